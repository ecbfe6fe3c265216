"""Which of torch's memory pools a thread allocates from: entered, nested, suspended, captured."""

from __future__ import annotations

import functools
import threading
from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch

from ..errors import DistcommError
from ..native import NativeNccl
from .alloc_conf import expandable_segments_off
from .cuda_capture import CaptureWatch

__all__ = ["PoolRouting"]

# Looked up once: contexts are entered and left around every layer of a model.
_begin_in_thread = torch._C._cuda_beginAllocateCurrentThreadToPool
_end_in_thread = torch._C._cuda_endAllocateToPool
_release = torch._C._cuda_releasePool


@functools.cache
def _torch_allocator(path: str) -> torch._C._cuda_CUDAAllocator:
    """torch's name for the heap's two functions; kept, as tensors may outlive every pool."""
    functions = "distcomm_torch_alloc", "distcomm_torch_free"
    allocator: torch._C._cuda_CUDAAllocator
    allocator = torch.cuda.memory.CUDAPluggableAllocator(path, *functions).allocator()
    return allocator


class _Pool:
    """One of torch's pools over the heap. Nothing that it refers to may refer to it: its memory
    has to go when its last user does, at the same point on every rank, not at a collection.

    Attributes:
        id: torch's.
        generation: the routing's when this one was made; an older one isn't used again.
    """

    __slots__ = ("generation", "id", "mem_pool")

    def __init__(self, mem_pool: torch.cuda.MemPool, generation: int) -> None:
        self.mem_pool = mem_pool
        self.id = mem_pool.id
        self.generation = generation


class _Frame(NamedTuple):
    """One entry of a thread's stack: into a pool, or (None) out of all pools.

    Attributes:
        pool: where this thread's allocations go.
        begun: the pools that entering has begun, or that suspending has ended, in order.
        capture_id: the CUDA graph capture that it was entered in; 0 outside.
    """

    pool: _Pool | None
    begun: tuple[_Pool, ...]
    capture_id: int


class _Capture(NamedTuple):
    """A CUDA graph that allocated in a context: its number in this process, and its pool."""

    number: int
    pool: _Pool


class _ThreadState(threading.local):
    def __init__(self) -> None:
        self.frames: list[_Frame] = []


