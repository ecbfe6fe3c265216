"""`init_distributed`: the groups it makes, the ways to launch it, and how it fails."""

from __future__ import annotations

import contextlib
import functools
import gc
import math
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

import distcomm
from distcomm import (
    AlreadyInitializedError,
    ArgumentError,
    CollectiveError,
    DistcommError,
    GroupClosedError,
    GroupCoordinator,
    InitializationError,
    LaunchError,
    LayoutError,
    NotInitializedError,
    ParallelState,
    communicators,
    meeting,
)
from distcomm.process_groups import create_process_group
from tests.cpu.job import start
from tests.worker_pool import WorkerPool, fresh_init_method

T = TypeVar("T")

AXES = ["tp", "cp", "attn_tp", "pp", "dp", "ep", "moe_tp"]
GETTERS = {axis: getattr(distcomm, f"get_{axis}_group") for axis in ["world", *AXES]}
UNLAUNCHED = dict.fromkeys(
    [
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
        "MASTER_ADDR",
        "MASTER_PORT",
        "TORCHELASTIC_USE_AGENT_STORE",
    ]
)
SHORT_S = 1.0  # for waits that are meant to end by their timeout
SHORT_TCP_S = 8.0  # torch looks up host names while it connects, which may take 5 s
LONG_S = 100.0  # for waits that must not: longer than a test may take


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def new_url(scheme: str) -> str:
    """An init_method that wasn't used before."""
    return fresh_init_method() if scheme == "file" else f"tcp://127.0.0.1:{free_port()}"


def leaves_nothing(fn: Callable[..., T]) -> Callable[..., T]:
    """Makes a worker's function end with no state in force, whatever it has raised."""

    @functools.wraps(fn)
    def run(*args: Any, **kwargs: Any) -> T:
        try:
            return fn(*args, **kwargs)
        finally:
            distcomm.destroy_distributed()
            if dist.is_initialized():
                dist.destroy_process_group()

    return run


def sums_to_its_ranks(group: GroupCoordinator) -> bool:
    return group.all_reduce(torch.tensor([group.rank])).item() == sum(group.ranks)


def num_process_groups() -> int:
    return len(c10d._world.pg_map)


# Groups and getters


def describe_groups(state: ParallelState) -> dict[str, list[int]]:
    for name, group in state.groups.items():
        assert sums_to_its_ranks(group), name
        assert getattr(state, name) is group
        assert GETTERS[name]() is group
        assert group.name == name
        assert group.ranks[group.rank_in_group] == group.rank == state.rank
        assert group.world_size == len(group.ranks)
        assert (group.first_rank, group.last_rank) == (group.ranks[0], group.ranks[-1])
        assert group.is_first_rank == (group.rank == group.ranks[0])
        assert group.is_last_rank == (group.rank == group.ranks[-1])
        assert group.ranks[(group.rank_in_group + 1) % group.world_size] == group.next_rank
        assert group.ranks[group.rank_in_group - 1] == group.prev_rank
        assert group.device == state.device == torch.device("cpu")
        assert group.pynccl_comm is None
        assert group.local_rank == state.local_rank
        assert group.device_group is group.cpu_group
        assert dist.get_process_group_ranks(group.cpu_group) == group.ranks
    return {name: group.ranks for name, group in state.groups.items()}


@leaves_nothing
def make_groups(rank: int, world_size: int, url: str, **options: Any) -> dict[str, list[int]]:
    with start(rank, world_size, url, **options) as state:
        assert distcomm.is_initialized()
        assert distcomm.get_parallel_state() is state
        assert (state.rank, state.world_size) == (rank, world_size)
        assert str(state.layout) in state.describe()
        assert "gloo" in state.describe()
        groups = describe_groups(state)
    assert not distcomm.is_initialized()
    assert not dist.is_initialized()
    return groups


def test_cp_inside_tp_on_8_ranks(workers: WorkerPool):
    found = workers.run(make_groups, fresh_init_method(), ranks=8, tp=8, cp=2)
    everyone = list(range(8))
    for rank, groups in enumerate(found):
        assert groups == {
            "world": everyone,
            "tp": everyone,
            "cp": [rank % 4, rank % 4 + 4],
            "attn_tp": [0, 1, 2, 3] if rank < 4 else [4, 5, 6, 7],
            "pp": [rank],
            "dp": [rank],
            "ep": [rank],
            "moe_tp": everyone,
        }


def test_cp_beside_tp_on_16_ranks(workers: WorkerPool):
    found = workers.run(make_groups, fresh_init_method(), tp=8, cp=2)
    for rank, groups in enumerate(found):
        half = list(range(8)) if rank < 8 else list(range(8, 16))
        assert groups == {
            "world": list(range(16)),
            "tp": half,
            "cp": [rank % 8, rank % 8 + 8],
            "attn_tp": half,
            "pp": [rank],
            "dp": [rank],
            "ep": [rank],
            "moe_tp": half,
        }


