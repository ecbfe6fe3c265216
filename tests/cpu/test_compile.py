"""torch.compile over the group's collectives: no graph breaks, eager's results, the same order."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch._dynamo
import torch._inductor.config
from torch import library as torch_library
from torch.utils._python_dispatch import TorchDispatchMode

from distcomm import GroupCoordinator, ParallelState, graph_ops
from tests.compiled import MOST, C, TensorParallelBlock, dynamo, num_calls
from tests.cpu.job import Job
from tests.worker_pool import WorkerPool

ROWS = 6  # of each rank's tensors; divisible by 2 and 3


# ---- a block of a model -----------------------------------------------------------------------


def compiled_block(state: ParallelState, dynamic: bool | None, batches: Sequence[int]) -> None:
    with dynamo() as stats, torch.inference_mode():
        eager = TensorParallelBlock(state.tp, torch.float32)
        block = TensorParallelBlock(state.tp, torch.float32)
        compiled = torch.compile(block, fullgraph=True, dynamic=dynamic)
        generator = torch.Generator().manual_seed(2)
        for number, batch in enumerate(batches):
            x = torch.randn(batch, C, generator=generator)
            slot = torch.tensor([number % 16])
            torch.testing.assert_close(compiled(x, slot), eager(x, slot), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(block.cache, eager.cache, atol=1e-5, rtol=1e-4)
        assert stats["unique_graphs"] <= 2
        assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("dynamic", [None, True])
def test_a_block_has_one_graph_for_all_batch_sizes(compile_job: Job, dynamic: bool | None) -> None:
    """The first batch of 1 has a graph of its own: torch makes sizes of 1 constant."""
    compile_job.run(compiled_block, dynamic, [1, *range(2, MOST + 1, 3), MOST, 1])


# ---- all collectives --------------------------------------------------------------------------


def all_collectives(group: GroupCoordinator, x: torch.Tensor) -> list[torch.Tensor]:
    """Each once or more; `x` is [T, 4]. Arguments that are written to are among the results."""
    world = group.world_size
    sizes = [number % 3 for number in range(world)]
    sizes[0] = x.shape[0]  # an unequal one
    results = [group.all_reduce(x), group.all_reduce(x, "max"), group.all_gather(x)]
    results += [group.all_gather(x, dim=0), group.all_gather(x.t(), 0)]
    same = x * 2
    assert group.all_reduce(same, out=same) is same
    out = torch.empty_like(x)
    results += [same, group.all_reduce(same, out=out), out]
    weight = torch.full((4,), 0.5)
    results += [group.all_reduce_rms_norm(x, weight), *group.all_reduce_rms_norm(x, weight, same)]
    wide = group.all_gather(x)
    results += [group.reduce_scatter(wide), group.reduce_scatter(wide.t(), 0, "min")]
    gathered, stacked = x.new_empty(world * x.shape[0], 4), x.new_empty(world, *x.shape)
    results += [group.all_gather_into_tensor(gathered, x), group.all_gather_into_tensor(stacked, x)]
    share, row = torch.empty_like(x), x.new_empty(4)
    results += [group.reduce_scatter_tensor(share, gathered), share]
    results += [group.reduce_scatter_tensor(row, group.all_gather(x[0], 0).view(world, 4))]
    mine = x[: sizes[group.rank_in_group]]
    total = x.new_empty(sum(sizes), 4)
    results += [group.all_gatherv(mine, sizes), group.all_gatherv(mine, sizes, out=total), total]
    results += [group.reduce_scatterv(total, sizes)]
    results += [group.reduce_scatterv(total, sizes, out=torch.empty_like(mine))]
    exchanged = torch.empty_like(gathered)
    results += [group.all_to_all_single(exchanged, gathered), exchanged]
    ones = [1] * world
    results += [group.all_to_all_single(x.new_empty(world, 4), x.repeat(2, 1)[:world], ones, ones)]
    sent = x + 1
    assert group.broadcast(sent, src=world - 1) is sent
    return [*results, sent]


def like_eager(state: ParallelState, backend: str) -> None:
    group = state.tp
    with dynamo() as stats, torch.inference_mode():
        # Inductor takes long: once is enough.
        dynamic = True if backend == "inductor" else None
        compiled = torch.compile(all_collectives, backend=backend, fullgraph=True, dynamic=dynamic)
        for rows in (ROWS, 2 * ROWS, 3 * ROWS):
            x = torch.arange(4.0 * rows).view(rows, 4) + group.rank_in_group
            before = x.clone()
            wanted, calls = all_collectives(group, x), num_calls(group)
            results = compiled(group, x)
            assert num_calls(group) - calls == calls_of(group, x)
            for number, (each, right) in enumerate(zip(results, wanted, strict=True)):
                assert torch.equal(each, right), (number, each, right)
            assert torch.equal(x, before)
        assert stats["unique_graphs"] <= 2


def calls_of(group: GroupCoordinator, x: torch.Tensor) -> int:
    before = num_calls(group)
    all_collectives(group, x)
    return num_calls(group) - before


@pytest.mark.timeout(300)
@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_collectives_give_eagers_results(compile_job: Job, backend: str) -> None:
    compile_job.run(like_eager, backend)


@pytest.mark.timeout(300)
def test_three_ranks(compile_workers: WorkerPool) -> None:
    job = Job(compile_workers, 3, tp=3, timeout=100)
    job.run(like_eager, "aot_eager")
    job.close()


def alone(state: ParallelState) -> None:
    group = state.pp
    assert group.world_size == 1
    with dynamo(), torch.inference_mode():
        compiled = torch.compile(all_collectives, backend="aot_eager", fullgraph=True)
        x = torch.arange(4.0 * ROWS).view(ROWS, 4)
        for each, right in zip(compiled(group, x), all_collectives(group, x), strict=True):
            assert torch.equal(each, right)
        strided = torch.rand(4, 6).t()
        for call in (group.all_gatherv, group.reduce_scatterv):
            same = torch.compile(lambda x, call=call: call(x, [6]), fullgraph=True)(strided)
            assert torch.equal(same, strided)
        nodes: list[str] = []

        def backend(graph: torch.fx.GraphModule, _: object) -> Callable[..., Any]:
            nodes.extend(str(node.target) for node in graph.graph.nodes)
            return graph.forward

        both = torch.compile(
            lambda x: (group.all_reduce(x), group.all_gather(x)), backend=backend, fullgraph=True
        )
        assert all(result is x for result in both(x))
        assert not any("distcomm" in node for node in nodes)


def test_a_group_of_one_copies_nothing(compile_job: Job) -> None:
    compile_job.run(alone)


def opchecks(state: ParallelState) -> None:
    group = state.tp.unique_name
    x, wide = torch.ones(4, 6), torch.ones(8, 6)
    arguments: dict[str, tuple[Any, ...]] = {
        "all_reduce": (x, "sum"),
        "all_reduce_into": (x.clone(), x, "sum"),
        "all_reduce_rms_norm": (x, x[0].clone(), x.clone(), 1e-6, 0.0),
        "reduce_scatter": (x, 1, "sum"),
        "reduce_scatter_tensor": (x.clone(), wide, "sum"),
        "reduce_scatterv": (wide, [4, 4], "sum"),
        "reduce_scatterv_into": (x.clone(), wide, [4, 4], "sum"),
        "all_gather": (x, -1),
        "all_gather_into_tensor": (wide.clone(), x),
        "all_gatherv": (x, [4, 4]),
        "all_gatherv_into": (wide.clone(), x, [4, 4]),
        "all_to_all_single": (wide.clone(), wide, None, None),
        "broadcast": (x.clone(), 0),
    }
    assert sorted(arguments) == sorted(graph_ops.OPERATORS)
    # What opcheck has about gradients is for operators that have some.
    utils = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    for name, values in arguments.items():
        operator = getattr(torch.ops.distcomm, name).default
        order = torch.zeros(1, dtype=torch.int8)
        torch_library.opcheck(operator, (order, *values, group), test_utils=utils)


@pytest.mark.timeout(300)
def test_torch_finds_the_operators_well_made(compile_job: Job) -> None:
    compile_job.run(opchecks)


# ---- the same calls in the same order ---------------------------------------------------------


def unused_results(state: ParallelState) -> list[str]:
    """Ranks differ in what they use, so that their compilers have different graphs."""
    tp = state.tp

    def step(x: torch.Tensor) -> torch.Tensor:
        first, second = tp.all_reduce(x @ x), tp.all_gather(x + 1)
        third = tp.all_reduce(x * 3)
        tp.broadcast(x + 2, src=0)
        if tp.rank_in_group % 2:
            return third.sum() + second.sum()
        return first.sum()

    with dynamo(), torch.inference_mode():
        x = torch.eye(3)
        compiled = torch.compile(step, fullgraph=True)
        assert torch.equal(compiled(x), step(x))
        order = tp.stats()["sequence"]
        compiled(x)
        assert tp.stats()["sequence"] - order == 4
        with torch.profiler.profile() as profiler:
            compiled(x)
    events = sorted(profiler.events(), key=lambda event: event.time_range.start)
    return [event.name for event in events if event.name.startswith("distcomm::")]


@pytest.mark.timeout(300)
def test_nothing_is_dropped_or_reordered(compile_job: Job) -> None:
    for calls in compile_job.run(unused_results):
        names = [call.removeprefix("distcomm::") for call in calls]
        assert names == ["all_reduce", "all_gather", "all_reduce", "broadcast"]


def eager_dispatches(state: ParallelState) -> list[str]:
    seen = []

    class Recorded(TorchDispatchMode):
        def __torch_dispatch__(
            self, function: Any, _: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            seen.append(str(function))
            return function(*args, **kwargs or {})

    with Recorded():
        all_collectives(state.tp, torch.ones(ROWS, 4))
    return seen


def test_eager_calls_use_no_operators(compile_job: Job) -> None:
    for seen in compile_job.run(eager_dispatches):
        assert seen
        assert not any("distcomm" in name for name in seen)


def gradients(state: ParallelState) -> None:
    def step(x: torch.Tensor) -> torch.Tensor:
        return state.tp.all_reduce(x @ weight) * weight

    with dynamo(), warnings.catch_warnings():
        warnings.simplefilter("error")
        for each in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
            weight = torch.ones(4, 4, requires_grad=True)
            each(torch.ones(4, 4)).sum().backward()
            assert weight.grad is not None
            assert torch.equal(weight.grad, torch.full((4, 4), 4.0 * state.tp.world_size))


def test_no_gradients_flow_through(compile_job: Job) -> None:
    """Where something else needs some, they are right but for what went through a collective."""
    compile_job.run(gradients)