class PoolRouting:
    """Routes threads' allocations into pools over one allocator.

    Args:
        nccl: the binding to the C++ library, which has the allocator's functions.
        device: where memory is allocated.
    """

    def __init__(self, nccl: NativeNccl, device: torch.device) -> None:
        self._device = device
        self._device_index = device.index
        self._watch = CaptureWatch(nccl)
        self._allocator = _torch_allocator(str(nccl.path))
        self._idle: dict[int, _Frame] = {}  # by thread: its outermost entry, to be used again
        self._retired: list[_Pool] = []  # to be dropped once nothing is begun
        self._num_begun = 0
        self._lock = threading.Lock()  # guards the count
        self._captures: dict[int, _Capture] = {}  # by CUDA's id
        self._num_captures = 0
        self._ended: set[int] = set()
        self._generation = 0
        self._threads = _ThreadState()
        self._closed = False

    def enter(self) -> None:
        """From here on this thread allocates symmetric memory, until `leave`. Nests."""
        frames = self._threads.frames
        capture_id = self._capture_id()
        if frames or capture_id:
            pool = self._pool_for(capture_id, frames)
            begun = () if frames and pool is frames[-1].pool else (pool,)
            frame = _Frame(pool, begun, capture_id)
        else:
            frame = self._idle_frame()
        for pool in frame.begun:
            self._begin(pool)
        frames.append(frame)

    def suspend(self) -> None:
        """From here on this thread allocates as if it weren't in a context, until `leave`."""
        capture_id = self._capture_id()
        frames = self._threads.frames
        routed: list[_Pool] = []
        for frame in reversed(frames):
            # Pools begun outside a capture are beneath the graph's own pool, which comes first.
            # Ended and begun again they would be above it.
            if frame.pool is None or frame.capture_id != capture_id:
                break
            routed[:0] = frame.begun
        for pool in reversed(routed):
            self._end(pool)
        frames.append(_Frame(None, tuple(routed), capture_id))

    def leave(self) -> None:
        """Undoes this thread's latest `enter` or `suspend`."""
        frames = self._threads.frames
        frame = frames.pop()
        if frame.pool is None:
            for pool in frame.begun:
                self._begin(pool)
            return
        for pool in frame.begun:
            self._end(pool)
        if frame.begun and frame.capture_id == 0:
            if frame.pool.generation == self._generation and not self._closed:
                self._idle[threading.get_ident()] = frame
            else:
                self._retired.append(frame.pool)
        if self._retired:
            self._drop_retired()

    def graph_pool(self) -> _Pool:
        """A new pool for one CUDA graph, or for several that may share memory; to be retired.

        Once torch's capture has begun with its id, the graph keeps the memory, and gives it back
        when it dies.
        """
        return self._new_pool()

    def retire(self, pool: _Pool) -> None:
        """Drops a pool, now or once it is safe.

        torch ends the process when a pool goes while any thread allocates from another one.
        """
        self._retired.append(pool)
        self._drop_retired()

    def num_captures(self) -> int:
        """How many captured graphs that allocated in a context are alive."""
        self._note_ended()
        return len(self._captures) - len(self._ended)

    def ended_captures(self) -> list[int]:
        """The captures whose graphs are gone, numbered as this process has made them."""
        self._note_ended()
        return sorted(self._ended)

    def drop_captures(self, numbers: Collection[int]) -> None:
        """Gives back what ended captures have used.

        To be called by all ranks at the same point, with the same numbers: a graph's end is
        noticed at different times, and what is free decides where the next tensor lies.
        """
        for capture_id, capture in list(self._captures.items()):
            if capture.number in numbers and capture.number in self._ended:
                del self._captures[capture_id]
                self._ended.remove(capture.number)
                self.retire(capture.pool)

    def renew(self) -> None:
        """Later allocations come from new pools; the old ones' memory goes as its tensors go."""
        self._generation += 1
        self._retire_idle()

    def close(self) -> None:
        """Drops all pools; `enter` raises from now on. Idempotent."""
        self._closed = True
        self._retired += [capture.pool for capture in self._captures.values()]
        self._captures.clear()
        self._retire_idle()

    # ---- inside -----------------------------------------------------------------------------

    def _capture_id(self) -> int:
        """Of the current stream of this device, which need not be the thread's current device."""
        return self._watch.capture_id(torch._C._cuda_getCurrentRawStream(self._device_index))

    def _pool_for(self, capture_id: int, frames: Sequence[_Frame]) -> _Pool:
        """Where this thread's allocations are to go.

        A capture has a pool of its own, which lives as long as its graph: what a replay writes
        to is never given to anyone else meanwhile. A thread has one, because torch refuses to
        begin a pool that another thread is in.
        """
        if capture_id:
            return self._pool_of_capture(capture_id)
        for frame in reversed(frames):
            if frame.pool is not None and frame.capture_id == 0:
                return frame.pool
        return self._idle_frame().begun[0]

    def _idle_frame(self) -> _Frame:
        frame = self._idle.pop(threading.get_ident(), None)
        if frame is None:
            pool = self._new_pool()
            frame = _Frame(pool, (pool,), 0)
        return frame

    def _retire_idle(self) -> None:
        self._retired += [frame.begun[0] for frame in self._idle.values()]
        self._idle.clear()
        self._drop_retired()

    def _drop_retired(self) -> None:
        if self._num_begun == 0 and not self._capture_id():
            self._retired.clear()

    def _pool_of_capture(self, capture_id: int) -> _Pool:
        capture = self._captures.get(capture_id)
        if capture is None:
            self._watch.watch(torch._C._cuda_getCurrentRawStream(self._device_index))
            self._num_captures += 1
            capture = self._captures[capture_id] = _Capture(self._num_captures, self._new_pool())
        return capture.pool

    def _note_ended(self) -> None:
        while ended := self._watch.take_ended():
            known = [self._captures[each] for each in ended if each in self._captures]
            self._ended.update(capture.number for capture in known)

    def _new_pool(self) -> _Pool:
        if self._closed:
            raise DistcommError(f"symmetric memory: the pool is closed ({self._device})")
        expandable_segments_off.refresh()
        with torch.cuda.device(self._device):  # a new thread has another current device
            return _Pool(torch.cuda.MemPool(self._allocator), self._generation)

    def _begin(self, pool: _Pool) -> None:
        expandable_segments_off.enter()
        try:
            _begin_in_thread(self._device_index, pool.id)
        except BaseException:
            expandable_segments_off.leave()
            raise
        with self._lock:
            self._num_begun += 1

    def _end(self, pool: _Pool) -> None:
        with self._lock:
            self._num_begun -= 1
        try:
            _end_in_thread(self._device_index, pool.id)
        finally:
            try:
                _release(self._device_index, pool.id)
            finally:
                expandable_segments_off.leave()
