"""Addresses of the other ranks' symmetric memory, and whether they work.

Up to NCCL 2.29.1 they come from the public device structure behind a window (`ncclWindow_vidmem`
in nccl_device/impl/core__types.h of 2.28), later from `ncclGetPeerDevicePointer`.
"""

from __future__ import annotations

import ctypes
import logging
import time
from collections.abc import Callable, Sequence
from ctypes import c_int, c_uint32, c_uint64, c_void_p
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..errors import SymmetricMemoryError
from ..native import NativeNccl
from ..nccl import PyNcclCommunicator
from .segment_heap import HeapLocation, SegmentHeap

__all__ = ["PeerMemory", "WindowLayout", "copy_bounded"]

logger = logging.getLogger(__name__)

_NO_ROOM = "no room in a window"
_SLOT_BYTES = 16
# NCCL_VERSION_CODE range in which a window's layout is the one below.
_LAYOUT_SINCE, _LAYOUT_UNTIL = 22800, 22902
_MOST_PROBE_S = 10.0
_POLL_S = 0.0005


class _WindowStruct(ctypes.Structure):
    """The head of `ncclWindow_vidmem` (NCCL 2.28)."""

    _fields_ = [
        ("winHost", c_void_p),
        ("lsaFlatBase", c_uint64),
        ("lsaRank", c_int),
        ("worldRank", c_int),
        ("stride4G", c_uint32),
    ]


@dataclass(frozen=True)
class WindowLayout:
    """Where the ranks that this one can load from and store to have the same window.

    Attributes:
        base: address of the window of the first of these ranks.
        stride: bytes from one rank's to the next's.
        lsa_rank: this rank's place among them.
        world_rank: this rank's place in the communicator.
    """

    base: int
    stride: int
    lsa_rank: int
    world_rank: int

    @classmethod
    def from_bytes(cls, raw: bytes, rank: int) -> WindowLayout | None:
        """What the structure says; None unless it can be that of rank `rank`."""
        struct = _WindowStruct.from_buffer_copy(raw)
        layout = cls(struct.lsaFlatBase, struct.stride4G << 32, struct.lsaRank, struct.worldRank)
        plausible = layout.base and layout.world_rank == rank and 0 <= layout.lsa_rank <= rank
        return layout if plausible else None

    @property
    def first_rank(self) -> int:
        """The first rank of the communicator that is within reach; the others follow it."""
        return self.world_rank - self.lsa_rank

    def address(self, rank: int, offset: int) -> int:
        """Of rank `rank`'s byte at `offset` of the window."""
        return self.base + (rank - self.first_rank) * self.stride + offset


