"""All-reduce, residual and RMSNorm in one kernel: every rank adds up a part of each row.

Two crossings of the link, 2 (W - 1) / W times the bytes: for many tokens.

Shapes: W group size, T tokens, H hidden size.
"""

# ruff: noqa: N803, PLR0913, RUF005
# mypy: disallow-untyped-decorators=False

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import cuda

from ..errors import ArgumentError
from .launch import KernelLauncher
from .mailbox import (
    DTYPES,
    HALF_BYTES,
    MOST_BLOCKS,
    NUM_TURNS,
    TURN_BYTES,
    Mailboxes,
    advance,
    begin_round,
    empty_slots,
    slot_bytes,
)
from .ptx import poll_vectors, store_vectors
from .rms_norm import NormedRows, load_row, norm_row
from .vectors import VECTOR_BYTES, filled, sum_vectors

__all__ = ["most_row_bytes", "two_shot_rms_norm"]

_HALF_BYTES = tl.constexpr(HALF_BYTES)
_MOST_BLOCKS = tl.constexpr(MOST_BLOCKS)
_NUM_TURNS = tl.constexpr(NUM_TURNS)
_TURN_BYTES = tl.constexpr(TURN_BYTES)
_BLOCKS = (256, 128, 64)


@triton.jit(do_not_specialize=[
    "turns", "x", "weight", "residual", "normed", "new_residual", "base", "stride", "rank",
    "num_rows", "eps", "weight_bias",
])  # fmt: skip
def _two_shot_rms_norm_kernel(
    turns: tl.tensor, x: tl.int64, weight: tl.int64, residual: tl.int64, normed: tl.int64,
    new_residual: tl.int64, base: tl.int64, stride: tl.int64,
    rank: tl.int32, num_rows: tl.int32, eps: tl.float32, weight_bias: tl.float32,
    W: tl.constexpr, DTYPE: tl.constexpr, ROW_VECTORS: tl.constexpr, ROW_ELEMENTS: tl.constexpr,
    THREADS: tl.constexpr, PARTS: tl.constexpr, SHARE: tl.constexpr, SLOT_BYTES: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, OVERLAPS: tl.constexpr,
) -> None:  # fmt: skip
    """Rounds and slots as in `two_shot_push`, where a row is a chunk of W shares of SHARE vectors.

    A vector is sent, added up and collected by the same thread of every rank.
    """
    block = tl.program_id(0)
    num_blocks = tl.num_programs(0)
    if OVERLAPS:
        cuda.gdc_wait()  # until then, all memory belongs to the kernels ahead
        cuda.gdc_launch_dependents()
    turn = tl.load(turns + block)
    own_part = base + block * (W * SLOT_BYTES)
    num_rounds = (num_rows - block + num_blocks - 1) // num_blocks + 2
    for number in range(num_rounds):
        begin_round(number, tl.arange(0, THREADS))
        row = block + number * num_blocks
        if row < num_rows:
            slots = own_part + (turn + number) % _NUM_TURNS * _TURN_BYTES
            words = load_row(x + row.to(tl.int64) * (ROW_VECTORS * 16), ROW_VECTORS, THREADS,
                             PARTS)  # fmt: skip
            for part in tl.static_range(PARTS):
                vector = part * THREADS + tl.arange(0, THREADS)
                owner = vector // SHARE
                to = slots + rank * SLOT_BYTES + owner * stride + (vector - owner * SHARE) * 16
                store_vectors(to, filled(words[4 * part]), filled(words[4 * part + 1]),
                              filled(words[4 * part + 2]), filled(words[4 * part + 3]),
                              (vector < ROW_VECTORS) & (owner != rank))  # fmt: skip
        row -= num_blocks
        if (row >= 0) & (row < num_rows):
            slots = own_part + (turn + number + _NUM_TURNS - 1) % _NUM_TURNS * _TURN_BYTES
            words = load_row(x + row.to(tl.int64) * (ROW_VECTORS * 16), ROW_VECTORS, THREADS,
                             PARTS)  # fmt: skip
            for part in tl.static_range(PARTS):
                vector = part * THREADS + tl.arange(0, THREADS)
                in_share = vector - rank * SHARE
                active = (vector < ROW_VECTORS) & (in_share >= 0) & (in_share < SHARE)
                at = slots + rank * stride + in_share * 16
                each = poll_vectors(at, active, rank, filled(words[4 * part]),
                                    filled(words[4 * part + 1]), filled(words[4 * part + 2]),
                                    filled(words[4 * part + 3]), W, SLOT_BYTES,
                                    (0, 1, 2, 3))  # fmt: skip
                empty_slots(at, active, rank, W, SLOT_BYTES)
                a, b, c, d = sum_vectors(each, W, DTYPE)
                a, b, c, d = filled(a), filled(b), filled(c), filled(d)
                to = slots + rank * SLOT_BYTES + in_share * 16 + _HALF_BYTES
                for step in tl.static_range(1, W + 1):
                    store_vectors(to + (rank + step) % W * stride, a, b, c, d, active)
        row -= num_blocks
        if row >= 0:
            slots = own_part + (turn + number + _NUM_TURNS - 2) % _NUM_TURNS * _TURN_BYTES
            at = row.to(tl.int64) * (ROW_VECTORS * 16)
            old = ()
            if HAS_RESIDUAL:
                old = load_row(residual + at, ROW_VECTORS, THREADS, PARTS)
            weights = load_row(weight, ROW_VECTORS, THREADS, PARTS)
            zero = tl.zeros((THREADS,), tl.int32)
            sums = ()
            for part in tl.static_range(PARTS):
                vector = part * THREADS + tl.arange(0, THREADS)
                owner = vector // SHARE
                slot = slots + rank * stride + owner * SLOT_BYTES + _HALF_BYTES
                slot += (vector - owner * SHARE) * 16
                active = vector < ROW_VECTORS
                a, b, c, d = poll_vectors(slot, active, -1, zero, zero, zero, zero, 1, SLOT_BYTES,
                                          (0, 1, 2, 3))  # fmt: skip
                empty_slots(slot, active, -1, 1, SLOT_BYTES)
                sums = sums + (a, b, c, d)  # type: ignore[assignment]
            norm_row(sums, old, weights, new_residual + at, normed + at, eps, weight_bias,
                     DTYPE, ROW_VECTORS, ROW_ELEMENTS, THREADS, PARTS, HAS_RESIDUAL)  # fmt: skip
    advance(turns, turn + tl.cdiv(num_rows, num_blocks), _MOST_BLOCKS)