def test_all_axes_at_once(workers: WorkerPool):
    options = {"tp": 4, "cp": 2, "pp": 2, "dp": 2, "ep": 2, "order": "pp-tp-cp-dp"}
    found = workers.run(make_groups, fresh_init_method(), cp_layout="inside_tp", **options)
    layout = distcomm.ParallelLayout(16, **options, cp_layout="inside_tp")
    for rank, groups in enumerate(found):
        assert groups.pop("world") == list(range(16))
        assert groups == {axis: list(layout.group_of(axis, rank)) for axis in AXES}


def test_a_world_of_one_rank(workers: WorkerPool):
    (groups,) = workers.run(make_groups, fresh_init_method(), ranks=1)
    assert groups == {name: [0] for name in GETTERS}


@leaves_nothing
def share_communicators(rank: int, world_size: int, url: str) -> None:
    with start(rank, world_size, url, tp=8, cp=2) as state:
        assert state.tp.cpu_group is state.world.cpu_group is state.moe_tp.cpu_group
        assert num_process_groups() == 3  # of world, cp and attn_tp
        assert state.tp is not state.world
        same = state.create_group("same", range(8))
        assert same.cpu_group is state.world.cpu_group
        assert state.create_group("alone", [rank]).all_gather_object(1) == [1]
        assert num_process_groups() == 3  # none for a group of one
        assert dist.get_world_size(state.pp.cpu_group) == 1
        assert state.pp.cpu_group is state.dp.cpu_group
        assert num_process_groups() == 4  # until it is asked for
        reverse = state.create_group("reverse", range(7, -1, -1))
        assert reverse.cpu_group is not state.world.cpu_group
        assert reverse.all_gather_object(rank) == list(range(7, -1, -1))
    assert num_process_groups() == 0


def test_groups_of_the_same_ranks_share_communicators(workers: WorkerPool):
    workers.run(share_communicators, fresh_init_method(), ranks=8)


# create_group


@leaves_nothing
def create_groups(rank: int, world_size: int, url: str) -> None:
    with start(rank, world_size, url, tp=4) as state:
        if rank != 1:  # who isn't a member isn't needed
            group = state.create_group("some", [3, 0, 2])
            assert group.ranks == [3, 0, 2]
            assert group.all_gather_object(rank) == [3, 0, 2]
            assert state.groups["some"] is group
            assert sums_to_its_ranks(group)
        if rank in (1, 2):
            overlapping = state.create_group("overlapping", (2, 1))
            assert sums_to_its_ranks(overlapping)
        assert sums_to_its_ranks(state.tp)


def test_create_group_needs_only_its_members(workers: WorkerPool):
    workers.run(create_groups, fresh_init_method(), ranks=4)


@leaves_nothing
def create_a_group_slowly(rank: int, world_size: int, url: str) -> tuple[float, float]:
    """When this rank's process group was made, and when `create_group` returned."""
    made = []

    def create(*args: Any, **kwargs: Any) -> dist.ProcessGroup:
        group = create_process_group(*args, **kwargs)
        time.sleep(0.5 if rank == 1 else 0.0)
        made.append(time.monotonic())
        return group

    with start(rank, world_size, url, tp=3) as state:
        with mock.patch.object(communicators, "create_process_group", create):
            state.create_group("slow", [2, 1, 0])
        return made[0], time.monotonic()


def test_no_member_goes_on_before_all_have_made_the_group(workers: WorkerPool):
    # It might close, and the connections of one that still makes its own would break.
    times = workers.run(create_a_group_slowly, fresh_init_method(), ranks=3)
    assert max(made for made, _ in times) <= min(returned for _, returned in times)


@leaves_nothing
def refuse_groups(rank: int, world_size: int, url: str) -> None:
    with start(rank, world_size, url, tp=2) as state:
        for ranks in ([], [0, 0, 1], [0, 1, 2], [-1, 0, 1], [1 - rank], [0.0, 1], [False, True]):
            with pytest.raises(ArgumentError) as caught:
                state.create_group("new", ranks)
            assert str(caught.value) == (
                "create_group: ranks must be distinct ranks from 0 to 1, the caller's among them; "
                f"got {ranks} [rank {rank}]"
            )
        for name in ("tp", "world"):
            with pytest.raises(ArgumentError, match=f"name must be a new .* '{name}' .rank {rank}"):
                state.create_group(name, [0, 1])
        assert state.groups.keys() == GETTERS.keys()
        assert sums_to_its_ranks(state.create_group("new", [1, 0]))
        with pytest.raises(ArgumentError, match="name must be a new group name; got 'new'"):
            state.create_group("new", [1, 0])
    with pytest.raises(GroupClosedError, match=rf"create_group: .*closed \[rank {rank}\]"):
        state.create_group("late", [0, 1])


def test_create_group_refuses_wrong_arguments(workers: WorkerPool):
    workers.run(refuse_groups, fresh_init_method(), ranks=2)


@leaves_nothing
def create_group_without_rank_1(rank: int, world_size: int, url: str) -> None:
    with start(rank, world_size, url, tp=3, timeout=SHORT_S) as state:
        before = num_process_groups()
        if rank != 1:
            with pytest.raises(CollectiveError, match=r"create_group failed: .*\[group 'missing'"):
                state.create_group("missing", [0, 2, 1])
        assert num_process_groups() == before
        assert "missing" not in state.groups


