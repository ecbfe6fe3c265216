"""The engines' names: complete, and each the same as what it is a name of."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
import torch.distributed as dist

import distcomm
from distcomm import (
    ArgumentError,
    GroupClosedError,
    GroupCoordinator,
    LayoutError,
    NotInitializedError,
    ParallelState,
    parallel_state,
)
from tests.cpu.job import Job, start
from tests.worker_pool import WorkerPool, fresh_init_method

# What engines import, by the attribute of the state that it returns.
GROUPS = {
    "get_world_group": "world",
    "get_tp_group": "tp",
    "get_tensor_model_parallel_group": "tp",
    "get_cp_group": "cp",
    "get_attn_cp_group": "cp",
    "get_attention_cp_group": "cp",
    "get_context_parallel_group": "cp",
    "get_moe_dp_group": "cp",
    "get_dcp_group": "cp",
    "get_context_model_parallel_group": "cp",
    "get_pcp_group": "cp",
    "get_attn_tp_group": "attn_tp",
    "get_attention_tp_group": "attn_tp",
    "get_pp_group": "pp",
    "get_pipeline_model_parallel_group": "pp",
    "get_dp_group": "dp",
    "get_data_parallel_group": "dp",
    "get_ep_group": "ep",
    "get_moe_ep_group": "ep",
    "get_expert_model_parallel_group": "ep",
    "get_moe_tp_group": "moe_tp",
    "get_expert_tensor_parallel_group": "moe_tp",
}
SIZES = {
    "get_world_size": "world",
    "get_tensor_model_parallel_world_size": "tp",
    "get_attn_context_model_parallel_world_size": "cp",
    "get_attention_cp_size": "cp",
    "get_context_parallel_world_size": "cp",
    "get_moe_data_parallel_world_size": "cp",
    "get_decode_context_model_parallel_world_size": "cp",
    "get_dcp_world_size": "cp",
    "get_prefill_context_model_parallel_world_size": "cp",
    "get_attn_tensor_model_parallel_world_size": "attn_tp",
    "get_attention_tp_size": "attn_tp",
    "get_pipeline_model_parallel_world_size": "pp",
    "get_data_parallel_world_size": "dp",
    "get_moe_expert_parallel_world_size": "ep",
    "get_expert_model_parallel_world_size": "ep",
    "get_moe_tensor_parallel_world_size": "moe_tp",
    "get_expert_tensor_parallel_world_size": "moe_tp",
}
RANKS = {
    "get_world_rank": "world",
    "get_tensor_model_parallel_rank": "tp",
    "get_attn_context_model_parallel_rank": "cp",
    "get_attention_cp_rank": "cp",
    "get_context_parallel_rank": "cp",
    "get_moe_data_parallel_rank": "cp",
    "get_decode_context_model_parallel_rank": "cp",
    "get_dcp_rank": "cp",
    "get_prefill_context_model_parallel_rank": "cp",
    "get_attn_tensor_model_parallel_rank": "attn_tp",
    "get_attention_tp_rank": "attn_tp",
    "get_pipeline_model_parallel_rank": "pp",
    "get_data_parallel_rank": "dp",
    "get_moe_expert_parallel_rank": "ep",
    "get_expert_model_parallel_rank": "ep",
    "get_moe_tensor_parallel_rank": "moe_tp",
    "get_expert_tensor_parallel_rank": "moe_tp",
}
ATTRIBUTES = {
    "get_tensor_model_parallel_src_rank": ("tp", "first_rank"),
    "get_data_parallel_src_rank": ("dp", "first_rank"),
    "get_context_parallel_global_ranks": ("cp", "ranks"),
    "get_pipeline_model_parallel_first_rank": ("pp", "first_rank"),
    "get_pipeline_model_parallel_last_rank": ("pp", "last_rank"),
    "get_pipeline_model_parallel_next_rank": ("pp", "next_rank"),
    "get_pipeline_model_parallel_prev_rank": ("pp", "prev_rank"),
    "is_pipeline_first_stage": ("pp", "is_first_rank"),
    "is_pipeline_last_stage": ("pp", "is_last_rank"),
    "is_global_first_rank": ("world", "is_first_rank"),
}
# By name: of which group, and its engines' parameters.
COLLECTIVES = {
    "tensor_model_parallel_all_reduce": ("tp", ["input_"]),
    "tensor_model_parallel_all_gather": ("tp", ["input_", "dim"]),
    "tensor_model_parallel_gather": ("tp", ["input_", "dst", "dim"]),
    "tensor_model_parallel_reduce_scatter": ("tp", ["input_", "dim"]),
    "tensor_model_parallel_fused_allreduce_rmsnorm": (
        "tp",
        ["input_", "residual_inp_", "weight_", "eps"],
    ),
    "attention_tensor_model_parallel_all_reduce": ("attn_tp", ["input_"]),
    "moe_tensor_model_parallel_all_reduce": ("moe_tp", ["input_"]),
    "moe_expert_parallel_all_reduce": ("ep", ["input_"]),
    "attn_cp_all_gather_into_tensor": ("cp", ["output", "input"]),
    "attn_cp_reduce_scatter_tensor": ("cp", ["output", "input"]),
    "broadcast_tensor_dict": ("tp", ["tensor_dict", "src"]),
}
OTHERS = {
    "destroy_distributed",
    "destroy_distributed_environment",
    "destroy_model_parallel",
    "ensure_model_parallel_initialized",
    "get_node_count",
    "get_parallel_state",
    "graph_capture",
    "in_the_same_node_as",
    "init_distributed",
    "init_distributed_environment",
    "init_world",
    "initialize_model_parallel",
    "is_initialized",
    "is_local_first_rank",
    "lay_out_world",
    "model_parallel_is_initialized",
}


def test_the_tables_are_complete():
    names = {*GROUPS, *SIZES, *RANKS, *ATTRIBUTES, *COLLECTIVES, *OTHERS}
    assert set(parallel_state.__all__) == names
    assert len(parallel_state.__all__) == len(names)


@pytest.mark.parametrize("name", sorted(parallel_state.__all__))
def test_each_is_a_function_that_says_what_it_is(name: str):
    function = getattr(parallel_state, name)
    assert function.__name__ == name
    assert function.__doc__
    parameters = list(inspect.signature(function).parameters)
    if name in COLLECTIVES:
        assert parameters == COLLECTIVES[name][1]
    elif name not in OTHERS:
        assert parameters == []


def test_without_a_state_each_says_so():
    for name in {*GROUPS, *SIZES, *RANKS, *ATTRIBUTES}:
        with pytest.raises(NotInitializedError, match="init_distributed"):
            getattr(parallel_state, name)()
    assert not parallel_state.is_initialized()
    assert not parallel_state.model_parallel_is_initialized()


def meant(name: str, axis: str, layout: distcomm.ParallelLayout) -> str:
    """Which group of the state a name of cp or of attention's tp means in this layout."""
    if axis == "attn_tp":  # decode context parallelism splits the cache, not attention's weights
        return "tp" if layout.cp_layout == "adjacent_in_tp" else "attn_tp"
    if axis != "cp" or name == "get_cp_group":
        return axis
    if "dcp" in name or "decode" in name or name == "get_context_model_parallel_group":
        return "cp" if layout.cp_layout == "adjacent_in_tp" else "rank_alone"
    if "pcp" in name or "prefill" in name:
        return "cp" if layout.cp_layout == "beside_tp" else "rank_alone"
    return "rank_alone" if layout.cp_layout == "adjacent_in_tp" else "cp"


