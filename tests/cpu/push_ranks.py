"""Ranks that push rows, for the tests of `PeerCopies`: threads of one process, in host memory."""

from __future__ import annotations

import ctypes
import functools
import random
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from distcomm.memory.peer_copy import PeerCopies, PushedRows, RowRun, RowRuns
from distcomm.native import NativeNccl
from tests.fake_nccl import fake_nccl_path

__all__ = [
    "GUARD_BYTES",
    "LONG_S",
    "Gather",
    "Memory",
    "Plan",
    "Ranks",
    "Shape",
    "in_place_plan",
    "initial_words",
    "native_library",
    "random_plan",
    "stream_of",
]

GUARD_BYTES = 64  # before and after what a test uses of its memory
LONG_S = 30.0  # never waited for


@functools.cache
def native_library() -> NativeNccl:
    return NativeNccl(str(fake_nccl_path()))


class Memory:
    """Zeroed host memory that poses as a device's."""

    def __init__(self, num_bytes: int) -> None:
        self.bytes = bytearray(num_bytes + 2 * GUARD_BYTES)
        self.start = ctypes.addressof(ctypes.c_char.from_buffer(self.bytes))
        self.address = self.start + GUARD_BYTES

    def payload(self) -> bytearray:
        """Without the guards."""
        return self.bytes[GUARD_BYTES:-GUARD_BYTES]

    def words(self) -> list[int]:
        raw = self.payload()
        return [int.from_bytes(raw[at : at + 4], "little") for at in range(0, len(raw), 4)]

    def set_words(self, words: Sequence[int]) -> None:
        raw = b"".join(word.to_bytes(4, "little") for word in words)
        self.bytes[GUARD_BYTES:-GUARD_BYTES] = raw


def initial_words(world_size: int) -> list[int]:
    return [0] * (2 * world_size) + [1]


@dataclass(frozen=True)
class Shape:
    """One tensor's bytes of a row, and from row to row."""

    row_bytes: int
    source_pitch: int
    output_pitch: int


@dataclass(frozen=True)
class Plan:
    """What W ranks gather: `runs` by rank, the same for each of `shapes`.

    Where `in_place` is set, row i of a source is row i of the rank's own output.
    """

    num_rows: int
    shapes: tuple[Shape, ...]
    runs: tuple[tuple[RowRun, ...], ...]
    in_place: bool = False

    def num_local_rows(self, rank: int) -> int:
        return max((run.source_row + run.num_rows for run in self.runs[rank]), default=0)


def random_shape(rng: random.Random) -> Shape:
    row_bytes = rng.choice([0, 1, 3, 4, 7, 16, 33, 64, 129])
    source_pitch, output_pitch = (row_bytes + rng.choice([0, 0, 1, 5, 16]) for _ in range(2))
    return Shape(row_bytes, source_pitch, output_pitch)


def random_plan(world_size: int, rng: random.Random) -> Plan:
    """Blocks of rows: contiguous, or dealt out in turns; some for nobody. One rank may get none."""
    givers = rng.sample(range(world_size), max(1, world_size - rng.randrange(2)))
    shares: list[list[tuple[int, int, int]]] = [[] for _ in range(world_size)]
    row = rng.randrange(3)
    for _ in range(rng.randrange(1, 10)):
        stride, num_turns = rng.choice([1, 1, 2, 3, world_size]), rng.randrange(5)
        for first in range(row, row + stride):
            if rng.random() < 0.9:
                shares[rng.choice(givers)].append((first, num_turns, stride))
        row += stride * num_turns + rng.randrange(2)
    runs = []
    for share in shares:
        rng.shuffle(share)
        local, own = 0, []
        for first, num_rows, stride in share:
            local += rng.randrange(2)
            own.append(RowRun(local, first, num_rows, stride if num_rows > 1 else rng.randrange(3)))
            local += num_rows
        runs.append(tuple(own))
    shapes = tuple(random_shape(rng) for _ in range(rng.randrange(1, 4)))
    return Plan(row + 1, shapes, tuple(runs))


def in_place_plan(world_size: int, stride: int) -> Plan:
    """Each rank owns every W-th row, or, with a stride of 1, five rows in a block."""
    shapes = (Shape(7, 7 * stride, 7), Shape(4, 9 * stride, 9))
    first_rows = [rank * 5 if stride == 1 else rank for rank in range(world_size)]
    runs = [(RowRun(first if stride == 1 else 0, first, 5, stride),) for first in first_rows]
    return Plan(5 * world_size, shapes, tuple(runs), in_place=True)


