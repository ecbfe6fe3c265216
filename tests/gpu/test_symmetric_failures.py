"""Symmetric memory when ranks differ: the same error on all of them, and the job goes on."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from distcomm import (
    InitializationError,
    ParallelState,
    SymmetricMismatchError,
    SymmetricOutOfMemoryError,
)
from tests.gpu.job import start
from tests.gpu.test_symmetric_memory import MIB, num_registrations, symmetric_job
from tests.worker_pool import WorkerPool, fresh_init_method

TIMEOUT_S = 4.0


def goes_on(state: ParallelState) -> None:
    """Collectives work, and equal growth registers."""
    tp, world = state.tp, state.world_size
    with tp.symmetric_memory():
        x = torch.full((48 * MIB,), state.rank + 1.0, device=state.device)
    assert tp.is_symmetric(x)
    assert (tp.all_reduce(x, out=x) == world * (world + 1) / 2).all()
    state.world.barrier()


def different_sizes(rank: int, world: int, method: str) -> str:
    with symmetric_job(rank, world, method) as state:
        tp, odd = state.tp, world - 1
        before = num_registrations(state)
        with pytest.raises(SymmetricMismatchError) as caught:
            with tp.symmetric_memory():
                x = torch.ones((40 if rank == odd else 24) * MIB, device=state.device)
        error = caught.value
        assert f"{160 * MIB} bytes" in error.reports[odd]
        assert f"{96 * MIB} bytes" in error.reports[0]
        if world > 2:
            assert error.odd_ranks == [odd]
        assert num_registrations(state) == before
        assert not tp.is_symmetric(x)
        assert (tp.all_reduce(x[:8]) == world).all()
        goes_on(state)
        return repr((error.reports, error.odd_ranks))


@contextmanager
def impatient_job(rank: int, world: int, method: str) -> Iterator[ParallelState]:
    """Ranks wait `TIMEOUT_S` for each other where they register; NCCL may take longer to begin."""
    with symmetric_job(rank, world, method) as state:
        for communicators in state.communicators:
            if communicators.windows is not None:
                communicators.windows._timeout_s = TIMEOUT_S
        yield state


def late_rank(rank: int, world: int, method: str) -> str:
    with impatient_job(rank, world, method) as state:
        tp, late = state.tp, world - 1
        before = num_registrations(state)
        if rank == late:
            time.sleep(TIMEOUT_S + 1)
        began = time.monotonic()
        with pytest.raises(SymmetricMismatchError, match="did not come") as caught:
            with tp.symmetric_memory():
                x = torch.full((24 * MIB,), rank + 1.0, device=state.device)
        assert time.monotonic() - began < (2.5 if rank == late else TIMEOUT_S + 2)
        assert caught.value.odd_ranks == [late]
        assert num_registrations(state) == before
        assert not tp.is_symmetric(x)
        assert (tp.all_reduce(x) == world * (world + 1) / 2).all()
        goes_on(state)
        return repr((caught.value.reports, caught.value.odd_ranks))


def out_of_memory_on_one(rank: int, world: int, method: str) -> None:
    with impatient_job(rank, world, method) as state:
        tp, odd = state.tp, 0
        with tp.symmetric_memory():
            kept = torch.ones(8, device=state.device)
        ballast = None
        if rank == odd:
            free, _ = torch.cuda.mem_get_info()
            ballast = torch.empty(free - 800 * MIB, dtype=torch.uint8, device=state.device)
        before = num_registrations(state)
        with pytest.raises(SymmetricMismatchError, match="out of memory") as caught:
            with tp.symmetric_memory():
                torch.empty(512 * MIB, device=state.device)  # 2 GiB
        assert caught.value.odd_ranks == [odd]
        if rank == odd:
            assert isinstance(caught.value.__cause__, torch.OutOfMemoryError)
        assert num_registrations(state) == before
        del ballast
        torch.cuda.empty_cache()
        with tp.symmetric_memory():
            small = torch.ones(8, device=state.device)
        places = tp.all_gather_object(state.symmetric_pool.heap.find(0, small.data_ptr()).offset)
        assert len(set(places)) == 1, places
        assert tp.is_symmetric(kept)
        goes_on(state)


def out_of_memory_everywhere(rank: int, world: int, method: str) -> None:
    with symmetric_job(rank, world, method) as state:
        with pytest.raises(SymmetricMismatchError, match="out of memory"):
            with state.tp.symmetric_memory():
                torch.ones(1 << 40, dtype=torch.uint8, device=state.device)
        with pytest.raises(SymmetricMismatchError, match="out of memory"):
            state.symmetric_pool.reserve(1 << 40)
        with (
            pytest.raises(torch.OutOfMemoryError) as ordinary,
            state.tp.symmetric_memory(),
            state.suspend_symmetric_memory(),
        ):
            torch.ones(1 << 40, dtype=torch.uint8, device=state.device)
        assert not isinstance(ordinary.value, SymmetricOutOfMemoryError)
        goes_on(state)


def error_in_the_body(rank: int, world: int, method: str) -> None:
    """What was allocated before is registered all the same, so ranks that go on don't wait."""
    with impatient_job(rank, world, method) as state:
        tp = state.tp

        def body() -> torch.Tensor:
            with tp.symmetric_memory():
                x = torch.ones(24 * MIB, device=state.device)
                if rank == 0:
                    kept.append(x)
                    raise ZeroDivisionError
            return x

        kept: list[torch.Tensor] = []
        if rank == 0:
            with pytest.raises(ZeroDivisionError):
                body()
        else:
            kept.append(body())
        assert tp.is_symmetric(kept[0])
        assert not tp.is_symmetric(torch.ones(8, device=state.device))
        goes_on(state)


