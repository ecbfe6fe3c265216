"""Memory in which the ranks of a group leave vectors for each other, without any other signal.

A mailbox is empty, every bit set, but for what has arrived and hasn't been taken yet. A rank stores
vectors into its peers' mailboxes; each polls its own until none of the words that it needs is
empty, takes them, and empties their places. So data is its own signal, and a message takes one
crossing of the link.

A call takes one turn or more, and each turn has an eighth of the mailbox: the places of turn t are
those of turn t - 8. In two halves where kernels send twice, the second time what they have made of
what came first. Blocks divide the room among them as suits the kernel.

Places have to be empty before they are written to again, and seen to be by whoever writes. A kernel
begins when the one before has ended on this rank, and has got all that its peers sent: so they had
begun that one, and ended the one before it, with all places empty that it had used.

A kernel that takes several turns does so in rounds. In round c a block sends chunk c, then adds up
chunk c - 1, which has had time to arrive, and empties its places. Every fifth round begins with a
fence: whoever gets what is sent afterwards knows that the places are empty that were emptied
before. So what does a rank know when it sends chunk c, to the places of chunk c - 8? It has chunk
c - 2 of every peer, sent in the peer's round c - 2. The latest fence up to then, or the peer's
kernel's beginning, was in its round c - 6 at the earliest, after it had emptied chunk c - 8.
(Rounds of the kernel before count as if they were this one's: its end is later than any fence in
it.) A fence costs as much as a round's stores take to arrive, nearly 1 µs on an H200, which is why
it isn't in every round.

Shapes: W group size, B = `MOST_BLOCKS`.
"""

# ruff: noqa: N803
# mypy: disallow-untyped-decorators=False

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from ..errors import ArgumentError
from .ptx import EMPTY, fence, store_vectors
from .vectors import VECTOR_BYTES

__all__ = [
    "DTYPES",
    "HALF_BYTES",
    "LEAST_CAPABILITY",
    "MOST_BLOCKS",
    "MOST_RANKS",
    "NUM_TURNS",
    "OVERLAPS_SINCE",
    "TURN_BYTES",
    "Mailboxes",
    "Split",
    "advance",
    "begin_round",
    "check_vectors",
    "empty_slots",
    "mailbox_bytes",
    "most_part",
    "most_vectors",
    "slot_bytes",
    "split",
]

LEAST_CAPABILITY = (8, 0)  # what Triton supports
OVERLAPS_SINCE = (9, 0)  # capability, of programmatic dependent launch
MOST_RANKS = 8  # of a group: for more, slots would be too small, and kernels need more registers
MOST_BLOCKS = 256
NUM_TURNS = 8
HALF_BYTES = 2 << 20
TURN_BYTES = 2 * HALF_BYTES
_NUM_TURNS = tl.constexpr(NUM_TURNS)
_ROUNDS_PER_FENCE = tl.constexpr(NUM_TURNS - 3)
_GRAIN = 8  # vectors, a cache line, that stay with one block
# What can be added up.
DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


@dataclass(frozen=True, eq=False)
class Mailboxes:
    """The mailboxes of a group, as one rank reaches them.

    Attributes:
        base: the address of rank 0's. All of its `mailbox_bytes()` are set before the first use,
            and again after each.
        stride: bytes from one rank's to the next one's.
        turns: int32 [B] on the device: the number of the next turn, for each block. The same on all
            ranks before the first use.
        rank: this one's, in the group.
        world_size: W.
        overlaps: whether the GPU can launch a kernel before the one ahead has ended (sm_90).
    """

    base: int
    stride: int
    turns: torch.Tensor
    rank: int
    world_size: int
    overlaps: bool


def mailbox_bytes() -> int:
    """Size of a rank's mailbox."""
    return NUM_TURNS * TURN_BYTES


def slot_bytes(num_slots: int, max_blocks: int, room: int = HALF_BYTES) -> int:
    """The size of each of `num_slots` equal slots of one of `max_blocks` blocks in a half, or
    another part of a turn."""
    return room // max_blocks // num_slots // VECTOR_BYTES * VECTOR_BYTES


