"""All-gather in one step: every rank sends what it has to all, each word with a flag beside it.

One crossing of the link, twice the bytes: for small tensors. Any bits may be data, so a word can't
say of itself that it has arrived.

Shapes: W group size.
"""

# ruff: noqa: N803, PLR0913
# mypy: disallow-untyped-decorators=False

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra import cuda

from .launch import KernelLauncher
from .mailbox import (
    MOST_BLOCKS,
    TURN_BYTES,
    Mailboxes,
    advance,
    check_vectors,
    empty_slots,
    most_part,
    most_vectors,
    slot_bytes,
    split,
)
from .ptx import load_vectors, poll_vectors, store_vectors
from .vectors import VECTOR_BYTES

__all__ = ["all_gather_push", "most_bytes"]

_MOST_BLOCKS = tl.constexpr(MOST_BLOCKS)
_TURN_BYTES = tl.constexpr(TURN_BYTES)
_WARPS = (2,)
_MAX_BLOCKS = MOST_BLOCKS


@triton.jit(do_not_specialize=[
    "turns", "x", "output", "base", "stride", "rank", "num_vectors", "part",
])  # fmt: skip
def _all_gather_push_kernel(
    turns: tl.tensor, x: tl.int64, output: tl.int64, base: tl.int64, stride: tl.int64,
    rank: tl.int32, num_vectors: tl.int32, part: tl.int32,
    W: tl.constexpr, SLOT_BYTES: tl.constexpr, THREADS: tl.constexpr, OVERLAPS: tl.constexpr,
) -> None:  # fmt: skip
    """`part` vectors a block. Slot r of a mailbox is for what rank r sends.

    Eight bytes arrive at once: a word, and a flag that isn't `EMPTY`.
    """
    block = tl.program_id(0)
    start = block * part
    end = tl.minimum(start + part, num_vectors)
    flag = tl.zeros((THREADS,), tl.int32)
    if OVERLAPS:
        cuda.gdc_wait()  # until then, all memory belongs to the kernels ahead
        cuda.gdc_launch_dependents()
    turn = tl.load(turns + block)
    box = base + turn * _TURN_BYTES + block * (W * SLOT_BYTES)
    for first in range(start, end, THREADS):
        vector = first + tl.arange(0, THREADS)
        active = vector < end
        a, b, c, d = load_vectors(x + vector.to(tl.int64) * 16, active)
        to = box + rank * SLOT_BYTES + (vector - start) * 32
        for step in tl.static_range(1, W):  # ranks begin with different peers
            peer = (rank + step) % W
            store_vectors(to + peer * stride, a, flag, b, flag, active)
            store_vectors(to + peer * stride + 16, c, flag, d, flag, active)
    for first in range(start, end, THREADS):
        vector = first + tl.arange(0, THREADS)
        active = vector < end
        a, b, c, d = load_vectors(x + vector.to(tl.int64) * 16, active)
        at = box + rank * stride + (vector - start) * 32
        low = poll_vectors(at, active, rank, a, flag, b, flag, W, SLOT_BYTES, (1, 3))
        high = poll_vectors(at + 16, active, rank, c, flag, d, flag, W, SLOT_BYTES, (1, 3))
        empty_slots(at, active, rank, W, SLOT_BYTES)
        empty_slots(at + 16, active, rank, W, SLOT_BYTES)
        for owner in tl.static_range(W):
            to = output + (vector + owner * num_vectors.to(tl.int64)) * 16
            store_vectors(to, low[4 * owner], low[4 * owner + 2], high[4 * owner],
                          high[4 * owner + 2], active)  # fmt: skip
    advance(turns, turn + 1, _MOST_BLOCKS)


_launcher = KernelLauncher(_all_gather_push_kernel)


def most_bytes(world_size: int) -> int:
    """The most that a rank may have."""
    most = most_vectors(world_size, max_blocks=_MAX_BLOCKS, vector_bytes=2 * VECTOR_BYTES)
    return most * VECTOR_BYTES


def all_gather_push(x: torch.Tensor, output: torch.Tensor, boxes: Mailboxes) -> None:
    """`output` becomes all ranks' `x`, one after another, bit for bit.

    Args:
        x: any dtype, contiguous, whole vectors, at most `most_bytes(W)`.
        output: W times as much, contiguous; `x` may be this rank's part of it, else lies in other
            memory.
        boxes: the group's.

    Collective. Asynchronous, on the current stream of the current device, which is x's. Calls with
    the same mailboxes come in the same order on all ranks, and one after another on the GPU. May
    be captured in a CUDA graph.

    Raises:
        ArgumentError: a tensor doesn't fit; nothing was launched.
    """
    w = boxes.world_size
    check_vectors("all_gather_push", x, output, most_bytes(w), output_shares=w, adds=False)
    num_vectors = x.nbytes // VECTOR_BYTES
    room = most_part(w, max_blocks=_MAX_BLOCKS, vector_bytes=2 * VECTOR_BYTES)
    grid = split(num_vectors, _WARPS, _MAX_BLOCKS, room)
    _launcher.launch(
        grid.num_blocks,
        (boxes.turns, x.data_ptr(), output.data_ptr(), boxes.base, boxes.stride, boxes.rank,
         num_vectors, grid.part),
        (w, slot_bytes(w, _MAX_BLOCKS), grid.num_warps * 32, boxes.overlaps),
        types=(),
        device=x.device,
        num_warps=grid.num_warps,
        launch_pdl=boxes.overlaps,
    )  # fmt: skip
