"""Every rank stores its rows straight into their final places on all ranks, over NVLink.

Each local row is read once and written W times; nothing is padded, gathered or reordered after.

Shapes: W group size, N local rows (each rank has its own N), S slots, B blocks.
"""

# ruff: noqa: N803, N806, PLR0913
# mypy: disallow-untyped-decorators=False

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from ..errors import ArgumentError
from .flags import flags_of
from .launch import KernelLauncher
from .ptx import set_flag, wait_and_clear_flag

__all__ = ["PushedTensor", "push_rows"]

_NUM_WARPS = 8
_NUM_THREADS = _NUM_WARPS * 32
# 16 words a thread: enough bytes on their way to hide latency, and few enough for registers.
_TILE_WORDS = 16 * _NUM_THREADS
# Where that leaves blocks without a tile, they are smaller, so that all SMs have some work.
_LEAST_TILE_WORDS = 4 * _NUM_THREADS
# A warp's widest access is 64 words; longer stretches of a row save row addresses.
_BLOCK_WORDS = (64, 128, 256, 512)
_WORDS = {1: tl.int8, 2: tl.int16, 4: tl.int32, 8: tl.int64}


@triton.jit
def _load_tile(tile: tl.tensor, rows_to: tl.tensor, slots: tl.tensor, num_rows: tl.tensor,
               source: tl.tensor, source_pitch: tl.tensor,
               WORD: tl.constexpr, ALIGNMENT: tl.constexpr, ROW_WORDS: tl.constexpr,
               BLOCK_ROWS: tl.constexpr, BLOCK_WORDS: tl.constexpr) -> Any:  # fmt: skip
    """A tile's words, and the row of the outputs where each of its rows goes.

    Beyond the last tile there is nothing to load, and no row goes anywhere.
    """
    CHUNKS: tl.constexpr = (ROW_WORDS + BLOCK_WORDS - 1) // BLOCK_WORDS
    row = tile // CHUNKS * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    word = (tile % CHUNKS * BLOCK_WORDS + tl.arange(0, BLOCK_WORDS))[None, :]
    # Rows that will be skipped are read too: the load needn't wait for the row numbers.
    start = (source + row.to(tl.int64) * source_pitch).to(tl.pointer_type(WORD))
    # An address that was an integer has no alignment that Triton knows of.
    start = tl.multiple_of(start, ALIGNMENT)[:, None]
    mask = (row < num_rows)[:, None] & (word < ROW_WORDS)
    values = tl.load(start + word, mask=mask, eviction_policy="evict_first")
    to = tl.load(rows_to + row, mask=row < num_rows, other=-1).to(tl.int64)
    if slots is not None:
        to = tl.load(slots + to, mask=to >= 0, other=-1).to(tl.int64)
    return values, to


@triton.jit
def _push_tiles(rows_to: tl.tensor, slots: tl.tensor, num_rows: tl.tensor,
                rank: tl.tensor, world_size: tl.tensor, first_tile: tl.tensor,
                source: tl.tensor, source_pitch: tl.tensor,
                output: tl.tensor, output_pitch: tl.tensor, deltas: tl.tensor,
                own_flags: tl.tensor, has_peer: tl.tensor,
                WORD: tl.constexpr, ALIGNMENT: tl.constexpr, ROW_WORDS: tl.constexpr,
                BLOCK_ROWS: tl.constexpr, BLOCK_WORDS: tl.constexpr,
                OPENS: tl.constexpr) -> None:  # fmt: skip
    """Stores this block's tiles of BLOCK_ROWS x BLOCK_WORDS words to every rank.

    A tile is loaded while the one before is on its way, and the first while the peers' flags are.
    """
    CHUNKS: tl.constexpr = (ROW_WORDS + BLOCK_WORDS - 1) // BLOCK_WORDS
    num_tiles = tl.cdiv(num_rows, BLOCK_ROWS) * CHUNKS
    values, to = _load_tile(first_tile, rows_to, slots, num_rows, source, source_pitch,
                            WORD, ALIGNMENT, ROW_WORDS, BLOCK_ROWS, BLOCK_WORDS)  # fmt: skip
    # Ranks begin with different peers, and come to their own memory last.
    peer = (rank + 1) % world_size
    base = output
    if deltas is not None:
        base += tl.load(deltas + peer)
    if OPENS:
        wait_and_clear_flag(own_flags, has_peer, False)
        tl.debug_barrier()  # the flags come before all stores of the block
    for tile in range(first_tile, num_tiles, tl.num_programs(0)):
        word = (tile % CHUNKS * BLOCK_WORDS + tl.arange(0, BLOCK_WORDS))[None, :]
        mask = (to >= 0)[:, None] & (word < ROW_WORDS)
        to_offset = to * output_pitch
        for _ in range(world_size):
            start = (base + to_offset).to(tl.pointer_type(WORD))
            start = tl.multiple_of(start, ALIGNMENT)[:, None]
            tl.store(start + word, values, mask=mask)
            peer = tl.where(peer + 1 == world_size, 0, peer + 1)
            base = output
            if deltas is not None:
                base += tl.load(deltas + peer)
        values, to = _load_tile(tile + tl.num_programs(0), rows_to, slots, num_rows,
                                source, source_pitch,
                                WORD, ALIGNMENT, ROW_WORDS, BLOCK_ROWS, BLOCK_WORDS)  # fmt: skip


