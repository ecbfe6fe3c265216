"""torch.compile over groups: other threads, caches on disk, what can't be in a graph, errors."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch._dynamo
import torch._inductor.config

import distcomm
from distcomm import GroupClosedError, ParallelState
from distcomm.backends import TorchPgBackend
from tests.compiled import dynamo, num_calls
from tests.cpu.job import Job, start
from tests.worker_pool import WorkerPool, fresh_init_method

ROWS = 6


# ---- while others compile -----------------------------------------------------------------------


def during_compilation(state: ParallelState) -> None:
    """Calls beside a compilation: of another thread, and of a backend that tries its graph."""
    x, compiles, go_on = torch.ones(3), threading.Event(), threading.Event()

    def slow(graph: torch.fx.GraphModule, _: object) -> Callable[..., Any]:
        compiles.set()
        assert go_on.wait(60)
        return graph.forward

    def tries(graph: torch.fx.GraphModule, inputs: Sequence[torch.Tensor]) -> Callable[..., Any]:
        graph(*inputs)
        return graph.forward

    with dynamo(), ThreadPoolExecutor(1) as other:
        compiled = other.submit(torch.compile(lambda x: x + 1, backend=slow), x)
        try:
            assert compiles.wait(60)
            before = num_calls(state.tp)
            assert torch.equal(state.tp.all_reduce(x), 2 * x)
            state.tp.barrier()
            assert num_calls(state.tp) - before == 1
        finally:
            go_on.set()
        assert torch.equal(compiled.result(60), x + 1)
        tried = torch.compile(lambda x: state.tp.all_reduce(x), backend=tries, fullgraph=True)
        assert torch.equal(tried(x), 2 * x)


@pytest.mark.timeout(300)
def test_eager_calls_during_a_compilation(compile_job: Job) -> None:
    compile_job.run(during_compilation)


def in_inference_mode(rank: int, world: int, url: str) -> None:
    """Workers of engines often run in it from the start."""
    with torch.inference_mode():
        state = start(rank, world, url, tp=world)
    with state, dynamo():
        for backend in ("eager", "aot_eager"):
            step = torch.compile(
                lambda x: state.tp.all_reduce(x) + 1, backend=backend, fullgraph=True
            )
            x = torch.ones(3)
            assert torch.equal(step(x), world * x + 1)
            with torch.inference_mode():
                assert torch.equal(step(x), world * x + 1)


@pytest.mark.timeout(300)
def test_a_job_that_began_in_inference_mode() -> None:
    with WorkerPool(2, timeout_s=200) as pool:
        pool.run(in_inference_mode, fresh_init_method())


def cached(rank: int, world: int, url: str, compiled_once: Path) -> None:
    """Shapes depend on rank and size. All but the first rank compile when its graph is on disk."""
    sizes = [1 + 4 * number for number in range(world)]

    def step(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return state.tp.reduce_scatterv(x, sizes), state.tp.all_gather(x, 0)

    def told(backend: TorchPgBackend, *args: Any, **kwargs: Any) -> torch.Tensor:
        compiled_once.touch()
        return reduce_scatterv(backend, *args, **kwargs)

    reduce_scatterv = TorchPgBackend.reduce_scatterv
    with start(rank, world, url, tp=world, timeout=100) as state, torch.inference_mode():
        x = torch.arange(2.0 * sum(sizes)).view(-1, 2) + rank
        wanted = step(x)
        deadline = time.monotonic() + 60
        while rank and not compiled_once.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        compiled = torch.compile(step, fullgraph=True)
        with mock.patch.object(TorchPgBackend, "reduce_scatterv", told):
            results = compiled(x)
        for each, right in zip(results, wanted, strict=True):
            assert torch.equal(each, right)


@pytest.mark.timeout(300)
def test_graphs_on_disk_are_of_one_rank_and_size(tmp_path: Path) -> None:
    env = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    for world in (2, 3):
        with WorkerPool(world, timeout_s=200) as pool:
            pool.run(cached, fresh_init_method(), tmp_path / f"compiled by {world}", env=env)


# ---- what can't be in a graph -----------------------------------------------------------------


def outside(state: ParallelState) -> None:
    tp = state.tp
    plan = distcomm.ContextParallelPlan([5, 3], tp.world_size)

    def step(x: torch.Tensor) -> list[Any]:
        x = x * 2
        tp.barrier()
        results = [tp.reduce(x), tp.gather(x), tp.broadcast_object(x.shape[0])]
        results += [tp.all_gather_object(x.shape[0]), len(tp.stats()), tp.is_symmetric(x)]
        if tp.is_first_rank:
            tp.send(x)
        else:
            results.append(tp.recv(x.shape, x.dtype))
        gathered = x.new_empty(2 * x.shape[0], 4)
        tp.cp_all_gather_into_tensor_async(gathered, x).wait()
        with tp.symmetric_memory():
            y = x + 1
        shard = y[: plan.tokens_per_rank[tp.rank_in_group]]
        results += [distcomm.all_gather_kv(tp, plan, shard), gathered + 1]
        sent = tp.broadcast_tensor_dict({"y": y} if tp.is_first_rank else None)
        return [*results, sent["y"]]

    with dynamo() as stats:
        compiled = torch.compile(step, backend="eager")
        for _ in range(2):
            x = torch.full((ROWS, 4), float(state.rank))
            for each, right in zip(compiled(x), step(x), strict=True):
                same = torch.equal(each, right) if isinstance(each, torch.Tensor) else each == right
                assert same
        breaks = torch._dynamo.utils.counters["graph_break"]
        for method in ("barrier", "reduce", "gather", "send" if tp.is_first_rank else "recv"):
            wanted = f"distcomm: {method} can't be part of a compiled graph"
            assert any(wanted in reason for reason in breaks), method
        # Dynamo looked at `step` and its parts, and into none of what they call.
        assert stats["unique_graphs"] <= 12, stats
        for call in (tp.barrier, tp.stats, lambda: distcomm.all_gather_kv(tp, plan, x)):
            with pytest.raises(torch._dynamo.exc.Unsupported, match="part of a compiled graph"):
                torch.compile(lambda x, call=call: (call(), x), fullgraph=True)(x)


@pytest.mark.timeout(300)
def test_other_calls_end_a_graph(compile_job: Job) -> None:
    compile_job.run(outside)


# ---- errors -----------------------------------------------------------------------------------


def bad_input(state: ParallelState) -> None:
    tp, x = state.tp, torch.ones(3, 4)
    for step, message in (
        (lambda: tp.all_reduce(x, out=torch.empty(4)), r"out must be of shape \[3, 4\]"),
        (lambda: tp.all_reduce(x, out=x.double()), "out must be of dtype torch.float32"),
        (lambda: tp.reduce_scatter(x, 0), "x must be divisible by the group size 2 in dim 0"),
        (lambda: tp.all_gather(x, 2), "dim must be between -2 and 1"),
        (lambda: tp.all_gather_into_tensor(x, x), r"output must be of shape \[6, 4\]"),
        (lambda: tp.reduce_scatter_tensor(x[:1], x), "input must be divisible"),
        (lambda: tp.all_gatherv(x, [3]), "sizes must be 2 row counts"),
        (lambda: tp.all_to_all_single(x[0], x), r"output must be of shape \[4, 4\]"),
        (lambda: tp.all_reduce(x, "median"), "op must be one of sum"),
        (lambda: tp.broadcast(x, 2), "src must be a rank in the group"),
        (lambda: tp.all_reduce_rms_norm(x, x), r"weight must be torch.float32 \[4\]"),
    ):
        torch._dynamo.reset()
        with pytest.raises(RuntimeError, match=message):
            torch.compile(step, backend="aot_eager", fullgraph=True)()
    assert torch.equal(tp.all_reduce(x), 2 * x)  # the group is as good as before


@pytest.mark.timeout(300)
def test_bad_input_is_named(compile_job: Job) -> None:
    compile_job.run(bad_input)


def closed_groups(rank: int, world: int, urls: list[str]) -> None:
    x = torch.ones(3)
    with dynamo():
        state = start(rank, world, urls[0], tp=world)
        tp, alone = state.tp, state.pp
        of_a_group = torch.compile(lambda x: tp.all_reduce(x) + 1, fullgraph=True)
        of_one = torch.compile(lambda x: alone.all_reduce(x) + 1, fullgraph=True)
        by_getter = torch.compile(
            lambda x: distcomm.get_tp_group().all_reduce(x) + 1, fullgraph=True
        )
        for step in (of_a_group, by_getter):
            assert torch.equal(step(x), world * x + 1)
        assert torch.equal(of_one(x), x + 1)
        state.close()
        message = "the group 'tp' that this was compiled for is closed"
        for _ in range(2):
            with pytest.raises(GroupClosedError, match=message):
                of_a_group(x)
        with pytest.raises(RuntimeError, match="the group 'pp' that this was compiled for"):
            of_one(x)
        with start(rank, world, urls[1], tp=world):
            with pytest.raises(GroupClosedError, match=message):
                of_a_group(x)
            assert torch.equal(by_getter(x), world * x + 1)
        with pytest.raises(RuntimeError, match="no groups yet"):
            by_getter(x)


@pytest.mark.timeout(300)
def test_a_destroyed_group() -> None:
    with WorkerPool(2, timeout_s=200) as pool:
        pool.run(closed_groups, [fresh_init_method(), fresh_init_method()])
