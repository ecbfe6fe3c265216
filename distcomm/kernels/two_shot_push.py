"""All-reduce in two steps: every rank adds up one share of the tensor, and sends it to all.

Two crossings of the link, 2 (W - 1) / W times the bytes: for all but the smallest tensors.

Shapes: W group size.
"""

# ruff: noqa: N803, PLR0913
# mypy: disallow-untyped-decorators=False

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from triton.language.extra import cuda

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
    check_vectors,
    empty_slots,
    slot_bytes,
)
from .ptx import load_vectors, poll_vectors, store_vectors
from .vectors import VECTOR_BYTES, filled, sum_vectors

__all__ = ["two_shot_push"]

_MOST_BLOCKS = tl.constexpr(MOST_BLOCKS)
_NUM_TURNS = tl.constexpr(NUM_TURNS)
_HALF_BYTES = tl.constexpr(HALF_BYTES)
_TURN_BYTES = tl.constexpr(TURN_BYTES)
# Vectors of a chunk's share, one a thread. Larger ones use the links better; smaller ones occupy
# more SMs when there is little to do.
_LEAST_SHARE = 64
_MOST_SHARE = 256
_ENOUGH_CHUNKS = 64
_MAX_BLOCKS = MOST_BLOCKS
_MOST_BYTES = 2**31 * VECTOR_BYTES - 1  # vectors are counted in int32


@triton.jit
def _send_shares(x: tl.tensor, start: tl.tensor, end: tl.tensor, to: tl.tensor,
                stride: tl.tensor, rank: tl.tensor,
                W: tl.constexpr, SHARE: tl.constexpr, THREADS: tl.constexpr) -> None:  # fmt: skip
    """Each peer's share of the vectors from `start` to `end`, as it is, to that peer."""
    in_share = tl.arange(0, THREADS)
    for step in tl.static_range(1, W):  # ranks begin with different peers
        peer = (rank + step) % W
        vector = start + peer * SHARE + in_share
        active = (in_share < SHARE) & (vector < end)
        a, b, c, d = load_vectors(x + vector.to(tl.int64) * 16, active)
        a, b, c, d = filled(a), filled(b), filled(c), filled(d)
        store_vectors(to + peer * stride + in_share * 16, a, b, c, d, active)


@triton.jit
def _add_up_share(x: tl.tensor, start: tl.tensor, end: tl.tensor,
                 slots: tl.tensor, to: tl.tensor, own_to: tl.tensor,
                 stride: tl.tensor, rank: tl.tensor,
                 W: tl.constexpr, DTYPE: tl.constexpr, SHARE: tl.constexpr,
                 THREADS: tl.constexpr, SLOT_BYTES: tl.constexpr) -> None:  # fmt: skip
    """The sum of this rank's share, once it is there, to all peers, and on this rank `own_to`."""
    in_share = tl.arange(0, THREADS)
    vector = start + rank * SHARE + in_share
    active = (in_share < SHARE) & (vector < end)
    a, b, c, d = load_vectors(x + vector.to(tl.int64) * 16, active)
    a, b, c, d = filled(a), filled(b), filled(c), filled(d)
    at = slots + in_share * 16
    words = poll_vectors(at, active, rank, a, b, c, d, W, SLOT_BYTES, (0, 1, 2, 3))
    empty_slots(at, active, rank, W, SLOT_BYTES)
    a, b, c, d = sum_vectors(words, W, DTYPE)
    a, b, c, d = filled(a), filled(b), filled(c), filled(d)
    for step in tl.static_range(1, W):
        peer = (rank + step) % W
        store_vectors(to + peer * stride + in_share * 16, a, b, c, d, active)
    store_vectors(own_to + in_share * 16, a, b, c, d, active)


@triton.jit
def _collect(output: tl.tensor, start: tl.tensor, num_vectors: tl.tensor, slots: tl.tensor,
             rank: tl.tensor,
             W: tl.constexpr, SHARE: tl.constexpr, SLOT_BYTES: tl.constexpr) -> None:  # fmt: skip
    """The sums of the peers' shares of a chunk, once they are there."""
    in_share = tl.arange(0, SHARE)
    zero = tl.zeros((SHARE,), tl.int32)
    at = slots + in_share * 16
    if start + W * SHARE <= num_vectors:
        active = in_share < SHARE
        words = poll_vectors(at, active, rank, zero, zero, zero, zero, W, SLOT_BYTES,
                             (0, 1, 2, 3))  # fmt: skip
        empty_slots(at, active, rank, W, SLOT_BYTES)
        for owner in tl.static_range(W):
            to = output + (start + owner * SHARE + in_share).to(tl.int64) * 16
            store_vectors(to, words[4 * owner], words[4 * owner + 1], words[4 * owner + 2],
                          words[4 * owner + 3], active & (owner != rank))  # fmt: skip
    else:  # the end of the tensor: threads have more of some owners' shares than of others'
        for owner in tl.static_range(W):
            vector = start + owner * SHARE + in_share
            active = (vector < num_vectors) & (owner != rank)
            slot = at + owner * SLOT_BYTES
            a, b, c, d = poll_vectors(slot, active, -1, zero, zero, zero, zero, 1, SLOT_BYTES,
                                      (0, 1, 2, 3))  # fmt: skip
            empty_slots(slot, active, -1, 1, SLOT_BYTES)
            store_vectors(output + vector.to(tl.int64) * 16, a, b, c, d, active)