def check_vectors(
    call: str,
    x: torch.Tensor,
    output: torch.Tensor,
    most_bytes: int,
    *,
    input_shares: int = 1,
    output_shares: int = 1,
    adds: bool = True,
) -> None:
    """Checks what a kernel reads and writes: the same dtype, in shares of whole vectors.

    Raises:
        ArgumentError: a tensor doesn't fit.
    """
    share_bytes = x.nbytes // input_shares
    fits = (
        x.dtype == output.dtype
        and (x.dtype in DTYPES or not adds)
        and x.is_contiguous()
        and output.is_contiguous()
        and (x.data_ptr() | output.data_ptr() | share_bytes) % VECTOR_BYTES == 0
        and share_bytes * input_shares == x.nbytes <= most_bytes
        and share_bytes * output_shares == output.nbytes
    )
    if fits:
        return
    raise ArgumentError(
        "x and output",
        f"contiguous, of one dtype{', bf16, fp16 or fp32' if adds else ''}, in {input_shares} and "
        f"{output_shares} equal shares of whole vectors of {VECTOR_BYTES} bytes, x at most "
        f"{most_bytes} bytes",
        " and ".join(
            f"{each.dtype} {list(each.shape)} with strides {each.stride()} at {each.data_ptr():#x}"
            for each in (x, output)
        ),
        call=call,
    )


@dataclass(frozen=True)
class Split:
    """How vectors are dealt out: `part` of them, the last ones fewer, to each block."""

    num_blocks: int
    num_warps: int
    part: int


def most_vectors(num_slots: int, *, max_blocks: int, vector_bytes: int = VECTOR_BYTES) -> int:
    """How many vectors of that size in the mailbox fit into slots, of which a block has a part."""
    return max_blocks * most_part(num_slots, max_blocks=max_blocks, vector_bytes=vector_bytes)


def most_part(num_slots: int, *, max_blocks: int, vector_bytes: int = VECTOR_BYTES) -> int:
    """How many of them are a block's."""
    return slot_bytes(num_slots, max_blocks) // vector_bytes // _GRAIN * _GRAIN


@functools.cache
def split(num_vectors: int, warps: tuple[int, ...], max_blocks: int, most_part: int) -> Split:
    """As few warps a block, of those in `warps`, as give every vector a thread of its own.

    Args:
        num_vectors: at most `max_blocks * most_part`.
        most_part: how many of a block's vectors there is room for, a multiple of 8.
    """
    num_warps = next((each for each in warps if max_blocks * each * 32 >= num_vectors), warps[-1])
    num_blocks = max(1, min(max_blocks, -(-num_vectors // min(num_warps * 32, most_part))))
    part = -(-num_vectors // num_blocks)
    part += -part % _GRAIN
    return Split(max(1, -(-num_vectors // part)) if part else 1, num_warps, part)


@triton.jit
def begin_round(number: tl.tensor, thread: tl.tensor) -> None:
    """To be called by all of a block's threads at the beginning of every round."""
    if (number > 0) & (number % _ROUNDS_PER_FENCE.value == 0):
        # Warps that come to the fence at different times take 5 % longer for large sums.
        tl.debug_barrier()
        fence(thread)


@triton.jit
def advance(turns: tl.tensor, turn: tl.tensor, MOST_BLOCKS: tl.constexpr) -> None:
    """At the end of a block: `turn` comes next, for the block and for those that there aren't."""
    tl.debug_barrier()  # all threads have read what it was
    block = tl.program_id(0) + tl.arange(0, MOST_BLOCKS) * tl.num_programs(0)
    tl.store(turns + block, turn % _NUM_TURNS, mask=block < MOST_BLOCKS)


@triton.jit
def empty_slots(address: tl.tensor, active: tl.tensor, own: tl.tensor, NUM_SLOTS: tl.constexpr,
                SLOT_BYTES: tl.constexpr) -> None:  # fmt: skip
    """Empties the vectors at `address`, int64, in each slot but `own`, where `active`."""
    empty = tl.full(address.shape, EMPTY, tl.int32)
    for slot in tl.static_range(NUM_SLOTS):
        store_vectors(address + slot * SLOT_BYTES, empty, empty, empty, empty,
                      active & (slot != own))  # fmt: skip
