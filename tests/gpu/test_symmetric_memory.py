"""Symmetric memory on GPUs: what is symmetric, for which group, and what it costs nobody."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from distcomm import (
    ArgumentError,
    ParallelState,
    suspend_symmetric_memory,
    symmetric,
    use_symmetric_memory,
)
from tests.gpu.job import start
from tests.worker_pool import WorkerPool, fresh_init_method

MIB = 1 << 20


@contextmanager
def symmetric_job(rank: int, world: int, method: str, **options: object) -> Iterator[ParallelState]:
    """A job with 64 MiB reserved; tp and cp are groups of different ranks where they can be."""
    options = {"symmetric_reserve": "64MiB", "timeout": 20, **options}
    gc.collect()
    torch.cuda.empty_cache()  # a former test's tensors may have outlived its job
    with start(rank, world, method, **options) as state:
        yield state


def num_segments(state: ParallelState) -> int:
    return state.symmetric_pool.stats()["segments_made"]


def num_registrations(state: ParallelState) -> int:
    return state.symmetric_pool.stats()["registrations"]


def from_one_slab(rank: int, world: int, method: str) -> None:
    """Small, large and other-stream tensors need no window but the slab's."""
    with symmetric_job(rank, world, method) as state:
        tp, device = state.tp, state.device
        before = num_segments(state), num_registrations(state)
        assert before[0] == 1
        side = torch.cuda.Stream()
        with tp.symmetric_memory():
            small = torch.full((100,), rank + 1.0, device=device)
            large = torch.full((5 * MIB,), rank + 1.0, device=device)
            with torch.cuda.stream(side):
                other = torch.full((3 * MIB,), rank + 1.0, device=device)
        ordinary = torch.ones(100, device=device)
        side.synchronize()
        for tensor in (small, large, other):
            assert tp.is_symmetric(tensor)
            assert symmetric.is_symmetric(tensor[1:], state.world)
            total = tp.all_reduce(tensor, out=tensor)
            assert (total == world * (world + 1) / 2).all()
        assert not tp.is_symmetric(ordinary)
        assert not tp.is_symmetric(ordinary.cpu())
        assert (num_segments(state), num_registrations(state)) == before
        stats = state.symmetric_pool.stats()
        assert stats["slabs"] == stats["segments"] == 1
        assert stats["bytes_reserved"] == 64 * MIB
        assert 0 < stats["bytes_used"] <= 64 * MIB
        assert stats["bytes_free"] == 64 * MIB - stats["bytes_used"]
        assert set(stats["windows"].values()) == {1}
        assert tp.stats()["symmetric_memory"] == {"contexts": 1, "inactive": {}, "windows": 1}


def growth(rank: int, world: int, method: str) -> None:
    """What doesn't fit makes a segment, registered on leaving; other groups register it later."""
    with symmetric_job(rank, world, method) as state:
        tp, device = state.tp, state.device
        other = state.create_group("reversed", list(reversed(range(world))))
        with use_symmetric_memory(tp):
            x = torch.full((32 * MIB,), rank + 1.0, device=device)  # 128 MiB
            assert not tp.is_symmetric(x)
        assert num_segments(state) == 2
        assert tp.is_symmetric(x)
        assert not other.is_symmetric(x)
        gathered = other.all_gather(x[:4], dim=0)
        assert gathered[::4].tolist() == [r + 1.0 for r in reversed(range(world))]
        with other.symmetric_memory():
            y = torch.full((4,), rank + 1.0, device=device)
            out = torch.empty(world, 4, device=device)
        assert other.is_symmetric(x)
        assert tp.is_symmetric(y)
        gathered = other.all_gather_into_tensor(out, x[:4])
        assert gathered[:, 0].tolist() == [r + 1.0 for r in reversed(range(world))]
        gathered = tp.all_gather_into_tensor(out, y)
        assert gathered[:, 0].tolist() == [r + 1.0 for r in range(world)]
        assert (tp.all_reduce(x, out=x) == world * (world + 1) / 2).all()


def steady_state(rank: int, world: int, method: str) -> None:
    """A thousand contexts add no segment and no registration."""
    with symmetric_job(rank, world, method) as state:
        tp = state.tp
        kept = []
        for trial in range(1000):
            with tp.symmetric_memory():
                x = torch.full((1000 + 97 * (trial % 50),), rank + trial, device=state.device)
                with state.cp.symmetric_memory():
                    y = torch.empty_like(x)
            tp.all_reduce(x, out=y)
            if trial % 100 == 0:
                kept.append((trial, y))
            if trial == 60:
                torch.cuda.synchronize()
                before = num_segments(state), num_registrations(state)
        assert (num_segments(state), num_registrations(state)) == before
        for trial, y in kept:
            assert (y == sum(range(world)) + world * trial).all()