class PeerMemory:
    """Which ranks of a communicator this one can write to, found out by doing it. Collective.

    Every rank writes a mark into the memory of every rank that NCCL gives it an address of, and
    all compare what arrived. A pair where a mark didn't arrive, or not in time, switches peer
    memory off for the whole group.

    Args:
        heap: with at least one window of `comm`.
        comm: the communicator.
        meet: brings the ranks together: ``meet(stage, report)`` returns all reports.
        timeout_s: bound of each step.

    Attributes:
        problem: why peer memory isn't used; None if it is. The same on all ranks.
        reachable: ranks in the group whose memory this rank can use, itself included.
    """

    def __init__(
        self,
        heap: SegmentHeap,
        comm: PyNcclCommunicator,
        meet: Callable[[str, Any], list[Any | None]],
        timeout_s: float,
    ) -> None:
        self._heap = heap
        self._comm = comm
        self._meet = meet
        self._timeout_s = min(timeout_s, _MOST_PROBE_S)
        self._layouts: dict[int, WindowLayout | None] = {}
        self._rank = comm.member.rank_in_group
        self.reachable: tuple[int, ...] = ()
        self.problem: str | None = None
        try:
            self._probe()
        except _ProbeFailed as failed:
            self.problem = str(failed)
            self.reachable = (self._rank,)
            if not self.found_no_room:
                logger.warning("peer memory is off: %s [%s]", self.problem, comm.member)

    @property
    def found_no_room(self) -> bool:
        """Whether the probe is worth another try, once there is more room. As on all ranks."""
        return self.problem is not None and self.problem.endswith(_NO_ROOM)

    def learn(self, place: HeapLocation) -> None:
        """Looks at a new window. Not during a capture: it reads device memory."""
        if not self._comm.nccl.supports("peer_pointer"):
            self._layouts[place.ordinal] = self._read_layout(place.window)

    def addresses(self, place: HeapLocation) -> list[int | None]:
        """The same byte of a window on every rank; None where it is out of reach."""
        return [
            self._address(place, rank) if rank in self.reachable else None
            for rank in range(self._comm.world_size)
        ]

    # ---- inside -----------------------------------------------------------------------------

    def _address(self, place: HeapLocation, rank: int) -> int | None:
        nccl = self._comm.nccl
        if nccl.supports("peer_pointer"):
            pointer = c_void_p()
            code = nccl.ncclGetPeerDevicePointer(
                place.window, place.offset, rank, ctypes.byref(pointer)
            )
            return (pointer.value or None) if code == 0 else None
        layout = self._layouts.get(place.ordinal)
        return None if layout is None else layout.address(rank, place.offset)

    def _read_layout(self, window: int) -> WindowLayout | None:
        if not _LAYOUT_SINCE <= self._comm.nccl.version < _LAYOUT_UNTIL:
            return None
        raw = ctypes.create_string_buffer(ctypes.sizeof(_WindowStruct))
        if self._comm.native.functions.distcomm_read_device(raw, window, len(raw)):
            return None
        return WindowLayout.from_bytes(raw.raw, self._rank)

    def _first_rank(self, ordinal: int) -> int:
        """The same for all ranks that can reach each other."""
        if self._comm.nccl.supports("peer_pointer"):
            return 0  # NCCL itself says who is within reach
        layout = self._layouts[ordinal]
        if layout is None:
            raise _ProbeFailed("NCCL's window has no layout that distcomm knows")
        return layout.first_rank

    def _probe(self) -> None:
        """Fills `reachable`, or raises `_ProbeFailed`, on all ranks alike."""
        area = self._heap.borrow(self._comm.world_size * _SLOT_BYTES)
        try:
            place, reports = self._prepared(area)
        except _ProbeFailed:
            if area:
                self._heap.give_back_borrowed(area)
            raise
        # From here on, a probe that fails leaves its area behind: a peer may still write there.
        reached = {}
        for peer, report in enumerate(reports):
            if report["first"] == reports[self._rank]["first"]:
                slot = replace(place, offset=report["place"][1] + self._rank * _SLOT_BYTES)
                address = self._address(slot, peer)
                if address is not None:
                    reached[peer] = address
        writers = self._written(reached)
        self._verify_arrival(area, writers)
        self.reachable = tuple(sorted(reached))
        self._heap.give_back_borrowed(area)

    def _prepared(self, area: int) -> tuple[HeapLocation, list[Any]]:
        """Clears the probe area; where it is, and all ranks' reports of theirs."""
        place, first, failure = None, -1, None
        try:
            place = self._heap.find(self._comm.handle, area) if area else None
            if place is None or not place.window:
                raise _ProbeFailed(_NO_ROOM)
            self.learn(place)
            first = self._first_rank(place.ordinal)
            zeros = torch.zeros(
                self._comm.world_size * _SLOT_BYTES, dtype=torch.uint8, device=self._comm.device
            )
            self._copy([(area, zeros.data_ptr(), zeros.numel())])
        except RuntimeError as failed:  # torch's, too: the others are told
            failure = str(failed)
        where = None if place is None else [place.ordinal, place.offset]
        reports = self._met("probe/ready", {"first": first, "place": where, "failure": failure})
        # Offsets may differ, as what the ranks have done before; the window must be the same.
        if place is None or any(each["place"][0] != place.ordinal for each in reports):
            raise _ProbeFailed("the ranks' probe areas are in different segments")
        return place, reports

    def _written(self, reached: dict[int, int]) -> list[int]:
        """Leaves this rank's mark with the ranks within reach; who has done so with this one."""
        failure = None
        try:
            marks = torch.tensor(
                list(_mark(self._rank)), dtype=torch.uint8, device=self._comm.device
            )
            self._copy([(to, marks.data_ptr(), _SLOT_BYTES) for to in reached.values()])
        except RuntimeError as failed:
            failure = str(failed)
        reports = self._met("probe/written", {"wrote": sorted(reached), "failure": failure})
        return [peer for peer, each in enumerate(reports) if self._rank in each["wrote"]]

    def _verify_arrival(self, area: int, writers: Sequence[int]) -> None:
        raw = ctypes.create_string_buffer(self._comm.world_size * _SLOT_BYTES)
        code = self._comm.native.functions.distcomm_read_device(raw, area, len(raw))
        failure = f"reading device memory failed with driver error {code}" if code else None
        ranks = self._comm.member.ranks
        for peer in writers:
            if raw.raw[peer * _SLOT_BYTES :][:_SLOT_BYTES] != _mark(peer):
                failure = failure or f"what rank {ranks[peer]} wrote did not arrive"
        self._met("probe/read", {"failure": failure})

    def _met(self, stage: str, report: Any) -> list[Any]:
        """All reports, if all ranks came and none failed."""
        reports = self._meet(stage, report)
        for rank, each in zip(self._comm.member.ranks, reports, strict=True):
            if each is None:
                raise _ProbeFailed(f"rank {rank} did not come to the probe")
            if each["failure"] is not None:
                raise _ProbeFailed(f"rank {rank}: {each['failure']}")
        return reports

    def _copy(self, copies: Sequence[tuple[int, int, int]]) -> None:
        try:
            copy_bounded(self._comm.native, self._comm.device, copies, self._timeout_s)
        except SymmetricMemoryError as error:
            raise _ProbeFailed(str(error)) from error


def copy_bounded(
    native: NativeNccl,
    device: torch.device,
    copies: Sequence[tuple[int, int, int]],
    timeout_s: float,
    fills: Sequence[tuple[int, int, int]] = (),
) -> None:
    """Copies (to, from, bytes) and fills (to, byte, bytes) on the current stream, and waits for the
    end.

    Raises:
        SymmetricMemoryError: a copy failed, or didn't end in time.
    """
    # Not a stream of its own: torch hands out a few in turn, and which are the same must not differ
    # between ranks.
    stream = torch.cuda.current_stream(device)
    for to, source, num_bytes in copies:
        code = native.functions.distcomm_copy_async(to, source, num_bytes, stream.cuda_stream)
        if code:
            raise SymmetricMemoryError(f"a copy to peer memory failed with driver error {code}")
    for to, value, num_bytes in fills:
        code = native.functions.distcomm_fill_async(to, value, num_bytes, stream.cuda_stream)
        if code:
            raise SymmetricMemoryError(f"filling memory failed with driver error {code}")
    done = stream.record_event()
    deadline = time.monotonic() + timeout_s
    while not done.query():
        if time.monotonic() > deadline:
            raise SymmetricMemoryError(f"a copy to peer memory did not end within {timeout_s:g} s")
        time.sleep(_POLL_S)


def _mark(rank: int) -> bytes:
    return bytes([rank % 255 + 1]) * _SLOT_BYTES


class _ProbeFailed(RuntimeError):  # noqa: N818 - a signal inside this module, not an error
    """Why peer memory can't be used."""
