"""The engines' way to begin: the group of all ranks first, groups of axes later, and again."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any, TypeVar

import pytest
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

import distcomm
from distcomm import (
    AlreadyInitializedError,
    ArgumentError,
    GroupClosedError,
    GroupCoordinator,
    InitializationError,
    LayoutError,
    NotInitializedError,
    ParallelState,
    parallel_state,
)
from distcomm.layout import AXES
from distcomm.parallel_state import (
    destroy_distributed_environment,
    destroy_model_parallel,
    ensure_model_parallel_initialized,
    init_distributed_environment,
    initialize_model_parallel,
    model_parallel_is_initialized,
)
from tests.cpu.test_init import num_process_groups, usage
from tests.worker_pool import WorkerPool, fresh_init_method

T = TypeVar("T")

TIMEOUT_S = 20.0
SHORT_S = 1.0  # for waits that are meant to end by their timeout
LONG_S = 100.0  # for waits that must not: longer than a test may take


def in_an_environment(fn: Callable[..., T]) -> Callable[..., T]:
    """Calls a worker's function with the state of `init_distributed_environment`."""

    @functools.wraps(fn)
    def run(rank: int, world_size: int, url: str, *args: Any, **options: Any) -> T:
        options = {"backend": "gloo", "timeout": TIMEOUT_S, **options}
        try:
            return fn(init_distributed_environment(world_size, rank, url, **options), *args)
        finally:
            destroy_distributed_environment()
            assert num_process_groups() == 0
            assert not dist.is_initialized()

    return run


def held_by_groups() -> dict[str, int]:
    """`usage` without what gloo closes some time later."""
    later = ("file descriptors", "sockets", "rss_kib")
    return {name: held for name, held in usage().items() if name not in later}


def sums_to_its_ranks(group: GroupCoordinator) -> bool:
    return group.all_reduce(torch.tensor([group.rank])).item() == sum(group.ranks)


def assert_works(state: ParallelState) -> None:
    for name, group in state.groups.items():
        assert sums_to_its_ranks(group), name
        assert group.all_gather_object(state.rank) == group.ranks
    for axis in AXES:
        assert getattr(state, axis) is state.groups[axis]
        assert tuple(getattr(state, axis).ranks) == state.layout.group_of(axis, state.rank)


# The first half


@in_an_environment
def use_the_world(state: ParallelState) -> None:
    assert distcomm.is_initialized()
    assert distcomm.get_parallel_state() is state
    assert not model_parallel_is_initialized()
    assert not state.is_laid_out
    assert list(state.groups) == ["world"]
    assert sums_to_its_ranks(parallel_state.get_world_group())
    assert len(state.hosts) == state.world_size
    assert len(set(state.hosts)) == 1
    assert "no layout yet" in state.describe()
    for name in ("layout", *AXES):
        with pytest.raises(NotInitializedError) as caught:
            getattr(state, name)
        assert str(caught.value).startswith(f"{name}: ")
        assert f"call initialize_model_parallel() first [rank {state.rank}]" in str(caught.value)
    for getter in (distcomm.get_tp_group, parallel_state.get_attention_cp_size):
        with pytest.raises(NotInitializedError, match="initialize_model_parallel"):
            getter()
    with pytest.raises(AttributeError, match="no attribute 'tensor'"):
        state.tensor  # noqa: B018
    with state.graph_capture():
        pass
    own = state.create_group("own", range(state.world_size))
    assert own.cpu_group is state.world.cpu_group
    with pytest.raises(ArgumentError, match="name must be a new group name; got 'tp'"):
        state.create_group("tp", range(state.world_size))
    with pytest.raises(AlreadyInitializedError):
        init_distributed_environment(state.world_size, state.rank, backend="gloo")
    destroy_model_parallel()  # nothing to do
    assert sums_to_its_ranks(own)


def test_at_first_there_is_the_group_of_all_ranks(workers: WorkerPool):
    workers.run(use_the_world, fresh_init_method(), ranks=2)


def test_without_an_environment_there_is_nothing_to_lay_out():
    with pytest.raises(NotInitializedError):
        initialize_model_parallel(1)
    with pytest.raises(NotInitializedError):
        ensure_model_parallel_initialized(1, 1)
    destroy_model_parallel()
    destroy_distributed_environment()


def test_a_backend_is_nccl_or_gloo():
    with pytest.raises(ArgumentError, match="backend must be 'nccl', 'gloo' or None; got 'mpi'"):
        init_distributed_environment(1, 0, "file:///x", backend="mpi")
    assert not distcomm.is_initialized()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA devices")
