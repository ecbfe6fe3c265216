"""A backend whose calls someone looks at before they are made."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ..checks import materialized
from .base import Backend
from .forwarding import ForwardingBackend

__all__ = ["Observer", "ObservedBackend"]

# The call's name, those of its tensors that have the same size on all ranks, and whether NCCL may
# use them symmetrically, so that they must also be at the same place.
Observer = Callable[[str, tuple[torch.Tensor, ...], bool], None]


class ObservedBackend(ForwardingBackend):
    """Forwards to another backend, and tells an observer of each collective first.

    Outputs that the backend would make are made here, so that the observer sees them. Sending and
    receiving are no collectives, and not told.

    Args:
        backend: makes the calls.
        observe: told of each; what it raises, the call raises.
    """

    def __init__(self, backend: Backend, observe: Observer) -> None:
        super().__init__(backend)
        self._observe = observe

    def all_reduce(
        self, x: torch.Tensor, op: str = "sum", out: torch.Tensor | None = None
    ) -> torch.Tensor:
        x = materialized(x)
        if out is None:
            out = torch.empty_like(x)
        self._observe(f"all_reduce {op}", (x, out), True)
        return self._backend.all_reduce(x, op, out)

    def reduce(
        self, x: torch.Tensor, dst: int = 0, op: str = "sum", out: torch.Tensor | None = None
    ) -> torch.Tensor | None:
        self._observe(f"reduce {op} to {dst}", (x,), False)
        return self._backend.reduce(x, dst, op, out)

    def reduce_scatter_tensor(
        self, output: torch.Tensor, input: torch.Tensor, op: str = "sum"
    ) -> torch.Tensor:
        x = materialized(input)
        self._observe(f"reduce_scatter_tensor {op}", (x, output), True)
        return self._backend.reduce_scatter_tensor(output, x, op)

    def reduce_scatterv(
        self,
        x: torch.Tensor,
        sizes: Sequence[int],
        out: torch.Tensor | None = None,
        op: str = "sum",
    ) -> torch.Tensor:
        self._observe(f"reduce_scatterv {op}", (x,), False)
        return self._backend.reduce_scatterv(x, sizes, out, op)

    def all_gather_into_tensor(self, output: torch.Tensor, input: torch.Tensor) -> torch.Tensor:
        x = materialized(input)
        self._observe("all_gather_into_tensor", (x, output), True)
        return self._backend.all_gather_into_tensor(output, x)

    def all_gatherv(
        self, x: torch.Tensor, sizes: Sequence[int], out: torch.Tensor | None = None
    ) -> torch.Tensor:
        self._observe(f"all_gatherv {x.dtype}", (), False)
        return self._backend.all_gatherv(x, sizes, out)

    def all_to_all_single(
        self,
        output: torch.Tensor,
        input: torch.Tensor,
        output_splits: Sequence[int] | None = None,
        input_splits: Sequence[int] | None = None,
    ) -> torch.Tensor:
        self._observe(f"all_to_all_single {input.dtype}", (), False)
        return self._backend.all_to_all_single(output, input, output_splits, input_splits)

    def broadcast(self, x: torch.Tensor, src: int = 0) -> torch.Tensor:
        self._observe(f"broadcast from {src}", (x,), False)
        return self._backend.broadcast(x, src)

    def gather(
        self, x: torch.Tensor, dst: int = 0, out: torch.Tensor | None = None
    ) -> torch.Tensor | None:
        self._observe(f"gather to {dst}", (x,), False)
        return self._backend.gather(x, dst, out)