# Nothing about the values is compiled in but what the launcher says: a row count of 1, or an
# address that happens to be aligned, must not mean another compilation.
@triton.jit(do_not_specialize=[
    "rows_to", "slots", "signals", "num_rows", "rank", "world_size",
    "source_0", "source_pitch_0", "output_0", "output_pitch_0", "deltas_0",
    "source_1", "source_pitch_1", "output_1", "output_pitch_1", "deltas_1",
])  # fmt: skip
def _push_rows_kernel(
    rows_to: tl.tensor, slots: tl.tensor, signals: tl.tensor,
    num_rows: tl.int32, rank: tl.int32, world_size: tl.int32,
    source_0: tl.int64, source_pitch_0: tl.int64, output_0: tl.int64, output_pitch_0: tl.int64,
    deltas_0: tl.tensor,
    source_1: tl.int64, source_pitch_1: tl.int64, output_1: tl.int64, output_pitch_1: tl.int64,
    deltas_1: tl.tensor,
    WORD_0: tl.constexpr, ALIGNMENT_0: tl.constexpr, ROW_WORDS_0: tl.constexpr,
    BLOCK_ROWS_0: tl.constexpr, BLOCK_WORDS_0: tl.constexpr,
    WORD_1: tl.constexpr, ALIGNMENT_1: tl.constexpr, ROW_WORDS_1: tl.constexpr,
    BLOCK_ROWS_1: tl.constexpr, BLOCK_WORDS_1: tl.constexpr,
    OPENS: tl.constexpr, CLOSES: tl.constexpr, THREADS: tl.constexpr,
) -> None:  # fmt: skip
    """One tensor, or two (ROW_WORDS_1 > 0), to all ranks.

    Opening: what peers' streams did before this kernel, comes before all that a block stores.
    So a peer's output is written only after all that used it before has ended.
    Closing: all that block b of the peers wrote, comes before the end of this block. With all
    its blocks ended, a rank has all rows.
    """
    if OPENS or CLOSES:
        their_flags, own_flags, has_peer = flags_of(signals, rank, world_size, THREADS)
    else:
        their_flags, own_flags, has_peer = 0, 0, 0
    if OPENS:
        set_flag(their_flags, has_peer, False)
    block = tl.program_id(0)
    _push_tiles(rows_to, slots, num_rows, rank, world_size, block,
                source_0, source_pitch_0, output_0, output_pitch_0, deltas_0, own_flags, has_peer,
                WORD_0, ALIGNMENT_0, ROW_WORDS_0, BLOCK_ROWS_0, BLOCK_WORDS_0, OPENS)  # fmt: skip
    if ROW_WORDS_1 > 0:
        # Goes on with the blocks that got one tile less of the first tensor.
        chunks = (ROW_WORDS_0 + BLOCK_WORDS_0 - 1) // BLOCK_WORDS_0
        num_tiles = tl.cdiv(num_rows, BLOCK_ROWS_0) * chunks
        num_blocks = tl.num_programs(0)
        first_tile = (block + num_blocks - num_tiles % num_blocks) % num_blocks
        _push_tiles(rows_to, slots, num_rows, rank, world_size, first_tile,
                    source_1, source_pitch_1, output_1, output_pitch_1, deltas_1,
                    own_flags, has_peer,
                    WORD_1, ALIGNMENT_1, ROW_WORDS_1, BLOCK_ROWS_1, BLOCK_WORDS_1,
                    False)  # fmt: skip
    if CLOSES:
        tl.debug_barrier()  # all stores of the block come before its flags
        set_flag(their_flags + world_size * 4, has_peer, True)
        wait_and_clear_flag(own_flags + world_size * 4, has_peer, False)


