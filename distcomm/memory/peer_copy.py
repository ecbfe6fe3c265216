"""Rows that a rank pushes into the other ranks' memory by copy engines (csrc/peer_copy.cpp)."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence
from ctypes import POINTER, c_uint32, c_uint64
from dataclasses import astuple, dataclass

from ..errors import ArgumentError, PeerCopyError
from ..native import NativeNccl

__all__ = ["PeerCopies", "PushedRows", "RowRun", "RowRuns"]

_FLAG_BYTES = ctypes.sizeof(c_uint32)


class _RowRun(ctypes.Structure):
    _fields_ = [
        ("source_row", c_uint64),
        ("output_row", c_uint64),
        ("num_rows", c_uint64),
        ("output_stride", c_uint64),
    ]


class _PushedRows(ctypes.Structure):
    _fields_ = [
        ("source", c_uint64),
        ("row_bytes", c_uint64),
        ("source_pitch", c_uint64),
        ("output_pitch", c_uint64),
        ("outputs", POINTER(c_uint64)),
    ]


@dataclass(frozen=True)
class RowRun:
    """Local rows that lie one after another, and where they go: every so many rows of the output.

    ``RowRun(source_row=2, output_row=10, num_rows=3, output_stride=4)`` takes the local rows
    2, 3, 4 to the rows 10, 14, 18 of every rank's output.
    """

    source_row: int
    output_row: int
    num_rows: int
    output_stride: int

    def __post_init__(self) -> None:
        if min(astuple(self)) < 0 or (self.num_rows > 1 and self.output_stride == 0):
            raise ArgumentError(
                "run", "of numbers >= 0, with an output_stride >= 1 if it has several rows", self
            )


class RowRuns:
    """Runs in the form that the C++ library takes. To be made once and used for many calls.

    Attributes:
        runs: what it was made of.
        array: the same for C.
        num_rows: of all of them.
    """

    def __init__(self, runs: Iterable[RowRun]) -> None:
        self.runs = tuple(runs)
        self.array = (_RowRun * len(self.runs))(*[_RowRun(*astuple(run)) for run in self.runs])
        self.num_rows = sum(run.num_rows for run in self.runs)


@dataclass(frozen=True)
class PushedRows:
    """One tensor of a push. All sizes are in bytes.

    Attributes:
        source: address of the first local row.
        row_bytes: what is copied of each row.
        source_pitch: from one local row to the next; at least `row_bytes`.
        output_pitch: from one output row to the next; at least `row_bytes`.
        outputs: by rank, the address of the first row of its output.
    """

    source: int
    row_bytes: int
    source_pitch: int
    output_pitch: int
    outputs: Sequence[int]


class PeerCopies:
    """All-gathers in which every rank pushes its rows to their final places in all outputs.

    A rank has a signal area of `signal_bytes`, in memory that all ranks can write to, aligned to
    4 bytes. All areas hold `initial_signals` before any rank's first push, and again whenever all
    ranks have done theirs. Pushes that share the areas must follow one another on each device, in
    the same order on all ranks.

    Args:
        native: the C++ library.
        rank: this rank's place among the ranks.
        signals: by rank, the address of its signal area, as this rank uses it.

    Raises:
        ArgumentError: `signals` has no area of `rank`.
    """

    def __init__(self, native: NativeNccl, rank: int, signals: Sequence[int]) -> None:
        if not 0 <= rank < len(signals):
            raise ArgumentError("rank", f"one of the {len(signals)} ranks with signals", rank)
        self._functions = native.functions
        self._rank = rank
        self._signals = (c_uint64 * len(signals))(*signals)

    @property
    def available(self) -> bool:
        """Whether the CUDA driver has all that `push` needs."""
        return bool(self._functions.distcomm_can_push())

    def push(
        self,
        tensors: Sequence[PushedRows],
        runs: RowRuns,
        stream: int,
        own_stream: int | None = None,
    ) -> None:
        """Gives this rank's part of an all-gather to a CUDA stream. Collective.

        All runs apply to all tensors. Once the stream has done its part, this rank's outputs hold
        the rows of all ranks, and its sources may be overwritten. A source may be a part of this
        rank's own output; otherwise the two must not overlap. Can be captured into a CUDA graph.

        Addresses are not checked. The memory must be there until the stream is done.

        Args:
            tensors: the same number on all ranks, in the same order.
            runs: which rows go where; together, the ranks' runs name no output row twice.
            stream: a `cudaStream_t` of this rank's device, which must be current.
            own_stream: another one, for the rows' copies in this rank's own output, which the
                caller orders after what comes before the push and before what follows it. By
                default `stream`.

        Raises:
            ArgumentError: a tensor hasn't an output of each rank. Nothing was enqueued.
            PeerCopyError: the driver refused an operation. What was enqueued before it stays, so
                that peers may wait for this rank forever; the signal areas can't be used again.
        """
        world_size = len(self._signals)
        array = (_PushedRows * len(tensors))()
        for entry, rows in zip(array, tensors, strict=True):
            if len(rows.outputs) != world_size:
                raise ArgumentError(
                    "outputs", f"of {world_size} ranks", f"{len(rows.outputs)}", call="push"
                )
            entry.source = rows.source
            entry.row_bytes = rows.row_bytes
            entry.source_pitch = rows.source_pitch
            entry.output_pitch = rows.output_pitch
            entry.outputs = (c_uint64 * world_size)(*rows.outputs)
        code = self._functions.distcomm_push_rows(
            self._rank,
            world_size,
            self._signals,
            array,
            len(array),
            runs.array,
            len(runs.runs),
            stream,
            stream if own_stream is None else own_stream,
        )
        if code:
            raise PeerCopyError(code, rank_in_group=self._rank, world_size=world_size)

    @staticmethod
    def signal_bytes(world_size: int) -> int:
        """Size of a signal area."""
        return _FLAG_BYTES * (2 * world_size + 1)

    @staticmethod
    def initial_signals(world_size: int) -> bytes:
        """What a signal area holds while no push is under way: no flag is set."""
        flags = [0] * (2 * world_size)
        return bytes((c_uint32 * (2 * world_size + 1))(*flags, 1))
