"""The stand-in for the CUDA driver of the CPU tests (csrc/fake_cuda.cpp)."""

from __future__ import annotations

import ctypes
import functools
import importlib
import inspect
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from ctypes import c_char_p, c_int, c_longlong, c_size_t, c_uint64
from pathlib import Path
from typing import Any, NamedTuple

from .native_build import built_library
from .worker_pool import WorkerPool

__all__ = [
    "GRANULARITY",
    "INJECTED",
    "OUT_OF_MEMORY",
    "TIMED_OUT",
    "FakeCuda",
    "LiveMemory",
    "Operation",
    "driver_with",
    "fake_cuda",
    "fake_cuda_path",
    "on_fake_cuda",
]

OUT_OF_MEMORY = 2  # CUDA_ERROR_OUT_OF_MEMORY
INJECTED = 719  # CUDA_ERROR_LAUNCH_FAILED
TIMED_OUT = 909  # CUDA_ERROR_TIMEOUT
GRANULARITY = 2 << 20  # of virtual memory
PLENTY = 1 << 30

_KINDS = {1: "copy", 2: "copy_2d", 3: "wait", 4: "write"}
_CAPACITY = 1 << 16


def fake_cuda_path() -> Path:
    """Path of the stand-in, named libcuda.so.1, in a folder of its own; see `built_library`."""
    return built_library("fake_cuda", "fake_cuda/libcuda.so.1")


def driver_with(folder: Path, functions: Sequence[str]) -> Path:
    """A libcuda.so.1 that has these functions, all of which do nothing, and no others."""
    source, library = folder / "driver.cpp", folder / "libcuda.so.1"
    source.write_text("".join(f'extern "C" int {name}() {{ return 0; }}\n' for name in functions))
    name_it = "-Wl,-soname,libcuda.so.1"
    subprocess.run(
        ["c++", "-shared", "-fPIC", name_it, "-o", str(library), str(source)], check=True
    )
    return library


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


class LiveMemory(NamedTuple):
    """What there is of virtual and pinned memory.

    Attributes:
        device_bytes: physical memory, and `rdma_bytes` of it which network cards may read.
        handles: of physical memory, that were not released.
        mappings: of physical memory at addresses.
        ranges, range_bytes: of reserved addresses.
        host_buffers, host_bytes: pinned memory.
        copies: that no one has waited for.
        faults: calls so far that no careful caller makes.
    """

    device_bytes: int = 0
    handles: int = 0
    mappings: int = 0
    ranges: int = 0
    range_bytes: int = 0
    host_buffers: int = 0
    host_bytes: int = 0
    rdma_bytes: int = 0
    copies: int = 0
    faults: int = 0


class _Live(ctypes.Structure):
    _fields_ = [(name, c_uint64) for name in LiveMemory._fields]


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
        self._library.fake_cuda_fail_call.argtypes = [c_char_p, c_uint64, c_uint64, c_int]
        self._library.fake_cuda_num_calls.argtypes = [c_char_p]
        self._library.fake_cuda_num_calls.restype = c_uint64
        self._library.fake_cuda_hold.argtypes = [c_char_p, c_uint64]
        self._library.fake_cuda_set_limits.argtypes = [c_size_t, c_size_t]
        self._library.fake_cuda_set_rdma.argtypes = [c_int]
        self._library.fake_cuda_set_capturing.argtypes = [c_uint64]
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

    def reset(self) -> None:
        """As at first, but for memory and counters."""
        self.fail_after(-1)
        self.set_timeout(10.0)
        self.set_delay(0.0)
        self.fail_no_call()
        self._library.fake_cuda_hold(b"", 1)
        self.set_limits()
        self.set_rdma(True)
        self.set_capturing(None)

    def fail_call(self, name: str, nth: int = 1, *, count: int = 1, code: int = INJECTED) -> None:
        """The `nth` call of this name from now on fails, and does nothing; so do the next ones, if
        `count` > 1. Names are those of cuda.h, without version."""
        self._library.fake_cuda_fail_call(name.encode(), nth, count, code)

    def fail_no_call(self) -> None:
        """Ends all that `fail_call` has begun."""
        self._library.fake_cuda_fail_no_call()

    def num_calls(self, name: str) -> int:
        """So far, failed ones included."""
        count: int = self._library.fake_cuda_num_calls(name.encode())
        return count

    @contextmanager
    def held(self, name: str, nth: int = 1) -> Iterator[Callable[[], None]]:
        """Calls of this name, from the `nth` on, wait until the block ends; gives what waits until
        one does."""

        def wait() -> None:
            deadline = time.monotonic() + 30
            while not self._library.fake_cuda_num_held():
                assert time.monotonic() < deadline, f"nobody has called {name}"
                time.sleep(1e-3)

        self._library.fake_cuda_hold(name.encode(), nth)
        try:
            yield wait
        finally:
            self._library.fake_cuda_hold(b"", 1)

    def set_limits(self, *, device_bytes: int = PLENTY, host_bytes: int = PLENTY) -> None:
        """What there may be of physical memory, of all devices together, and of pinned memory."""
        self._library.fake_cuda_set_limits(device_bytes, host_bytes)

    def set_rdma(self, supported: bool) -> None:
        """Whether network cards can read virtual memory."""
        self._library.fake_cuda_set_rdma(supported)

    def set_capturing(self, stream: int | None) -> None:
        """Pretends that this stream is captured; None: none is."""
        self._library.fake_cuda_set_capturing((1 << 64) - 1 if stream is None else stream)

    def release_unmapped(self) -> None:
        """Releases physical memory that is mapped nowhere: a test has made its release fail."""
        self._library.fake_cuda_release_unmapped()

    def live(self) -> LiveMemory:
        live = _Live()
        self._library.fake_cuda_live(ctypes.byref(live))
        return LiveMemory(*(getattr(live, name) for name in LiveMemory._fields))

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


@functools.cache
def fake_cuda() -> FakeCuda:
    """This process's."""
    return FakeCuda()


def on_fake_cuda(
    context: Callable[[], AbstractContextManager[Any]],
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorates a test that is to run in a process with the stand-in, as one has one driver only.

    The test gets what `context` gives, which is entered there, and its other arguments are those of
    pytest. Its module has a fixture named `process`, a `WorkerPool` of one.
    """

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(test)
        def run(process: WorkerPool, **arguments: object) -> None:
            process.run(_run_here, test.__module__, test.__qualname__, arguments)

        first = inspect.Parameter("process", inspect.Parameter.POSITIONAL_OR_KEYWORD)
        others = list(inspect.signature(test).parameters.values())[1:]
        run.__signature__ = inspect.Signature([first, *others])  # type: ignore[attr-defined]
        run.context = context  # type: ignore[attr-defined]
        return run

    return decorate


def _run_here(_rank: int, _world_size: int, module: str, name: str, arguments: Any) -> None:
    run: Any = getattr(importlib.import_module(module), name)
    fake_cuda().reset()
    try:
        with run.context() as given:
            run.__wrapped__(given, **arguments)
    finally:
        fake_cuda().reset()
