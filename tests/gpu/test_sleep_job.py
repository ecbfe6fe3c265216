"""`distcomm.sleep` of a job: pools, symmetric memory, and what is captured, on all ranks alike."""

from __future__ import annotations

import gc
import time
from unittest import mock

import pytest
import torch

import distcomm
from distcomm import ParallelState, SleepablePool, SleepError, SymmetricMemoryError
from distcomm.memory import PeerChannel
from tests.gpu.job import start
from tests.worker_pool import WorkerPool, fresh_init_method

MIB = 1 << 20
SIZES = (8, 1000, 40_000, 1 << 20, 1 << 23)  # elements: mailboxes, direct kernels, NCCL


def job(rank: int, world: int, method: str, **options: object) -> ParallelState:
    gc.collect()
    torch.cuda.empty_cache()
    options = {"symmetric_reserve": "64MiB", "timeout": 20, "tune": "shipped", **options}
    return start(rank, world, method, **options)


def expect_collectives(state: ParallelState) -> None:
    """All collectives that kernels run, of ordinary and of symmetric tensors where there are."""
    tp, world = state.tp, state.world_size
    total = world * (world + 1) / 2
    for size in SIZES:
        x = torch.full((size * world,), state.rank + 1.0, dtype=torch.bfloat16, device=state.device)
        assert (tp.all_reduce(x) == total).all()
        assert (tp.reduce_scatter(x, dim=0) == total).all()
        gathered = tp.all_gather(x[:size], dim=0).view(world, size)
        assert [row[-1].item() for row in gathered] == [r + 1.0 for r in range(world)]
        with tp.symmetric_memory():
            out = torch.empty_like(x)
        assert (tp.all_reduce(x, out=out) == total).all()
    torch.cuda.synchronize()


def expect_ended(state: ParallelState) -> None:
    """The driver tells of a graph's end in a thread of its own."""
    deadline = time.monotonic() + 10
    while state.symmetric_pool.why_awake is not None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    state.world.barrier()


def cycles(rank: int, world: int, method: str) -> None:
    """Symmetric memory goes and comes back at its addresses; meanwhile NCCL does everything."""
    with job(rank, world, method) as state:
        tp = state.tp
        other = state.create_group("reversed", list(reversed(range(world))))
        with tp.symmetric_memory():
            x = torch.full((MIB,), 3.0, device=state.device)
        expect_collectives(state)
        kernels = tp.kernels
        place = x.data_ptr(), tp.placement(x)
        for _ in range(3):
            report = distcomm.sleep(symmetric=True, communicators=False)
            reserved = state.symmetric_pool.stats()["bytes_reserved"]
            assert report.symmetric_bytes == report.freed_bytes == reserved
            assert state.symmetric_pool.stats()["asleep"]
            assert not tp.is_symmetric(x)
            assert tp.kernels is None
            assert "asleep" in str(tp.stats()["algorithms"])
            expect_collectives(state)
            assert tp.stats()["symmetric_memory"]["inactive"][distcomm.memory.ASLEEP] > 0
            assert distcomm.sleep(symmetric=True, communicators=False).freed_bytes == 0
            assert distcomm.wake_up(symmetric=False) == 0
            assert distcomm.wake_up() == reserved
            assert distcomm.wake_up() == 0
            assert (x.data_ptr(), tp.placement(x)) == place
            assert tp.is_symmetric(x)
            assert tp.kernels is kernels
            x.fill_(rank + 1.0)
            assert (tp.all_reduce(x, out=x) == world * (world + 1) / 2).all()
            expect_collectives(state)
            y = torch.full((5,), rank + 1.0, device=state.device)
            assert (other.all_reduce(y) == world * (world + 1) / 2).all()
        if kernels is not None:
            torch.cuda.synchronize()
            assert kernels.channel.signals_are_at_rest()


def test_symmetric_memory_sleeps_and_wakes_up(gpus: WorkerPool, world: int):
    gpus.run(cycles, fresh_init_method(), ranks=world)


