"""Taking nested values apart into a picklable description and their tensors, and back.

Used to send such values: the description as one object, then each tensor by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["Description", "join_tensors", "split_tensors"]


@dataclass(frozen=True)
class _TensorSpec:
    shape: tuple[int, ...]
    dtype: torch.dtype
    on_cpu: bool


@dataclass(frozen=True)
class _Slot:
    """Marks the place of the i-th tensor."""

    index: int


@dataclass(frozen=True)
class Description:
    """A nested value without its tensors, and what those look like."""

    structure: Any
    specs: tuple[_TensorSpec, ...]

    def empty_tensors(self, device: torch.device) -> list[torch.Tensor]:
        """Uninitialized tensors as described: on CPU, or on the receiver's `device`."""
        return [
            torch.empty(spec.shape, dtype=spec.dtype, device="cpu" if spec.on_cpu else device)
            for spec in self.specs
        ]


def split_tensors(value: Any) -> tuple[Description, list[torch.Tensor]]:
    """The description of `value`, and its tensors in order of appearance.

    Looks into dicts, lists and tuples, to any depth; other values are part of the description.
    """
    tensors: list[torch.Tensor] = []

    def describe(part: Any) -> Any:
        if isinstance(part, torch.Tensor):
            tensors.append(part)
            return _Slot(len(tensors) - 1)
        return _map_children(describe, part)

    structure = describe(value)
    specs = (_TensorSpec(tuple(t.shape), t.dtype, t.device.type == "cpu") for t in tensors)
    return Description(structure, tuple(specs)), tensors


def join_tensors(description: Description, tensors: Sequence[torch.Tensor]) -> Any:
    """The inverse of `split_tensors`."""

    def restore(part: Any) -> Any:
        return tensors[part.index] if isinstance(part, _Slot) else _map_children(restore, part)

    return restore(description.structure)


def _map_children(function: Callable[[Any], Any], part: Any) -> Any:
    if isinstance(part, dict):
        return {key: function(child) for key, child in part.items()}
    if isinstance(part, tuple) and hasattr(part, "_fields"):  # a NamedTuple
        return type(part)(*map(function, part))
    if isinstance(part, list | tuple):
        return type(part)(map(function, part))
    return part