def test_nccl_needs_gpus(workers: WorkerPool):
    workers.run(ask_for_nccl, fresh_init_method(), ranks=2)


def ask_for_nccl(rank: int, world_size: int, url: str) -> None:
    with pytest.raises(InitializationError, match="rank 1: torch sees no CUDA device"):
        init_distributed_environment(world_size, rank, url, 0, "nccl", TIMEOUT_S)
    state = init_distributed_environment(world_size, rank, f"{url}-2", 7, None, TIMEOUT_S)
    assert (state.device.type, state.local_rank) == ("cpu", 7)
    destroy_distributed_environment()


def use_torchs_group(rank: int, world_size: int, url: str) -> None:
    dist.init_process_group("gloo", init_method=url, rank=rank, world_size=world_size)
    init_distributed_environment(world_size, rank, backend="gloo", timeout=TIMEOUT_S)
    state = initialize_model_parallel(2)
    assert_works(state)
    destroy_model_parallel()
    destroy_distributed_environment()
    assert num_process_groups() == 1
    dist.destroy_process_group()


def test_torchs_own_group_is_used_if_there_is_one(workers: WorkerPool):
    workers.run(use_torchs_group, fresh_init_method(), ranks=4)


# Sizes

LAYOUTS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {"dp": 8}),
    ({"pipeline_model_parallel_size": 2}, {"pp": 2, "dp": 4}),
    ({"tensor_model_parallel_size": 4, "expert_model_parallel_size": 2}, {"tp": 4, "ep": 2}),
    (
        {"tensor_model_parallel_size": 8, "attention_context_model_parallel_size": 2},
        {"tp": 8, "cp": 2, "cp_layout": "inside_tp"},
    ),
    (
        {"tensor_model_parallel_size": 4, "prefill_context_model_parallel_size": 2},
        {"tp": 4, "cp": 2, "cp_layout": "beside_tp"},
    ),
    (
        {"tensor_model_parallel_size": 2, "context_parallel_size": 2},
        {"tp": 2, "cp": 2, "cp_layout": "beside_tp", "dp": 2},
    ),
    (
        {"tensor_model_parallel_size": 4, "decode_context_parallel_size": 2},
        {"tp": 4, "cp": 2, "cp_layout": "adjacent_in_tp", "dp": 2},
    ),
    (
        {
            "tensor_model_parallel_size": 8,
            "decode_context_parallel_size": 2,
            "decode_context_model_parallel_size": 2,
        },
        {"tp": 8, "cp": 2, "cp_layout": "adjacent_in_tp"},
    ),
    ({"tensor_model_parallel_size": 8, "decode_context_model_parallel_size": None}, {"tp": 8}),
]


