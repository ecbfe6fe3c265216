"""Binding to the C++ heap of symmetric segments (csrc/segment_heap.h)."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from ctypes import c_char, c_int64, c_void_p
from dataclasses import dataclass
from functools import partial

from ..errors import NativeLibraryError
from ..native import NativeNccl

__all__ = [
    "COUNTERS",
    "ALIGNMENT",
    "AllocationFailure",
    "HeapLocation",
    "Segment",
    "SegmentHeap",
    "next_ordinal_of_device",
]

ALIGNMENT = 2 << 20  # bytes: of every segment, and of every range carved out of one
_KINDS = ("none", "nccl", "capturing", "asleep")


@dataclass(frozen=True)
class Segment:
    """One allocation that NCCL made: its number, its bytes, and its first byte's address."""

    ordinal: int
    num_bytes: int
    address: int


@dataclass(frozen=True)
class AllocationFailure:
    """Why this thread's latest allocation or registration failed.

    Attributes:
        kind: ``"nccl"``; ``"capturing"`` where a new segment would have been needed while a CUDA
            graph is captured; ``"asleep"`` where the segments have no memory now.
        num_bytes: what was asked for.
        code: NCCL's error code; 0 if NCCL wasn't called.
        text: the reason, with NCCL's own text.
    """

    kind: str
    num_bytes: int
    code: int
    text: str


@dataclass(frozen=True)
class HeapLocation:
    """Where a pointer lies.

    Attributes:
        ordinal: the segment's number.
        offset: bytes from the segment's first.
        segment_bytes: the segment's size.
        window: of the communicator asked for; 0 if it has none of this segment.
    """

    ordinal: int
    offset: int
    segment_bytes: int
    window: int


class _SegmentInfo(ctypes.Structure):
    _fields_ = [("ordinal", c_int64), ("bytes", c_int64), ("address", c_int64)]


class _Failure(ctypes.Structure):
    _fields_ = [
        ("kind", c_int64),
        ("bytes", c_int64),
        ("code", c_int64),
        ("text", c_char * 512),
    ]


class _Location(ctypes.Structure):
    _fields_ = [
        ("ordinal", c_int64),
        ("offset", c_int64),
        ("segment_bytes", c_int64),
        ("window", c_void_p),
    ]


_STATS = (
    "segments",
    "slabs",
    "retired_segments",
    "bytes_reserved",
    "bytes_used",
    "largest_free",
    "ordinary_bytes",
    "ordinary_allocations",
    "allocations",
    "failed_allocations",
    "segments_made",
    "registrations",
    "failed_releases",
    "unknown_frees",
    "out_of_order",
    "not_mapped",
)


COUNTERS = _STATS[7:]
"""Those of the heap's statistics that only ever grow."""


class _Stats(ctypes.Structure):
    _fields_ = [(name, c_int64) for name in _STATS]


def next_ordinal_of_device(nccl: NativeNccl, device_index: int) -> int:
    """The number that the next segment of a device's shared heap gets."""
    ordinal: int = nccl.functions.distcomm_next_ordinal_of_device(device_index)
    return ordinal