def with_pools(rank: int, world: int, method: str) -> None:
    """Weights keep their content, the rest goes, and collectives of pool tensors work again."""
    with job(rank, world, method) as state, SleepablePool() as pool, SleepablePool() as other:
        with pool.use("weights"):
            weights = torch.arange(3 * MIB, device=state.device, dtype=torch.float32) + rank
        with other.use("kv"):
            kv = torch.ones(8 * MIB, device=state.device)
        expected = state.tp.all_reduce(weights)
        report = distcomm.sleep(("weights",))
        assert report.pools[pool].offloaded_bytes >= weights.nbytes
        assert report.pools[other].offloaded_bytes == 0
        assert report.freed_bytes >= weights.nbytes + kv.nbytes
        assert "communicators hold windows" in report.awake["symmetric memory"]
        assert (state.tp.all_reduce(torch.ones(9, device=state.device)) == world).all()
        assert distcomm.wake_up(("weights",)) >= weights.nbytes
        assert other.asleep_tags == ("kv",)
        assert torch.equal(state.tp.all_reduce(weights), expected)
        assert distcomm.wake_up() >= kv.nbytes
        kv.fill_(rank)
        assert (state.tp.all_reduce(kv)[::MIB] == sum(range(world))).all()
        del weights, kv, expected


def test_pools_and_collectives(gpus: WorkerPool, world: int):
    gpus.run(with_pools, fresh_init_method(), ranks=world)


def one_refuses(rank: int, world: int, method: str) -> None:
    """What is in the way on one rank leaves all ranks awake, and pools that can be used."""
    with job(rank, world, method) as state, SleepablePool() as pool:
        with pool.use("weights"):
            weights = torch.full((MIB,), 7.0, device=state.device)
        if rank == 1:
            with pool.use("weights"), pytest.raises(SleepError, match=r"ranks \[1\]: nothing has"):
                distcomm.sleep(("weights",))
        else:
            with pytest.raises(SleepError, match=r"rank 1: .*1 uses have not ended"):
                distcomm.sleep(("weights",))
        assert pool.asleep_tags == ()
        with pool.use("weights"):
            more = torch.ones(MIB, device=state.device)
        context = state.tp.symmetric_memory(enabled=rank == 0)
        in_the_way = r"rank 0: .*a symmetric_memory\(\) block has not ended"
        with context, pytest.raises(SleepError, match=in_the_way):
            distcomm.sleep(symmetric=True, communicators=False)
        assert (weights == 7).all()
        distcomm.sleep(("weights",))
        distcomm.wake_up()
        assert (weights == 7).all()
        assert (more == 1).all()
        with pytest.raises(SymmetricMemoryError, match="segments don't sleep by themselves"):
            state.symmetric_pool.sleep()


def test_one_rank_that_can_not_keeps_all_awake(gpus: WorkerPool, most_ranks: int):
    gpus.run(one_refuses, fresh_init_method(), ranks=most_ranks)


def captures(rank: int, world: int, method: str) -> None:
    """Graphs that hold addresses of symmetric memory keep it awake until they are gone; those of
    pools' tensors are as good as before."""
    with job(rank, world, method) as state, SleepablePool() as pool:
        tp = state.tp
        with pool.use("weights"):
            weights = torch.full((1000,), 2.0, device=state.device, dtype=torch.bfloat16)
        with tp.symmetric_memory():
            symmetric = torch.full((1000,), 1.0, device=state.device)

        def captured(x: torch.Tensor, out: torch.Tensor | None, **options: object) -> tuple:
            graph = torch.cuda.CUDAGraph()
            with state.graph_capture(**options) as c:
                with torch.cuda.graph(graph, stream=c.stream, pool=c.pool):
                    result = tp.all_reduce(x, out=out)
            return graph, result

        plain = torch.ones(2 * MIB, device=state.device, dtype=torch.float64)
        kept, result = captured(plain, None)  # by NCCL, of ordinary tensors
        for x, out, options in (
            (weights, None, {}),
            (symmetric, symmetric, {}),
            (plain, None, {"symmetric": True}),
        ):
            graph, out = captured(x, out, **options)
            if tp.kernels is not None or x is not weights:
                with pytest.raises(SleepError, match="a CUDA graph that was captured with"):
                    distcomm.sleep(symmetric=True, communicators=False)
            distcomm.sleep(("weights",))
            distcomm.wake_up()
            graph.replay()
            torch.cuda.synchronize()
            assert out[0].item() == x[0].item() * (1 if x is symmetric else world)
            del graph, out
            gc.collect()
            expect_ended(state)
        distcomm.sleep(("weights",), symmetric=True, communicators=False)
        kept.replay()
        torch.cuda.synchronize()
        assert (result == world).all()
        distcomm.wake_up()
        assert (weights == 2).all()
        expect_collectives(state)
        del kept, result