def check_getters(state: ParallelState) -> None:
    def group(name: str, axis: str) -> GroupCoordinator:
        return getattr(state, meant(name, axis, state.layout))

    for name, axis in GROUPS.items():
        assert getattr(parallel_state, name)() is group(name, axis), name
    for names, attribute in ((SIZES, "world_size"), (RANKS, "rank_in_group")):
        for name, axis in names.items():
            assert getattr(parallel_state, name)() == getattr(group(name, axis), attribute), name
    for name, (axis, attribute) in ATTRIBUTES.items():
        assert getattr(parallel_state, name)() == getattr(group(name, axis), attribute), name
    assert parallel_state.get_parallel_state() is state
    assert parallel_state.get_node_count() == 1
    assert parallel_state.is_local_first_rank() == (state.rank == 0)
    assert parallel_state.model_parallel_is_initialized()


def get_all(rank: int, world_size: int, url: str, sizes: dict[str, Any]) -> None:
    with start(rank, world_size, url, **sizes) as state:
        check_getters(state)


@pytest.mark.parametrize(
    "sizes",
    [
        {"tp": 8, "cp": 2, "ep": 4},
        {"tp": 4, "cp": 2, "cp_layout": "beside_tp"},
        {"tp": 8, "cp": 2, "cp_layout": "adjacent_in_tp"},
        {"tp": 2, "pp": 2, "dp": 2},
    ],
)
def test_each_returns_what_the_state_has(workers: WorkerPool, sizes: dict[str, Any]):
    workers.run(get_all, fresh_init_method(), sizes, ranks=8)


