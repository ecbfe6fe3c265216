"""A stand-in for torch's pools of CUDA memory, which its CPU builds don't have.

It is strict where torch crashes, hangs or goes wrong silently: a pool begun twice, an end or
release without a begin, a pool that goes while any other is begun, and lookups of the wrong
device. What a thread allocates from is torch's rule: the latest begun that applies.
"""

from __future__ import annotations

import ctypes
import threading
from contextlib import nullcontext
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from distcomm.memory import pool_routing, torch_pools

__all__ = ["DEVICE_INDEX", "GRAPH", "Allocator", "MemPool", "Torch", "Segment", "patched"]

DEVICE_INDEX = 3
GRAPH = "the graph's own pool"


class Allocator:
    """The two functions of a library that a CUDAPluggableAllocator calls."""

    def __init__(self, path: str, prefix: str) -> None:
        self.names = path, prefix

    def alloc(self, num_bytes: int, stream: int) -> int:
        return self._function("alloc", ctypes.c_void_p)(num_bytes, DEVICE_INDEX, stream) or 0

    def free(self, address: int, num_bytes: int, stream: int) -> None:
        self._function("free", None)(address, num_bytes, DEVICE_INDEX, stream)

    def _function(self, name: str, result: Any) -> Any:
        path, prefix = self.names
        function = getattr(ctypes.CDLL(path), f"{prefix}_{name}")
        numbers = [ctypes.c_ssize_t, ctypes.c_int, ctypes.c_void_p]
        function.argtypes = numbers if name == "alloc" else [ctypes.c_void_p, *numbers]
        function.restype = result
        return function


@dataclass(eq=False)
class Segment:
    """Memory that torch has of an allocator, for one tensor at a time."""

    pool: int
    address: int
    num_bytes: int
    is_live: bool = True  # a tensor lies in it

    def free(self) -> None:
        """The tensor goes. torch keeps the memory, for the pool's next tensor."""
        assert self.is_live
        self.is_live = False


