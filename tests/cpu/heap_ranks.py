"""Ranks with a symmetric heap and a communicator on the NCCL stand-in, for `WorkerPool.run`."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from typing import Any, TypeVar

import pytest
import torch
import torch.distributed as dist

from distcomm.errors import SymmetricMismatchError
from distcomm.memory import GroupWindows
from distcomm.memory.segment_heap import SegmentHeap
from distcomm.nccl import PyNcclCommunicator
from tests.nccl_on_cpu import (
    becomes_true,
    communicator,
    fake_nccl_environment,
    num_live_bytes,
    num_live_windows,
)
from tests.worker_pool import WorkerPool, fresh_init_method

__all__ = ["CHUNK", "HeapRank", "run"]

T = TypeVar("T")

CHUNK = 4 << 20  # bytes of a segment, unless an allocation needs more
LONG_S = 20.0  # never waited for
_THREADS_END_S = 10.0


class HeapRank:
    """One rank: its heap, its communicator, and that one's windows.

    Attributes:
        windows: of `comm`, over `heap`; they meet within `timeout_s`.
        store: private to the test.
        num_give_ups: how often `windows` has said that segments were given up.
    """

    def __init__(self, comm: PyNcclCommunicator, store: dist.Store, timeout_s: float) -> None:
        self.comm = comm
        self.rank = comm.member.rank_in_group
        self.store = store
        self.heap = SegmentHeap(comm.native, 0, chunk_bytes=CHUNK, shared=False)
        self.num_give_ups = 0
        own = dist.PrefixStore("windows", store)
        self.windows = GroupWindows(self.heap, comm, own, timeout_s, self._count_give_up)
        self._used: list[int] = []

    def alloc(self, num_bytes: int = 1) -> int:
        """The address of so many bytes; freed when the test ends."""
        address = self.heap.alloc(num_bytes)
        assert address
        self._used.append(address)
        return address

    def tensor(self, num_elements: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """A tensor in the heap."""
        num_bytes = num_elements * dtype.itemsize
        memory = (ctypes.c_char * num_bytes).from_address(self.alloc(num_bytes))
        return torch.frombuffer(memory, dtype=dtype)

    def sum_of_ones(self) -> float:
        """Shows that the communicator works."""
        return self.comm.all_reduce(torch.ones(1)).item()

    def mismatch(
        self, failure: str | None = None, call: Callable[[], object] | None = None
    ) -> tuple[SymmetricMismatchError, float]:
        """What `register_new`, or another call, raises, and after how many seconds."""
        start = time.monotonic()
        with pytest.raises(SymmetricMismatchError) as caught:
            self.windows.register_new(failure) if call is None else call()
        error, seconds = caught.value, time.monotonic() - start
        assert error.member == self.comm.member
        assert f"[{self.comm.member}]" in str(error)
        assert all(f"  rank {rank}: {text}" in str(error) for rank, text in error.reports.items())
        return error, seconds

    def register_common(self, payload: Any = None) -> list[Any]:
        """As those calls do in which all ranks of the group meet."""
        self.windows.count_common()
        return self.windows.register_common(payload)

    @property
    def given_up(self) -> tuple[int, int]:
        """How many segments, and how often that was said."""
        return self.heap.stats()["retired_segments"], self.num_give_ups

    def _count_give_up(self) -> None:
        self.num_give_ups += 1

    def free_all(self) -> None:
        for address in self._used:
            assert self.heap.free(address)
        self.heap.retire_all()


def run(
    workers: WorkerPool,
    world_size: int,
    check: Callable[..., T],
    *args: object,
    timeout_s: float = LONG_S,
) -> list[T]:
    """``check(heap_rank, *args)`` of each rank; no windows or memory are left behind."""
    urls = fresh_init_method(), fresh_init_method().removeprefix("file://")
    return workers.run(
        _on_heap, *urls, timeout_s, check, args, ranks=world_size, env=fake_nccl_environment()
    )


def _on_heap(
    rank: int,
    world_size: int,
    url: str,
    path: str,
    timeout_s: float,
    check: Callable[..., T],
    args: tuple[Any, ...],
) -> T:
    before = num_live_bytes()
    with communicator(rank, world_size, url) as comm:
        ranks = HeapRank(comm, dist.FileStore(path, world_size), timeout_s)
        result = check(ranks, *args)
        dist.barrier()  # nobody closes while others communicate
    assert num_live_windows() == 0
    ranks.free_all()
    # At once, unless a registration that hangs still holds its segments.
    assert becomes_true(lambda: num_live_bytes() == before, _THREADS_END_S)
    return result