def check_decode_cp(rank: int, world_size: int, url: str) -> None:
    with start(rank, world_size, url, tp=8, cp=2, cp_layout="adjacent_in_tp") as state:
        for name in ("get_attn_tp_group", "get_attention_tp_group"):
            assert getattr(parallel_state, name)().ranks == list(range(8))
        assert parallel_state.get_attention_tp_size() == 8
        assert parallel_state.get_attn_tensor_model_parallel_rank() == rank
        x = torch.tensor([rank])
        assert parallel_state.attention_tensor_model_parallel_all_reduce(x).item() == sum(range(8))
        assert distcomm.get_attn_tp_group() is state.attn_tp
        assert state.attn_tp.ranks == list(range(rank % 2, 8, 2))


def test_decode_cp_leaves_attentions_tp_whole(workers: WorkerPool):
    workers.run(check_decode_cp, fresh_init_method(), ranks=8)


def check_alone(rank: int, world_size: int, url: str) -> None:
    parallel_state.init_distributed_environment(world_size, rank, url, rank, "gloo", 20)
    state = parallel_state.initialize_model_parallel(2, decode_context_parallel_size=2)
    names = ("get_pcp_group", "get_attn_cp_group", "get_moe_dp_group", "get_context_parallel_group")
    for name in names:
        group = getattr(parallel_state, name)()
        assert (group.ranks, group.world_size, group.rank_in_group) == ([rank], 1, 0)
        assert group.all_gather_object(rank) == [rank]
        assert group.all_reduce(torch.tensor([rank])).item() == rank
    assert dist.get_process_group_ranks(group.cpu_group) == [rank]
    with parallel_state.graph_capture():
        group.barrier()
    assert "rank_alone" not in state.groups
    with pytest.raises(ArgumentError, match="name must be a new group name; got 'rank_alone'"):
        state.create_group("rank_alone", [0, 1])
    x, out = torch.randn(3, 2), torch.empty(3, 2)
    assert torch.equal(parallel_state.attn_cp_all_gather_into_tensor(out, x), x)
    parallel_state.destroy_model_parallel()
    with pytest.raises(GroupClosedError):
        group.barrier()
    with pytest.raises(NotInitializedError, match="initialize_model_parallel"):
        parallel_state.get_pcp_group()
    with pytest.raises(ArgumentError, match="name must be a new group name; got 'rank_alone'"):
        state.create_group("rank_alone", [0, 1])
    parallel_state.initialize_model_parallel(2)
    assert parallel_state.get_dcp_group().ranks == parallel_state.get_pcp_group().ranks == [rank]
    assert parallel_state.get_pcp_group() is not group
    parallel_state.destroy_distributed_environment()


def test_a_kind_of_cp_that_the_layout_has_not_is_one_rank(workers: WorkerPool):
    workers.run(check_alone, fresh_init_method(), ranks=2)