def test_graphs_keep_symmetric_memory_awake(gpus: WorkerPool, most_ranks: int):
    gpus.run(captures, fresh_init_method(), ranks=most_ranks)


def without_channel(rank: int, world: int, method: str) -> None:
    """A channel that never worked says why afterwards, too, and nothing stays asleep for it."""
    with job(rank, world, method, tune="nccl") as state:
        with mock.patch.object(PeerChannel, "_claimed", return_value="no room"):
            assert state.tp.peer_channel() == "no room"
        distcomm.sleep(symmetric=True, communicators=False)
        assert "asleep" in str(state.tp.peer_channel())
        assert distcomm.wake_up() > 0
        assert state.tp.peer_channel() == "no room"
        with state.tp.symmetric_memory():
            x = torch.ones(100, device=state.device)
        registered = state.symmetric_pool.stats()["registrations"]
        assert distcomm.wake_up() == 0
        assert state.symmetric_pool.stats()["registrations"] == registered
        assert (state.tp.all_reduce(x) == world).all()


def test_a_channel_that_never_worked(gpus: WorkerPool, most_ranks: int):
    gpus.run(without_channel, fresh_init_method(), ranks=most_ranks)


def closed_asleep(rank: int, world: int, method: str) -> None:
    """A job that ends asleep leaves nothing to the next one of the process."""
    with job(rank, world, method) as state:
        with state.tp.symmetric_memory():
            kept = torch.ones(100, device=state.device)
        distcomm.sleep(symmetric=True, communicators=False)
    with job(rank, world, f"{method}_again") as state:
        assert not state.tp.is_symmetric(kept)
        expect_collectives(state)
        distcomm.sleep(symmetric=True, communicators=False)
        distcomm.wake_up()
        expect_collectives(state)
        del kept


def test_a_job_may_end_asleep(gpus: WorkerPool, most_ranks: int):
    gpus.run(closed_asleep, fresh_init_method(), ranks=most_ranks)


def refusals(rank: int, world: int, method: str) -> None:
    """While symmetric memory is asleep, what needs it says so or does without; closing is fine."""
    with job(rank, world, method) as state:
        context = state.tp.symmetric_memory()
        with context:
            x = torch.ones(100, device=state.device)
        del x  # torch would give its memory out again
        distcomm.sleep(symmetric=True, communicators=False)
        with pytest.raises(SymmetricMemoryError, match=r"symmetric_memory: .* is asleep"), context:
            pass
        with pytest.raises(SleepError, match="create_group: the symmetric memory is asleep"):
            state.create_group("late", list(range(world)))
        for call in (lambda: state.symmetric_pool.reserve("4MiB"), state.symmetric_pool.freeze):
            with pytest.raises(SymmetricMemoryError, match="is asleep"):
                call()
        with state.graph_capture(symmetric=True) as c:
            assert c.pool is None
        x = torch.ones(100, device=state.device)
        assert (state.tp.all_reduce(x) == world).all()


def test_what_needs_symmetric_memory_is_refused(gpus: WorkerPool, most_ranks: int):
    gpus.run(refusals, fresh_init_method(), ranks=most_ranks)


def kernels_can_not_go_on(rank: int, world: int, method: str) -> None:
    """What fails for one rank's kernels pauses all ranks' until the next `wake_up`."""
    with job(rank, world, method) as state:
        kernels = state.tp.kernels
        if kernels is None:  # as simulated GPUs have none
            return
        distcomm.sleep(symmetric=True, communicators=False)
        with mock.patch.object(PeerChannel, "reopen", autospec=True) as reopen:
            reopen.side_effect = None if rank != 1 else torch.OutOfMemoryError("no memory left")
            with pytest.raises(SleepError, match=r"wake_up failed on ranks \[1\](?s:.)*no memory"):
                distcomm.wake_up()
            assert reopen.called
        assert state.tp.kernels is None
        expect_collectives(state)
        distcomm.wake_up()
        assert state.tp.kernels is kernels
        expect_collectives(state)
        distcomm.sleep(symmetric=True, communicators=False)
        distcomm.wake_up()
        assert state.tp.kernels is kernels
        expect_collectives(state)