_launcher = KernelLauncher(_two_shot_rms_norm_kernel)


def most_row_bytes(world_size: int) -> int:
    """The size of the largest row that fits."""
    return slot_bytes(world_size, _BLOCKS[-1]) * world_size


def two_shot_rms_norm(rows: NormedRows, boxes: Mailboxes) -> None:
    """As `one_shot_rms_norm`, with the same bits, for any number of rows.

    Raises:
        ArgumentError: a tensor doesn't fit; nothing was launched.
    """
    rows.check("two_shot_rms_norm")
    w, num_rows = boxes.world_size, rows.x.shape[0]
    threads, share = rows.threads, -(-rows.row_vectors // w)
    if share * VECTOR_BYTES > slot_bytes(w, _BLOCKS[-1]):
        requirement = f"of rows of at most {most_row_bytes(w)} bytes"
        raise ArgumentError("x", requirement, list(rows.x.shape), call="two_shot_rms_norm")
    max_blocks = next(blocks for blocks in _BLOCKS if share * VECTOR_BYTES <= slot_bytes(w, blocks))
    _launcher.launch(
        max(1, min(num_rows, max_blocks)),
        (boxes.turns, *rows.addresses(), boxes.base, boxes.stride, boxes.rank, num_rows,
         rows.eps, rows.weight_bias),
        (w, DTYPES[rows.x.dtype], rows.row_vectors, rows.x.shape[1], threads,
         -(-rows.row_vectors // threads), share, slot_bytes(w, max_blocks),
         rows.residual is not None, boxes.overlaps),
        types=(),
        device=rows.x.device,
        num_warps=threads // 32,
        launch_pdl=boxes.overlaps,
    )  # fmt: skip
