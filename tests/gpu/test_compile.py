"""torch.compile on GPUs: one graph, eager's results, and CUDA graphs of torch's and of our own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo
import torch._inductor.config

from distcomm import GroupClosedError, GroupCoordinator
from tests.compiled import MOST, C, TensorParallelBlock, dynamo, num_calls
from tests.gpu.job import start
from tests.worker_pool import WorkerPool, fresh_init_method

# Rounds where torch rounds without a compiler.
EXACT = {"emulate_precision_casts": True}


def on_each_batch(
    rank: int, world: int, method: str, dtype: torch.dtype, mode: str, tune: str
) -> None:
    """The block at many batch sizes, compiled and not; and how often it was compiled."""
    with start(rank, world, method, tune=tune) as state, dynamo() as stats, torch.inference_mode():
        eager = TensorParallelBlock(state.tp, dtype)
        block = TensorParallelBlock(state.tp, dtype)
        options = {**torch._inductor.list_mode_options(mode), **EXACT}
        compiled = torch.compile(block, fullgraph=True, dynamic=True, options=options)
        generator = torch.Generator(state.device).manual_seed(2)
        for number, batch in enumerate((1, 2, 7, 33, MOST)):
            x = torch.randn(batch, C, generator=generator, device=state.device).to(dtype)
            for repeat in range(3):  # torch warms up, captures, replays
                slot = torch.tensor([(number * 3 + repeat) % 16], device=state.device)
                torch.compiler.cudagraph_mark_step_begin()
                before = num_calls(state.tp)
                result = compiled(x, slot)
                made = num_calls(state.tp) - before
                replayed = mode == "reduce-overhead" and repeat == 2
                assert (made == 0) == replayed, (batch, repeat, made)
                tolerance = {"atol": 2e-2, "rtol": 2e-2} if dtype == torch.bfloat16 else {}
                torch.testing.assert_close(result, eager(x, slot), **tolerance)
        torch.testing.assert_close(block.cache, eager.cache, **tolerance)
        assert stats["unique_graphs"] <= 2
        assert not torch._dynamo.utils.counters["graph_break"]
        assert not torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("tune", ["shipped", "nccl"])
def test_a_block(gpus: WorkerPool, world: int, mode: str, tune: str) -> None:
    gpus.run(on_each_batch, fresh_init_method(), torch.bfloat16, mode, tune, ranks=world)


def all_collectives(group: GroupCoordinator, x: torch.Tensor) -> list[torch.Tensor]:
    """Each that a graph can have; `x` is [T, 64]."""
    world, rank = group.world_size, group.rank_in_group
    sizes = [8 * (number + 1) for number in range(world)]
    total = group.all_reduce(x)
    in_place = x * 2
    group.all_reduce(in_place, out=in_place)
    normed, residual = group.all_reduce_rms_norm(x, x[0], total)
    wide = group.all_gather(x)
    gathered, share = x.new_empty(world * x.shape[0], 64), torch.empty_like(x)
    group.all_gather_into_tensor(gathered, x)
    group.reduce_scatter_tensor(share, gathered)
    mine = x[: sizes[rank]]
    ragged = group.all_gatherv(mine, sizes)
    exchanged = torch.empty_like(gathered)
    group.all_to_all_single(exchanged, gathered)
    sent = x + 1
    group.broadcast(sent, src=world - 1)
    scattered = [group.reduce_scatter(wide), group.reduce_scatterv(ragged, sizes)]
    return [
        *(total, in_place, normed, residual, wide, gathered, share, ragged, exchanged, sent),
        *scattered,
    ]


def like_eager(rank: int, world: int, method: str, backend: str) -> None:
    """Bits of all results, eager and captured by hand, in symmetric memory and in ordinary one."""
    with start(rank, world, method, tune="shipped") as state, dynamo(), torch.inference_mode():
        tp = state.tp
        x = torch.randn(64, 64, device=state.device).bfloat16() + tp.rank_in_group
        compiled: Callable[..., Any] = torch.compile(
            all_collectives, backend=backend, fullgraph=True
        )
        wanted = all_collectives(tp, x)
        for each, right in zip(compiled(tp, x), wanted, strict=True):
            assert torch.equal(each, right)
        with tp.symmetric_memory():
            static = x.clone()
        for symmetric in (False, True):
            graph = torch.cuda.CUDAGraph()
            with (
                state.graph_capture(symmetric=symmetric) as c,
                torch.cuda.graph(graph, pool=c.pool, stream=c.stream),
            ):
                results = compiled(tp, static)
            for factor in (1, 3):
                static.copy_(x * factor)
                graph.replay()
                for each, right in zip(results, all_collectives(tp, x * factor), strict=True):
                    assert torch.equal(each, right)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_collectives_give_eagers_bits(gpus: WorkerPool, world: int, backend: str) -> None:
    gpus.run(like_eager, fresh_init_method(), backend, ranks=world)


def unused_results(rank: int, world: int, method: str) -> None:
    """Ranks differ in what they use, so that their compilers have different graphs."""
    with start(rank, world, method, tune="shipped") as state, dynamo(), torch.inference_mode():
        tp = state.tp

        def step(x: torch.Tensor) -> torch.Tensor:
            first, second = tp.all_reduce(x @ x), tp.all_gather(x + 1)
            third = tp.all_reduce(x * 3)
            tp.broadcast(x + 2, src=0)
            if tp.rank_in_group % 2:
                return third.sum() + second.sum()
            return first.sum()

        compiled = torch.compile(step, fullgraph=True, mode="reduce-overhead")
        for number in range(4):
            x = torch.full((64, 64), float(number), device=state.device)
            before = num_calls(tp)
            result = compiled(x)
            assert num_calls(tp) - before == (4 if number < 2 else 0)
            assert torch.equal(result, step(x))


@pytest.mark.timeout(300)
def test_nothing_is_dropped_or_reordered(gpus: WorkerPool, most_ranks: int) -> None:
    gpus.run(unused_results, fresh_init_method(), ranks=most_ranks)


def closed(rank: int, world: int, method: str) -> None:
    with dynamo():
        with start(rank, world, method) as state:
            tp, x = state.tp, torch.ones(8, device=state.device)
            compiled = torch.compile(lambda x: tp.all_reduce(x) + 1, fullgraph=True)
            assert (compiled(x) == world + 1).all()
        with pytest.raises(GroupClosedError, match="that this was compiled for is closed"):
            compiled(x)


@pytest.mark.timeout(300)
def test_a_destroyed_group(gpus: WorkerPool, most_ranks: int) -> None:
    gpus.run(closed, fresh_init_method(), ranks=most_ranks)