@dataclass
class Torch:
    """Pools, routes and captures, as torch keeps them. Errors are kept for the end, as torch's
    would end the process."""

    routes: list[tuple[Any, int | None]] = field(default_factory=list)  # pool, thread; None: graph
    use_counts: dict[int, int] = field(default_factory=dict)
    freeable: set[int] = field(default_factory=set)  # without a use, not emptied yet
    live: set[int] = field(default_factory=set)  # tensors lie in these, whatever the segments
    segments: list[Segment] = field(default_factory=list)
    allocators: dict[int, Allocator] = field(default_factory=dict)
    num_pools: int = 0
    capture_id: int = 0
    watched: list[int] = field(default_factory=list)
    ended: list[int] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    def begin(self, device: int, pool: int) -> None:
        assert device == DEVICE_INDEX
        self.use_counts[pool] += 1
        if any(pool == begun for begun, _ in self.routes):
            raise RuntimeError("already recording")
        self.routes.append((pool, threading.get_ident()))

    def end(self, device: int, pool: int) -> None:
        assert device == DEVICE_INDEX
        found = [route for route in self.routes if route[0] == pool]
        if not found:
            raise RuntimeError("endAllocatePool: not currently recording")
        self.routes.remove(found[0])

    def release(self, device: int, pool: int) -> None:
        assert device == DEVICE_INDEX
        if self.use_counts[pool] < 1:
            self.faults.append(f"pool {pool} was released once too often")
        self.use_counts[pool] -= 1
        if not self.use_counts[pool]:
            self.freeable.add(pool)

    def destroy(self, pool: int) -> None:
        self.use_counts[pool] -= 1
        if not self.use_counts[pool]:
            if self.routes or self.capture_id:
                self.faults.append(f"pool {pool} went while {self.routes} were begun")
            self.freeable.add(pool)
            self.empty({pool})

    def empty_cache(self) -> None:
        if not self.routes:
            self.faults.append("all that torch has cached was given back")
        self.empty(self.freeable)

    def empty(self, pools: set[int]) -> None:
        for pool in list(pools):
            self.give_back_cached(pool)
            if self.is_empty(pool):
                del self.use_counts[pool]
                self.freeable.discard(pool)

    def is_empty(self, pool: int) -> bool:
        return pool not in self.live and all(
            segment.pool != pool or not segment.is_live for segment in self.segments
        )

    def has_no_tensors(self, device: int, pool: int, expected: set[int]) -> bool:
        assert device == DEVICE_INDEX
        assert not expected
        return self.is_empty(pool)

    def allocates_from(self) -> Any:
        """The pool, of this thread; None for ordinary memory."""
        mine = [pool for pool, thread in self.routes if thread in (None, threading.get_ident())]
        return mine[-1] if mine else None

    def alloc(self, num_bytes: int, stream: int = 0) -> Segment:
        """Memory for a new tensor of this thread, of the pool that it is in."""
        pool = self.allocates_from()
        assert pool in self.allocators, f"ordinary memory: {pool}"
        for segment in self.segments:
            fits = segment.pool == pool and segment.num_bytes >= num_bytes
            if fits and not segment.is_live:
                segment.is_live = True
                return segment
        address = self.allocators[pool].alloc(num_bytes, stream)
        if not address:  # once more, without what is cached
            self.empty(self.freeable)
            self.give_back_cached(pool)
            address = self.allocators[pool].alloc(num_bytes, stream)
        if not address:
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {num_bytes}")
        self.segments.append(Segment(pool, address, num_bytes))
        return self.segments[-1]

    def give_back_cached(self, pool: int) -> None:
        for segment in list(self.segments):
            if segment.pool == pool and not segment.is_live:
                self.segments.remove(segment)
                self.allocators[pool].free(segment.address, segment.num_bytes, 0)

    def begin_capture(self) -> None:
        self.num_captures = getattr(self, "num_captures", 0) + 1
        self.capture_id = 100 + self.num_captures
        self.routes.append((GRAPH, None))

    def end_capture(self) -> int:
        self.routes.remove((GRAPH, None))
        ended, self.capture_id = self.capture_id, 0
        return ended

    def take_ended(self) -> list[int]:
        taken, self.ended = self.ended, []
        return taken


class MemPool:
    def __init__(self, owner: Torch, allocator: Allocator) -> None:
        self._owner = owner
        owner.num_pools += 1
        self.id = owner.num_pools
        owner.use_counts[self.id] = 1
        owner.allocators[self.id] = allocator

    def use_count(self) -> int:
        return self._owner.use_counts[self.id]

    def __del__(self) -> None:
        self._owner.destroy(self.id)


class patched:  # noqa: N801 - used as a function
    """Puts the stand-in in torch's place."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._patch = monkeypatch

    def __enter__(self) -> Torch:
        there = Torch()
        put = self._patch.setattr
        put(torch_pools, "_begin_in_thread", there.begin)
        put(torch_pools, "_end_in_thread", there.end)
        put(torch_pools, "_release", there.release)
        put(torch_pools, "_empty_cache", there.empty_cache)
        put(torch_pools, "_has_no_tensors", there.has_no_tensors)
        put(torch_pools, "_torch_allocator", Allocator)
        put(torch.cuda, "MemPool", lambda allocator: MemPool(there, allocator), raising=False)
        put(torch.cuda, "device", lambda device: nullcontext())
        put(torch.cuda, "is_current_stream_capturing", lambda: there.capture_id != 0)
        put(torch._C, "_cuda_getCurrentRawStream", lambda device: 7, raising=False)
        watch = SimpleNamespace(
            capture_id=lambda stream: there.capture_id,
            watch=lambda stream: there.watched.append(there.capture_id),
            take_ended=there.take_ended,
        )
        put(pool_routing, "CaptureWatch", lambda nccl: watch)
        return there

    def __exit__(self, *_: object) -> None:
        self._patch.undo()