def place(output: bytearray, source: bytes, shape: Shape, runs: Sequence[RowRun]) -> None:
    """Does the same as a push, row by row. `output` has guards, `source` has none."""
    for run in runs:
        for i in range(run.num_rows):
            start = (run.source_row + i) * shape.source_pitch
            row = source[start : start + shape.row_bytes]
            to = GUARD_BYTES + (run.output_row + i * run.output_stride) * shape.output_pitch
            output[to : to + shape.row_bytes] = row


class Gather:
    """A plan with memory for it: the sources, and the outputs of all ranks."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        world_size = len(plan.runs)
        self.runs = [RowRuns(runs) for runs in plan.runs]
        self.outputs = [
            [Memory(plan.num_rows * shape.output_pitch) for shape in plan.shapes]
            for _ in range(world_size)
        ]
        self.sources = [
            [Memory(plan.num_local_rows(rank) * shape.source_pitch) for shape in plan.shapes]
            for rank in range(world_size)
        ]
        self.tensors = [
            [
                PushedRows(
                    self._source_address(rank, tensor),
                    shape.row_bytes,
                    shape.source_pitch,
                    shape.output_pitch,
                    [outputs[tensor].address for outputs in self.outputs],
                )
                for tensor, shape in enumerate(plan.shapes)
            ]
            for rank in range(world_size)
        ]
        self._expected: dict[int, list[bytearray]] = {}
        self._lock = threading.Lock()

    def fill(self, rank: int, call: int) -> None:
        """New rows; all of the outputs, guards included, gets the call's poison."""
        for tensor, output in enumerate(self.outputs[rank]):
            output.bytes[:] = self._poison(tensor, call)
            data = self._data(rank, tensor, call)
            if self.plan.in_place:
                place(output.bytes, data, self.plan.shapes[tensor], self.plan.runs[rank])
            else:
                self.sources[rank][tensor].bytes[GUARD_BYTES:-GUARD_BYTES] = data

    def expected(self, call: int) -> list[bytearray]:
        """The outputs of any rank."""
        with self._lock:
            if call not in self._expected:
                outputs = []
                for tensor, shape in enumerate(self.plan.shapes):
                    outputs.append(self._poison(tensor, call))
                    for rank, runs in enumerate(self.plan.runs):
                        place(outputs[-1], self._data(rank, tensor, call), shape, runs)
                # Ranks are never two calls apart.
                recent = {each: kept for each, kept in self._expected.items() if each >= call - 1}
                self._expected = {**recent, call: outputs}
            return self._expected[call]

    def check(self, rank: int, call: int) -> None:
        for tensor, (output, expected) in enumerate(
            zip(self.outputs[rank], self.expected(call), strict=True)
        ):
            where = f"rank {rank}, call {call}, tensor {tensor} of {self.plan}"
            assert output.bytes == expected, where

    def _source_address(self, rank: int, tensor: int) -> int:
        if not self.plan.in_place:
            return self.sources[rank][tensor].address
        (run,) = self.plan.runs[rank]
        first = run.output_row if run.output_stride > 1 else 0
        offset = first * self.plan.shapes[tensor].output_pitch
        return self.outputs[rank][tensor].address + offset

    def _poison(self, tensor: int, call: int) -> bytearray:
        size = len(self.outputs[0][tensor].bytes)
        return bytearray(random.Random(f"poison/{tensor}/{call}").randbytes(size))

    def _data(self, rank: int, tensor: int, call: int) -> bytes:
        size = len(self.sources[rank][tensor].bytes) - 2 * GUARD_BYTES
        return random.Random(f"{rank}/{tensor}/{call}").randbytes(size)


class Ranks:
    """W ranks with their signal areas."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        native = native_library()
        initial = PeerCopies.initial_signals(world_size)
        self.areas = [Memory(PeerCopies.signal_bytes(world_size)) for _ in range(world_size)]
        for area in self.areas:
            area.bytes[GUARD_BYTES:-GUARD_BYTES] = initial
        addresses = [area.address for area in self.areas]
        self.copies = [PeerCopies(native, rank, addresses) for rank in range(world_size)]

    def push(self, rank: int, gather: Gather) -> None:
        self.copies[rank].push(gather.tensors[rank], gather.runs[rank], stream_of(rank))

    def run(self, body: Callable[[int], object], ranks: Sequence[int] | None = None) -> None:
        """Calls ``body(rank)`` in a thread of each rank; raises what the first of them raised."""
        chosen = range(self.world_size) if ranks is None else ranks
        with ThreadPoolExecutor(self.world_size) as threads:
            for done in [threads.submit(body, rank) for rank in chosen]:
                done.result(LONG_S)

    def check_signals(self) -> None:
        """All areas, and what is around them, are as they were at first."""
        for area in self.areas:
            assert area.words() == initial_words(self.world_size)
            assert not any(area.bytes[:GUARD_BYTES] + area.bytes[-GUARD_BYTES:])


def stream_of(rank: int) -> int:
    return 0x1000 + rank