def nested(rank: int, world: int, method: str) -> None:
    with symmetric_job(rank, world, method, cp=world) as state:
        tp, world_group, device = state.tp, state.world, state.device
        context = tp.symmetric_memory()

        def is_routed() -> bool:
            return tp.is_symmetric(torch.empty(8, device=device))

        assert not is_routed()
        with context:
            with context, world_group.symmetric_memory():
                assert is_routed()
            assert is_routed()
            with suspend_symmetric_memory():
                assert not is_routed()
                with tp.symmetric_memory():
                    assert is_routed()
                assert not is_routed()
                with tp.symmetric_memory(enabled=False):
                    assert not is_routed()
            assert is_routed()
            with pytest.raises(ZeroDivisionError), world_group.symmetric_memory():
                with suspend_symmetric_memory():
                    raise ZeroDivisionError
            assert is_routed()
            with suspend_symmetric_memory(), suspend_symmetric_memory():
                assert not is_routed()
            assert is_routed()
        assert not is_routed()
        with suspend_symmetric_memory():
            assert not is_routed()
        inactive = tp.stats()["symmetric_memory"]["inactive"]
        assert inactive == {"disabled by the caller": 1}


def two_threads(rank: int, world: int, method: str) -> None:
    """Each thread has its own routing; one may be in a context while another is too."""
    with symmetric_job(rank, world, method) as state:
        tp, device = state.tp, state.device
        inside, done = threading.Event(), threading.Event()
        found = []

        def other() -> None:  # a new thread, whose current device is the first
            outside = torch.empty(8, device=device)
            with tp.symmetric_memory():
                x = torch.empty(8, device=device)
                inside.set()
                done.wait(10)
            found.extend([tp.is_symmetric(outside), tp.is_symmetric(x)])

        thread = threading.Thread(target=other)
        thread.start()
        inside.wait(10)
        assert not tp.is_symmetric(torch.empty(8, device=device))
        with tp.symmetric_memory():
            assert tp.is_symmetric(torch.empty(8, device=device))
        done.set()
        thread.join(10)
        assert found == [False, True]


def peers(rank: int, world: int, method: str) -> None:
    """Addresses of the peers' tensors: what they hold arrives, what is written there is there."""
    with symmetric_job(rank, world, method) as state:
        tp, device = state.tp, state.device
        windows = state.communicators[0].windows  # of the world
        assert windows.peers.problem is None
        with tp.symmetric_memory():
            big = torch.empty(40 * MIB, device=device)  # in a segment of its own
            x = torch.full((64,), rank + 1, dtype=torch.int64, device=device)
            inbox = torch.zeros(world, dtype=torch.int64, device=device)
        for tensor in (x, big):
            pointers = tp.peer_pointers(tensor)
            assert None not in pointers
            assert len(set(pointers)) == world
        copy = windows.comm.native.functions.distcomm_copy_async
        stream = torch.cuda.current_stream().cuda_stream
        got = torch.zeros(world, dtype=torch.int64, device=device)
        torch.cuda.synchronize()
        tp.barrier()
        pointers = symmetric.peer_pointers(x[3:], tp)
        for peer in range(world):
            assert copy(got[peer:].data_ptr(), pointers[peer], 8, stream) == 0
            to = tp.peer_pointers(inbox)[peer] + 8 * rank
            assert copy(to, x.data_ptr(), 8, stream) == 0
        torch.cuda.synchronize()
        tp.barrier()
        expected = [r + 1 for r in range(world)]
        assert got.tolist() == expected
        assert inbox.tolist() == expected
        with pytest.raises(ArgumentError, match="symmetric for this group"):
            tp.peer_pointers(torch.ones(4, device=device))


