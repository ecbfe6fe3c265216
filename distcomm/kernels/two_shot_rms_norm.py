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
from .ptx import load_vectors, poll_vectors, store_vectors
from .rms_norm import (
    NormedRows,
    add_residual,
    add_shares,
    load_share,
    scale_of,
    share_vectors,
    shares_of,
    store_scaled,
    store_share,
    sum_each,
)
from .vectors import filled, sum_vectors

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
    SHARE: tl.constexpr, THREADS: tl.constexpr, PARTS: tl.constexpr, SLOT_BYTES: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, OVERLAPS: tl.constexpr,
) -> None:  # fmt: skip
    """Rounds and slots as in `two_shot_push`, where a chunk is a row.

    A thread has to do with the same vectors of every share, and with no others, on all ranks.
    """
    block = tl.program_id(0)
    num_blocks = tl.num_programs(0)
    if OVERLAPS:
        cuda.gdc_wait()  # until then, all memory belongs to the kernels ahead
        cuda.gdc_launch_dependents()
    turn = tl.load(turns + block)
    own_part = base + block * (W * SLOT_BYTES)
    thread = tl.arange(0, THREADS)
    num_rounds = (num_rows - block + num_blocks - 1) // num_blocks + 2
    for number in range(num_rounds):
        begin_round(number, thread)
        row = block + number * num_blocks
        if row < num_rows:
            at = x + row.to(tl.int64) * (ROW_VECTORS * 16)
            to = own_part + (turn + number) % _NUM_TURNS * _TURN_BYTES + rank * SLOT_BYTES
            for step in tl.static_range(1, W):  # ranks begin with different peers
                peer = (rank + step) % W
                for part in tl.static_range(PARTS):
                    vector, active = share_vectors(peer, part, SHARE, ROW_VECTORS, THREADS)
                    a, b, c, d = load_vectors(at + vector * 16, active)
                    in_share = part * THREADS + thread
                    store_vectors(to + peer * stride + in_share * 16, filled(a), filled(b),
                                  filled(c), filled(d), in_share < SHARE)  # fmt: skip
        row -= num_blocks
        if (row >= 0) & (row < num_rows):
            slots = own_part + (turn + number + _NUM_TURNS - 1) % _NUM_TURNS * _TURN_BYTES
            own = load_share(x + row.to(tl.int64) * (ROW_VECTORS * 16), rank, PARTS, SHARE,
                             ROW_VECTORS, THREADS)  # fmt: skip
            for part in tl.static_range(PARTS):
                in_share = part * THREADS + thread
                sent = in_share < SHARE  # those beyond the row's end are zeros
                at = slots + rank * stride + in_share * 16
                each = poll_vectors(at, sent, rank, filled(own[4 * part]),
                                    filled(own[4 * part + 1]), filled(own[4 * part + 2]),
                                    filled(own[4 * part + 3]), W, SLOT_BYTES,
                                    (0, 1, 2, 3))  # fmt: skip
                empty_slots(at, sent, rank, W, SLOT_BYTES)
                a, b, c, d = sum_vectors(each, W, DTYPE)
                a, b, c, d = filled(a), filled(b), filled(c), filled(d)
                to = slots + rank * SLOT_BYTES + in_share * 16 + _HALF_BYTES
                for step in tl.static_range(1, W + 1):
                    store_vectors(to + (rank + step) % W * stride, a, b, c, d, sent)
        row -= num_blocks
        if row >= 0:
            slots = own_part + (turn + number + _NUM_TURNS - 2) % _NUM_TURNS * _TURN_BYTES
            slots += rank * stride + _HALF_BYTES
            at = row.to(tl.int64) * (ROW_VECTORS * 16)
            olds = ()
            weights = ()
            for share in tl.static_range(W):
                if HAS_RESIDUAL:
                    old = load_share(residual + at, share, PARTS, SHARE, ROW_VECTORS, THREADS)
                    olds = olds + (old,)  # type: ignore[assignment]
                of_share = load_share(weight, share, PARTS, SHARE, ROW_VECTORS, THREADS)
                weights = weights + (of_share,)  # type: ignore[assignment]
            words = ()
            for part in tl.static_range(PARTS):
                in_share = part * THREADS + thread
                place = slots + in_share * 16
                sent = in_share < SHARE
                words = words + poll_vectors(place, sent, -1, 0, 0, 0, 0, W, SLOT_BYTES,
                                             (0, 1, 2, 3))  # fmt: skip
                empty_slots(place, sent, -1, W, SLOT_BYTES)
            lows = ()
            highs = ()
            squares = ()
            for share in tl.static_range(W):
                sums = ()
                for part in tl.static_range(PARTS):
                    for word in tl.static_range(4):
                        sums = sums + (words[4 * (part * W + share) + word],)  # type: ignore[assignment]
                old = ()
                if HAS_RESIDUAL:
                    old = olds[share]
                low, high, square = add_residual(sums, old, share, DTYPE, PARTS, SHARE,
                                                 ROW_VECTORS, THREADS, HAS_RESIDUAL)  # fmt: skip
                lows = lows + (low,)  # type: ignore[assignment]
                highs = highs + (high,)  # type: ignore[assignment]
                squares = squares + (square,)  # type: ignore[assignment]
                if HAS_RESIDUAL:
                    store_share(low, high, new_residual + at, share, DTYPE, PARTS, SHARE,
                                ROW_VECTORS, THREADS)  # fmt: skip
            total = add_shares(sum_each(squares, W, THREADS), W)
            scale = scale_of(total, eps, ROW_ELEMENTS)
            for share in tl.static_range(W):
                store_scaled(lows[share], highs[share], weights[share], scale, weight_bias,
                             normed + at, share, DTYPE, PARTS, SHARE, ROW_VECTORS,
                             THREADS)  # fmt: skip
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
    shares = shares_of(rows.row_vectors, w)
    if shares.num_bytes > slot_bytes(w, _BLOCKS[-1]):
        requirement = f"of rows of at most {most_row_bytes(w)} bytes"
        raise ArgumentError("x", requirement, list(rows.x.shape), call="two_shot_rms_norm")
    max_blocks = next(blocks for blocks in _BLOCKS if shares.num_bytes <= slot_bytes(w, blocks))
    _launcher.launch(
        max(1, min(num_rows, max_blocks)),
        (boxes.turns, *rows.addresses(), boxes.base, boxes.stride, boxes.rank, num_rows,
         rows.eps, rows.weight_bias),
        (w, DTYPES[rows.x.dtype], rows.row_vectors, rows.x.shape[1], shares.vectors,
         shares.threads, shares.parts, slot_bytes(w, max_blocks), rows.residual is not None,
         boxes.overlaps),
        types=(),
        device=rows.x.device,
        num_warps=shares.threads // 32,
        launch_pdl=boxes.overlaps,
    )  # fmt: skip
