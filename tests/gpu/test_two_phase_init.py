"""Groups of axes that come after the group of all ranks, end, and come again: on GPUs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch

from distcomm import (
    CaptureMismatchError,
    GraphCapture,
    GroupCoordinator,
    NotInitializedError,
    ParallelState,
)
from distcomm.kernels import LEAST_CAPABILITY
from distcomm.memory import PeerChannel
from distcomm.parallel_state import (
    destroy_distributed_environment,
    destroy_model_parallel,
    init_distributed_environment,
    initialize_model_parallel,
)
from tests.gpu.conftest import NUM_GPUS
from tests.worker_pool import WorkerPool, fresh_init_method

MIB = 1 << 20


@contextmanager
def environment(rank: int, world: int, url: str, **options: Any) -> Iterator[ParallelState]:
    options = {"timeout": 60, "tune": "nccl", **options}
    try:
        yield init_distributed_environment(world, rank, url, rank, "nccl", **options)
    finally:
        destroy_distributed_environment()


def assert_sums(group: GroupCoordinator) -> None:
    x = torch.full((1024,), float(group.rank + 1), device=group.device)
    total = group.all_reduce(x)
    assert total.tolist() == [float(sum(rank + 1 for rank in group.ranks))] * 1024


def capture_sums(
    group: GroupCoordinator, block: AbstractContextManager[GraphCapture], count: int
) -> None:
    x, graph = torch.ones(1024, device=group.device), torch.cuda.CUDAGraph()
    with block as capture, torch.cuda.graph(graph, stream=capture.stream):
        for _ in range(count):
            group.all_reduce(x)


@pytest.fixture(scope="module")
def gpus() -> Iterator[WorkerPool]:
    """Processes in which no other job has left segments that are still in use."""
    with WorkerPool(NUM_GPUS, timeout_s=120) as pool:
        yield pool


def reserved(state: ParallelState) -> int:
    assert state.symmetric_pool is not None
    return int(state.symmetric_pool.stats()["bytes_reserved"])


def lay_out_in_turn(rank: int, world: int, url: str) -> None:
    layouts: list[dict[str, Any]] = [
        {"tensor_model_parallel_size": world},
        {"tensor_model_parallel_size": world, "attention_context_model_parallel_size": world},
        {"pipeline_model_parallel_size": world},
        {},
    ]
    with environment(rank, world, url) as state:
        assert reserved(state) == 0  # nothing before it is known for whom
        assert_sums(state.world)
        with pytest.raises(NotInitializedError):
            state.tp  # noqa: B018
        first = 0
        for turn in range(3):
            for sizes in layouts:
                initialize_model_parallel(**sizes, symmetric_reserve="32MiB")
                first = first or reserved(state)
                assert reserved(state) == first  # the slab stays
                for group in state.groups.values():
                    assert_sums(group)
                    if group.world_size > 1:
                        with group.symmetric_memory():
                            y = torch.empty(1024, device=state.device)
                        assert group.is_symmetric(y)
                del y
                capture_sums(state.tp, state.graph_capture(), 1)
                if turn == 0 or state.tp.world_size == 1:
                    capture_sums(state.tp, state.tp.graph_capture(), 1)
                else:  # ranks are compared now, whatever was before
                    with pytest.raises(CaptureMismatchError):
                        capture_sums(state.tp, state.tp.graph_capture(), 1 + rank)
                destroy_model_parallel()
        initialize_model_parallel(world, symmetric_reserve="64MiB")
        assert reserved(state) >= first + 32 * MIB
        x = torch.ones(4, device=state.device)
        assert state.tp.all_reduce(x).tolist() == [float(world)] * 4


def test_layouts_in_turn_share_the_reserve(gpus: WorkerPool, world: int) -> None:
    gpus.run(lay_out_in_turn, fresh_init_method(), ranks=world)


def reserve_too_much(rank: int, world: int, url: str) -> None:
    with environment(rank, world, url) as state:
        with pytest.raises(RuntimeError, match="bytes of symmetric memory"):
            initialize_model_parallel(world, symmetric_reserve="4TiB")
        assert list(state.groups) == ["world"]
        assert reserved(state) == 0
        # On one rank alone there is no room: the others give theirs back.
        pool = state.symmetric_pool
        assert pool is not None
        if rank == 1:
            make, pool.heap.reserve = pool.heap.reserve, lambda num_bytes: make(1 << 42)
        with pytest.raises(RuntimeError, match=r"rank 1: .*bytes of symmetric memory"):
            initialize_model_parallel(world, symmetric_reserve="32MiB")
        assert reserved(state) == 0
        if rank == 1:
            pool.heap.reserve = make
        initialize_model_parallel(world, symmetric_reserve="32MiB")
        assert_sums(state.tp)
        with state.tp.symmetric_memory():
            y = torch.empty(1024, device=state.device)
        assert state.tp.is_symmetric(y)


def test_a_reserve_that_one_rank_has_no_room_for(gpus: WorkerPool, most_ranks: int) -> None:
    gpus.run(reserve_too_much, fresh_init_method(), ranks=most_ranks)


def take_turns_with_kernels(rank: int, world: int, url: str) -> None:
    """Groups of parts of the world have mailboxes, which the next layout's get."""
    layouts: list[dict[str, Any]] = [
        {"tensor_model_parallel_size": 2},
        {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": world // 2},
        {"tensor_model_parallel_size": world, "attention_context_model_parallel_size": 2},
    ]
    with environment(rank, world, url, tune="shipped") as state:
        pool = state.symmetric_pool
        assert pool is not None
        claims: list[list[tuple[int, int]]] = []
        held: list[list[tuple[int, int]]] = []  # when the GPU was waited for
        wait = state.wait_for_device

        def wait_for_device() -> None:
            held.append(sorted(pool.signal_claims))
            wait()

        state.wait_for_device = wait_for_device
        for _ in range(3):
            for sizes in layouts:
                initialize_model_parallel(**sizes, symmetric_reserve="64MiB")
                for group in state.groups.values():
                    if group.world_size > 1:
                        if torch.cuda.get_device_capability() >= LEAST_CAPABILITY:
                            assert group.kernels is not None, group.stats()["algorithms"]
                        x = torch.full((2048,), float(rank), device=state.device).bfloat16()
                        total = float(sum(group.ranks))
                        assert group.all_reduce(x).tolist() == [total] * 2048
                        channel = group.peer_channel()
                        assert isinstance(channel, PeerChannel)
                        torch.cuda.synchronize()
                        group.barrier()
                        assert channel.signals_are_at_rest()
                claims.append(sorted(pool.signal_claims))
                destroy_model_parallel()
                assert sorted(pool.signal_claims) == claims[-1]  # peers may still write there
        assert claims[:3] == claims[3:6] == claims[6:9]
        # Before each layout but the first: nobody's mailbox is given away while it is written to.
        # Of two ranks, all groups have the mailbox of the group of all ranks, which stays.
        assert held == (claims[:-1] if world > 2 else [])


def test_mailboxes_pass_from_layout_to_layout(gpus: WorkerPool, world: int) -> None:
    if world % 2:
        pytest.skip("needs pairs of ranks")
    gpus.run(take_turns_with_kernels, fresh_init_method(), ranks=world)