def frozen(rank: int, world: int, method: str) -> None:
    """After freeze() nothing grows and nothing is registered; what doesn't fit is ordinary."""
    with symmetric_job(rank, world, method) as state:
        tp, pool, device = state.tp, state.symmetric_pool, state.device
        with tp.symmetric_memory():
            before_freeze = torch.full((32 * MIB,), 1.0, device=device)
        pool.freeze()
        counts = num_segments(state), num_registrations(state)
        with tp.symmetric_memory():
            fits = torch.full((MIB,), rank + 1.0, device=device)
            late = torch.full((64 * MIB,), rank + 1.0, device=device)
        assert tp.is_symmetric(before_freeze)
        assert tp.is_symmetric(fits)
        assert not tp.is_symmetric(late)
        for tensor in (fits, late):
            assert (tp.all_reduce(tensor, out=tensor) == world * (world + 1) / 2).all()
        assert (num_segments(state), num_registrations(state)) == counts
        assert sum(pool.stats()["fallbacks"].values()) == 1
        assert pool.stats()["ordinary_bytes"] == 256 * MIB
        del late, tensor
        with tp.symmetric_memory():
            again = torch.full((64 * MIB,), 1.0, device=device)
            small = torch.full((MIB,), rank + 1.0, device=device)
        assert not tp.is_symmetric(again)
        assert tp.is_symmetric(small)
        assert (tp.all_reduce(small, out=small) == world * (world + 1) / 2).all()
        assert (num_segments(state), num_registrations(state)) == counts
        del again
        steady = pool.stats()
        for _ in range(100):  # what torch has cached is used again
            with tp.symmetric_memory():
                torch.full((64 * MIB,), 1.0, device=device)
                torch.full((MIB,), 1.0, device=device)
        for name in ("ordinary_bytes", "bytes_used"):
            assert pool.stats()[name] <= steady[name]
        with pytest.raises(RuntimeError, match="frozen"):
            pool.reserve(1)


def others_make_a_group(rank: int, world: int, method: str) -> None:
    """What two ranks do to make a group of theirs leaves no trace in the pool."""
    with symmetric_job(rank, world, method) as state:
        tp = state.tp
        with tp.symmetric_memory():
            kept = torch.zeros(MIB, device=state.device)
            torch.zeros(2 * MIB, device=state.device)  # pending, when given back
        if rank < 2:
            pair = state.create_group("pair", [0, 1])
            assert pair.is_symmetric(kept)
        with tp.symmetric_memory():
            tensors = [torch.zeros(n * MIB, device=state.device) for n in (1, 3, 5)]
        windows = state.symmetric_pool._groups[0]
        places = [windows.find(each.data_ptr()) for each in (kept, *tensors)]
        mine = [(place.ordinal, place.offset) for place in places]
        assert tp.all_gather_object(mine) == [mine] * world


def freed_in_flight(rank: int, world: int, method: str) -> None:
    """Memory that a kernel still writes to is given to nobody else, on whatever stream."""
    with symmetric_job(rank, world, method) as state:
        tp, pool, device = state.tp, state.symmetric_pool, state.device
        streams = torch.cuda.Stream(), torch.cuda.Stream()
        with tp.symmetric_memory(), torch.cuda.stream(streams[0]):
            late = torch.empty(10 * MIB, device=device)  # 40 of 64 MiB
            place = late.data_ptr()
            torch.cuda._sleep(100_000_000)  # about 50 ms
            late.fill_(1.0)
        del late
        pool.routing.renew()
        pool.routing.drop_empty()  # torch's pool goes, and what it has cached
        with tp.symmetric_memory(), torch.cuda.stream(streams[1]):
            mine = torch.full((10 * MIB,), 5.0, device=device)
        assert mine.data_ptr() == place
        torch.cuda.synchronize()
        assert (mine == 5.0).all()


def inactive_in_a_group_of_one(rank: int, world: int, method: str) -> None:
    with start(rank, world, method) as state:
        with state.tp.symmetric_memory(), suspend_symmetric_memory():
            x = torch.ones(4, device=state.device)
        assert not state.tp.is_symmetric(x)
        assert state.tp.stats()["symmetric_memory"]["inactive"] == {"a group of one": 1}


@pytest.mark.parametrize(
    "function", [from_one_slab, growth], ids=lambda function: function.__name__
)
def test_what_is_symmetric(gpus: WorkerPool, world: int, function: object) -> None:
    gpus.run(function, fresh_init_method(), ranks=world)


@pytest.mark.parametrize(
    "function",
    [steady_state, nested, two_threads, peers, frozen, others_make_a_group, freed_in_flight],
    ids=lambda function: function.__name__,
)
def test_symmetric_memory(gpus: WorkerPool, most_ranks: int, function: object) -> None:
    gpus.run(function, fresh_init_method(), ranks=most_ranks)


def test_group_of_one(gpus: WorkerPool) -> None:
    gpus.run(inactive_in_a_group_of_one, fresh_init_method(), ranks=1)
