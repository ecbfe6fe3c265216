"""Reduce-scatter in one step: every rank sends each share to its owner, who adds up.

One crossing of the link, no byte more than is needed. The owner keeps the sum, or stores it into
all ranks' outputs, which makes it an all-reduce (`two_shot_direct`).

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

from .flags import MAX_BLOCKS, PeerTensors, flags_of
from .launch import KernelLauncher
from .mailbox import (
    DTYPES,
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
from .ptx import load_vectors, poll_vectors, set_flag, store_vectors, wait_and_clear_flag
from .vectors import VECTOR_BYTES, filled, sum_vectors

__all__ = ["MOST_BYTES", "push_and_add", "reduce_scatter_push"]

_MOST_BLOCKS = tl.constexpr(MOST_BLOCKS)
_NUM_TURNS = tl.constexpr(NUM_TURNS)
_TURN_BYTES = tl.constexpr(TURN_BYTES)
# Vectors of each share in a chunk, one a thread.
_LEAST_CHUNK = 128
_MOST_CHUNK = 512
_MAX_BLOCKS = MAX_BLOCKS
MOST_BYTES = 2**31 * VECTOR_BYTES - 1  # vectors are counted in int32


@triton.jit(do_not_specialize=[
    "turns", "signals", "x", "output", "base", "stride", "rank", "num_vectors", "share",
    "num_chunks",
])  # fmt: skip
def _push_and_add_kernel(
    turns: tl.tensor, signals: tl.tensor, x: tl.int64, output: tl.int64, base: tl.int64,
    stride: tl.int64, rank: tl.int32, num_vectors: tl.int32, share: tl.int32, num_chunks: tl.int32,
    W: tl.constexpr, DTYPE: tl.constexpr, CHUNK: tl.constexpr, SLOT_BYTES: tl.constexpr,
    TO_ALL: tl.constexpr, OVERLAPS: tl.constexpr,
) -> None:  # fmt: skip
    """The sum of share r of all ranks' `x`, on rank r.

    Slot r of a mailbox is for what rank r sends. Of each slot, a thread has to do with one vector.
    Rounds are as described in mailbox.py.

    `TO_ALL`, sums go to all ranks' outputs, of which `output` is rank 0's. Then blocks have flags.
    Opening: what peers' streams did before this kernel, comes before all that a block stores to
    their outputs. Closing: all that block b of the peers has stored, comes before this one's end.
    An output may be the input: what a sum is stored over has been sent, or it couldn't be in it.
    """
    block = tl.program_id(0)
    num_blocks = tl.num_programs(0)
    in_chunk = tl.arange(0, CHUNK)
    first = rank * share
    end = tl.minimum(first + share, num_vectors)
    if OVERLAPS:
        cuda.gdc_wait()  # until then, all memory belongs to the kernels ahead
        cuda.gdc_launch_dependents()
    turn = tl.load(turns + block)
    if TO_ALL:
        their_flags, own_flags, has_peer = flags_of(signals, rank, W, CHUNK)
        set_flag(their_flags, has_peer, False)
    own_part = base + block * (W * SLOT_BYTES) + in_chunk * 16
    num_rounds = (num_chunks - block + num_blocks - 1) // num_blocks + 1
    for number in range(num_rounds):
        begin_round(number, in_chunk)
        chunk = block + number * num_blocks
        if chunk < num_chunks:
            to = own_part + (turn + number) % _NUM_TURNS * _TURN_BYTES + rank * SLOT_BYTES
            in_share = chunk * CHUNK + in_chunk
            for step in tl.static_range(1, W):  # ranks begin with different peers
                peer = (rank + step) % W
                vector = peer * share + in_share
                active = (in_share < share) & (vector < num_vectors)
                a, b, c, d = load_vectors(x + vector.to(tl.int64) * 16, active)
                a, b, c, d = filled(a), filled(b), filled(c), filled(d)
                store_vectors(to + peer * stride, a, b, c, d, active)
        if number > 0:
            vector = first + (chunk - num_blocks) * CHUNK + in_chunk
            active = vector < end
            at = own_part + (turn + number + _NUM_TURNS - 1) % _NUM_TURNS * _TURN_BYTES
            at += rank * stride
            a, b, c, d = load_vectors(x + vector.to(tl.int64) * 16, active)
            a, b, c, d = filled(a), filled(b), filled(c), filled(d)
            words = poll_vectors(at, active, rank, a, b, c, d, W, SLOT_BYTES, (0, 1, 2, 3))
            empty_slots(at, active, rank, W, SLOT_BYTES)
            a, b, c, d = sum_vectors(words, W, DTYPE)
            if TO_ALL:
                if number == 1:
                    wait_and_clear_flag(own_flags, has_peer, False)
                    tl.debug_barrier()  # the flags come before all stores of the block
                to = output + vector.to(tl.int64) * 16
                for step in tl.static_range(1, W + 1):
                    peer = (rank + step) % W
                    store_vectors(to + peer * stride, a, b, c, d, active)
            else:
                store_vectors(output + (vector - first).to(tl.int64) * 16, a, b, c, d, active)
    if TO_ALL:
        tl.debug_barrier()  # all stores of the block come before its flags
        set_flag(their_flags + W * 4, has_peer, True)
        wait_and_clear_flag(own_flags + W * 4, has_peer, False)
    advance(turns, turn + tl.cdiv(num_chunks, num_blocks), _MOST_BLOCKS)


_launcher = KernelLauncher(_push_and_add_kernel)


def reduce_scatter_push(x: torch.Tensor, output: torch.Tensor, boxes: Mailboxes) -> None:
    """`output` becomes this rank's share of the sum of all ranks' `x`.

    In fp32, from the first rank to the last, rounded once.

    Args:
        x: bf16, fp16 or fp32, contiguous, W equal shares of whole vectors.
        output: a share, contiguous; this rank's share of `x`, or other memory.
        boxes: the group's.

    Collective. Asynchronous, on the current stream of the current device, which is x's. Calls with
    the same mailboxes come in the same order on all ranks, and one after another on the GPU. May
    be captured in a CUDA graph.

    Raises:
        ArgumentError: a tensor doesn't fit; nothing was launched.
    """
    w = boxes.world_size
    check_vectors("reduce_scatter_push", x, output, MOST_BYTES, input_shares=w)
    push_and_add(x, output.data_ptr(), boxes)


def push_and_add(
    x: torch.Tensor, output: int, boxes: Mailboxes, peers: PeerTensors | None = None
) -> None:
    """Launches the kernel, for vectors that have been checked.

    Args:
        x: in W shares, of which the last ones may be shorter.
        output: address of this rank's sum; with `peers`, of rank 0's whole output.
        boxes: the group's.
        peers: the group's, if the sums go to all ranks' outputs.
    """
    w = boxes.world_size
    num_vectors = x.nbytes // VECTOR_BYTES
    share = -(-num_vectors // w)
    room = slot_bytes(w, _MAX_BLOCKS, TURN_BYTES)
    chunk = _chunk(share, room)
    num_chunks = -(-share // chunk)
    signals = boxes.turns if peers is None else peers.signals
    _launcher.launch(
        max(1, min(num_chunks, _MAX_BLOCKS)),
        (boxes.turns, signals, x.data_ptr(), output, boxes.base, boxes.stride, boxes.rank,
         num_vectors, share, num_chunks),
        (w, DTYPES[x.dtype], chunk, room, peers is not None, boxes.overlaps),
        types=(signals.dtype,),
        device=x.device,
        num_warps=chunk // 32,
        launch_pdl=boxes.overlaps,
    )  # fmt: skip


@functools.cache
def _chunk(share: int, room: int) -> int:
    """As few threads a block as take the share in one round, or else as many as there can be."""
    most = min(_MOST_CHUNK, room // VECTOR_BYTES)
    chunk = _LEAST_CHUNK
    while chunk * _MAX_BLOCKS < share and 2 * chunk <= most:
        chunk *= 2
    return chunk
