"""Which of torch's memory pools a thread allocates from: entered, nested, suspended, captured."""

from __future__ import annotations

import threading
from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch

from ..errors import DistcommError
from ..native import NativeNccl
from .cuda_capture import CaptureWatch
from .torch_pools import TorchPool, TorchPools

__all__ = ["PoolRouting"]


class _Frame(NamedTuple):
    """One entry of a thread's stack: into a pool, or (None) out of all pools.

    Attributes:
        pool: where this thread's allocations go.
        begun: the pools that entering has begun, or that suspending has ended, in order.
        capture_id: the CUDA graph capture that it was entered in; 0 outside.
    """

    pool: TorchPool | None
    begun: tuple[TorchPool, ...]
    capture_id: int


class _Captured:
    """A pool that CUDA graphs use.

    Attributes:
        capture_id: CUDA's, of the capture in which contexts have allocated from it; 0 for a pool
            that graphs were captured with as their own.
        ended: whether the graphs are gone.
    """

    __slots__ = ("capture_id", "ended", "is_open", "pool")

    def __init__(self, pool: TorchPool, capture_id: int) -> None:
        self.pool = pool
        self.capture_id = capture_id
        self.is_open = capture_id == 0  # graphs may still be captured with it
        self.ended = False


class _ThreadState(threading.local):
    """One thread's.

    Attributes:
        frames: what it has entered and not left.
        idle: its outermost entry, to be used again.
        end: goes with the thread.
    """

    def __init__(self) -> None:
        self.frames: list[_Frame] = []
        self.idle: _Frame | None = None
        self.end: _AtEnd | None = None


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
        self._pools = TorchPools(nccl, device)
        self._threads = _ThreadState()
        self._generation = 0
        self._eager: list[TorchPool] = []  # of all threads, of this generation
        self._orphans: list[TorchPool] = []  # those of them whose threads are gone
        self._lingering: list[TorchPool] = []  # to be dropped once nothing lies in them
        self._captured: dict[int, _Captured] = {}  # by number, counted in this process
        self._num_captured = 0
        self._noted: set[int] = set()  # captures by CUDA's number, until their graphs are gone
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
            self._pools.begin(pool)
        if frame.pool is not None:
            frame.pool.num_entered += 1
        frames.append(frame)

    def suspend(self) -> None:
        """From here on this thread allocates as if it weren't in a context, until `leave`."""
        capture_id = self._capture_id()
        frames = self._threads.frames
        routed: list[TorchPool] = []
        for frame in reversed(frames):
            # Pools begun outside a capture are beneath the graph's own pool, which comes first.
            # Ended and begun again they would be above it.
            if frame.pool is None or frame.capture_id != capture_id:
                break
            routed[:0] = frame.begun
        for pool in reversed(routed):
            self._pools.end(pool)
        frames.append(_Frame(None, tuple(routed), capture_id))

    def leave(self) -> None:
        """Undoes this thread's latest `enter` or `suspend`."""
        frames = self._threads.frames
        frame = frames.pop()
        if frame.pool is None:
            for pool in frame.begun:
                self._pools.begin(pool)
            return
        frame.pool.num_entered -= 1
        for pool in frame.begun:
            self._pools.end(pool)
        if frame.begun and frame.capture_id == 0 and frame.pool.generation == self._generation:
            self._threads.idle = frame
        if self._closed:
            self._pools.empty_unused()
        elif self._lingering and not frames:
            self.drop_empty()

    def open_graph_pool(self) -> tuple[int, tuple[int, int]]:
        """A new pool for CUDA graphs that may share memory: its number here, and torch's id.

        To be closed once no more graphs are captured with it. Its memory goes as that of
        captures does, by `drop_captured`, when the graphs are gone.
        """
        self._refuse_if_closed()
        self._num_captured += 1
        pool = self._pools.make(self._generation)
        self._captured[self._num_captured] = _Captured(pool, 0)
        return self._num_captured, pool.id

    def close_graph_pool(self, number: int) -> None:
        """From now on the end of the graphs that there are is the end of the pool."""
        if number in self._captured:
            self._captured[number].is_open = False

    def note_capture(self, capture_id: int, stream: int) -> None:
        """The graph that `stream` captures uses symmetric memory, or peers' memory, by address."""
        if capture_id not in self._noted:
            self._watch.watch(stream)
            self._noted.add(capture_id)

    def note_current_capture(self) -> None:
        """`note_capture` of the current stream's."""
        stream = torch._C._cuda_getCurrentRawStream(self._device_index)
        capture_id = self._watch.capture_id(stream)
        if capture_id:
            self.note_capture(capture_id, stream)

    @property
    def why_in_use(self) -> str | None:
        """What holds on to addresses of peers or to windows, or is about to allocate; else None."""
        alive = len(self.captured()[0]) + len(self._noted)
        if alive:
            return (
                "a CUDA graph that was captured with symmetric memory, or with collectives that "
                "write to their peers' memory, is alive, or has ended in the last moments"
            )
        pools = [*self._eager, *self._lingering]
        return (
            "a symmetric_memory() block has not ended"
            if any(pool.num_entered for pool in pools)
            else None
        )

    def num_captures(self) -> int:
        """How many pools of captured graphs there are whose graphs live."""
        return len(self.captured()[0])

    def captured(self) -> tuple[list[int], int]:
        """The numbers of captures whose graphs live, and how many captures were numbered."""
        ended = set(self._watch_ended())
        self._noted -= ended
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
        empty = [pool for pool in self._lingering if pool.is_unused and self._pools.is_empty(pool)]
        self._lingering = [pool for pool in self._lingering if pool not in empty]
        self._pools.drop(empty)

    def close(self) -> None:
        """Drops all pools; `enter` raises from now on. Idempotent."""
        self._closed = True
        captured = [capture.pool for capture in self._captured.values()]
        pools = [*self._eager, *self._lingering, *captured]
        self._eager, self._orphans, self._lingering = [], [], []
        self._captured.clear()
        self._threads.idle = None
        self._pools.drop(pools)

    # ---- inside -----------------------------------------------------------------------------

    def _capture_id(self) -> int:
        """Of the current stream of this device, which need not be the thread's current device."""
        return self._watch.capture_id(torch._C._cuda_getCurrentRawStream(self._device_index))

    def _pool_for(self, capture_id: int, frames: Sequence[_Frame]) -> TorchPool:
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
            pool = self._orphans.pop() if self._orphans else self._pools.make(self._generation)
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
            self._pools.end(old)
        new = self._idle_frame().begun[0]
        for index, frame in enumerate(frames):
            begun = tuple(new if pool is old else pool for pool in frame.begun)
            frames[index] = _Frame(new if frame.pool is old else frame.pool, begun, 0)
        old.num_entered, new.num_entered = 0, old.num_entered
        if is_begun:
            self._pools.begin(new)

    def _pool_of_capture(self, capture_id: int) -> TorchPool:
        for capture in self._captured.values():
            if capture.capture_id == capture_id:
                return capture.pool
        self._refuse_if_closed()
        self._watch.watch(torch._C._cuda_getCurrentRawStream(self._device_index))
        self._num_captured += 1
        pool = self._pools.make(self._generation)
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


class _AtEnd:
    """Goes with its thread, and leaves the thread's pool to another one."""

    __slots__ = ("_orphans", "_pool")

    def __init__(self, orphans: list[TorchPool], pool: TorchPool) -> None:
        self._orphans = orphans
        self._pool = pool

    def __del__(self) -> None:
        self._orphans.append(self._pool)
