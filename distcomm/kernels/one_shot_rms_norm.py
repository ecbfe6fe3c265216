"""All-reduce, residual and RMSNorm in one kernel: every rank sends all rows to all.

One crossing of the link, W - 1 times the bytes: for few tokens.

Shapes: W group size, T tokens, H hidden size.
"""

# ruff: noqa: N803, N806, PLR0913
# mypy: disallow-untyped-decorators=False

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import cuda

from ..errors import ArgumentError
from .launch import KernelLauncher
from .mailbox import (
    DTYPES,
    MOST_BLOCKS,
    TURN_BYTES,
    Mailboxes,
    advance,
    empty_slots,
    slot_bytes,
)
from .ptx import load_vectors, poll_vectors, store_vectors
from .rms_norm import NormedRows, load_row, norm_row
from .vectors import VECTOR_BYTES, filled, sum_vectors

__all__ = ["most_tokens", "one_shot_rms_norm"]

_MOST_BLOCKS = tl.constexpr(MOST_BLOCKS)
_TURN_BYTES = tl.constexpr(TURN_BYTES)
_BLOCKS = (128, 64, 32, 16)
# One multiprocessor of an H200 stores 36 GB/s to peers, much less than the links carry.
_MOST_SENDERS = 4
_LEAST_SENT = 64  # vectors
_ENOUGH_BLOCKS = 128


@triton.jit(do_not_specialize=[
    "turns", "x", "weight", "residual", "normed", "new_residual", "base", "stride", "rank",
    "num_rows", "eps", "weight_bias",
])  # fmt: skip
def _one_shot_rms_norm_kernel(
    turns: tl.tensor, x: tl.int64, weight: tl.int64, residual: tl.int64, normed: tl.int64,
    new_residual: tl.int64, base: tl.int64, stride: tl.int64,
    rank: tl.int32, num_rows: tl.int32, eps: tl.float32, weight_bias: tl.float32,
    W: tl.constexpr, DTYPE: tl.constexpr, ROW_VECTORS: tl.constexpr, ROW_ELEMENTS: tl.constexpr,
    THREADS: tl.constexpr, PARTS: tl.constexpr, SENDERS: tl.constexpr, SLOT_BYTES: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, OVERLAPS: tl.constexpr,
) -> None:  # fmt: skip
    """Every row is sent by SENDERS blocks, a part by each, of which one gets what the peers send.

    Slot r of a mailbox is for what rank r sends. Blocks that wait come last, so that those that
    they wait for have begun.
    """
    num_getters = tl.num_programs(0) // SENDERS
    block = tl.program_id(0) % num_getters
    sender = tl.program_id(0) // num_getters
    if OVERLAPS:
        cuda.gdc_wait()  # until then, all memory belongs to the kernels ahead
        cuda.gdc_launch_dependents()
    turn = tl.load(turns + tl.program_id(0))
    box = base + turn * _TURN_BYTES + block * (W * SLOT_BYTES)
    num_own = (num_rows - block + num_getters - 1) // num_getters
    SENT: tl.constexpr = (ROW_VECTORS + SENDERS - 1) // SENDERS
    for number in range(num_own):
        row = block + number * num_getters
        at = x + row.to(tl.int64) * (ROW_VECTORS * 16)
        to = box + rank * SLOT_BYTES + number * (ROW_VECTORS * 16)
        for part in tl.static_range((SENT + THREADS - 1) // THREADS):
            in_part = part * THREADS + tl.arange(0, THREADS)
            vector = sender * SENT + in_part
            active = (in_part < SENT) & (vector < ROW_VECTORS)
            a, b, c, d = load_vectors(at + vector * 16, active)
            a, b, c, d = filled(a), filled(b), filled(c), filled(d)
            for step in tl.static_range(1, W):  # ranks begin with different peers
                peer = (rank + step) % W
                store_vectors(to + peer * stride + vector * 16, a, b, c, d, active)
    if sender == SENDERS - 1:
        for number in range(num_own):
            row = block + number * num_getters
            at = row.to(tl.int64) * (ROW_VECTORS * 16)
            own = load_row(x + at, ROW_VECTORS, THREADS, PARTS)
            old = ()
            if HAS_RESIDUAL:
                old = load_row(residual + at, ROW_VECTORS, THREADS, PARTS)
            weights = load_row(weight, ROW_VECTORS, THREADS, PARTS)
            slot = box + rank * stride + number * (ROW_VECTORS * 16)
            sums = ()
            for part in tl.static_range(PARTS):
                vector = part * THREADS + tl.arange(0, THREADS)
                active = vector < ROW_VECTORS
                a, b = filled(own[4 * part]), filled(own[4 * part + 1])
                c, d = filled(own[4 * part + 2]), filled(own[4 * part + 3])
                words = poll_vectors(slot + vector * 16, active, rank, a, b, c, d, W, SLOT_BYTES,
                                     (0, 1, 2, 3))  # fmt: skip
                empty_slots(slot + vector * 16, active, rank, W, SLOT_BYTES)
                sums = sums + sum_vectors(words, W, DTYPE)
            norm_row(sums, old, weights, new_residual + at, normed + at, eps, weight_bias,
                     DTYPE, ROW_VECTORS, ROW_ELEMENTS, THREADS, PARTS, HAS_RESIDUAL)  # fmt: skip
    advance(turns, turn + 1, _MOST_BLOCKS)


_launcher = KernelLauncher(_one_shot_rms_norm_kernel)


def most_tokens(row_vectors: int, world_size: int) -> int:
    """The most rows that fit; 0 if not even one does."""
    return max(
        blocks * (slot_bytes(world_size, blocks) // (row_vectors * VECTOR_BYTES))
        for blocks in _BLOCKS
    )


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
    max_blocks = next(
        blocks
        for blocks in _BLOCKS
        if num_rows <= blocks * (slot_bytes(w, blocks) // (row_vectors * VECTOR_BYTES))
    )
    threads, getters = rows.threads, max(1, min(num_rows, max_blocks))
    senders = _senders(getters, row_vectors)
    _launcher.launch(
        senders * getters,
        (boxes.turns, *rows.addresses(), boxes.base, boxes.stride, boxes.rank, num_rows,
         rows.eps, rows.weight_bias),
        (w, DTYPES[rows.x.dtype], row_vectors, rows.x.shape[1], threads,
         -(-row_vectors // threads), senders, slot_bytes(w, max_blocks),
         rows.residual is not None, boxes.overlaps),
        types=(),
        device=rows.x.device,
        num_warps=threads // 32,
        launch_pdl=boxes.overlaps,
    )  # fmt: skip


def _senders(getters: int, row_vectors: int) -> int:
    """A power of two, so that few kernels are compiled."""
    senders = 1
    while (
        2 * senders <= _MOST_SENDERS
        and 2 * senders * getters <= _ENOUGH_BLOCKS
        and 2 * senders * _LEAST_SENT <= row_vectors
    ):
        senders *= 2
    return senders
