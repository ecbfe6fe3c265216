"""What ranks give back together: captures whose graphs are gone everywhere, and stale pools."""

from __future__ import annotations

import logging
import logging.handlers
from typing import Any

import pytest
import torch

from distcomm.memory import SymmetricPool
from tests.cpu.heap_ranks import HeapRank, run
from tests.worker_pool import WorkerPool


class Routing:
    """Notes what it is told; has what one rank knows."""

    def __init__(self, alive: list[int], num_captured: int, generation: int) -> None:
        self._captured = (alive, num_captured)
        self.generation = generation
        self.told: list[Any] = []

    def captured(self) -> tuple[list[int], int]:
        return self._captured

    def drop_captured(self, alive: set[int], num_captured: int) -> None:
        self.told.append((sorted(alive), num_captured))

    def renew(self, generation: int) -> None:
        self.told.append(generation)


def pool_of(rank: HeapRank, routing: Routing, frozen: bool) -> SymmetricPool:
    """A pool without torch's part, which needs CUDA."""
    pool = SymmetricPool.__new__(SymmetricPool)
    pool.device = torch.device("cpu")
    pool.heap = rank.heap
    pool.routing = routing  # type: ignore[assignment]
    pool.frozen = frozen
    pool.asleep = False
    pool._groups = [rank.windows]
    pool._at_start = rank.heap.stats()
    pool._warned_not_mapped = False
    return pool


def settle(rank: HeapRank, frozen: bool, knows: list[Any]) -> list[Any]:
    routing = Routing(*knows[rank.rank])
    if not frozen:
        rank.alloc()  # what is pending is registered on the way
    rank.heap.defer_frees(True)
    pool_of(rank, routing, frozen).settle(rank.comm.world_size)
    rank.heap.defer_frees(False)
    assert rank.windows.num_new == 0
    assert rank.windows.num_windows == (0 if frozen else 1)
    return routing.told


@pytest.mark.parametrize("frozen", [False, True])
def test_all_are_told_what_lives_on_any_rank(workers: WorkerPool, frozen: bool):
    knows = [([1, 4], 5, 0), ([1], 4, 0), ([2], 7, 0)]
    assert run(workers, 3, settle, frozen, knows) == [[([1, 2, 4], 7)]] * 3


@pytest.mark.parametrize("frozen", [False, True])
def test_where_some_have_renewed_their_pools_all_do(workers: WorkerPool, frozen: bool):
    knows = [([], 0, 1), ([], 0, 3), ([], 0, 1)]
    assert run(workers, 3, settle, frozen, knows) == [[4, ([], 0)]] * 3


def alone(rank: HeapRank) -> list[Any]:
    routing = Routing([3], 3, 2)
    pool = pool_of(rank, routing, False)
    pool._groups = []
    pool.settle(1)
    return routing.told


def test_a_rank_alone(workers: WorkerPool):
    assert run(workers, 1, alone) == [[([3], 3)]]


def registered_twice(rank: HeapRank) -> list[str]:
    """What is logged by the way. There is no driver here that could map anything."""
    handler = logging.handlers.BufferingHandler(100)
    logger = logging.getLogger("distcomm.memory.symmetric_pool")
    logger.addHandler(handler)
    try:
        pool = pool_of(rank, Routing([], 0, 0), False)
        pool.register_common()
        assert not handler.buffer  # nothing was made yet
        for _ in range(2):
            rank.alloc()
            pool.register_common()
        assert rank.heap.stats()["not_mapped"] > 0
        return [record.getMessage() for record in handler.buffer]
    finally:
        logger.removeHandler(handler)


def test_memory_that_is_not_mapped_is_told_once(workers: WorkerPool):
    for messages in run(workers, 2, registered_twice):
        assert len(messages) == 1
        assert "could not be mapped at rising addresses" in messages[0]
