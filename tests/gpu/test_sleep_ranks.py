"""Memory that sleeps on several GPUs: pools of one process, collectives, symmetric memory."""

from __future__ import annotations

import pytest
import torch

from distcomm import SleepablePool
from tests.gpu.test_sleep import WORDS, Probe, holds, made, mapped, new_pool
from tests.gpu.test_symmetric_memory import symmetric_job
from tests.worker_pool import WorkerPool, fresh_init_method


def two_devices(rank: int, world: int) -> None:
    """A process's pools on two GPUs: each takes what is made on its own, and sleeps alone."""
    with new_pool("cuda:0", name="zero") as zero, SleepablePool("cuda:1", name="one") as one:
        probe = Probe(zero, one)
        for current in (0, 1):
            with torch.cuda.device(current), zero.use("w"), one.use("w"):
                assert probe("cuda:0") == ("zero", "w")
                assert probe("cuda:1") == ("one", "w")
            assert probe("cuda:0") is None
            assert probe("cuda:1") is None
        with zero.use("w"):
            assert probe("cuda:1") is None
        x = made(zero, "w", 24, 1)
        assert holds(x, 1)
        y = made(one, "w", 24, 2)
        assert holds(y, 2)
        zero.sleep(("w",))
        assert holds(y, 2)
        one.sleep(("w",))
        assert sum(mapped(zero).values()) == sum(mapped(one).values()) == 0
        with torch.cuda.device(1):
            zero.wake_up()
        assert holds(x, 1)
        one.wake_up()
        assert holds(y, 2)


def symmetric_in_both_orders(rank: int, world: int, method: str) -> None:
    """A symmetric context in a `use`, and the other way round; the one doesn't touch the other."""
    with symmetric_job(rank, world, method) as state, new_pool(state.device, name="pool") as pool:
        tp, device = state.tp, state.device
        probe = Probe(pool)
        with pool.use("a"):
            with tp.symmetric_memory():
                x = torch.full((WORDS,), rank + 1.0, device=device)
                assert tp.is_symmetric(x)
                with pool.use("b"):
                    y = torch.full((WORDS,), rank + 1.0, device=device)
                    assert not tp.is_symmetric(y)
                    assert probe(device) == ("pool", "b")
                assert tp.is_symmetric(torch.empty(8, device=device))
            assert probe(device) == ("pool", "a")
        with pytest.raises(ZeroDivisionError), tp.symmetric_memory(), pool.use("a"):
            raise ZeroDivisionError
        with tp.symmetric_memory():
            assert tp.is_symmetric(torch.empty(8, device=device))
        assert probe(device) is None
        total = world * (world + 1) / 2
        for _ in range(2):
            for z in (x, y):
                assert (tp.all_reduce(z) == total).all()
            pool.sleep(("b",))
            assert (tp.all_reduce(x) == total).all()
            pool.wake_up()


def collectives(rank: int, world: int, method: str, tune: str) -> None:
    """Eager and captured, on tensors of a pool, before and after it has slept."""
    with symmetric_job(rank, world, method, tune=tune) as state, new_pool(state.device) as pool:
        tp, device = state.tp, state.device
        with pool.use("weights"):
            x = torch.full((WORDS,), rank + 1.0, device=device)
        with pool.use("out"):
            reduced = torch.zeros(WORDS, device=device)
            gathered = torch.zeros(world, WORDS, device=device)

        def calls() -> None:
            tp.all_reduce(x, out=reduced)
            tp.all_gather_into_tensor(gathered, x)

        def is_right() -> bool:
            ranks = torch.arange(world, device=device).unsqueeze(1)
            wanted = (x[0] + ranks - rank).expand(world, WORDS)
            return torch.equal(gathered, wanted) and torch.equal(reduced, wanted.sum(0))

        calls()
        assert is_right()
        graph = torch.cuda.CUDAGraph()
        with state.graph_capture() as c, torch.cuda.graph(graph, pool=c.pool, stream=c.stream):
            calls()
        for number in range(3):
            for call in (calls, graph.replay):
                x.fill_(rank + 1.0 + number)
                reduced.zero_()
                gathered.zero_()
                call()
                assert is_right()
            x.fill_(rank + 2.0 + number)
            torch.cuda.synchronize()
            tp.barrier()  # a peer may be about to read what goes to sleep
            pool.sleep(("weights",))
            tp.barrier()
            pool.wake_up()
            graph.replay()
            assert is_right()
        del graph


def test_two_devices_of_a_process(gpus: WorkerPool, most_ranks: int) -> None:
    gpus.run(two_devices, ranks=1)
    gpus.reset()  # its contexts on other ranks' GPUs


def test_inside_and_around_symmetric_memory(gpus: WorkerPool, most_ranks: int) -> None:
    gpus.run(symmetric_in_both_orders, fresh_init_method(), ranks=most_ranks)


@pytest.mark.parametrize("tune", ["nccl", "shipped"])
def test_collectives(gpus: WorkerPool, world: int, tune: str) -> None:
    gpus.run(collectives, fresh_init_method(), tune, ranks=world)
