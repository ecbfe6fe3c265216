"""All-reduce, residual and RMSNorm in one kernel: every rank sends all rows to all.

One crossing of the link, W - 1 times the bytes: for few tokens.

Shapes: W group size, T tokens, H hidden size.
"""

# ruff: noqa: N803, PLR0913
# mypy: disallow-untyped-decorators=False

from __future__ import annotations

import functools

import triton
import triton.language as tl
from triton.language.extra import cuda

from ..errors import ArgumentError
from .launch import KernelLauncher
from .mailbox import (
    DTYPES,
    HALF_BYTES,
    MOST_BLOCKS,
    TURN_BYTES,
    Mailboxes,
    advance,
    empty_slots,
    slot_bytes,
)
from .ptx import load_vectors, poll_vectors, store_vectors
from .rms_norm import (
    NormedRows,
    add_residual,
    load_share,
    scale_of,
    share_vectors,
    shares_of,
    store_scaled,
    store_share,
)
from .vectors import filled, sum_vectors

__all__ = ["most_tokens", "one_shot_rms_norm"]

_MOST_BLOCKS = tl.constexpr(MOST_BLOCKS)
_TURN_BYTES = tl.constexpr(TURN_BYTES)
_HALF_BYTES = tl.constexpr(HALF_BYTES)
_BLOCKS = (128, 64, 32, 16)


@triton.jit(do_not_specialize=[
    "turns", "x", "weight", "residual", "normed", "new_residual", "base", "stride", "rank",
    "num_rows", "eps", "weight_bias",
])  # fmt: skip
def _one_shot_rms_norm_kernel(
    turns: tl.tensor, x: tl.int64, weight: tl.int64, residual: tl.int64, normed: tl.int64,
    new_residual: tl.int64, base: tl.int64, stride: tl.int64,
    rank: tl.int32, num_rows: tl.int32, eps: tl.float32, weight_bias: tl.float32,
    W: tl.constexpr, DTYPE: tl.constexpr, ROW_VECTORS: tl.constexpr, ROW_ELEMENTS: tl.constexpr,
    SHARE: tl.constexpr, THREADS: tl.constexpr, PARTS: tl.constexpr, SLOT_BYTES: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, OVERLAPS: tl.constexpr,
) -> None:  # fmt: skip
    """A row is dealt out to W blocks, a share to each: one alone would move its bytes too slowly.

    Slot r of a block's mailbox is for what rank r sends, in the first half of a turn. In the second
    half of this rank's own, slot s is for the sum of share s's squares, from the block that has it.
    All blocks are in the same turn.
    """
    share = tl.program_id(0) % W
    first_row = tl.program_id(0) // W
    num_at_once = tl.num_programs(0) // W
    if OVERLAPS:
        cuda.gdc_wait()  # until then, all memory belongs to the kernels ahead
        cuda.gdc_launch_dependents()
    turn = tl.load(turns + tl.program_id(0))
    row_box = base + turn * _TURN_BYTES + first_row * (W * W * SLOT_BYTES)
    box = row_box + share * (W * SLOT_BYTES)
    num_own = (num_rows - first_row + num_at_once - 1) // num_at_once
    thread = tl.arange(0, THREADS)
    for number in range(num_own):
        row = first_row + number * num_at_once
        at = x + row.to(tl.int64) * (ROW_VECTORS * 16)
        to = box + rank * SLOT_BYTES + number * (SHARE * 16)
        for part in tl.static_range(PARTS):
            vector, active = share_vectors(share, part, SHARE, ROW_VECTORS, THREADS)
            a, b, c, d = load_vectors(at + vector * 16, active)
            a, b, c, d = filled(a), filled(b), filled(c), filled(d)
            for step in tl.static_range(1, W):  # ranks begin with different peers
                peer = (rank + step) % W
                store_vectors(to + peer * stride + (part * THREADS + thread) * 16, a, b, c, d,
                              active)  # fmt: skip
    for number in range(num_own):
        row = first_row + number * num_at_once
        at = row.to(tl.int64) * (ROW_VECTORS * 16)
        own = load_share(x + at, share, PARTS, SHARE, ROW_VECTORS, THREADS)
        old = ()
        if HAS_RESIDUAL:
            old = load_share(residual + at, share, PARTS, SHARE, ROW_VECTORS, THREADS)
        weights = load_share(weight, share, PARTS, SHARE, ROW_VECTORS, THREADS)
        slot = box + rank * stride + number * (SHARE * 16)
        sums = ()
        for part in tl.static_range(PARTS):
            _, active = share_vectors(share, part, SHARE, ROW_VECTORS, THREADS)
            place = slot + (part * THREADS + thread) * 16
            a, b = filled(own[4 * part]), filled(own[4 * part + 1])
            c, d = filled(own[4 * part + 2]), filled(own[4 * part + 3])
            words = poll_vectors(place, active, rank, a, b, c, d, W, SLOT_BYTES, (0, 1, 2, 3))
            sums = sums + sum_vectors(words, W, DTYPE)
        lows, highs, squares = add_residual(sums, old, share, DTYPE, PARTS, SHARE, ROW_VECTORS,
                                            THREADS, HAS_RESIDUAL)  # fmt: skip
        # The sum of the share's squares to the blocks of all shares; all else can wait.
        inboxes = row_box + rank * stride + _HALF_BYTES + number * (SHARE * 16)
        total = filled(tl.sum(squares, axis=0).to(tl.int32, bitcast=True))
        to = inboxes + thread * (W * SLOT_BYTES) + share * SLOT_BYTES
        store_vectors(to, total, 0, 0, 0, thread < W)
        for part in tl.static_range(PARTS):
            _, active = share_vectors(share, part, SHARE, ROW_VECTORS, THREADS)
            empty_slots(slot + (part * THREADS + thread) * 16, active, rank, W, SLOT_BYTES)
        if HAS_RESIDUAL:
            store_share(lows, highs, new_residual + at, share, DTYPE, PARTS, SHARE, ROW_VECTORS,
                        THREADS)  # fmt: skip
        # Theirs from them, one a thread: more threads that poll slow down what they wait for.
        place = inboxes + share * (W * SLOT_BYTES) + thread * SLOT_BYTES
        total, _, _, _ = poll_vectors(place, thread < W, -1, 0, 0, 0, 0, 1, SLOT_BYTES,
                                      (0, 1, 2, 3))  # fmt: skip
        scale = scale_of(tl.sum(total.to(tl.float32, bitcast=True), axis=0), eps, ROW_ELEMENTS)
        store_scaled(lows, highs, weights, scale, weight_bias, normed + at, share, DTYPE, PARTS,
                     SHARE, ROW_VECTORS, THREADS)  # fmt: skip
        empty_slots(place, thread < W, -1, 1, SLOT_BYTES)
    advance(turns, turn + 1, _MOST_BLOCKS)


