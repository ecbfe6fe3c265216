"""torch's own all-reduces on its symmetric memory, to compare with."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.distributed._symmetric_memory as symm_mem

from ..group import GroupCoordinator

__all__ = ["torch_symmetric_ways"]

# What they are made for; beyond, they are no match.
_MOST_BYTES = {"one-shot": 4 << 20, "two-shot": 64 << 20}

_DTYPES = (torch.bfloat16, torch.float32)

_Call = tuple[Callable[[], object], torch.Tensor, torch.Tensor]


def torch_symmetric_ways(
    op: str, group: GroupCoordinator, num_bytes: int, dtype: torch.dtype
) -> dict[str, _Call]:
    """By name: a call, its input and its output. Collective, as memory is exchanged."""
    if op != "all_reduce" or dtype not in _DTYPES or num_bytes > max(_MOST_BYTES.values()):
        return {}
    name = group.device_group.group_name
    x = symm_mem.empty(num_bytes // dtype.itemsize, dtype=dtype, device=group.device)
    symm_mem.rendezvous(x, name)
    x.zero_()
    output = torch.zeros_like(x)
    calls: dict[str, _Call] = {}
    if num_bytes <= _MOST_BYTES["one-shot"]:
        one_shot = partial(torch.ops.symm_mem.one_shot_all_reduce_out, x, "sum", name, output)
        calls["torch symm_mem one-shot"] = (one_shot, x, output)
    two_shot = partial(torch.ops.symm_mem.two_shot_all_reduce_, x, "sum", name)
    calls["torch symm_mem two-shot"] = (two_shot, x, x)
    return calls
