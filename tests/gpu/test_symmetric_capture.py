"""Symmetric memory in CUDA graphs: right over many replays, private to the graph, given back."""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Callable

import pytest
import torch

import distcomm
from distcomm import (
    CaptureMismatchError,
    GroupCoordinator,
    NcclLibrary,
    SymmetricMemoryError,
    SymmetricOutOfMemoryError,
)
from tests.gpu.job import start
from tests.gpu.test_symmetric_memory import MIB, symmetric_job
from tests.worker_pool import WorkerPool, fresh_init_method

RACE = "captured-symmetric-race"
NUM_REPLAYS = 10_000
N = 2048


def becomes_true(condition: Callable[[], bool], within_s: float = 5.0) -> bool:
    deadline = time.monotonic() + within_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def num_programmatic_edges(graph: torch.cuda.CUDAGraph) -> int:
    """Edges of a captured graph that don't wait for the kernel before to end."""
    cuda = ctypes.CDLL("libcuda.so.1")
    raw, count = ctypes.c_void_p(graph.raw_cuda_graph()), ctypes.c_size_t()
    assert cuda.cuGraphGetEdges_v2(raw, None, None, None, ctypes.byref(count)) == 0
    nodes = ctypes.c_void_p * count.value
    edges = (ctypes.c_ubyte * (8 * count.value))()  # CUgraphEdgeData: from_port, to_port, type
    code = cuda.cuGraphGetEdges_v2(raw, nodes(), nodes(), edges, ctypes.byref(count))
    assert code == 0
    return sum(edges[8 * i + 2] == 1 for i in range(count.value))


def step(group: GroupCoordinator, counter: torch.Tensor, errors: torch.Tensor) -> None:
    """Collectives right behind the kernels that make their input; wrong results are counted.

    `counter` holds the number of the replay plus the rank.
    """
    world, rank = group.world_size, group.rank_in_group
    counter.add_(1)
    first = counter[0] - rank
    total = group.all_reduce(counter * 1)
    errors.add_((total != world * first + sum(range(world))).sum())
    gathered = group.all_gather_into_tensor(counter.new_empty(world, N), counter * 2)
    ranks = torch.arange(world, device=counter.device).unsqueeze(1)
    errors.add_((gathered != 2 * (first + ranks)).sum())
    share = group.reduce_scatter_tensor(counter.new_empty(N), gathered * 1)
    errors.add_((share != 2 * world * (first + rank)).sum())


def replays(rank: int, world: int, method: str, symmetric: bool) -> None:
    """10,000 replays, in a symmetric graph pool or through a context, equal what eager gives."""
    with symmetric_job(rank, world, method) as state:
        tp, device = state.tp, state.device
        counter = torch.full((N,), float(rank), device=device)
        errors = torch.zeros((), dtype=torch.int64, device=device)
        step(tp, counter, errors)
        graph = torch.cuda.CUDAGraph()
        with tp.graph_capture(symmetric=symmetric) as c:
            with torch.cuda.graph(graph, pool=c.pool, stream=c.stream):
                with tp.symmetric_memory(enabled=not symmetric):
                    assert tp.is_symmetric(torch.empty(N, device=device))
                    step(tp, counter, errors)
        for _ in range(NUM_REPLAYS):
            graph.replay()
        step(tp, counter, errors)
        assert counter[0].item() == rank + NUM_REPLAYS + 2
        assert errors.item() == 0


def in_place(rank: int, world: int, method: str, verifies: bool) -> None:
    """Each rank's part of the whole is the input, or the output, and at another offset on each."""
    with symmetric_job(rank, world, method, verify_symmetric=verifies) as state:
        tp, device = state.tp, state.device
        with tp.symmetric_memory():
            whole = torch.zeros(world, N, device=device)
        own = whole[rank]
        wanted = torch.arange(1.0, world + 1, device=device).unsqueeze(1).expand(world, N)

        def calls() -> torch.Tensor:
            own.fill_(rank + 1.0)
            tp.all_gather_into_tensor(whole, own)
            gathered = whole.clone()
            tp.reduce_scatter_tensor(own, whole)
            return gathered

        assert torch.equal(calls(), wanted)
        assert (own == world * (rank + 1.0)).all()
        whole.zero_()
        graph = torch.cuda.CUDAGraph()
        with tp.graph_capture() as c, torch.cuda.graph(graph, pool=c.pool, stream=c.stream):
            gathered = calls()
        for _ in range(3):
            graph.replay()
            assert torch.equal(gathered, wanted)
            assert (own == world * (rank + 1.0)).all()
        del graph


