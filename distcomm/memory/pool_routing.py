"""Which of torch's memory pools a thread allocates from: entered, nested, suspended, captured."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Collection, Sequence
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
# Not in builds without CUDA.
_empty_cache: Callable[[], None] = getattr(torch._C, "_cuda_emptyCache", lambda: None)
_has_no_tensors = getattr(torch._C, "_cuda_checkPoolLiveAllocations", None)

_OWN_USES = 2  # a pool's MemPool's, and one more


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

    It has one use of its own besides the MemPool's. torch empties a pool whose MemPool goes with
    its last use, and ends the process if any pool is begun or any capture is under way then, be it
    somebody else's, or one that has failed. So the MemPool goes first, and then that use.

    Attributes:
        id: torch's.
        generation: the routing's when this one was made; an older one isn't used again.
        mem_pool: torch's object; None once the pool has been dropped.
    """

    __slots__ = ("generation", "id", "mem_pool")

    def __init__(self, mem_pool: torch.cuda.MemPool, generation: int) -> None:
        self.mem_pool: torch.cuda.MemPool | None = mem_pool
        self.id = mem_pool.id
        self.generation = generation

    @property
    def is_unused(self) -> bool:
        """Whether no thread is in it, and no graph has it."""
        return self.mem_pool is None or self.mem_pool.use_count() <= _OWN_USES


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


class _Captured:
    """A pool that CUDA graphs use.

    Attributes:
        capture_id: CUDA's, of the capture in which contexts have allocated from it; 0 for a pool
            that graphs were captured with as their own.
        ended: whether the graphs are gone.
    """

    __slots__ = ("capture_id", "ended", "is_open", "pool")

    def __init__(self, pool: _Pool, capture_id: int) -> None:
        self.pool = pool
        self.capture_id = capture_id
        self.is_open = capture_id == 0  # graphs may still be captured with it
        self.ended = False


