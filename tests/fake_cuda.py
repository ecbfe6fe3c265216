"""The stand-in for the CUDA driver of the CPU tests (csrc/fake_cuda.cpp)."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import c_int, c_longlong, c_size_t, c_uint64
from pathlib import Path
from typing import NamedTuple

from .native_build import built_library

__all__ = ["INJECTED", "TIMED_OUT", "FakeCuda", "Operation", "fake_cuda_path"]

INJECTED = 719  # CUDA_ERROR_LAUNCH_FAILED
TIMED_OUT = 909  # CUDA_ERROR_TIMEOUT

_KINDS = {1: "copy", 2: "copy_2d", 3: "wait", 4: "write"}
_CAPACITY = 1 << 16


def fake_cuda_path() -> Path:
    """Path of the stand-in, named libcuda.so.1, in a folder of its own; see `built_library`."""
    return built_library("fake_cuda", "fake_cuda/libcuda.so.1")


class Operation(NamedTuple):
    """One operation of a stream.

    `call` numbers the driver calls of the process: the operations of a batch have the same one.
    For a wait or a write, `to` is the address and `value` what is waited for or written. `source`,
    `num_bytes` and `num_rows` are of copies, the pitches of 2D copies.
    """

    call: int
    stream: int
    kind: str
    to: int
    source: int
    num_bytes: int
    num_rows: int
    to_pitch: int
    source_pitch: int
    value: int


class _Record(ctypes.Structure):
    _fields_ = [(name, c_uint64) for name in Operation._fields]


class FakeCuda:
    """The stand-in, loaded into this process so that distcomm finds it as the driver.

    Raises RuntimeError if this process has another driver already.
    """

    def __init__(self) -> None:
        self._library = ctypes.CDLL(str(fake_cuda_path()))
        self._library.fake_cuda_fail_after.argtypes = [c_int]
        self._library.fake_cuda_set_timeout.argtypes = [c_longlong]
        self._library.fake_cuda_set_delay.argtypes = [c_longlong]
        self._library.fake_cuda_log.argtypes = [c_int]
        self._library.fake_cuda_take_log.argtypes = [ctypes.POINTER(_Record), c_size_t]
        self._library.fake_cuda_take_log.restype = c_size_t
        found = ctypes.CDLL("libcuda.so.1")
        if not hasattr(found, "fake_cuda_fail_after"):
            raise RuntimeError("this process has loaded a CUDA driver before the stand-in")

    def fail_after(self, num_calls: int) -> None:
        """Of the copies and batches of this process, the one after so many fails; -1: none."""
        self._library.fake_cuda_fail_after(num_calls)

    def set_timeout(self, timeout_s: float) -> None:
        """Bounds each wait; 10 s at first."""
        self._library.fake_cuda_set_timeout(round(timeout_s * 1e6))

    def set_delay(self, most_s: float) -> None:
        """Each operation begins after a random time up to `most_s`."""
        self._library.fake_cuda_set_delay(round(most_s * 1e6))

    @contextmanager
    def logged(self) -> Iterator[list[Operation]]:
        """What is done during a ``with`` block, in order; to be read after it."""
        operations: list[Operation] = []
        self._library.fake_cuda_log(1)
        try:
            yield operations
        finally:
            self._library.fake_cuda_log(0)
            records = (_Record * _CAPACITY)()
            count = self._library.fake_cuda_take_log(records, _CAPACITY)
            for record in records[:count]:
                fields = {name: getattr(record, name) for name in Operation._fields}
                operations.append(Operation(**{**fields, "kind": _KINDS[record.kind]}))