_launcher = KernelLauncher(_push_rows_kernel)


@dataclass(frozen=True, eq=False)
class PushedTensor:
    """One tensor of rows to push: where it is read, and where every rank wants it.

    Attributes:
        source: address of this rank's first row.
        output: address of row 0 of this rank's own output.
        deltas: int64 [W] on the device, contiguous: rank p's output is at ``output + deltas[p]``,
            as this rank addresses it. None stands for zeros and is for a group of one.
        row_bytes: size of a row, whose bytes follow one another.
        source_pitch: bytes from one row of the source to the next.
        output_pitch: bytes from one row of an output to the next, the same on all ranks.
        delta_alignment: a power of two that divides every delta; the launcher can't look at them.
            The same place in symmetric memory is always a multiple of 4096 bytes apart.
    """

    source: int
    output: int
    deltas: torch.Tensor | None
    row_bytes: int
    source_pitch: int
    output_pitch: int
    delta_alignment: int = 16

    @property
    def alignment(self) -> int:
        """Bytes, a power of two up to 16, that divide every address of a row and its size."""
        pitches = (self.row_bytes, self.source_pitch, self.output_pitch)
        return math.gcd(16, self.source, self.output, *pitches, self.delta_alignment)


def push_rows(
    tensors: Sequence[PushedTensor],
    rows_to: torch.Tensor,
    *,
    slots: torch.Tensor | None,
    rank: int,
    world_size: int,
    signals: torch.Tensor | None,
    num_blocks: int,
) -> None:
    """Stores row i of this rank's sources as row ``rows_to[i]`` of every rank's outputs.

    With `slots`, as row ``slots[rows_to[i]]``. A row whose number is negative, in either table,
    is skipped. Rows that no rank writes, and bytes between rows, keep their values.

    Example: rank 0 holds the rows ``[10, 13]`` with ``rows_to = [0, 3]``, rank 1 the rows
    ``[11, 12]`` with ``rows_to = [1, 2]``. Afterwards the outputs on both ranks are
    ``[10, 11, 12, 13]``. With ``slots = [5, -1, 0, 2]`` on both ranks, outputs of six zeros
    become ``[12, 0, 13, 0, 0, 10]``.

    Args:
        tensors: any number, with the same N rows each; two share a launch.
        rows_to: int32 or int64 [N] on the device, contiguous.
        slots: int32 or int64 [S] on the device, contiguous; None for no slot table.
        rank: this rank in the group.
        world_size: W.
        signals: int64 [W] on the device, contiguous: the address of each rank's signal area of
            `signal_bytes(...)`, as this rank addresses it. None: nobody waits for anybody.
        num_blocks: B, thread blocks to use; the same on all ranks, and within `signals`.

    Collective if `signals` are given: all ranks call it with the same tensors and `num_blocks`
    in the same order, also those with N = 0. Asynchronous, on the current CUDA stream: what
    follows there finds the rows of all ranks in this rank's outputs. May be captured in a CUDA
    graph. Row numbers aren't checked, and which of two rows for one place wins is open.

    Raises:
        ArgumentError: a wrong table, row size, rank or number of blocks; nothing was launched.
    """
    for arguments, types, constants in _launches(
        tensors, rows_to, slots, rank, world_size, signals, num_blocks
    ):
        _launcher.launch(
            num_blocks,
            arguments,
            constants,
            types=types,
            device=rows_to.device,
            num_warps=_NUM_WARPS,
        )


