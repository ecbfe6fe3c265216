"""Flags that the blocks of a kernel set on other ranks: one area a rank, at rest between kernels.

Block b of a rank meets block b of each peer, once before the kernel's work and once after it. A
flag is 0 whenever its writer sets it, although only its reader clears it: a rank sets its opening
flag on a peer after it has seen the peer's closing flag of the call before, and the peer had
cleared its opening flags by then. It sets its closing flag after it has seen the peer's opening
flag of this call, and the peer had cleared its closing flags in the call before. So flags need no
counter, and a launch may be replayed by a CUDA graph.

Shapes: W group size, B blocks.
"""

# ruff: noqa: N803
# mypy: disallow-untyped-decorators=False

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

__all__ = ["MAX_BLOCKS", "PeerTensors", "flags_of", "signal_bytes"]

_FLAG_BYTES = 4
# What groups make signal areas for: near one block for each multiprocessor of an H200.
MAX_BLOCKS = 128


@dataclass(frozen=True, eq=False)
class PeerTensors:
    """What kernels need that write to the group's symmetric tensors.

    Attributes:
        signals: int64 [W] on the device: the address of each rank's flags (`signal_bytes` of
            `MAX_BLOCKS`), as this rank reaches it.
        stride: bytes from a place in one rank's symmetric memory to the same in the next one's.
        rank: this one's, in the group.
        world_size: W.
    """

    signals: torch.Tensor
    stride: int
    rank: int
    world_size: int


@triton.jit
def flags_of(signals: tl.tensor, rank: tl.tensor, world_size: tl.tensor,
           THREADS: tl.constexpr) -> Any:  # fmt: skip
    """Addresses of block b's opening flags, one peer a thread: those that it sets in block b's row
    of every rank, those that it waits for in its own, and which threads have one.

    Its closing flags are a row of W flags further on.
    """
    thread = tl.arange(0, THREADS)  # one peer a thread, so that all are polled at the same time
    has_peer = thread < world_size
    row = tl.program_id(0) * 2 * world_size
    theirs = tl.load(signals + thread, mask=has_peer, other=0) + (row + rank) * 4
    own = tl.load(signals + rank) + (row + thread) * 4
    return theirs, own, has_peer


def signal_bytes(world_size: int, max_blocks: int) -> int:
    """Size of a rank's signal area for `push_rows` with at most `max_blocks` blocks.

    The area is uint32 [B, 2, W]: by block, opening or closing, and the rank that sets the flag.
    All of it must be 0 on all ranks before the first launch, and is 0 again after each.
    """
    return max_blocks * 2 * world_size * _FLAG_BYTES