def test_kernels_that_one_rank_can_not_wake_up(gpus: WorkerPool, most_ranks: int):
    gpus.run(kernels_can_not_go_on, fresh_init_method(), ranks=most_ranks)


def broken_off(rank: int, world: int, method: str) -> None:
    """A rank that breaks a call off keeps nobody waiting for ever, and the call can be repeated."""
    with job(rank, world, method) as state:
        kernels, pool, steps = state.tp.kernels, state.symmetric_pool, state.sleep_steps
        for name in ("fall_asleep", "wake_up"):
            if name == "wake_up":
                distcomm.sleep(symmetric=True, communicators=False)
            state.world.barrier()
            broken = mock.Mock(side_effect=LookupError(name))
            patch = mock.patch.object(pool, name, broken if rank == 0 else getattr(pool, name))
            short = mock.patch.object(steps, "_timeout_s", 1.0)
            with patch, short, pytest.raises(LookupError if rank == 0 else SleepError):
                distcomm.sleep(symmetric=True) if name == "fall_asleep" else distcomm.wake_up()
            state.world.barrier()  # the others have waited for this rank
            distcomm.wake_up()
            expect_collectives(state)
            assert state.tp.kernels is kernels
            assert not pool.asleep
        if kernels is not None:
            torch.cuda.synchronize()
            assert kernels.channel.signals_are_at_rest()


def test_a_call_that_one_rank_breaks_off_can_be_repeated(gpus: WorkerPool, most_ranks: int):
    gpus.run(broken_off, fresh_init_method(), ranks=most_ranks)


def out_of_memory(rank: int, world: int, method: str) -> None:
    """Where one rank can't have its symmetric memory again, none has; and it can be repeated."""
    with job(rank, world, method, symmetric_reserve="1GiB") as state:
        with state.tp.symmetric_memory():
            x = torch.ones(1000, device=state.device)
        before = torch.cuda.mem_get_info()[0]
        freed = distcomm.sleep(symmetric=True, communicators=False).symmetric_bytes
        assert freed >= 1 << 30
        hog = None
        if rank == 0:
            torch.cuda.empty_cache()
            left = torch.cuda.mem_get_info()[0]
            hog = torch.empty(left - (256 << 20), dtype=torch.uint8, device=state.device)
        state.world.barrier()
        with pytest.raises(
            SleepError, match=r"failed on ranks \[0\].*(?s:.)*ncclMemAlloc returned"
        ):
            distcomm.wake_up()
        assert state.symmetric_pool.stats()["asleep"]
        if rank != 0:
            assert torch.cuda.mem_get_info()[0] >= before + freed // 2
        del hog
        torch.cuda.empty_cache()
        state.world.barrier()
        assert distcomm.wake_up() == freed
        x.fill_(1.0)
        assert (state.tp.all_reduce(x, out=x) == world).all()


@pytest.mark.alone
def test_symmetric_memory_that_one_rank_can_not_have_again(gpus: WorkerPool, most_ranks: int):
    gpus.run(out_of_memory, fresh_init_method(), ranks=most_ranks)


def suspended(rank: int, world: int, method: str) -> None:
    """NCCL's own buffers, where it can; its calls raise until it is woken up."""
    with job(rank, world, method) as state:
        x = torch.ones(10, device=state.device)
        with state.tp.pynccl_comm.change_state(enable=rank != 0):
            assert distcomm.sleep(symmetric=True).communicators == {}
        distcomm.wake_up()
        assert (state.tp.all_reduce(x) == world).all()
        supported = state.tp.pynccl_comm.nccl.supports("comm_suspend")
        report = distcomm.sleep(symmetric=True)
        name = state.tp.pynccl_comm.member.name
        if supported:
            assert report.communicators[name] > 0
            with pytest.raises(SleepError, match="all_reduce: the communicator is suspended"):
                state.tp.all_reduce(x)
        else:
            assert "can't suspend it; 2.29.7 and newer can" in report.awake[name]
            assert (state.tp.all_reduce(x) == world).all()
        distcomm.wake_up()
        assert (state.tp.all_reduce(x) == world).all()


def test_communicators_are_suspended_where_nccl_can(gpus: WorkerPool, most_ranks: int):
    gpus.run(suspended, fresh_init_method(), ranks=most_ranks)
