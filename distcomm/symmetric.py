"""Symmetric memory, as functions: what a rank allocates at the same place as its peers.

>>> with use_symmetric_memory(tp):
...     x = torch.empty(4096, device="cuda")   # every rank of tp does the same
>>> y = tp.all_reduce(x, out=x)                # NCCL reads the peers' memory directly
"""

from __future__ import annotations

import torch

from .current import get_parallel_state, is_initialized
from .group import GroupCoordinator
from .memory import InactiveContext, MemoryContext

__all__ = ["is_symmetric", "peer_pointers", "suspend_symmetric_memory", "use_symmetric_memory"]


def use_symmetric_memory(group: GroupCoordinator, disabled: bool = False) -> MemoryContext:
    """`GroupCoordinator.symmetric_memory`, with the switch the other way round."""
    return group.symmetric_memory(enabled=not disabled)


def suspend_symmetric_memory() -> MemoryContext:
    """A ``with`` block whose new tensors are ordinary memory, whatever contexts it is in."""
    return (
        get_parallel_state().suspend_symmetric_memory() if is_initialized() else InactiveContext()
    )


def is_symmetric(tensor: torch.Tensor, group: GroupCoordinator) -> bool:
    """`GroupCoordinator.is_symmetric`."""
    return group.is_symmetric(tensor)


def peer_pointers(tensor: torch.Tensor, group: GroupCoordinator) -> list[int | None]:
    """`GroupCoordinator.peer_pointers`."""
    return group.peer_pointers(tensor)