def test_a_group_whose_member_does_not_come_is_given_up(workers: WorkerPool):
    workers.run(create_group_without_rank_1, fresh_init_method(), ranks=3)


# One state at a time, and its end


@leaves_nothing
def initialize_twice(rank: int, world_size: int, url: str) -> None:
    for getter in [distcomm.get_parallel_state, *GETTERS.values()]:
        with pytest.raises(NotInitializedError, match=r"call init_distributed\(\) first"):
            getter()
    distcomm.destroy_distributed()  # nothing to do
    state = start(rank, world_size, url, tp=2)
    with pytest.raises(AlreadyInitializedError, match=rf"destroy_distributed\(\).*rank {rank}"):
        start(rank, world_size, url, tp=2)
    assert sums_to_its_ranks(state.tp)
    distcomm.destroy_distributed()
    distcomm.destroy_distributed()
    state.close()
    assert not distcomm.is_initialized()
    with pytest.raises(NotInitializedError):
        distcomm.get_tp_group()


def test_there_is_one_state_at_a_time(workers: WorkerPool):
    workers.run(initialize_twice, fresh_init_method(), ranks=2)


@leaves_nothing
def raise_in_with(rank: int, world_size: int, url: str) -> None:
    with pytest.raises(LookupError, match=r"^from the body$"), start(rank, world_size, url, tp=2):
        raise LookupError("from the body")
    assert not distcomm.is_initialized()
    assert not dist.is_initialized()


def test_with_closes_also_after_an_error(workers: WorkerPool):
    workers.run(raise_in_with, fresh_init_method(), ranks=2)


X = torch.ones(2)
CLOSED_CALLS: dict[str, Callable[[GroupCoordinator], object]] = {
    "all_reduce": lambda g: g.all_reduce(X),
    "reduce": lambda g: g.reduce(X),
    "reduce_scatter": lambda g: g.reduce_scatter(torch.ones(2 * g.world_size)),
    "reduce_scatter_tensor": lambda g: g.reduce_scatter_tensor(X, torch.ones(2 * g.world_size)),
    "reduce_scatterv": lambda g: g.reduce_scatterv(X, [0] * (g.world_size - 1) + [2]),
    "all_gather": lambda g: g.all_gather(X),
    "all_gather_into_tensor": lambda g: g.all_gather_into_tensor(torch.ones(2 * g.world_size), X),
    "all_gatherv": lambda g: g.all_gatherv(X, [2] * g.world_size),
    "all_to_all_single": lambda g: g.all_to_all_single(*torch.ones(2, g.world_size).unbind()),
    "broadcast": lambda g: g.broadcast(X),
    "gather": lambda g: g.gather(X),
    "send": lambda g: g.send(X),
    "recv": lambda g: g.recv(X),
    "barrier": lambda g: g.barrier(),
    "cp_all_gather_into_tensor_async": lambda g: g.cp_all_gather_into_tensor_async(
        torch.ones(2 * g.world_size), X
    ),
    "broadcast_object": lambda g: g.broadcast_object(1),
    "broadcast_object_list": lambda g: g.broadcast_object_list([1]),
    "all_gather_object": lambda g: g.all_gather_object(1),
    "send_object": lambda g: g.send_object(1, 1 - g.rank_in_group),
    "recv_object": lambda g: g.recv_object(1 - g.rank_in_group),
    "broadcast_tensor_dict": lambda g: g.broadcast_tensor_dict({"x": X}),
    "send_tensor_dict": lambda g: g.send_tensor_dict({"x": X}, 1 - g.rank_in_group),
    "recv_tensor_dict": lambda g: g.recv_tensor_dict(1 - g.rank_in_group),
    "cpu_group": lambda g: g.cpu_group,
    "device_group": lambda g: g.device_group,
}
FOR_TWO = [name for name in CLOSED_CALLS if name.startswith(("send_", "recv_"))]


def assert_closed(group: GroupCoordinator) -> None:
    for name, call in CLOSED_CALLS.items():
        if group.world_size == 1 and name in FOR_TWO:
            continue  # no peer to name
        with pytest.raises(GroupClosedError) as caught:
            call(group)
        assert str(caught.value).endswith(f"the group is closed [{group.member}]"), name


@leaves_nothing
def call_after_the_end(rank: int, world_size: int, url: str) -> None:
    state = start(rank, world_size, url, tp=2)
    used, unused, alone = state.tp, state.create_group("unused", [1, 0]), state.pp
    for group in (used, alone):
        group.all_reduce(X)
    state.close()
    for group in (used, unused, alone, state.world):
        assert_closed(group)


def test_every_call_on_a_group_of_a_closed_state_raises(workers: WorkerPool):
    workers.run(call_after_the_end, fresh_init_method(), ranks=2)


@leaves_nothing
def close_one_group(rank: int, world_size: int, url: str) -> None:
    with start(rank, world_size, url, tp=2) as state:
        state.tp.close()
        state.tp.close()
        assert_closed(state.tp)
        assert sums_to_its_ranks(state.world)  # of the same communicators