class _ThreadState(threading.local):
    """One thread's.

    Attributes:
        frames: what it has entered and not left.
        idle: its outermost entry, to be used again.
    """

    def __init__(self) -> None:
        self.frames: list[_Frame] = []
        self.idle: _Frame | None = None


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
        self._threads = _ThreadState()
        self._generation = 0
        self._eager: list[_Pool] = []  # of all threads, of this generation
        self._orphans: list[_Pool] = []  # those of them whose threads are gone
        self._lingering: list[_Pool] = []  # to be dropped once nothing lies in them
        self._captured: dict[int, _Captured] = {}  # by number, counted in this process
        self._num_captured = 0
        self._never_used: _Pool | None = None
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
        if frame.begun and frame.capture_id == 0 and frame.pool.generation == self._generation:
            self._threads.idle = frame
        if self._closed:
            self._empty_unused()
        elif self._lingering and not frames:
            self.drop_empty()

    def open_graph_pool(self) -> tuple[int, tuple[int, int]]:
        """A new pool for CUDA graphs that may share memory: its number here, and torch's id.

        To be closed once no more graphs are captured with it. Its memory goes as that of
        captures does, by `drop_captured`, when the graphs are gone.
        """
        self._refuse_if_closed()
        self._num_captured += 1
        pool = self._new_pool()
        self._captured[self._num_captured] = _Captured(pool, 0)
        return self._num_captured, pool.id

    def close_graph_pool(self, number: int) -> None:
        """From now on the end of the graphs that there are is the end of the pool."""
        if number in self._captured:
            self._captured[number].is_open = False

    def num_captures(self) -> int:
        """How many pools of captured graphs there are whose graphs live."""
        return len(self.captured()[0])

    def captured(self) -> tuple[list[int], int]:
        """The numbers of captures whose graphs live, and how many captures were numbered."""
        ended = set(self._watch_ended())
        for capture in self._captured.values():
            if capture.capture_id:
                capture.ended |= capture.capture_id in ended
            else:
                capture.ended = not capture.is_open and capture.pool.is_unused
        alive = [number for number, each in self._captured.items() if not each.ended]
        return sorted(alive), self._num_captured

    def drop_captured(self, alive: Collection[int], num_captured: int) -> None:
        """Gives back what captures have used whose graphs are gone on all ranks.

        To be called by all ranks at the same point, with the same arguments: a graph's end is
        noticed at different times, and what is free decides where the next tensor lies.

        Args:
            alive: the numbers of captures whose graphs live on any rank.
            num_captured: the most that any rank has numbered, where all go on from.
        """
        self._num_captured = max(self._num_captured, num_captured)
        for number, capture in list(self._captured.items()):
            if capture.ended and number not in alive:
                del self._captured[number]
                self._lingering.append(capture.pool)
        self.drop_empty()

    @property
    def generation(self) -> int:
        """How often the pools were renewed."""
        return self._generation

    def renew(self, generation: int = 0) -> None:
        """Later allocations come from new pools; the old ones' memory goes as its tensors go.

        Also in the contexts that this thread is in; another thread's goes on until it is left.

        Args:
            generation: the least number that the new ones get.
        """
        self._generation = max(self._generation + 1, generation)
        self._lingering += self._eager
        self._eager, self._orphans = [], []
        self._threads.idle = None
        self._replace_in_frames()

    def drop_empty(self) -> None:
        """Drops the pools that are to go, of those that nothing lies in any more."""
        if self._capture_id():
            return
        empty = [pool for pool in self._lingering if pool.is_unused and self._is_empty(pool)]
        self._lingering = [pool for pool in self._lingering if pool not in empty]
        self._drop(empty)

    def close(self) -> None:
        """Drops all pools; `enter` raises from now on. Idempotent."""
        self._closed = True
        captured = [capture.pool for capture in self._captured.values()]
        pools = [*self._eager, *self._lingering, *captured]
        self._eager, self._orphans, self._lingering = [], [], []
        self._captured.clear()
        self._threads.idle = None
        self._drop(pools)

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
        frame = self._threads.idle
        self._threads.idle = None
        if frame is None or frame.begun[0].generation != self._generation:
            self._refuse_if_closed()
            pool = self._orphans.pop() if self._orphans else self._new_pool()
            if pool not in self._eager:
                self._eager.append(pool)
            frame = _Frame(pool, (pool,), 0)
            # Whoever comes after this thread goes on with its pool.
            self._threads.end = _AtEnd(self._orphans, pool)
        return frame

    def _replace_in_frames(self) -> None:
        """This thread's frames outside of captures go on with a new pool."""
        frames = self._threads.frames
        old = next((f.pool for f in frames if f.pool is not None and f.capture_id == 0), None)
        if old is None or self._capture_id():
            return
        is_begun = frames[-1].pool is not None
        if is_begun:
            self._end(old)
        new = self._idle_frame().begun[0]
        for index, frame in enumerate(frames):
            begun = tuple(new if pool is old else pool for pool in frame.begun)
            frames[index] = _Frame(new if frame.pool is old else frame.pool, begun, 0)
        if is_begun:
            self._begin(new)

    def _drop(self, pools: Sequence[_Pool]) -> None:
        """Ends pools, and gives back what doesn't belong to live tensors or graphs."""
        for pool in pools:
            pool.mem_pool = None
            _release(self._device_index, pool.id)
        if pools:
            self._empty_unused()

    def _empty_unused(self) -> None:
        """Gives back what lies in pools that have no use any more."""
        with torch.cuda.device(self._device):
            if self._never_used is None:
                self._never_used = self._new_pool()
            # While a pool is begun, torch leaves its cache of ordinary memory alone.
            _begin_in_thread(self._device_index, self._never_used.id)
            try:
                _empty_cache()
            finally:
                _end_in_thread(self._device_index, self._never_used.id)
                _release(self._device_index, self._never_used.id)

    def _is_empty(self, pool: _Pool) -> bool:
        """Whether no tensor lies in it. Otherwise torch would give back the rest of it at some
        later time, which differs between ranks."""
        return _has_no_tensors is None or bool(_has_no_tensors(self._device_index, pool.id, set()))

    def _pool_of_capture(self, capture_id: int) -> _Pool:
        for capture in self._captured.values():
            if capture.capture_id == capture_id:
                return capture.pool
        self._refuse_if_closed()
        self._watch.watch(torch._C._cuda_getCurrentRawStream(self._device_index))
        self._num_captured += 1
        pool = self._new_pool()
        self._captured[self._num_captured] = _Captured(pool, capture_id)
        return pool

    def _watch_ended(self) -> list[int]:
        ended: list[int] = []
        while taken := self._watch.take_ended():
            ended += taken
        return ended

    def _refuse_if_closed(self) -> None:
        if self._closed:
            raise DistcommError(f"symmetric memory: the pool is closed ({self._device})")

    def _new_pool(self) -> _Pool:
        expandable_segments_off.refresh()
        with torch.cuda.device(self._device):  # a new thread has another current device
            pool = _Pool(torch.cuda.MemPool(self._allocator), self._generation)
            _begin_in_thread(self._device_index, pool.id)  # the use of its own
            _end_in_thread(self._device_index, pool.id)
            return pool

    def _begin(self, pool: _Pool) -> None:
        expandable_segments_off.enter()
        try:
            _begin_in_thread(self._device_index, pool.id)
        except BaseException:
            expandable_segments_off.leave()
            raise

    def _end(self, pool: _Pool) -> None:
        try:
            _end_in_thread(self._device_index, pool.id)
        finally:
            try:
                _release(self._device_index, pool.id)
            finally:
                expandable_segments_off.leave()


class _AtEnd:
    """Goes with its thread, and leaves the thread's pool to another one."""

    __slots__ = ("_orphans", "_pool")

    def __init__(self, orphans: list[_Pool], pool: _Pool) -> None:
        self._orphans = orphans
        self._pool = pool

    def __del__(self) -> None:
        self._orphans.append(self._pool)