def check_ensure(rank: int, world_size: int, url: str) -> None:
    ensure = parallel_state.ensure_model_parallel_initialized
    parallel_state.init_distributed_environment(world_size, rank, url, rank, "gloo", 20)
    state = ensure(2, 1, 2, 1, "gloo")
    assert (state.layout.cp, state.layout.cp_layout) == (2, "beside_tp")
    assert ensure(2, 1, 2) is ensure(2, 1, 2, 1, "gloo") is ensure(2, 1, 2, None, None) is state
    assert ensure(2, 1, context_parallel_size=2) is state
    for arguments, options, problem in (
        ((1, 1, 2), {}, "tensor_model_parallel_size must be 2, as .* got 1"),
        ((2, 2, 2), {}, "pipeline_model_parallel_size must be 1, as .* got 2"),
        ((2, 1), {}, "prefill_context_model_parallel_size must be 2, as .* got 1"),
        ((2, 1, 4), {}, "prefill_context_model_parallel_size must be 2, as .* got 4"),
        ((2, 1, 1, 2), {}, "prefill_context_model_parallel_size must be 2, as .* got 1"),
        ((2, 1, 2, 2), {}, "decode_context_model_parallel_size must be left out or 1 beside"),
        ((2, 1, 2, 0), {}, "decode_context_model_parallel_size must be left out or 1 beside"),
        ((2, 1, 2, 1, "nccl"), {}, "backend must be None, or the one of cpu"),
        ((2, 1, 2), {"expert_model_parallel_size": 2}, "expert_model_parallel_size must be 1, as"),
        ((2, 1, 2), {"moe_data_model_parallel_size": 2}, "moe_data_model_parallel_size must be 1"),
        ((2, 1, 2), {"symmetric_reserve": "much"}, "symmetric_reserve must be"),
    ):
        with pytest.raises(ArgumentError, match=problem):
            ensure(*arguments, **options)
    with pytest.raises(TypeError, match="nonsense"):
        ensure(2, 1, 2, nonsense=7)
    parallel_state.destroy_model_parallel()
    with pytest.raises(TypeError, match="nonsense"):
        ensure(2, 1, 2, nonsense=7)
    ensure(4, 1, 1, 2)
    assert parallel_state.get_dcp_group().ranks == [rank // 2 * 2, rank // 2 * 2 + 1]
    with pytest.raises(ArgumentError, match="decode_context_model_parallel_size must be 2, as"):
        ensure(4, 1)
    parallel_state.destroy_model_parallel()
    with pytest.raises(LayoutError, match="cp must be a positive int; got 0"):
        parallel_state.initialize_model_parallel(4, decode_context_model_parallel_size=0)
    parallel_state.initialize_model_parallel(4, decode_context_model_parallel_size=None)
    assert state.layout.cp == 1
    parallel_state.destroy_distributed_environment()


def test_ensure_compares_all_sizes(workers: WorkerPool):
    workers.run(check_ensure, fresh_init_method(), ranks=4)


def find_neighbours_on_two_hosts(rank: int, world_size: int, url: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NCCL_HOSTID", "first" if rank in (0, 3) else "second")
        with start(rank, world_size, url, tp=4) as state:
            assert parallel_state.get_node_count() == 2
            nodes = parallel_state.in_the_same_node_as
            assert nodes(state.world) == [True, False, False, True]
            assert nodes(pg=state.world, source_rank=2) == [False, True, True, False]
            assert parallel_state.is_local_first_rank() == (rank < 2)
            assert nodes(state.world, source_rank=1) == [False, True, True, False]
            group = state.create_group("turned", [3, 2, 1, 0])
            assert nodes(group, 1) == [False, True, True, False]
            assert nodes(group.cpu_group, 0) == [True, False, False, True]


def test_ranks_of_two_hosts(workers: WorkerPool):
    workers.run(find_neighbours_on_two_hosts, fresh_init_method(), ranks=4)


def call_collectives(state: ParallelState) -> None:
    torch.manual_seed(state.rank)
    for name, (axis, _) in COLLECTIVES.items():
        function, group = getattr(parallel_state, name), getattr(state, axis)
        x = torch.randn(2, 8 * group.world_size)
        before = x.clone()
        if name.endswith("all_reduce"):
            assert torch.equal(function(x), group.all_reduce(x))
        elif name.endswith("all_gather"):
            assert torch.equal(function(x), group.all_gather(x))
            assert torch.equal(function(x, 0), group.all_gather(x, 0))
        elif name.endswith("parallel_reduce_scatter"):
            assert torch.equal(function(x), group.reduce_scatter(x))
        elif name.endswith("parallel_gather"):
            gathered, expected = function(x, 1, 0), group.gather(x, 1, 0)
            assert (gathered is None) == (expected is None) == (group.rank_in_group != 1)
            assert gathered is None or torch.equal(gathered, expected)
        elif name.endswith("rmsnorm"):
            weight, residual = torch.ones(x.shape[1]), torch.ones_like(x)
            found = function(x, residual, weight, 1e-5)
            expected = group.all_reduce_rms_norm(x, weight, residual, eps=1e-5)
            assert all(map(torch.equal, found, expected))
        elif name.endswith("into_tensor"):
            out, expected = torch.empty(2 * group.world_size, x.shape[1]), group.all_gather(x, 0)
            assert function(out, x) is out
            assert torch.equal(out, expected)
        elif name.endswith("scatter_tensor"):
            out, whole = torch.empty(3), torch.randn(3 * group.world_size)
            assert function(out, whole) is out
            assert torch.equal(out, group.reduce_scatter(whole))
        else:
            sent = {"x": x, "n": state.rank} if group.rank_in_group == 1 else None
            received = function(sent, src=1)
            assert received["n"] == group.ranks[1]
        assert torch.equal(x, before), name


def test_collectives_are_those_of_the_group(job: Job):
    job.run(call_collectives)


# Compiled functions

OUTSIDE_GRAPHS = {"broadcast_tensor_dict", "tensor_model_parallel_gather"}


def compiled(function: Callable[..., Any], *args: Any) -> Any:
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend="eager")(*args)


def call_one(name: str, x: torch.Tensor) -> Any:
    """Calls a collective of one tensor, [2, 4]."""
    function, cp = getattr(parallel_state, name), parallel_state.get_attention_cp_size()
    if name.endswith("rmsnorm"):
        return function(x, x * 2, x[0] + 1, 1e-5)
    if name.endswith("gather_into_tensor"):
        return function(x.new_empty(2 * cp, 4), x)
    if name.endswith("scatter_tensor"):
        return function(x.new_empty(2, 4), x.repeat(cp, 1))
    return function({"x": x} if name == "broadcast_tensor_dict" else x)


def check_compiled(rank: int, world_size: int, url: str, sizes: dict[str, Any]) -> None:
    def add(x: torch.Tensor, getter: Callable[[], Any]) -> torch.Tensor:
        number = getter()
        return x + (sum(number) if isinstance(number, list) else int(number))

    with start(rank, world_size, url, **sizes):
        x = torch.arange(8.0).view(2, 4) + rank
        numbers = [*SIZES, *RANKS, *ATTRIBUTES, "get_node_count", "is_local_first_rank"]
        for name in numbers:
            getter = getattr(parallel_state, name)
            assert torch.equal(compiled(add, x, getter), add(x, getter)), name
        for name in GROUPS:
            getter = getattr(parallel_state, name)
            found = compiled(lambda x, getter=getter: getter().all_reduce(x), x)
            assert torch.equal(found, getter().all_reduce(x)), name
        for name in sorted(COLLECTIVES.keys() - OUTSIDE_GRAPHS):
            torch.testing.assert_close(compiled(call_one, name, x), call_one(name, x), msg=name)
        for name in OUTSIDE_GRAPHS:
            with pytest.raises(torch._dynamo.exc.Unsupported, match="part of a compiled graph"):
                compiled(call_one, name, x)
        torch._dynamo.reset()


@pytest.mark.parametrize(
    "sizes", [{"tp": 2, "ep": 2}, {"tp": 2, "cp": 2, "cp_layout": "adjacent_in_tp"}]
)
def test_each_can_be_part_of_a_compiled_graph(sizes: dict[str, Any]):
    with WorkerPool(2, timeout_s=200) as pool:
        pool.run(check_compiled, fresh_init_method(), sizes, ranks=2)


# Hosts


def find_neighbours(state: ParallelState) -> None:
    for group in (state.world, state.cp, state.world.cpu_group, state.cp.cpu_group):
        size = group.size() if isinstance(group, dist.ProcessGroup) else group.world_size
        assert parallel_state.in_the_same_node_as(group) == [True] * size
    for source in (-1, 8, "0", True):
        with pytest.raises(ArgumentError, match="source_rank must be a rank in the group"):
            parallel_state.in_the_same_node_as(state.world, source)


def test_ranks_of_one_host(job: Job):
    job.run(find_neighbours)


# Graph capture, which engines give a stream or a device


def capture_on_cpu(state: ParallelState) -> None:
    cpu = torch.device("cpu")
    for arguments in ({}, {"device": cpu}, {"stream": cpu}):
        with parallel_state.graph_capture(**arguments) as capture:
            assert capture.stream is None
    with (
        pytest.raises(ArgumentError, match="device must be cpu, the job's; got cuda:1"),
        parallel_state.graph_capture(device=torch.device("cuda:1")),
    ):
        pass


def test_graph_capture_takes_a_device(job: Job):
    job.run(capture_on_cpu)


@pytest.mark.parametrize("name", sorted({*GROUPS, *SIZES, *RANKS, *ATTRIBUTES, *COLLECTIVES}))
def test_the_migration_guide_has_it(name: str):
    guide = (Path(__file__).parents[2] / "docs" / "migration.md").read_text()
    ending = name.rsplit("_", 2)
    short = [f"..._{ending[-1]}", f"..._{'_'.join(ending[-2:])}"]  # after its size or kin
    stem = name.rsplit("_", 1)[0] if name in RANKS else ending[0]
    assert name in guide or (stem in guide and any(each in guide for each in short))