@in_an_environment
def lay_out_again_and_again(state: ParallelState) -> None:
    """All layouts, one after another; at the end of each round the process holds the same."""
    extra = state.create_group("extra", [1, 0]) if state.rank < 2 else None
    held = []
    for _ in range(3):
        for sizes, expected in LAYOUTS:
            sizes = {"backend": "gloo", **sizes}
            assert initialize_model_parallel(**sizes) is state
            sizes_of = {"dp": 8 // expected.get("tp", 1), **expected}
            if expected.get("cp_layout") == "beside_tp":
                sizes_of = {"dp": 8 // (expected["tp"] * expected["cp"]), **expected}
            assert state.layout == distcomm.ParallelLayout(8, **sizes_of)
            assert model_parallel_is_initialized()
            assert_works(state)
            tp, world = state.tp, state.world
            with pytest.raises(AlreadyInitializedError, match="destroy_model_parallel"):
                initialize_model_parallel(**sizes)
            destroy_model_parallel()
            destroy_model_parallel()
            assert not model_parallel_is_initialized()
            with pytest.raises(GroupClosedError):
                tp.all_reduce(torch.ones(1))
            assert state.groups.keys() == {"world", *(["extra"] if extra else [])}
            assert all(sums_to_its_ranks(group) for group in state.groups.values())
            assert state.world is world
        held.append(held_by_groups())
    assert held[0] == held[1] == held[2]


def test_layouts_one_after_another(workers: WorkerPool):
    workers.run(lay_out_again_and_again, fresh_init_method(), ranks=8)


def test_groups_of_decode_context_parallelism_are_neighbours():
    layout = distcomm.ParallelLayout(16, tp=8, cp=2, dp=2, cp_layout="adjacent_in_tp")
    assert list(layout.groups("cp"))[:5] == [(0, 1), (2, 3), (4, 5), (6, 7), (8, 9)]
    assert list(layout.groups("attn_tp")) == [
        (0, 2, 4, 6), (1, 3, 5, 7), (8, 10, 12, 14), (9, 11, 13, 15),
    ]  # fmt: skip
    with pytest.raises(LayoutError, match="cp must divide tp = 8 for adjacent_in_tp; got 3") as no:
        distcomm.ParallelLayout(8, tp=8, cp=3, cp_layout="adjacent_in_tp")
    assert "with cp=2" in str(no.value)
    assert distcomm.ParallelLayout(8, tp=8, cp=2).cp_layout == "inside_tp"


@in_an_environment
def share_and_part(state: ParallelState) -> None:
    """A group of `create_group` has the same ranks as a tp group on some ranks, and stays."""
    pair = state.create_group("pair", [0, 1]) if state.rank < 2 else None
    initialize_model_parallel(2)
    assert_works(state)
    if pair is not None:
        assert state.tp.cpu_group is pair.cpu_group
    late = state.create_group("late", state.pp.ranks)
    everyone = state.create_group("everyone", [3, 2, 1, 0])
    destroy_model_parallel()
    assert late.all_gather_object(state.rank) == [state.rank]
    assert everyone.all_gather_object(state.rank) == [3, 2, 1, 0]
    if pair is not None:
        assert sums_to_its_ranks(pair)
        with pytest.raises(ArgumentError, match=r"\[group 'pair'"):
            pair.broadcast_object(1, src=5)
    initialize_model_parallel(2)
    assert_works(state)
    destroy_model_parallel()
    destroy_distributed_environment()
    with pytest.raises(GroupClosedError):
        everyone.barrier()


def test_groups_of_ones_own_outlive_a_layout(workers: WorkerPool):
    workers.run(share_and_part, fresh_init_method(), ranks=4)


@in_an_environment
def ensure(state: ParallelState) -> None:
    assert ensure_model_parallel_initialized(2, 2) is state
    tp = state.tp
    assert ensure_model_parallel_initialized(2, 2) is state
    assert state.tp is tp
    with pytest.raises(ArgumentError, match="tensor_model_parallel_size must be 2, as there are"):
        ensure_model_parallel_initialized(4, 1)
    with pytest.raises(ArgumentError, match="pipeline_model_parallel_size must be 2, as there are"):
        ensure_model_parallel_initialized(2, 1)
    assert_works(state)


def test_ensure_makes_groups_once(workers: WorkerPool):
    workers.run(ensure, fresh_init_method(), ranks=4)


# Failures: on all ranks, and nothing is left


@in_an_environment
def refuse(state: ParallelState, options: dict[str, Any], odd: dict[str, Any] | None) -> Any:
    """The error of sizes that can't be had; on rank 2 those of `odd`, if given."""
    before = held_by_groups()
    own = {**options, **odd} if odd and state.rank == 2 else options
    with pytest.raises(distcomm.DistcommError) as caught:
        initialize_model_parallel(**own)
    assert held_by_groups() == before
    assert not model_parallel_is_initialized()
    assert list(state.groups) == ["world"]
    initialize_model_parallel(4)
    assert_works(state)
    error = caught.value
    return type(error).__name__, str(error), getattr(error, "failures", None)


@pytest.mark.parametrize(
    ("odd", "difference"),
    [
        ({"tensor_model_parallel_size": 4}, "tp is 4, on rank 0 2; dp is 1, on rank 0 2"),
        ({"expert_model_parallel_size": 2}, "ep is 2, on rank 0 1"),
        ({"symmetric_reserve": "4GiB"}, "symmetric_reserve is '4GiB', on rank 0 'auto'"),
        ({"decode_context_parallel_size": 2}, "cp_layout is 'adjacent_in_tp', on rank 0 'auto'"),
    ],
)
def test_sizes_that_differ_are_named(workers: WorkerPool, odd: dict[str, Any], difference: str):
    options = {"tensor_model_parallel_size": 2}
    results = workers.run(refuse, fresh_init_method(), options, odd, ranks=4, timeout=LONG_S)
    for name, text, failures in results:
        assert name == "InitializationError", text
        assert failures.keys() == {2}
        assert difference in failures[2]


@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize(
    ("options", "error", "problem"),
    [
        ({"tensor_model_parallel_size": 3}, "LayoutError", "world_size must be tp·pp·dp = 3"),
        ({"tensor_model_parallel_size": "2"}, "LayoutError", "tp must be a positive int; got '2'"),
        ({"tensor_model_parallel_size": 8}, "LayoutError", "tp·pp·dp = 8"),
        ({"expert_model_parallel_size": 3}, "LayoutError", "ep must divide tp = 2; got 3"),
        (
            {"attention_context_model_parallel_size": 2, "decode_context_parallel_size": 2},
            "ArgumentError",
            "decode_context_parallel_size must be left out or 1 beside "
            "attention_context_model_parallel_size=2: there is one cp; got 2",
        ),
        (
            {"decode_context_model_parallel_size": 2, "decode_context_parallel_size": 4},
            "ArgumentError",
            "decode_context_parallel_size must be left out or 1 beside",
        ),
        ({"attention_data_parallel_size": 2}, "ArgumentError", "must be 1, as there are no such"),
        ({"moe_data_model_parallel_size": 2}, "ArgumentError", "must be 1, as there are no such"),
        ({"backend": "nccl"}, "ArgumentError", "backend must be None, or the one of cpu"),
        ({"backend": "mpi"}, "ArgumentError", "backend must be None, or the one of cpu"),
        ({"symmetric_reserve": "much"}, "ArgumentError", "symmetric_reserve must be a number of"),
    ],
)
def test_what_cant_be_had_is_told_to_all(
    workers: WorkerPool, options: dict[str, Any], error: str, problem: str, alone: bool
):
    good = {"tensor_model_parallel_size": 2}
    given = (good, options) if alone else ({**good, **options}, None)
    results = workers.run(refuse, fresh_init_method(), *given, ranks=4, timeout=LONG_S)
    for rank, (name, text, failures) in enumerate(results):
        assert problem in text
        assert name == (error if rank == 2 or not alone else "InitializationError"), text
        assert failures is None or failures.keys() == {2}


@in_an_environment
def wait_for_rank_1(state: ParallelState) -> dict[int, str] | None:
    if state.rank == 1:
        return None
    with pytest.raises(InitializationError) as caught:
        initialize_model_parallel(2)
    return caught.value.failures


def test_a_rank_that_does_not_come_is_named(workers: WorkerPool):
    results = workers.run(wait_for_rank_1, fresh_init_method(), ranks=4, timeout=SHORT_S)
    for failures in (results[0], *results[2:]):
        assert failures == {1: f"did not come within {SHORT_S:g} s"}


@in_an_environment
def fail_while_building(state: ParallelState, error: Exception) -> str:
    """Rank 3 can't make its cp group at first; then all can."""
    make, calls = c10d._new_process_group_helper, []

    def make_or_fail(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        if state.rank == 3 and len(calls) == 2:
            raise error
        return make(*args, **kwargs)

    before = num_process_groups()
    c10d._new_process_group_helper = make_or_fail
    try:
        with pytest.raises(InitializationError) as caught:
            initialize_model_parallel(2, context_parallel_size=2)
    finally:
        c10d._new_process_group_helper = make
    assert num_process_groups() == before
    assert list(state.groups) == ["world"]
    for _ in range(2):
        initialize_model_parallel(2, context_parallel_size=2)
        assert_works(state)
        destroy_model_parallel()
    return str(caught.value)


@pytest.mark.parametrize("error", [RuntimeError("out of sockets"), ValueError("out of sockets")])
def test_a_failure_while_building_leaves_the_world_alone(workers: WorkerPool, error: Exception):
    url = fresh_init_method()
    results = workers.run(fail_while_building, url, error, ranks=4, timeout=SHORT_S)
    for text in results:
        assert "rank 3: making the cp group failed: out of sockets" in text
    assert len({text.split("\n", 1)[1] for text in results}) == 1


@in_an_environment
def lay_out_with_a_slow_rank(state: ParallelState) -> None:
    """One rank is late each time: the others must not find what its last group has left."""
    make = c10d._new_process_group_helper

    def make_slowly(*args: Any, **kwargs: Any) -> Any:
        time.sleep(0.1)
        return make(*args, **kwargs)

    for number in range(6):
        if number % state.world_size == state.rank:
            c10d._new_process_group_helper = make_slowly
        try:
            initialize_model_parallel(2, context_parallel_size=2)
        finally:
            c10d._new_process_group_helper = make
        assert_works(state)
        destroy_model_parallel()


def test_groups_made_again_find_each_other(workers: WorkerPool):
    workers.run(lay_out_with_a_slow_rank, fresh_init_method(), ranks=4)