_launcher = KernelLauncher(_one_shot_rms_norm_kernel)


def most_tokens(row_vectors: int, world_size: int) -> int:
    """The most rows that fit; 0 if not even one does."""
    return max(_room(row_vectors, world_size, blocks) for blocks in _BLOCKS)


@functools.cache
def _room(row_vectors: int, world_size: int, max_blocks: int) -> int:
    """How many rows fit, with room for so many blocks."""
    share_bytes = shares_of(row_vectors, world_size).num_bytes
    return max_blocks // world_size * (slot_bytes(world_size, max_blocks) // share_bytes)


def one_shot_rms_norm(rows: NormedRows, boxes: Mailboxes) -> None:
    """``h = sum of x over the ranks, rounded to its dtype, + residual``; ``normed = h /
    sqrt(mean(h * h) + eps) * (weight + weight_bias)``; ``new_residual = h``.

    All in fp32, sums from the first rank to the last; results are rounded once. The same bits on
    every rank, and for a token whatever the others are.

    Args:
        rows: at most `most_tokens` of them.
        boxes: the group's.

    Collective. Asynchronous, on the current stream of the current device, which is x's. Calls with
    the same mailboxes come in the same order on all ranks, and one after another on the GPU. May
    be captured in a CUDA graph.

    Raises:
        ArgumentError: a tensor doesn't fit; nothing was launched.
    """
    rows.check("one_shot_rms_norm")
    w, num_rows, row_vectors = boxes.world_size, rows.x.shape[0], rows.row_vectors
    if num_rows > most_tokens(row_vectors, w):
        requirement = f"of at most {most_tokens(row_vectors, w)} tokens"
        raise ArgumentError("x", requirement, list(rows.x.shape), call="one_shot_rms_norm")
    max_blocks = next(each for each in _BLOCKS if num_rows <= _room(row_vectors, w, each))
    shares = shares_of(row_vectors, w)
    _launcher.launch(
        w * max(1, min(num_rows, max_blocks // w)),
        (boxes.turns, *rows.addresses(), boxes.base, boxes.stride, boxes.rank, num_rows,
         rows.eps, rows.weight_bias),
        (w, DTYPES[rows.x.dtype], row_vectors, rows.x.shape[1], shares.vectors, shares.threads,
         shares.parts, slot_bytes(w, max_blocks), rows.residual is not None,
         boxes.overlaps),
        types=(),
        device=rows.x.device,
        num_warps=shares.threads // 32,
        launch_pdl=boxes.overlaps,
    )  # fmt: skip
