"""All-reduce in one step: every rank sends all it has to all, and each adds up for itself.

One crossing of the link, W - 1 times the bytes: for small tensors.

Shapes: W group size.
"""

# ruff: noqa: N803, PLR0913
# mypy: disallow-untyped-decorators=False

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra import cuda

from .launch import KernelLauncher
from .mailbox import (
    DTYPES,
    MOST_BLOCKS,
    TURN_BYTES,
    Mailboxes,
    Split,
    advance,
    check_vectors,
    empty_slots,
    most_part,
    most_vectors,
    slot_bytes,
    split,
)
from .ptx import load_vectors, poll_vectors, store_vectors
from .vectors import VECTOR_BYTES, filled, sum_vectors

__all__ = ["most_bytes", "one_shot_push"]

_MOST_BLOCKS = tl.constexpr(MOST_BLOCKS)
_TURN_BYTES = tl.constexpr(TURN_BYTES)
_WARPS = (4, 8)
_MAX_BLOCKS = 128


@triton.jit(do_not_specialize=[
    "turns", "x", "output", "base", "stride", "rank", "num_vectors", "part",
])  # fmt: skip
def _one_shot_push_kernel(
    turns: tl.tensor, x: tl.int64, output: tl.int64, base: tl.int64, stride: tl.int64,
    rank: tl.int32, num_vectors: tl.int32, part: tl.int32,
    W: tl.constexpr, DTYPE: tl.constexpr, SLOT_BYTES: tl.constexpr, THREADS: tl.constexpr,
    OVERLAPS: tl.constexpr,
) -> None:  # fmt: skip
    """`part` vectors a block. Slot r of a mailbox is for what rank r sends."""
    block = tl.program_id(0)
    start = block * part
    end = tl.minimum(start + part, num_vectors)
    if OVERLAPS:
        cuda.gdc_wait()  # until then, all memory belongs to the kernels ahead
        cuda.gdc_launch_dependents()
    turn = tl.load(turns + block)
    box = base + turn * _TURN_BYTES + block * (W * SLOT_BYTES)
    for first in range(start, end, THREADS):
        vector = first + tl.arange(0, THREADS)
        active = vector < end
        a, b, c, d = load_vectors(x + vector.to(tl.int64) * 16, active)
        a, b, c, d = filled(a), filled(b), filled(c), filled(d)
        to = box + rank * SLOT_BYTES + (vector - start) * 16
        for step in tl.static_range(1, W):  # ranks begin with different peers
            peer = (rank + step) % W
            store_vectors(to + peer * stride, a, b, c, d, active)
    for first in range(start, end, THREADS):
        vector = first + tl.arange(0, THREADS)
        active = vector < end
        a, b, c, d = load_vectors(x + vector.to(tl.int64) * 16, active)
        a, b, c, d = filled(a), filled(b), filled(c), filled(d)
        at = box + rank * stride + (vector - start) * 16
        words = poll_vectors(at, active, rank, a, b, c, d, W, SLOT_BYTES, (0, 1, 2, 3))
        empty_slots(at, active, rank, W, SLOT_BYTES)
        a, b, c, d = sum_vectors(words, W, DTYPE)
        store_vectors(output + vector.to(tl.int64) * 16, a, b, c, d, active)
    advance(turns, turn + 1, _MOST_BLOCKS)


_launcher = KernelLauncher(_one_shot_push_kernel)


@functools.cache
def most_bytes(world_size: int) -> int:
    """The size of the largest tensor that fits."""
    return most_vectors(world_size, max_blocks=_MAX_BLOCKS) * VECTOR_BYTES


def one_shot_push(x: torch.Tensor, output: torch.Tensor, boxes: Mailboxes) -> None:
    """`output` becomes the sum of all ranks' `x`.

    In fp32, from the first rank to the last, rounded once: the same bits on every rank.

    Args:
        x: bf16, fp16 or fp32, contiguous, whole vectors, at most `most_bytes(W)`.
        output: like `x`; `x` itself, or other memory.
        boxes: the group's.

    Collective. Asynchronous, on the current stream of the current device, which is x's. Calls with
    the same mailboxes come in the same order on all ranks, and one after another on the GPU. May
    be captured in a CUDA graph.

    Raises:
        ArgumentError: a tensor doesn't fit; nothing was launched.
    """
    w = boxes.world_size
    check_vectors("one_shot_push", x, output, most_bytes(w))
    num_vectors = x.nbytes // VECTOR_BYTES
    grid, constants = _launch_of(num_vectors, x.dtype, w, boxes.overlaps)
    _launcher.launch(
        grid.num_blocks,
        (boxes.turns, x.data_ptr(), output.data_ptr(), boxes.base, boxes.stride, boxes.rank,
         num_vectors, grid.part),
        constants,
        types=(),
        device=x.device,
        num_warps=grid.num_warps,
        launch_pdl=boxes.overlaps,
    )  # fmt: skip


@functools.cache
def _launch_of(
    num_vectors: int, dtype: torch.dtype, world_size: int, overlaps: bool
) -> tuple[Split, tuple[Any, ...]]:
    """The grid, and the kernel's constants."""
    room = most_part(world_size, max_blocks=_MAX_BLOCKS)
    grid = split(num_vectors, _WARPS, _MAX_BLOCKS, room)
    slot = slot_bytes(world_size, _MAX_BLOCKS)
    return grid, (world_size, DTYPES[dtype], slot, grid.num_warps * 32, overlaps)