class SegmentHeap:
    """The symmetric heap of one device. Thread-safe; no call but `register_new` is collective.

    Communicators are given as NCCL's handle. Results are those of the C++ methods.

    Args:
        nccl: the libnccl to allocate and register with.
        device_index: the CUDA device.
        chunk_bytes: the least size of a segment made when nothing fits.
        shared: the process's one heap of that device, which torch's allocator functions use and
            which is never freed; its libnccl and chunk size are those of the first call. Else a
            heap of its own, freed with this object.

    Raises:
        NativeLibraryError: this libnccl has no windows.
    """

    def __init__(
        self, nccl: NativeNccl, device_index: int, *, chunk_bytes: int = 64 << 20, shared: bool
    ) -> None:
        self._nccl = nccl
        native = self._native = nccl.functions
        make = native.distcomm_heap_of_device if shared else native.distcomm_heap_open
        self.handle = make(nccl.symbols, device_index, chunk_bytes)
        if not self.handle:
            raise NativeLibraryError(
                f"no symmetric heap on device {device_index}: this libnccl has no windows"
            )
        if shared:
            nccl.keep()
        self._owned = not shared
        self._num_new = native.distcomm_heap_num_new
        self._location = native.distcomm_heap_find

    def __del__(self) -> None:
        if getattr(self, "_owned", False):
            self._native.distcomm_heap_close(self.handle)

    # ---- memory -----------------------------------------------------------------------------

    def alloc(self, num_bytes: int, stream: int = 0) -> int:
        """The address of a range; 0 on failure."""
        return self._native.distcomm_heap_alloc(self.handle, num_bytes, stream) or 0

    def free(self, address: int, stream: int = 0) -> bool:
        """Waits for the device. False if `address` isn't one in use that `alloc` returned.

        While frees are deferred it doesn't wait, and the memory stays pending.
        """
        return bool(self._native.distcomm_heap_free(self.handle, address, stream))

    def borrow(self, num_bytes: int) -> int:
        """The address of a range for a moment; 0 if none is free. Makes no room for it."""
        return self._native.distcomm_heap_borrow(self.handle, num_bytes) or 0

    def give_back_borrowed(self, address: int) -> None:
        """Returns it at once: nothing uses it any more. Then all is as if it hadn't been."""
        self._native.distcomm_heap_give_back_borrowed(self.handle, address)

    def take_failure(self) -> AllocationFailure | None:
        """Why this thread's latest allocation or registration failed; None from then on."""
        failure = _Failure()
        self._native.distcomm_heap_take_failure(self.handle, ctypes.byref(failure))
        if failure.kind == 0:
            return None
        text = failure.text.decode(errors="replace")
        return AllocationFailure(_KINDS[failure.kind], failure.bytes, failure.code, text)

    def reserve(self, num_bytes: int) -> bool:
        """Makes a slab; False on failure."""
        return not self._native.distcomm_heap_reserve(self.handle, num_bytes)

    def retire_all(self) -> None:
        """Nothing more is carved out of what there is; empty segments are freed, slabs too."""
        self.settle()
        self._native.distcomm_heap_retire_all(self.handle)

    def defer_frees(self, deferred: bool) -> None:
        """Whether what is freed stays pending until `settle`, or until there is no other room."""
        self._native.distcomm_heap_defer_frees(self.handle, deferred)

    def settle(self) -> bool:
        """Waits for the device, and gives back what is pending; False if that was nothing."""
        return bool(self._native.distcomm_heap_settle(self.handle))

    def freeze(self, frozen: bool) -> None:
        """While frozen, what doesn't fit is memory of its own, in no segment."""
        self._native.distcomm_heap_freeze(self.handle, frozen)

    def trim(self) -> None:
        """Frees empty segments whose release has failed before."""
        self._native.distcomm_heap_trim(self.handle)

    def shut_down(self) -> None:
        """The process ends: from now on memory given back stays as it is."""
        self._native.distcomm_heap_shut_down(self.handle)

    def why_awake(self) -> str | None:
        """Why `fall_asleep` can't give back all segments; None if it can. Windows don't count."""
        if self._native.distcomm_heap_can_sleep(self.handle):
            return None
        failure = self.take_failure()
        return "the heap doesn't say" if failure is None else failure.text

    def fall_asleep(self) -> tuple[int, AllocationFailure | None]:
        """Gives the segments' memory back, but not their addresses; nothing can be allocated then.

        No communicator may have windows any more. Its content is lost. What can't be given back
        stays as it is.

        Returns:
            How many bytes this call has given back, and why not all.
        """
        num_bytes = c_int64()
        code = self._native.distcomm_heap_fall_asleep(self.handle, ctypes.byref(num_bytes))
        return num_bytes.value, self.take_failure() if code else None

    def wake_up(self) -> tuple[int, AllocationFailure | None]:
        """Takes memory for all segments again, or all is as before.

        Returns:
            How many bytes this call has taken, and why none.
        """
        num_bytes = c_int64()
        code = self._native.distcomm_heap_wake_up(self.handle, ctypes.byref(num_bytes))
        return num_bytes.value, self.take_failure() if code else None

    # ---- windows ----------------------------------------------------------------------------

    def num_new(self, comm: int) -> int:
        """How many segments a communicator has not seen."""
        count: int = self._num_new(self.handle, comm)
        return count

    def counter_of_new(self, comm: int) -> Callable[[], int]:
        """`num_new` of one communicator, as a function that is quick to call."""
        # ctypes objects are passed on faster than ints, which are converted on each call.
        return partial(self._num_new, c_void_p(self.handle), c_void_p(comm))

    @contextmanager
    def pinned_new(self, comm: int) -> Iterator[list[Segment]]:
        """The segments that a communicator has not seen, in the order of their making.

        They aren't freed before the block ends, even if they become empty.
        """
        infos = (_SegmentInfo * self.num_new(comm))()
        count = self._native.distcomm_heap_pin_new(self.handle, comm, infos, len(infos))
        try:
            yield [
                Segment(info.ordinal, info.bytes, info.address)
                for info in infos[: min(count, len(infos))]
            ]
        finally:
            self._native.distcomm_heap_unpin(self.handle, comm)

    def pass_over(self, comm: int, ordinals: Sequence[int]) -> None:
        """Counts segments as seen that this communicator gets no window of."""
        array = (c_int64 * len(ordinals))(*ordinals)
        self._native.distcomm_heap_pass_over(self.handle, comm, array, len(ordinals))

    def cancel_registration(self, comm: int) -> None:
        """Undoes what the registration under way still gets, as nobody waits for it any more."""
        self._native.distcomm_heap_cancel_registration(self.handle, comm)

    def register_new(self, comm: int, through: int) -> tuple[int, int]:
        """Registers what a communicator has not seen, up to ordinal `through`. Collective.

        Returns:
            NCCL's error code, and for how many segments NCCL gave no window.
        """
        null_windows = c_int64()
        code = self._native.distcomm_heap_register_new(
            self.handle, comm, through, ctypes.byref(null_windows)
        )
        return code, null_windows.value

    def abandon(self, comm: int, ordinals: Sequence[int]) -> None:
        """Ends a communicator's windows of these segments, out of which nothing more is carved."""
        array = (c_int64 * len(ordinals))(*ordinals)
        self._native.distcomm_heap_abandon(self.handle, comm, array, len(ordinals))

    def release_comm(self, comm: int, *, deregister: bool = True) -> int:
        """Forgets a communicator, and ends its windows first; NCCL's first error code."""
        code: int = self._native.distcomm_heap_release_comm(self.handle, comm, deregister)
        return code

    def find(self, comm: int, address: int) -> HeapLocation | None:
        """Where an address lies; None if in no segment."""
        found = _Location()
        if not self._location(self.handle, comm, address, ctypes.byref(found)):
            return None
        return HeapLocation(found.ordinal, found.offset, found.segment_bytes, found.window or 0)

    def num_windows(self, comm: int) -> int:
        count: int = self._native.distcomm_heap_num_windows(self.handle, comm)
        return count

    def num_ordinary(self) -> int:
        """How many allocations were memory of their own, because the heap was frozen and full."""
        count: int = self._native.distcomm_heap_num_ordinary(self.handle)
        return count

    def next_ordinal(self) -> int:
        """The number that the next segment gets."""
        ordinal: int = self._native.distcomm_heap_next_ordinal(self.handle)
        return ordinal

    def raise_ordinal(self, ordinal: int) -> None:
        """The next segment's number is at least this."""
        self._native.distcomm_heap_raise_ordinal(self.handle, ordinal)

    def stats(self) -> dict[str, int]:
        """Counters by name; see `HeapStats` in csrc/segment_heap.h."""
        stats = _Stats()
        self._native.distcomm_heap_stats(self.handle, ctypes.byref(stats))
        return {name: getattr(stats, name) for name in _STATS}
