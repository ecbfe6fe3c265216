"""Groups are made by all ranks or by none, and by all the next time, whoever missed a call."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from typing import Any
from unittest import mock

import pytest
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

import distcomm
from distcomm import CollectiveError, InitializationError, ParallelState, group_steps
from distcomm.communicators import GroupCommunicators
from distcomm.parallel_state import destroy_model_parallel, initialize_model_parallel
from tests.cpu.job import start
from tests.cpu.test_init import num_process_groups, sums_to_its_ranks
from tests.cpu.test_two_phase_init import SHORT_S, TIMEOUT_S, assert_works, in_an_environment
from tests.worker_pool import WorkerPool, fresh_init_method


def tell(state: ParallelState, what: str) -> None:
    state._job.store.set(f"test/{what}/{state.rank}", "")


def wait_for(state: ParallelState, what: str, *ranks: int) -> None:
    """Until these ranks have told it."""
    names = [f"test/{what}/{rank}" for rank in ranks]
    state._job.store.wait(names, timedelta(seconds=TIMEOUT_S))


def raise_when_called(number: int, error: BaseException) -> Callable[..., Any]:
    """What makes process groups, but for one time."""
    make, calls = c10d._new_process_group_helper, []

    def make_or_raise(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        if len(calls) == number:
            raise error
        return make(*args, **kwargs)

    return make_or_raise


@contextmanager
def interrupted(here: bool, number: int) -> Iterator[None]:
    """Ctrl-C comes while the process group of that number is made; others don't wait longer than
    they have to."""
    make = c10d._new_process_group_helper
    if here:
        make = raise_when_called(number, KeyboardInterrupt())
    with (
        mock.patch.object(c10d, "_new_process_group_helper", make),
        mock.patch.object(group_steps, "_GIVING_UP_S", 0.0),
    ):
        yield


# Layouts


@in_an_environment
def miss_layouts(state: ParallelState) -> None:
    """Rank 1 misses one, and rank 0, which decides who was there, two."""
    for late, number in ((1, 1), (0, 2)):
        others = [rank for rank in range(state.world_size) if rank != late]
        if state.rank == late:
            wait_for(state, f"given up on {late}", *others)
        else:
            for _ in range(number):
                with pytest.raises(InitializationError) as caught:
                    initialize_model_parallel(2)
                assert caught.value.failures == {late: f"did not come within {SHORT_S:g} s"}
            tell(state, f"given up on {late}")
        initialize_model_parallel(2)
        assert_works(state)
        destroy_model_parallel()


def test_a_rank_that_missed_a_layout_comes_to_the_next(workers: WorkerPool):
    workers.run(miss_layouts, fresh_init_method(), ranks=4, timeout=SHORT_S)


@in_an_environment
def interrupt_a_layout(state: ParallelState) -> None:
    before = num_process_groups()
    expected = KeyboardInterrupt if state.rank == 3 else InitializationError
    with interrupted(state.rank == 3, 2), pytest.raises(expected):
        initialize_model_parallel(2, context_parallel_size=2)
    assert num_process_groups() == before
    assert list(state.groups) == ["world"]
    assert not state.is_laid_out
    initialize_model_parallel(2, context_parallel_size=2)
    assert_works(state)


def test_an_interrupt_leaves_the_world_alone(workers: WorkerPool):
    workers.run(interrupt_a_layout, fresh_init_method(), ranks=4, timeout=SHORT_S)


def interrupt_init(rank: int, world_size: int, url: str, stage: str) -> None:
    """Ctrl-C comes to rank 1 when it has made the groups of a stage, and waits for the others."""
    wait = group_steps.pass_stage

    def wait_or_be_interrupted(store: dist.Store, launch: Any, name: str, *args: Any) -> None:
        if rank == 1 and name == stage:
            raise KeyboardInterrupt
        wait(store, launch, name, *args)

    expected = KeyboardInterrupt if rank == 1 else InitializationError
    with (
        mock.patch.object(group_steps, "pass_stage", wait_or_be_interrupted),
        mock.patch.object(group_steps, "_GIVING_UP_S", 0.0),
        pytest.raises(expected),
    ):
        start(rank, world_size, url, tp=2, dp=2, timeout=SHORT_S)
    assert not distcomm.is_initialized()
    assert not dist.is_initialized()
    assert num_process_groups() == 0


@pytest.mark.parametrize("stage", ["groups/world", "groups/dp"])
def test_an_interrupt_while_all_is_made_leaves_nothing(workers: WorkerPool, stage: str):
    workers.run(interrupt_init, fresh_init_method(), stage, ranks=4)


# Groups of the caller's own


@in_an_environment
def miss_attempts(state: ParallelState, early: int) -> None:
    """One member gives up twice before the other one comes. Rank 2 is none."""
    late = 1 - early
    before = num_process_groups()
    if state.rank == early:
        for _ in range(2):
            with pytest.raises(CollectiveError, match=rf"ranks \[{late}\] did not come within 1 s"):
                state.create_group("pair", [0, 1])
        assert num_process_groups() == before
        assert "pair" not in state.groups
        tell(state, "given up")
    if state.rank == late:
        wait_for(state, "given up", early)
    if state.rank < 2:
        assert sums_to_its_ranks(state.create_group("pair", [0, 1]))
        assert sums_to_its_ranks(state.create_group("the same ranks", [0, 1]))
    tell(state, "done")
    wait_for(state, "done", 0, 1, 2)


@pytest.mark.parametrize("early", [0, 1])
def test_a_group_that_was_given_up_can_be_made(workers: WorkerPool, early: int):
    workers.run(miss_attempts, fresh_init_method(), early, ranks=3, timeout=SHORT_S)


@in_an_environment
def interrupt_a_group(state: ParallelState) -> None:
    before = num_process_groups()
    expected = KeyboardInterrupt if state.rank == 1 else CollectiveError
    last_wait = (
        mock.patch.object(GroupCommunicators, "wait_for_all", side_effect=KeyboardInterrupt)
        if state.rank == 1
        else nullcontext()
    )
    for number, interrupt in enumerate((interrupted(state.rank == 1, 1), last_wait)):
        with interrupt, pytest.raises(expected):
            state.create_group("pair", [1, 0])
        assert num_process_groups() == before
        assert list(state.groups) == ["world"]
        tell(state, f"over {number}")  # gloo gives up later than others would wait
        wait_for(state, f"over {number}", 0, 1)
    assert sums_to_its_ranks(state.create_group("pair", [1, 0]))


def test_an_interrupted_group_can_be_made_again(workers: WorkerPool):
    workers.run(interrupt_a_group, fresh_init_method(), ranks=2, timeout=SHORT_S)


@in_an_environment
def fail_after_the_group_is_made(state: ParallelState) -> None:
    before = num_process_groups()
    broken = mock.patch.object(state._groups, "_add", side_effect=KeyboardInterrupt)
    with broken, pytest.raises(KeyboardInterrupt):
        state.create_group("pair", [1, 0])
    assert num_process_groups() == before
    assert [communicators.ranks for communicators in state.communicators] == [(0, 1)]
    assert sums_to_its_ranks(state.create_group("pair", [1, 0]))


def test_communicators_of_a_group_that_failed_are_closed(workers: WorkerPool):
    workers.run(fail_after_the_group_is_made, fresh_init_method(), ranks=2)
