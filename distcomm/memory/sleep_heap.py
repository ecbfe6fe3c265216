"""Binding to the C++ heap of memory that can sleep (csrc/sleep_heap.h)."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_char, c_int64
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ..errors import SleepError
from ..native import NativeLibrary

__all__ = [
    "HostMemoryError",
    "SleepFailure",
    "SleepHeap",
    "SleepOutOfMemoryError",
    "TagUsage",
    "TransferProgress",
]


class TagUsage(NamedTuple):
    """Bytes under one tag.

    Attributes:
        mapped_bytes: GPU memory, in use or cached by torch.
        asleep_bytes: addresses without memory.
        offloaded_bytes: of these, those whose content is kept in host memory.
    """

    mapped_bytes: int = 0
    asleep_bytes: int = 0
    offloaded_bytes: int = 0


@dataclass(frozen=True)
class SleepFailure:
    """Why this thread's latest call failed.

    Attributes:
        code: the driver's error code (CUresult); 0 if no driver call has failed.
        needed_bytes: what the call needed of the memory that is missing.
        free_bytes: what the device had free, by the driver; -1 if that isn't what was missing.
        text: the reason, with the driver call and its error.
    """

    code: int
    needed_bytes: int
    free_bytes: int
    text: str


class SleepOutOfMemoryError(SleepError, torch.OutOfMemoryError):
    """There is not enough GPU memory, to wake up or to allocate in a pool. It can be tried again.

    Attributes:
        needed_bytes: what the call needed.
        free_bytes: what the device had free; -1 where the driver didn't tell.
        missing_bytes: the difference.
    """

    def __init__(self, what: str, failure: SleepFailure, hint: str = "") -> None:
        self.needed_bytes = failure.needed_bytes
        self.free_bytes = failure.free_bytes
        self.missing_bytes = max(0, failure.needed_bytes - max(0, failure.free_bytes))
        amount = f"{failure.needed_bytes} bytes of GPU memory are needed"
        if failure.free_bytes >= 0:
            amount += f", {failure.free_bytes} are free, {self.missing_bytes} are missing"
        super().__init__(f"{what}: {amount}: {failure.text}{hint}")


class HostMemoryError(SleepError, MemoryError):
    """Host memory for what is to be offloaded can't be had. Nothing has changed.

    Attributes:
        needed_bytes: pinned host memory that was asked for, on top of what there was.
    """

    def __init__(self, what: str, failure: SleepFailure) -> None:
        self.needed_bytes = failure.needed_bytes
        super().__init__(
            f"{what}: {failure.needed_bytes} bytes of pinned host memory can't be had: "
            f"{failure.text}; the pool stays awake"
        )


class TransferProgress(ctypes.Structure):
    """How far a transfer is: bytes copied so far, and all to be copied. Changes meanwhile."""

    _fields_ = [("done", c_int64), ("total", c_int64)]


class _Failure(ctypes.Structure):
    _fields_ = [
        ("code", c_int64),
        ("needed_bytes", c_int64),
        ("free_bytes", c_int64),
        ("text", c_char * 512),
    ]


class _Usage(ctypes.Structure):
    _fields_ = [("blocks", c_int64)] + [(name, c_int64) for name in TagUsage._fields]


_STATS = (
    "allocations",
    "failed_allocations",
    "failed_releases",
    "unknown_frees",
    "host_bytes",
    "free_host_bytes",
)


class _Stats(ctypes.Structure):
    _fields_ = [(name, c_int64) for name in _STATS]


class SleepHeap:
    """The memory of one device that can sleep. Thread-safe; no call is collective.

    `prepare`, `cancel`, `sleep`, `wake_up`, `discard` and `trim_host` wait for one another, however
    long one takes. Results are those of the C++ methods; where one says that it failed,
    `take_failure` says why.

    Args:
        native: the C++ library.
        device_index: the CUDA device.
        chunk_bytes: what is copied and mapped at once.
        shared: the process's one heap of that device, which torch's allocator functions use and
            which is never freed; its chunk size is that of the first call. Else a heap of its own,
            freed with this object.

    Raises:
        SleepError: there is no CUDA driver that can map memory.
    """

    def __init__(
        self,
        native: NativeLibrary,
        device_index: int,
        *,
        chunk_bytes: int = 64 << 20,
        shared: bool = True,
    ) -> None:
        functions = self._functions = native.functions
        self._owned = False
        if not functions.distcomm_can_sleep():
            raise SleepError(
                "sleepable memory: there is no CUDA driver (libcuda.so.1), or one that can't map "
                "memory; it needs a GPU and CUDA 11.7 or newer"
            )
        make = (
            functions.distcomm_sleep_heap_of_device
            if shared
            else functions.distcomm_sleep_heap_open
        )
        self.handle = make(device_index, chunk_bytes)
        if not self.handle:
            raise SleepError(f"sleepable memory: there can't be a device {device_index}")
        self._owned = not shared

    def __del__(self) -> None:
        if getattr(self, "_owned", False):
            self._functions.distcomm_sleep_heap_close(self.handle)

    def new_tag(self) -> int:
        """A tag's number, > 0."""
        tag: int = self._functions.distcomm_sleep_heap_new_tag(self.handle)
        return tag

    def select(self, tag: int) -> int:
        """From now on this thread allocates here with `tag`, 0 for none; the former one."""
        former: int = self._functions.distcomm_sleep_heap_select(self.handle, tag)
        return former

    def alloc(self, num_bytes: int, stream: int = 0) -> int:
        """The address of a block; 0 on failure."""
        return self._functions.distcomm_sleep_heap_alloc(self.handle, num_bytes, stream) or 0

    def free(self, address: int, stream: int = 0) -> bool:
        """Gives a block back, awake or asleep; False if `address` is none."""
        return bool(self._functions.distcomm_sleep_heap_free(self.handle, address, stream))

    def settle(self) -> None:
        """Gives back what was freed while a graph was captured, or memory moved."""
        self._functions.distcomm_sleep_heap_settle(self.handle)

    def take_failure(self) -> SleepFailure | None:
        """Why this thread's latest call failed; None from then on."""
        failure = _Failure()
        self._functions.distcomm_sleep_heap_take_failure(self.handle, ctypes.byref(failure))
        if not failure.text:
            return None
        text = failure.text.decode(errors="replace")
        return SleepFailure(failure.code, failure.needed_bytes, failure.free_bytes, text)

    def prepare(self, tags: Sequence[int]) -> SleepFailure | None:
        """Has host memory ready for all that is awake under these tags; or why there is none."""
        code = self._functions.distcomm_sleep_heap_prepare(self.handle, *_array(tags))
        return self._failure(code)

    def cancel(self, tags: Sequence[int]) -> None:
        """Gives back what `prepare` has made ready."""
        self._functions.distcomm_sleep_heap_cancel(self.handle, *_array(tags))

    def sleep(
        self,
        tags: Sequence[int],
        offloaded: Sequence[int],
        streams: tuple[int, int],
        progress: TransferProgress | None = None,
    ) -> SleepFailure | None:
        """Releases the memory under `tags`, of which `offloaded` keep their content; or why not.

        Waits for the device first. On failure what is offloaded is there, some of it perhaps
        asleep.
        """
        progress = progress or TransferProgress()
        first = [*offloaded, *(tag for tag in tags if tag not in offloaded)]
        code = self._functions.distcomm_sleep_heap_sleep(
            self.handle, *_array(first), len(offloaded), *streams, ctypes.byref(progress)
        )
        return self._failure(code)

    def wake_up(
        self,
        tags: Sequence[int],
        streams: tuple[int, int],
        progress: TransferProgress | None = None,
    ) -> SleepFailure | None:
        """Maps what is asleep under `tags`, at the same addresses; or why nothing is."""
        progress = progress or TransferProgress()
        code = self._functions.distcomm_sleep_heap_wake_up(
            self.handle, *_array(tags), *streams, ctypes.byref(progress)
        )
        return self._failure(code)

    def discard(self, tags: Sequence[int]) -> None:
        """Forgets the content of what is asleep under these tags."""
        self._functions.distcomm_sleep_heap_discard(self.handle, *_array(tags))

    def forget(self, tags: Sequence[int]) -> None:
        """Frees all host memory of these tags, and what is not in use."""
        self.cancel(tags)
        self.discard(tags)
        self.trim_host()

    def trim_host(self) -> int:
        """Frees host memory that is not in use; how many bytes."""
        num_bytes: int = self._functions.distcomm_sleep_heap_trim_host(self.handle)
        return num_bytes

    def usage(self, tag: int) -> TagUsage:
        usage = _Usage()
        self._functions.distcomm_sleep_heap_usage(self.handle, tag, ctypes.byref(usage))
        return TagUsage(*(getattr(usage, name) for name in TagUsage._fields))

    def stats(self) -> dict[str, int]:
        """Counters by name; see `SleepStats` in csrc/sleep_heap.h."""
        stats = _Stats()
        self._functions.distcomm_sleep_heap_stats(self.handle, ctypes.byref(stats))
        return {name: getattr(stats, name) for name in _STATS}

    def shut_down(self) -> None:
        """The process ends: from now on memory given back stays as it is."""
        self._functions.distcomm_sleep_heap_shut_down(self.handle)

    def _failure(self, code: int) -> SleepFailure | None:
        if not code:
            return None
        return self.take_failure() or SleepFailure(code, 0, -1, f"driver error {code}")


def _array(tags: Sequence[int]) -> tuple[ctypes.Array[c_int64], int]:
    return (c_int64 * len(tags))(*tags), len(tags)
