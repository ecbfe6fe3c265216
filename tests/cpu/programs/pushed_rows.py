"""Runs `push_rows` in Triton's interpreter, with CPU tensors that pose as the ranks' memory.

    pushed_rows.py CASES

The result is compared with a plain copy row by row, including all bytes between the rows. Ends
with 0 if all is as expected. TRITON_INTERPRET must be set before Triton is imported, so this is a
program of its own.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from distcomm.kernels import PushedTensor, push_rows

GUARD_BYTES = 64  # before and after each tensor


@dataclass
class Shape:
    """Of one tensor: gaps follow each row, offsets come before the first."""

    row_bytes: int
    source_gap: int = 0
    output_gap: int = 0
    source_offset: int = 0
    output_offset: int = 0
    uneven: bool = False  # outputs at a different place on every rank


class Ranks:
    """W ranks with rows, and outputs of S rows; `expected` is what the outputs should become."""

    def __init__(self, shape: Shape, counts: Sequence[int], num_slots: int) -> None:
        self.shape = shape
        self.source_pitch = shape.row_bytes + shape.source_gap
        self.output_pitch = shape.row_bytes + shape.output_gap
        self.source_offset = GUARD_BYTES + shape.source_offset
        self.offsets = [
            GUARD_BYTES + shape.output_offset + (rank * 3 if shape.uneven else 0)
            for rank in range(len(counts))
        ]
        self.sources = [noise(self.source_offset + n * self.source_pitch) for n in counts]
        self.outputs = [noise(offset + num_slots * self.output_pitch) for offset in self.offsets]
        self.expected = [output.clone() for output in self.outputs]

    def pushed(self, rank: int) -> PushedTensor:
        addresses = [
            output.data_ptr() + offset
            for output, offset in zip(self.outputs, self.offsets, strict=True)
        ]
        return PushedTensor(
            source=self.sources[rank].data_ptr() + self.source_offset,
            output=addresses[rank],
            deltas=torch.tensor([address - addresses[rank] for address in addresses]),
            row_bytes=self.shape.row_bytes,
            source_pitch=self.source_pitch,
            output_pitch=self.output_pitch,
            delta_alignment=1 if self.shape.uneven else 16,
        )

    def expect(self, rank: int, row: int, slot: int) -> None:
        start = self.source_offset + row * self.source_pitch
        data = self.sources[rank][start : start + self.shape.row_bytes]
        for expected, offset in zip(self.expected, self.offsets, strict=True):
            start = offset + slot * self.output_pitch
            expected[start : start + self.shape.row_bytes] = data

    def check(self, what: str) -> None:
        for rank, (output, expected) in enumerate(zip(self.outputs, self.expected, strict=True)):
            wrong = (output != expected).nonzero().flatten()
            assert not len(wrong), f"{what}: rank {rank}, {len(wrong)} bytes, first {wrong[0]}"


def noise(num_bytes: int) -> torch.Tensor:
    return torch.randint(0, 256, (num_bytes + GUARD_BYTES,), dtype=torch.uint8)


def check(
    shapes: Sequence[Shape],
    counts: Sequence[int],
    *,
    num_blocks: int = 3,
    table_dtype: torch.dtype = torch.int32,
    with_slots: bool = False,
) -> None:
    """Pushes all rows of all ranks to random places."""
    what = f"{shapes} {counts} {num_blocks} blocks {table_dtype} slots {with_slots}"
    total = sum(counts)
    num_slots = total + 5
    rows = random.sample(range(num_slots), total)
    for skipped in random.sample(range(total), total // 8):
        rows[skipped] = -1
    slots = random.sample(range(-2, num_slots - 2), num_slots) if with_slots else None
    table = None if slots is None else torch.tensor(slots, dtype=table_dtype)
    tensors = [Ranks(shape, counts, num_slots) for shape in shapes]
    first = 0
    for rank, count in enumerate(counts):
        rows_to = rows[first : first + count]
        first += count
        for i, row in enumerate(rows_to):
            to = row if slots is None or row < 0 else slots[row]
            if to >= 0:
                for tensor in tensors:
                    tensor.expect(rank, i, to)
        push_rows(
            [tensor.pushed(rank) for tensor in tensors],
            torch.tensor(rows_to, dtype=table_dtype),
            slots=table,
            rank=rank,
            world_size=len(counts),
            signals=None,
            num_blocks=num_blocks,
        )
    for tensor in tensors:
        tensor.check(what)


def example() -> None:
    """The docstring's example."""
    for slots, rows, wanted in (
        (None, 4, [10, 11, 12, 13]),
        (torch.tensor([5, -1, 0, 2]), 6, [12, 0, 13, 0, 0, 10]),
    ):
        outputs = [torch.zeros(rows, dtype=torch.float32) for _ in range(2)]
        sources = [torch.tensor([10.0, 13.0]), torch.tensor([11.0, 12.0])]
        tables = [torch.tensor([0, 3]), torch.tensor([1, 2])]
        for rank in range(2):
            deltas = [output.data_ptr() - outputs[rank].data_ptr() for output in outputs]
            tensor = PushedTensor(
                source=sources[rank].data_ptr(),
                output=outputs[rank].data_ptr(),
                deltas=torch.tensor(deltas),
                row_bytes=4,
                source_pitch=4,
                output_pitch=4,
            )
            push_rows(
                [tensor],
                tables[rank],
                slots=slots,
                rank=rank,
                world_size=2,
                signals=None,
                num_blocks=1,
            )
        assert [output.tolist() for output in outputs] == [wanted, wanted]


def row_sizes() -> None:
    """Every row size with every kind of word, and about two tiles of rows."""
    for row_bytes, rows in (
        (2048, 35),
        (1152, 130),
        (576, 70),
        (132, 130),
        (128, 515),
        (16, 4100),
        (7, 1030),
        (1, 8200),
        (5000, 20),
        (16384, 5),
    ):
        check([Shape(row_bytes)], [rows, 3])
        check([Shape(row_bytes, 16, 48)], [2, rows], with_slots=True)
        check([Shape(row_bytes, 8, 24, 8, 16)], [rows // 2, rows // 3])
        check([Shape(row_bytes, 1, 5, 3, 7)], [5, 7], with_slots=True)
        check([Shape(row_bytes, 16, 16, uneven=True)], [5, 7])
    for words in (1, 2, 4, 8, 16):
        check([Shape(words), Shape(words * 3, words, words)], [9, 4])


def groups() -> None:
    """Group sizes, uneven row counts with ranks that have none, tables, lists of tensors."""
    pair = [Shape(256, output_gap=16), Shape(132, source_gap=4)]
    for world_size in range(1, 9):
        counts = [random.choice((0, 1, 17, 40)) for _ in range(world_size)]
        for num_tensors, dtype in ((1, torch.int64), (2, torch.int32), (2, torch.int64)):
            for with_slots in (False, True):
                check(
                    pair[:num_tensors],
                    counts,
                    table_dtype=dtype,
                    with_slots=with_slots,
                    num_blocks=random.choice((1, 2, 5, 16)),
                )
    check([*pair, Shape(7)], [11, 0, 20], with_slots=True)
    check([*pair, Shape(2048), Shape(1), Shape(64)], [40, 33])
    check(pair, [0, 0])
    check([], [3, 4])


CASES: dict[str, Callable[[], None]] = {
    "example": example,
    "row_sizes": row_sizes,
    "groups": groups,
}

if __name__ == "__main__":
    random.seed(1)
    torch.manual_seed(1)
    CASES[sys.argv[1]]()