def verified(rank: int, world: int, method: str) -> None:
    """`verify_symmetric` finds tensors at different offsets before NCCL is called."""
    with symmetric_job(rank, world, method, verify_symmetric=True) as state:
        tp, odd = state.tp, world - 1
        with tp.symmetric_memory():
            x = torch.ones(3 * MIB, device=state.device)
            y = torch.empty_like(x)
            z = torch.empty_like(x)
        assert (tp.all_reduce(x, out=y) == world).all()
        with pytest.raises(SymmetricMismatchError, match="offset") as caught:
            tp.all_reduce(x, out=z if rank == odd else y)
        if world > 2:
            assert caught.value.odd_ranks == [odd]
        with pytest.raises(SymmetricMismatchError, match="broadcast from 0"):
            tp.broadcast(x[:4] if rank == odd else x[:8])
        part = x[: 4 * world].to(torch.float16 if rank == odd else torch.float32)
        with pytest.raises(SymmetricMismatchError, match="all_to_all_single"):
            tp.all_to_all_single(torch.empty_like(part), part)
        assert (tp.all_reduce(x, out=z) == world).all()


def stages_that_differ(rank: int, world: int, method: str) -> None:
    """What one pipeline stage has made is no other stage's business: whole-job calls pass it by."""
    with symmetric_job(rank, world, method, tp=world // 2, pp=2) as state:
        tp, stage = state.tp, state.pp.rank_in_group
        kept = []
        for _ in range(1 + stage):
            with tp.symmetric_memory():
                kept.append(torch.ones((24 + 8 * stage) * MIB, device=state.device))
        with state.graph_capture():
            pass
        state.symmetric_pool.reserve("64MiB")
        with state.world.symmetric_memory():
            x = torch.ones(4 * MIB, device=state.device)
        assert state.world.is_symmetric(x)
        assert (state.world.all_reduce(x) == world).all()
        for tensor in kept:
            assert tp.is_symmetric(tensor)
            assert not state.world.is_symmetric(tensor)
            assert (tp.all_reduce(tensor) == tp.world_size).all()
        with tp.symmetric_memory():  # from here on the slab isn't used alike either
            other = torch.ones((1 + 6 * stage) * MIB, device=state.device)
        assert tp.is_symmetric(other)
        state.create_group("all again", list(reversed(range(world))))
        assert state.communicators[-1].windows.peers.problem is None  # of the new group
        state.symmetric_pool.freeze()


def too_much_at_init(rank: int, world: int, method: str) -> None:
    free, _ = torch.cuda.mem_get_info(rank)
    with pytest.raises(InitializationError, match="out of memory") as caught:
        start(rank, world, method, symmetric_reserve="1TiB")
    assert sorted(caught.value.failures) == list(range(world))
    assert abs(torch.cuda.mem_get_info(rank)[0] - free) < 2048 * MIB


def two_hosts(rank: int, world: int, method: str) -> list[bool]:
    """NCCL takes the ranks to be on two hosts: windows, but no pointers from one to the other."""
    os.environ["NCCL_HOSTID"] = f"host{2 * rank // world}"
    try:
        with symmetric_job(rank, world, method, timeout=60) as state:
            tp = state.tp
            with tp.symmetric_memory():
                x = torch.full((N,), rank + 1.0, device=state.device)
                y = torch.empty_like(x)
            assert (tp.all_reduce(x, out=y) == world * (world + 1) / 2).all()
            assert state._job.topology(range(world)).num_hosts == 2
            assert tp.is_symmetric(x)
            return [pointer is not None for pointer in tp.peer_pointers(x)]
    finally:
        del os.environ["NCCL_HOSTID"]


N = 4096


def test_different_sizes(gpus: WorkerPool, world: int) -> None:
    assert len(set(gpus.run(different_sizes, fresh_init_method(), ranks=world))) == 1


def test_late_rank(gpus: WorkerPool, world: int) -> None:
    assert len(set(gpus.run(late_rank, fresh_init_method(), ranks=world))) == 1


@pytest.mark.parametrize(
    "function",
    [
        pytest.param(out_of_memory_on_one, marks=pytest.mark.alone),
        out_of_memory_everywhere,
        error_in_the_body,
        verified,
        pytest.param(too_much_at_init, marks=pytest.mark.alone),
    ],
    ids=lambda function: function.__name__,
)
def test_symmetric_failures(gpus: WorkerPool, most_ranks: int, function: object) -> None:
    gpus.run(function, fresh_init_method(), ranks=most_ranks)


def test_stages_that_differ(gpus: WorkerPool, most_ranks: int) -> None:
    if most_ranks < 4:
        pytest.skip("needs 4 GPUs")
    gpus.run(stages_that_differ, fresh_init_method(), ranks=4)


def test_two_simulated_hosts(gpus: WorkerPool, most_ranks: int) -> None:
    gpus.reset()
    world = most_ranks - most_ranks % 2
    reached = gpus.run(two_hosts, fresh_init_method(), ranks=world)
    hosts = [2 * rank // world for rank in range(world)]
    assert reached == [[mine == other for other in hosts] for mine in hosts]
    gpus.reset()