def test_a_closed_group_leaves_others_of_the_same_ranks_open(workers: WorkerPool):
    workers.run(close_one_group, fresh_init_method(), ranks=2)


# Launches


def init_here(**options: Any) -> ParallelState:
    return distcomm.init_distributed(**{"device": "cpu", "timeout": LONG_S, **options})


@leaves_nothing
def launch_alone(_rank: int, _world_size: int, options: dict[str, Any]) -> str:
    with pytest.raises(LaunchError) as caught:
        init_here(**options)
    assert not distcomm.is_initialized()
    return str(caught.value)


@pytest.mark.parametrize(
    ("env", "options", "missing"),
    [
        ({}, {}, "RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT"),
        ({"RANK": "0"}, {}, "WORLD_SIZE, MASTER_ADDR, MASTER_PORT"),
        ({"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost"}, {}, "MASTER_PORT"),
        ({"RANK": "", "WORLD_SIZE": "1"}, {"init_method": "file:///x"}, "RANK"),
        ({}, {"init_method": "tcp://localhost:1", "rank": 0}, "WORLD_SIZE"),
        ({}, {"init_method": "env://", "rank": 0, "world_size": 1}, "MASTER_ADDR, MASTER_PORT"),
    ],
)
def test_a_process_that_was_not_launched_is_told_what_is_missing(
    workers: WorkerPool, env: dict[str, str], options: dict[str, Any], missing: str
):
    (text,) = workers.run(launch_alone, options, ranks=1, env={**UNLAUNCHED, **env})
    assert f"can't find its job: {missing} not set" in text
    assert "torchrun --nproc-per-node N script.py" in text


@pytest.mark.parametrize(
    ("env", "options", "problem"),
    [
        ({"RANK": "one"}, {}, "RANK must be an integer >= 0; got 'one'"),
        ({"WORLD_SIZE": "-2"}, {}, "WORLD_SIZE must be an integer >= 0; got '-2'"),
        ({"LOCAL_RANK": "1.5"}, {}, "LOCAL_RANK must be an integer >= 0; got '1.5'"),
        ({}, {"rank": 2, "world_size": 2}, "got 2 of 2"),
        ({}, {"rank": -1, "world_size": 2}, "got -1 of 2"),
        ({}, {"rank": 0, "world_size": 0}, "got 0 of 0"),
    ],
)
def test_a_launch_of_impossible_numbers_is_refused(
    workers: WorkerPool, env: dict[str, str], options: dict[str, Any], problem: str
):
    options = {"init_method": "file:///x", **options}
    (text,) = workers.run(launch_alone, options, ranks=1, env={**UNLAUNCHED, **env})
    assert problem in text


@leaves_nothing
def meet(rank: int, world_size: int, env: dict[str, str], **options: Any) -> tuple[int, int]:
    """Initializes with this rank's variables, in which ``{rank}`` is filled in."""
    os.environ.update({name: value.format(rank=rank) for name, value in env.items()})
    with init_here(tp=world_size, **options) as state:
        assert sums_to_its_ranks(state.tp)
        return state.rank, state.local_rank


@leaves_nothing
def meet_by_hand(rank: int, world_size: int, url: str, **options: Any) -> tuple[int, int]:
    with init_here(
        tp=world_size, init_method=url, rank=rank, world_size=world_size, **options
    ) as state:
        assert sums_to_its_ranks(state.tp)
        return state.rank, state.local_rank


@pytest.mark.parametrize("scheme", ["tcp", "file"])
def test_ranks_given_by_hand_meet(workers: WorkerPool, scheme: str):
    url = new_url(scheme)
    results = workers.run(meet_by_hand, url, ranks=4, env=UNLAUNCHED)
    assert results == [(rank, rank) for rank in range(4)]


def test_a_local_rank_given_by_hand_counts(workers: WorkerPool):
    url = fresh_init_method()
    results = workers.run(meet_by_hand, url, ranks=2, env=UNLAUNCHED, local_rank=5)
    assert results == [(0, 5), (1, 5)]