def fenced(rank: int, world: int, method: str, ignored: tuple[str, ...]) -> int:
    """How many programmatic edges a captured symmetric all-reduce has."""
    with symmetric_job(rank, world, method, ignore_known_issues=ignored) as state:
        tp, device = state.tp, state.device
        x = torch.ones(N, device=device)
        graph = torch.cuda.CUDAGraph(keep_graph=True)
        with (
            tp.graph_capture(symmetric=True) as c,
            torch.cuda.graph(graph, pool=c.pool, stream=c.stream),
        ):
            for _ in range(3):
                x = tp.all_reduce(x * 2)
        edges = num_programmatic_edges(graph)
        graph.instantiate()
        graph.replay()
        assert (x == (2 * world) ** 3).all()
        return edges


def private_to_the_graph(rank: int, world: int, method: str) -> None:
    """What a graph replays into is given to nobody else until the graph is gone."""
    with symmetric_job(rank, world, method) as state:
        tp, device, pool = state.tp, state.device, state.symmetric_pool
        x = torch.full((N,), rank + 1.0, device=device)
        result = torch.empty_like(x)
        stream = torch.cuda.Stream()
        graph = torch.cuda.CUDAGraph()
        with tp.graph_capture(stream) as c:
            assert c.stream is stream
            assert c.pool is None
            with torch.cuda.graph(graph, stream=c.stream):
                with tp.symmetric_memory():
                    doubled, total = x * 2, torch.empty_like(x)
                    places = {doubled.data_ptr(), total.data_ptr()}
                tp.all_reduce(doubled, out=total)
                result.copy_(total)
                del doubled, total
        assert pool.stats()["captures"] == 1
        with torch.cuda.stream(stream):
            for trial in range(20):
                with tp.symmetric_memory():
                    mine = [torch.full((N,), -7.0, device=device) for _ in range(4)]
                assert not places & {tensor.data_ptr() for tensor in mine}
                x.fill_(rank + trial)
                graph.replay()
                assert (result == 2 * (sum(range(world)) + world * trial)).all()
                assert all((tensor == -7.0).all() for tensor in mine)
        used = pool.stats()["bytes_used"]
        del graph
        gc.collect()
        assert becomes_true(lambda: pool.stats()["captures"] == 0)
        assert pool.stats()["bytes_used"] == used
        tp.barrier()  # until all ranks know that their graph is gone
        with tp.symmetric_memory():
            with distcomm.graph_capture():  # where all ranks give it back together
                assert pool.stats()["captures"] == 0
        assert pool.stats()["bytes_used"] < used


def memory_returns(rank: int, world: int, method: str) -> None:
    """A symmetric graph pool comes back when its graph dies; one per graph, or shared by many."""
    with symmetric_job(rank, world, method) as state:
        tp, device, pool = state.tp, state.device, state.symmetric_pool
        x = torch.ones(6 * MIB, device=device)
        with distcomm.graph_capture():  # gives back what is pending
            pass
        start = pool.stats()
        for trial in range(30):  # 30 times 48 MiB wouldn't fit
            graphs = [torch.cuda.CUDAGraph() for _ in range(2)]
            with distcomm.graph_capture(symmetric=True) as c:
                for graph in graphs:
                    with torch.cuda.graph(graph, pool=c.pool, stream=c.stream):
                        y = tp.all_reduce(x)
                        assert tp.is_symmetric(y)
                        total = y.sum()
                        del y
            graphs[0].replay()
            graphs[1].replay()
            assert total.item() == world * x.numel()
            del graphs, graph, total
            gc.collect()
            if trial % 3 == rank % 3:  # what one rank alone does is no matter
                torch.cuda.empty_cache()
        with distcomm.graph_capture():
            pass
        end = pool.stats()
        for name in ("bytes_used", "segments_made", "registrations"):
            assert end[name] == start[name], f"{name}: {start} became {end}"


def growth_is_refused(rank: int, world: int, method: str) -> None:
    """A capture that needs more memory raises before NCCL is called, and can be repeated."""
    with symmetric_job(rank, world, method) as state:
        tp, device, pool = state.tp, state.device, state.symmetric_pool
        x = torch.ones(24 * MIB, device=device)  # 96 MiB

        def capture(symmetric: bool) -> torch.Tensor:
            graph = torch.cuda.CUDAGraph()
            with tp.graph_capture(symmetric=symmetric) as c:
                with torch.cuda.graph(graph, pool=c.pool, stream=c.stream):
                    with tp.symmetric_memory(enabled=not symmetric):
                        y = torch.empty_like(x)
                    tp.all_reduce(x, out=y)
            graph.replay()
            assert (y == world).all()
            assert tp.is_symmetric(y)
            return y

        before = pool.stats()
        for symmetric in (False, True):
            with pytest.raises(SymmetricOutOfMemoryError, match=f"at least {96 * MIB} bytes"):
                capture(symmetric)
            assert not torch.cuda.is_current_stream_capturing()
        assert pool.stats()["segments_made"] == before["segments_made"]
        assert pool.stats()["registrations"] == before["registrations"]
        assert tp.all_reduce(x[:4]).tolist() == [world] * 4
        pool.reserve("256MiB")
        capture(False)
        capture(True)