def _launches(
    tensors: Sequence[PushedTensor],
    rows_to: torch.Tensor,
    slots: torch.Tensor | None,
    rank: int,
    world_size: int,
    signals: torch.Tensor | None,
    num_blocks: int,
) -> list[tuple[tuple[Any, ...], tuple[Any, ...], tuple[Any, ...]]]:
    """Of each kernel launch the arguments, checked, those of their types that are open, and the
    constants."""
    _check_table("rows_to", rows_to)
    if slots is not None:
        _check_table("slots", slots)
    if not 1 <= world_size <= _NUM_THREADS:
        raise ArgumentError("world_size", f"1 to {_NUM_THREADS}", world_size, call="push_rows")
    if not 0 <= rank < world_size:
        requirement = f"a rank in the group, 0 to {world_size - 1}"
        raise ArgumentError("rank", requirement, rank, call="push_rows")
    if num_blocks < 1:
        raise ArgumentError("num_blocks", "at least 1", num_blocks, call="push_rows")
    if signals is not None:
        _check_per_rank("signals", signals, world_size)
    for tensor in tensors:
        _check_tensor(tensor, world_size)
    num_rows = rows_to.shape[0]
    common = (rows_to, slots, signals, num_rows, rank, world_size)
    tables = rows_to.dtype, None if slots is None else slots.dtype
    launches = []
    for start in range(0, len(tensors), 2):
        first, second = tensors[start], tensors[start + 1] if start + 1 < len(tensors) else None
        opens, closes = start == 0, start + 2 >= len(tensors)
        addresses_0, shape_0 = _tensor_arguments(first, num_rows, num_blocks)
        addresses_1, shape_1 = _tensor_arguments(second, num_rows, num_blocks)
        meets = (signals is not None and opens, signals is not None and closes, _NUM_THREADS)
        deltas = addresses_0[-1], addresses_1[-1]
        types = (*tables, signals is None, deltas[0] is None, deltas[1] is None)
        arguments = common + addresses_0 + addresses_1
        launches.append((arguments, types, shape_0 + shape_1 + meets))
    return launches


def _tensor_arguments(
    tensor: PushedTensor | None, num_rows: int, num_blocks: int
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Kernel arguments and constants of a tensor of a launch; None if there is none."""
    if tensor is None:
        return (0, 0, 0, 0, None), (_WORDS[1], 1, 0, 1, 1)
    addresses = (
        tensor.source,
        tensor.source_pitch,
        tensor.output,
        tensor.output_pitch,
        tensor.deltas,
    )
    alignment = tensor.alignment
    num_words = num_rows * tensor.row_bytes // min(alignment, 8)
    tile_words = _TILE_WORDS
    while tile_words > _LEAST_TILE_WORDS and num_words < num_blocks * tile_words:
        tile_words //= 2
    return addresses, _tile_shape(alignment, tensor.row_bytes, tile_words)


@functools.cache
def _tile_shape(alignment: int, row_bytes: int, tile_words: int) -> tuple[Any, int, int, int, int]:
    """Word type, its known alignment, words in a row, and rows and words of a tile."""
    word_bytes = min(alignment, 8)  # at 16, a thread moves two words at once
    row_words = row_bytes // word_bytes
    if row_words <= _BLOCK_WORDS[0]:
        block_words = 1 << (row_words - 1).bit_length()
    else:
        # Least beyond the end of the row, then the longest.
        block_words = min(_BLOCK_WORDS, key=lambda words: (-row_words % words, -words))
    return _WORDS[word_bytes], alignment, row_words, tile_words // block_words, block_words


def _check_table(argument: str, table: torch.Tensor) -> None:
    if table.dtype not in (torch.int32, torch.int64) or table.dim() != 1:
        actual = f"{table.dtype} with shape {list(table.shape)}"
        raise ArgumentError(argument, "int32 or int64 of one dim", actual, call="push_rows")
    if not table.is_contiguous():
        raise ArgumentError(argument, "contiguous", f"stride {table.stride(0)}", call="push_rows")


def _check_per_rank(argument: str, table: torch.Tensor, world_size: int) -> None:
    if table.dtype != torch.int64 or table.shape != (world_size,) or not table.is_contiguous():
        actual = f"{table.dtype} with shape {list(table.shape)}, strides {table.stride()}"
        requirement = f"contiguous int64 with shape [{world_size}]"
        raise ArgumentError(argument, requirement, actual, call="push_rows")


def _check_tensor(tensor: PushedTensor, world_size: int) -> None:
    if tensor.deltas is not None:
        _check_per_rank("deltas", tensor.deltas, world_size)
    elif world_size > 1:
        raise ArgumentError("deltas", f"given in a group of {world_size}", None, call="push_rows")
    step = tensor.delta_alignment
    if step < 1 or step & (step - 1):
        raise ArgumentError("delta_alignment", "a power of two", step, call="push_rows")
    if tensor.row_bytes < 1:
        raise ArgumentError("row_bytes", "at least 1", tensor.row_bytes, call="push_rows")
    if tensor.output_pitch < tensor.row_bytes:
        requirement = f"at least row_bytes {tensor.row_bytes}"
        raise ArgumentError("output_pitch", requirement, tensor.output_pitch, call="push_rows")