@pytest.mark.parametrize("options", [{}, {"init_method": "env://"}])
def test_ranks_launched_through_the_environment_meet(workers: WorkerPool, options: dict[str, str]):
    env = {
        "RANK": "{rank}",
        "LOCAL_RANK": "1{rank}",
        "WORLD_SIZE": "4",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    results = workers.run(meet, env, ranks=4, env=UNLAUNCHED, **options)
    assert results == [(rank, 10 + rank) for rank in range(4)]


@leaves_nothing
def use_an_existing_group(rank: int, world_size: int, url: str, num_own_groups: list[int]) -> None:
    """Ranks are in different numbers of groups already, whose names torch counts."""
    dist.init_process_group("gloo", init_method=url, rank=rank, world_size=world_size)
    own = [
        dist.new_group([rank], use_local_synchronization=True) for _ in range(num_own_groups[rank])
    ]
    before = num_process_groups()
    for sizes in ({"tp": 4, "cp": 2}, {"tp": 2, "pp": 2}):
        with init_here(**sizes) as state:
            assert (state.rank, state.world_size) == (rank, world_size)
            for group in state.groups.values():
                assert sums_to_its_ranks(group)
            assert state.world.cpu_group is not dist.group.WORLD
        assert num_process_groups() == before
    with init_here(tp=4, rank=rank, world_size=world_size) as state:  # the same said by hand
        assert sums_to_its_ranks(state.tp)
    total = torch.tensor([rank])
    dist.all_reduce(total)
    assert total.item() == sum(range(world_size))
    for group in own:
        dist.all_reduce(total, group=group)


def test_an_existing_default_group_is_used_and_survives(workers: WorkerPool):
    workers.run(use_an_existing_group, fresh_init_method(), [0, 2, 1, 0], ranks=4)


@leaves_nothing
def contradict_an_existing_group(rank: int, world_size: int, url: str) -> None:
    dist.init_process_group("gloo", init_method=url, rank=rank, world_size=world_size)
    for options in ({"rank": 5}, {"world_size": 7}, {"init_method": "file:///x"}):
        ((name, value),) = options.items()
        with pytest.raises(LaunchError) as caught:
            init_here(tp=2, **options)
        assert f"{name} must not be given" in str(caught.value)
        assert f"got {value!r} [rank {rank}]" in str(caught.value)
    state = init_here(tp=2)
    dist.destroy_process_group()  # with all others, also those of the state
    state.close()
    assert not distcomm.is_initialized()


def test_a_launch_that_contradicts_the_existing_group_is_refused(workers: WorkerPool):
    workers.run(contradict_an_existing_group, fresh_init_method(), ranks=2)


# A process group that doesn't end, as torch's NCCL group while a CUDA graph has captured it


@leaves_nothing
def close_beside_a_stuck_group(rank: int, world_size: int, url: str) -> None:
    graph_is_gone, ended = threading.Event(), threading.Event()
    destroy = communicators.destroy_process_group

    def stuck(group: dist.ProcessGroup) -> None:
        if group is captured:
            graph_is_gone.wait(LONG_S)
        destroy(group)
        if group is captured:
            ended.set()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(communicators, "FREE_S", 0.2)
        patch.setattr(communicators, "destroy_process_group", stuck)
        dist.init_process_group("gloo", init_method=url, rank=rank, world_size=world_size)
        before = num_process_groups()
        state = init_here(tp=world_size)
        captured = state.create_group("captured", [1, 0]).cpu_group
        began = time.monotonic()
        with mock.patch.object(communicators.logger, "warning") as warning:
            state.close()
        assert 0.2 <= time.monotonic() - began < LONG_S / 10
    (call,) = warning.call_args_list
    text = call.args[0] % call.args[1:]
    assert text.startswith("close: destroy_process_group did not return within 0.2 s")
    assert "[group 'captured'" in text
    assert num_process_groups() == before
    assert captured not in c10d._world.pg_names
    with pytest.raises((LookupError, RuntimeError, ValueError)):
        c10d._resolve_process_group(captured.group_name)
    assert not any(captured in groups for groups in c10d._world.tags_to_pg.values())
    dist.destroy_process_group()  # torch waits for all groups that it knows
    graph_is_gone.set()
    assert ended.wait(LONG_S)


def test_close_does_not_wait_for_a_stuck_process_group(workers: WorkerPool):
    workers.run(close_beside_a_stuck_group, fresh_init_method(), ranks=2)


# A store that outlives initializations, as torchrun's does


@contextmanager
def agent_store() -> Iterator[dict[str, str | None]]:
    """A store in this process; yields the variables that make ranks use it."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    yield {
        **UNLAUNCHED,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }


@leaves_nothing
def initialize_again_and_again(rank: int, world_size: int) -> None:
    """One store serves layouts, failures and again layouts; nothing old is ever read."""
    place = {"rank": rank, "world_size": world_size}
    for sizes in ({"tp": 4, "cp": 2}, {"tp": 4, "ep": 4}, {"dp": 4}):
        with init_here(**sizes, **place) as state:
            assert all(map(sums_to_its_ranks, state.groups.values()))
            state.create_group("again", [3, 2, 1, 0]).barrier()
    with pytest.raises(InitializationError):
        init_here(tp=4, order="tp-cp-pp-dp" if rank else "dp-cp-pp-tp", **place)
    with pytest.raises(LayoutError):
        init_here(tp=3, **place)
    with init_here(tp=4, **place) as state:
        assert sums_to_its_ranks(state.tp)


def test_nothing_that_an_earlier_initialization_left_is_read(workers: WorkerPool):
    with agent_store() as env:
        for _ in range(2):  # the second time the ranks' counters go on
            workers.run(initialize_again_and_again, ranks=4, env=env)


# Failures: the same on all ranks, and prompt


def outcome_of(rank: int, world_size: int, url: str, options: dict[str, Any]) -> DistcommError:
    """The error of an initialization that must fail, and must leave nothing."""
    with pytest.raises(DistcommError) as caught:
        start(rank, world_size, url, **options)
    assert not distcomm.is_initialized()
    assert not dist.is_initialized()
    assert num_process_groups() == 0
    return caught.value


@leaves_nothing
def fail_to_initialize(
    rank: int,
    world_size: int,
    url: str,
    options: dict[str, Any],
    odd_rank: int | None = None,
    odd_options: dict[str, Any] | None = None,
) -> tuple[str, str, dict[int, str] | None]:
    """Fails with `odd_options` on one rank; then the same workers initialize rightly."""
    if rank == odd_rank:
        options = {**options, **(odd_options or {})}
    error = outcome_of(rank, world_size, url, {"timeout": LONG_S, **options})
    with start(rank, world_size, f"{url}-second", tp=world_size) as state:
        assert sums_to_its_ranks(state.tp)
    return type(error).__name__, str(error), getattr(error, "failures", None)


@pytest.mark.parametrize("odd_rank", [0, 2])
@pytest.mark.parametrize(
    ("name", "odd", "usual"),
    [
        ("tp", 2, 4),
        ("ep", 2, 1),
        ("order", "dp-tp-cp-pp", "tp-cp-pp-dp"),
        ("cp_layout", "inside_tp", "auto"),
        ("device", "auto", "cpu"),
    ],
)
def test_an_argument_that_differs_is_named_with_the_odd_rank(
    workers: WorkerPool, name: str, odd: Any, usual: Any, odd_rank: int
):
    options = {"tp": 4, "dp": 1, name: usual}
    odd_options = {name: odd, **({"dp": 2} if name == "tp" else {})}
    url = fresh_init_method()
    results = workers.run(fail_to_initialize, url, options, odd_rank, odd_options, ranks=4)
    usual_rank = 1 if odd_rank == 0 else 0
    for rank, (error, text, failures) in enumerate(results):
        assert error == "InitializationError", text
        assert failures is not None
        assert failures.keys() == {odd_rank}, text
        assert f"{name} is {odd!r}, on rank {usual_rank} {usual!r}" in failures[odd_rank]
        assert f"[raised on rank {rank}]\n  rank {odd_rank}: " in text


@leaves_nothing
def claim_a_world_size(rank: int, world_size: int, url: str) -> str:
    claimed = 5 if rank == 1 else world_size
    return str(outcome_of(rank, claimed, url, {"dp": claimed}))


def test_a_world_size_that_differs_is_named(workers: WorkerPool):
    for text in workers.run(claim_a_world_size, fresh_init_method(), ranks=4):
        assert "rank 1: world_size is 5, on rank 0 4; dp is 5, on rank 0 4" in text


@pytest.mark.parametrize("odd_rank", [0, 2])
@pytest.mark.parametrize(
    ("odd_options", "error", "problem"),
    [
        ({"tp": 3}, "LayoutError", "world_size must be tp·pp·dp = 3"),
        ({"tp": 0}, "LayoutError", "tp must be a positive int; got 0"),
        ({"ep": 3}, "LayoutError", "ep must divide tp = 4; got 3"),
        ({"pp": "two"}, "LayoutError", "pp must be a positive int; got 'two'"),
        ({"device": "tpu"}, "ArgumentError", "device must be one of auto, cuda, cpu; got 'tpu'"),
    ],
)
def test_a_wrong_argument_of_one_rank_fails_all_and_is_named(
    workers: WorkerPool, odd_options: dict[str, Any], error: str, problem: str, odd_rank: int
):
    url = fresh_init_method()
    results = workers.run(fail_to_initialize, url, {"tp": 4}, odd_rank, odd_options, ranks=4)
    for rank, (name, text, failures) in enumerate(results):
        assert name == (error if rank == odd_rank else "InitializationError"), text
        assert problem in text
        if rank != odd_rank:
            assert failures is not None
            assert failures.keys() == {odd_rank}, text


@pytest.mark.parametrize(
    ("options", "error", "problem"),
    [
        ({"tp": 3}, "LayoutError", "tp·pp·dp = 3 (inside_tp)"),
        ({"tp": -4}, "LayoutError", "tp must be a positive int; got -4"),
        ({"tp": 4, "ep": 8}, "LayoutError", "ep must divide tp = 4; got 8"),
        ({"tp": 4, "order": "tp-cp"}, "LayoutError", "order must name each of tp, cp, pp and dp"),
        ({"tp": 4, "cp_layout": "beside"}, "LayoutError", "cp_layout must be one of 'auto'"),
        ({"tp": 4, "device": "gpu"}, "ArgumentError", "device must be one of auto, cuda, cpu"),
    ],
)
def test_a_wrong_argument_of_all_ranks_is_each_ones_own_error(
    workers: WorkerPool, options: dict[str, Any], error: str, problem: str
):
    for name, text, _ in workers.run(fail_to_initialize, fresh_init_method(), options, ranks=4):
        assert name == error, text
        assert problem in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA devices")
@pytest.mark.parametrize("scheme", ["file", "tcp"])
def test_cuda_without_gpus_names_all_ranks(workers: WorkerPool, scheme: str):
    url = new_url(scheme)
    options = {"tp": 8, "device": "cuda"}
    for text in workers.run(fail_on_tcp_or_file, url, options, ranks=8):
        assert "device='cuda' can't be used" in text
        for rank in range(8):
            assert f"rank {rank}: torch sees no CUDA device" in text


@leaves_nothing
def fail_on_tcp_or_file(rank: int, world_size: int, url: str, options: dict[str, Any]) -> str:
    error = outcome_of(rank, world_size, url, options)
    assert type(error) is InitializationError
    return str(error)


@leaves_nothing
def read_the_outcome_late(rank: int, world_size: int, url: str) -> str:
    """Rank 0, in whose process the store is, has nothing to do after its own error but to go."""
    comes = meeting._comes

    def read_late(*args: Any) -> bool:
        came = comes(*args)
        if rank > 0:
            time.sleep(0.3)
        return came

    meeting._comes = read_late
    try:
        start(rank, world_size, url, tp=world_size, device="cuda")
    except InitializationError as error:
        return str(error)
    finally:
        meeting._comes = comes
        gc.collect()
    return "no error"


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA devices")
def test_rank_0_stays_until_all_know_why_it_fails(workers: WorkerPool):
    for text in workers.run(read_the_outcome_late, new_url("tcp"), ranks=3):
        assert "device='cuda' can't be used" in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA devices")
def test_auto_is_cpu_without_gpus(workers: WorkerPool):
    groups = workers.run(make_groups, fresh_init_method(), ranks=2, tp=2, device="auto")
    assert [found["tp"] for found in groups] == [[0, 1]] * 2


@pytest.mark.parametrize(
    "timeout", [0, -1.0, math.inf, math.nan, "5", None, timedelta(0), timedelta(seconds=-2)]
)
def test_a_wrong_timeout_is_refused(timeout: Any):
    with pytest.raises(ArgumentError) as caught:
        distcomm.init_distributed(timeout=timeout)
    assert f"timeout must be a finite number of seconds > 0; got {timeout!r}" in str(caught.value)
    assert not distcomm.is_initialized()


def test_a_timeout_may_be_a_timedelta(workers: WorkerPool):
    groups = workers.run(
        make_groups, fresh_init_method(), ranks=2, tp=2, timeout=timedelta(seconds=LONG_S)
    )
    assert [found["tp"] for found in groups] == [[0, 1]] * 2


@leaves_nothing
def wait_for_the_absent(
    rank: int, world_size: int, url: str, absent: int, timeout_s: float = SHORT_S
) -> tuple[str, dict[int, str]] | None:
    if rank == absent:
        return None
    error = outcome_of(rank, world_size, url, {"tp": 4, "timeout": timeout_s})
    assert type(error) is InitializationError
    return str(error), error.failures


@pytest.mark.parametrize(("scheme", "timeout_s"), [("file", SHORT_S), ("tcp", SHORT_TCP_S)])
def test_a_rank_that_does_not_come_is_named_on_all_others(
    workers: WorkerPool, scheme: str, timeout_s: float
):
    url = new_url(scheme)
    results = workers.run(wait_for_the_absent, url, 2, timeout_s, ranks=4)
    assert results.pop(2) is None
    for outcome in results:
        assert outcome is not None
        assert outcome[1] == {2: f"did not come within {timeout_s:g} s"}, outcome[0]


def test_a_missing_rank_0_is_named_on_all_others(workers: WorkerPool):
    url = fresh_init_method()
    results = workers.run(wait_for_the_absent, url, 0, ranks=4)
    for outcome in results[1:]:
        assert outcome is not None
        assert outcome[1].keys() == {0}
        assert f"rank 0: did not come within {SHORT_S:g} s" in outcome[0]


def test_a_store_that_nobody_serves_is_named(workers: WorkerPool):
    url = new_url("tcp")
    results = workers.run(wait_for_the_absent, url, 0, ranks=2)
    assert results[1] is not None
    assert f"no store at {url}, where rank 0 or its launcher serves one" in results[1][0]


@leaves_nothing
def fail_while_building(rank: int, world_size: int, url: str, failing: int, bad_rank: int) -> str:
    """One rank can't make its `failing`-th process group. Later it can."""
    make, calls = c10d._new_process_group_helper, []

    def make_or_fail(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        if rank == bad_rank and len(calls) == failing:
            raise RuntimeError("out of sockets")
        return make(*args, **kwargs)

    options = {"tp": 4, "cp": 2}
    c10d._new_process_group_helper = make_or_fail
    try:
        error = outcome_of(rank, world_size, url, {**options, "timeout": SHORT_S})
    finally:
        c10d._new_process_group_helper = make
    assert type(error) is InitializationError
    with start(rank, world_size, f"{url}-second", **options) as state:
        assert all(map(sums_to_its_ranks, state.groups.values()))
    return str(error)


@pytest.mark.parametrize(
    ("axis", "failing", "peers", "others"), [("world", 1, [0, 1, 2], []), ("cp", 2, [1], [0, 2])]
)
def test_a_failure_while_building_fails_all_ranks_and_leaves_nothing(
    workers: WorkerPool, axis: str, failing: int, peers: list[int], others: list[int]
):
    results = workers.run(fail_while_building, fresh_init_method(), failing, 3, ranks=4)
    for text in results:
        assert f"rank 3: making the {axis} group failed: out of sockets" in text
        for rank in peers:
            assert f"rank {rank}: making the {axis} group failed: Wait timeout" in text
        for rank in others:
            assert f"rank {rank}:" not in text
    assert len({text.split("\n", 1)[1] for text in results}) == 1


@leaves_nothing
def fail_alone_then_meet(rank: int, world_size: int, url: str) -> None:
    if rank == 0:
        with pytest.raises(RuntimeError, match="Wait timeout"):
            dist.init_process_group(
                "gloo",
                store=dist.HashStore(),
                rank=0,
                world_size=2,
                timeout=timedelta(seconds=SHORT_S),
            )
    with start(rank, world_size, url, tp=world_size) as state:
        assert sums_to_its_ranks(state.tp)


def test_ranks_meet_although_one_has_failed_by_itself_before(workers: WorkerPool):
    workers.run(fail_alone_then_meet, fresh_init_method(), ranks=2)


@leaves_nothing
def close_at_once(rank: int, world_size: int, urls: list[str]) -> None:
    """All ranks but one are quick: they have left when the slow one has what it connects to."""
    make = c10d._new_process_group_helper

    def make_slowly(*args: Any, **kwargs: Any) -> Any:
        time.sleep(0.05)
        return make(*args, **kwargs)

    for number, url in enumerate(urls):
        if number % world_size == rank:
            c10d._new_process_group_helper = make_slowly
        with start(rank, world_size, url, tp=world_size):
            pass
        c10d._new_process_group_helper = make


def test_a_state_may_be_closed_as_soon_as_it_is_there(workers: WorkerPool):
    workers.run(close_at_once, [fresh_init_method() for _ in range(9)], ranks=3)


# Nothing grows


def usage() -> dict[str, int]:
    """What this process holds."""
    gc.collect()
    fds = open_files()
    status = Path("/proc/self/status").read_text()
    return {
        "threads": len(os.listdir("/proc/self/task")),
        "Python threads": threading.active_count(),
        "file descriptors": len(fds),
        "sockets": sum(link.startswith("socket:") for link in fds),
        "process groups": num_process_groups(),
        "group names": len(c10d._world.pg_names) + len(c10d._world.pg_group_ranks),
        "group tags": len(c10d._world.tags_to_pg) + len(c10d._world.pg_to_tag),
        "rss_kib": int(status.split("VmRSS:")[1].split()[0]),
    }


def open_files() -> list[str]:
    """What the open descriptors are of, without the one that lists them, which is closed then."""
    links = []
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            links.append(os.readlink(f"/proc/self/fd/{fd}"))
    return links


CYCLE_LAYOUTS: list[dict[str, Any]] = [
    {"tp": 8, "cp": 2},
    {"tp": 4, "cp": 2, "ep": 2, "order": "tp-dp-cp-pp", "cp_layout": "beside_tp"},
    {"tp": 2, "pp": 2, "dp": 2},
    {"dp": 8},
]


@leaves_nothing
def cycle(rank: int, world_size: int, urls: list[str]) -> dict[str, int]:
    for number, url in enumerate(urls):
        sizes = CYCLE_LAYOUTS[number % len(CYCLE_LAYOUTS)]
        with start(rank, world_size, url, **sizes) as state:
            assert sums_to_its_ranks(state.tp)
            state.create_group("extra", [7, 0, 3]) if rank in (0, 3, 7) else None
            state.pp.cpu_group  # noqa: B018 - makes one
            state.tp.all_gather_object("x" * 10_000)
            handle = state.cp.cp_all_gather_into_tensor_async(
                torch.empty(2 * state.cp.world_size), torch.ones(2)
            )
            handle.wait()
    return usage()


def test_twenty_cycles_leave_nothing_behind(workers: WorkerPool):
    def cycles(count: int) -> list[dict[str, int]]:
        return workers.run(cycle, [fresh_init_method() for _ in range(count)], ranks=8)

    before, after = cycles(4), cycles(20)
    for earlier, later in zip(before, after, strict=True):
        growth_kib = later.pop("rss_kib") - earlier.pop("rss_kib")
        assert later == earlier
        assert growth_kib < 20_000


@leaves_nothing
def keep_closed_states(rank: int, world_size: int, urls: list[str]) -> list[dict[str, int]]:
    """What this process holds while it still refers to closed states and their groups."""
    kept, found = [], []
    for url in urls:
        with start(rank, world_size, url, tp=2) as state:
            assert sums_to_its_ranks(state.tp)
            assert sums_to_its_ranks(state.create_group("swapped", [1, 0]))
            kept.append((state, state.groups))
        found.append(usage())
    return [{name: held[name] for name in ("threads", "process groups")} for held in found]


def test_a_closed_state_that_is_kept_has_no_threads(workers: WorkerPool):
    urls = [fresh_init_method() for _ in range(4)]
    for first, *others in workers.run(keep_closed_states, urls, ranks=2):
        assert others == [first] * 3