def registration_is_refused(rank: int, world: int, method: str) -> None:
    """Another group's new segment can't be registered in a capture: refused before NCCL."""
    with symmetric_job(rank, world, method) as state:
        tp, device = state.tp, state.device
        other = state.create_group("reversed", list(reversed(range(world))))
        with tp.symmetric_memory():
            torch.empty(32 * MIB, device=device)

        def capture() -> torch.Tensor:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                with other.symmetric_memory():
                    x = torch.ones(N, device=device)
                y = other.all_reduce(x)
            graph.replay()
            return y

        with pytest.raises(SymmetricMemoryError, match="not registered with this communicator"):
            capture()
        with other.symmetric_memory():
            pass
        assert (capture() == world).all()
        with distcomm.graph_capture():  # registers by itself
            pass


def differences(rank: int, world: int, method: str) -> None:
    """At the end of a capture the ranks compare; the odd rank is named, and all go on."""
    with symmetric_job(rank, world, method) as state:
        tp, device = state.tp, state.device
        x = torch.ones(N, device=device)
        odd = world - 1

        def capture(body: Callable[[], object]) -> None:
            with tp.graph_capture() as c, torch.cuda.graph(torch.cuda.CUDAGraph(), stream=c.stream):
                tp.all_reduce(x)
                body()

        with pytest.raises(CaptureMismatchError, match="captured call 1 differs") as caught:
            capture(lambda: tp.all_reduce(x[: N // 2] if rank == odd else x))
        if world > 2:
            assert caught.value.odd_ranks == [odd]
        assert "all_reduce sum" in str(caught.value)
        with pytest.raises(CaptureMismatchError, match="nothing"):
            capture(lambda: rank == odd or tp.all_reduce(x))

        def fails_on_one() -> None:
            if rank == odd:
                raise ZeroDivisionError("in the body")

        expected = ZeroDivisionError if rank == odd else CaptureMismatchError
        with pytest.raises(expected, match="in the body") as failed:
            capture(fails_on_one)
        if rank != odd:
            assert failed.value.odd_ranks == [odd]

        def at_another_place() -> None:
            with tp.symmetric_memory():
                spare = torch.empty(6 * MIB, device=device) if rank == odd else None
                y = torch.ones(3 * MIB, device=device)
                z = torch.empty_like(y)
            tp.all_reduce(y, out=z)
            del spare

        with pytest.raises(CaptureMismatchError, match="offset"):
            capture(at_another_place)
        capture(lambda: tp.all_reduce(x))
        assert tp.all_reduce(x)[0].item() == world


@pytest.mark.parametrize("symmetric", [True, False], ids=["graph pool", "context"])
def test_replays_equal_eager(gpus: WorkerPool, world: int, symmetric: bool) -> None:
    gpus.run(replays, fresh_init_method(), symmetric, ranks=world)


@pytest.mark.parametrize("verifies", [False, True], ids=["", "verified"])
def test_in_place(gpus: WorkerPool, most_ranks: int, verifies: bool) -> None:
    gpus.run(in_place, fresh_init_method(), verifies, ranks=most_ranks)


def test_captured_collectives_wait_for_their_input(gpus: WorkerPool, most_ranks: int) -> None:
    """NCCL's programmatic edges are gone; ignoring the known issue shows that they were there."""
    assert gpus.run(fenced, fresh_init_method(), (), ranks=most_ranks) == [0] * most_ranks
    if 22800 <= NcclLibrary().version < 23007:
        edges = gpus.run(fenced, fresh_init_method(), (RACE,), ranks=most_ranks)
        assert edges == [3] * most_ranks


def alone(_rank: int, _world: int, method: str) -> None:
    with start(0, 1, method) as state:
        graph = torch.cuda.CUDAGraph()
        with (
            state.graph_capture(symmetric=True) as c,
            torch.cuda.graph(graph, pool=c.pool, stream=c.stream),
        ):
            y = state.tp.all_reduce(torch.ones(8, device=state.device)) + 1
        assert c.pool is None
        graph.replay()
        assert (y == 2).all()


def test_one_rank_captures_ordinary_memory(gpus: WorkerPool) -> None:
    gpus.run(alone, fresh_init_method(), ranks=1)


def test_differences_are_found(gpus: WorkerPool, world: int) -> None:
    gpus.run(differences, fresh_init_method(), ranks=world)


@pytest.mark.parametrize(
    "function",
    [private_to_the_graph, memory_returns, growth_is_refused, registration_is_refused],
    ids=lambda function: function.__name__,
)
def test_symmetric_capture(gpus: WorkerPool, most_ranks: int, function: object) -> None:
    gpus.run(function, fresh_init_method(), ranks=most_ranks)