@triton.jit(do_not_specialize=[
    "turns", "x", "output", "base", "stride", "rank", "num_vectors", "num_chunks",
])  # fmt: skip
def _two_shot_push_kernel(
    turns: tl.tensor, x: tl.int64, output: tl.int64, base: tl.int64, stride: tl.int64,
    rank: tl.int32, num_vectors: tl.int32, num_chunks: tl.int32,
    W: tl.constexpr, DTYPE: tl.constexpr, SHARE: tl.constexpr, SLOT_BYTES: tl.constexpr,
    OVERLAPS: tl.constexpr,
) -> None:  # fmt: skip
    """A block's chunks, of W shares each, one after another, a turn for each.

    Slot r of a mailbox's first half is for what rank r sends to be added up, of its second half for
    what rank r has added up. A thread has to do with one vector of each slot, and with no other.

    Rounds are as described in mailbox.py, and in round c the sums of chunk c - 2 are collected, so
    that what is polled has had time to arrive. Sums of chunk c are sent in round c + 1, when chunk
    c has come from every peer, sent in its round c. Its latest fence up to then was in its round
    c - 4 at the earliest, after it had emptied the second half of chunk c - 7.
    """
    block = tl.program_id(0)
    num_blocks = tl.num_programs(0)
    if OVERLAPS:
        cuda.gdc_wait()  # until then, all memory belongs to the kernels ahead
        cuda.gdc_launch_dependents()
    turn = tl.load(turns + block)
    part = base + block * (W * SLOT_BYTES)
    num_rounds = (num_chunks - block + num_blocks - 1) // num_blocks + 2
    for number in range(num_rounds):
        begin_round(number, tl.arange(0, SHARE))
        chunk = block + number * num_blocks
        if chunk < num_chunks:
            slots = part + (turn + number) % _NUM_TURNS * _TURN_BYTES
            _send_shares(x, chunk * (W * SHARE), num_vectors, slots + rank * SLOT_BYTES, stride,
                        rank, W, SHARE, SHARE)  # fmt: skip
        chunk -= num_blocks
        if (chunk >= 0) & (chunk < num_chunks):
            slots = part + (turn + number + _NUM_TURNS - 1) % _NUM_TURNS * _TURN_BYTES
            start = chunk * (W * SHARE)
            own_to = output + (start + rank * SHARE).to(tl.int64) * 16
            _add_up_share(x, start, num_vectors, slots + rank * stride,
                         slots + rank * SLOT_BYTES + _HALF_BYTES, own_to, stride, rank,
                         W, DTYPE, SHARE, SHARE, SLOT_BYTES)  # fmt: skip
        chunk -= num_blocks
        if chunk >= 0:
            slots = part + (turn + number + _NUM_TURNS - 2) % _NUM_TURNS * _TURN_BYTES
            _collect(output, chunk * (W * SHARE), num_vectors,
                     slots + rank * stride + _HALF_BYTES, rank, W, SHARE,
                     SLOT_BYTES)  # fmt: skip
    advance(turns, turn + tl.cdiv(num_chunks, num_blocks), _MOST_BLOCKS)


_launcher = KernelLauncher(_two_shot_push_kernel)


def two_shot_push(x: torch.Tensor, output: torch.Tensor, boxes: Mailboxes) -> None:
    """`output` becomes the sum of all ranks' `x`.

    In fp32, from the first rank to the last, rounded once: the same bits on every rank.

    Args:
        x: bf16, fp16 or fp32, contiguous, whole vectors.
        output: like `x`; `x` itself, or other memory.
        boxes: the group's.

    Collective. Asynchronous, on the current stream of the current device, which is x's. Calls with
    the same mailboxes come in the same order on all ranks, and one after another on the GPU. May
    be captured in a CUDA graph.

    Raises:
        ArgumentError: a tensor doesn't fit; nothing was launched.
    """
    check_vectors("two_shot_push", x, output, _MOST_BYTES)
    w = boxes.world_size
    num_vectors = x.nbytes // VECTOR_BYTES
    share = _share(num_vectors, w)
    num_chunks = -(-num_vectors // (share * w))
    _launcher.launch(
        max(1, min(num_chunks, _MAX_BLOCKS)),
        (boxes.turns, x.data_ptr(), output.data_ptr(), boxes.base, boxes.stride, boxes.rank,
         num_vectors, num_chunks),
        (w, DTYPES[x.dtype], share, slot_bytes(w, _MAX_BLOCKS), boxes.overlaps),
        types=(),
        device=x.device,
        num_warps=share // 32,
        launch_pdl=boxes.overlaps,
    )  # fmt: skip


@functools.cache
def _share(num_vectors: int, world_size: int) -> int:
    """A power of two, as each of a block's threads has one vector of a share."""
    wanted = -(-num_vectors // (world_size * _ENOUGH_CHUNKS))
    most = min(_MOST_SHARE, slot_bytes(world_size, _MAX_BLOCKS) // VECTOR_BYTES)
    share = _LEAST_SHARE
    while share < wanted and 2 * share <= most:
        share *= 2
    return share
