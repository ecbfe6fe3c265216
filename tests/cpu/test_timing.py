"""Medians of benchmarks: of the slowest rank, without what could not be timed."""

from __future__ import annotations

import pytest

from distcomm import ParallelState
from distcomm.timing import slowest_medians
from tests.cpu.job import Job


def medians(state: ParallelState) -> None:
    group = state.world
    slow = group.rank_in_group * 10.0
    rounds = iter([100.0, None, 1.0, None, 3.0])  # the first one is for warming up
    ways = {"even": lambda: slow + 1.0, "disturbed": lambda: next(rounds)}
    found = slowest_medians(group, ways, num_rounds=4, num_warm_up=1)
    assert found == {"even": (group.world_size - 1) * 10.0 + 1.0, "disturbed": 2.0}


def never(state: ParallelState) -> None:
    group = state.world
    ways = {"fine": lambda: 1.0, "odd": lambda: None if group.rank_in_group == 0 else 1.0}
    with pytest.raises(SystemExit, match="no round could time odd"):
        slowest_medians(group, ways, num_rounds=2)


def test_medians_of_the_slowest_rank(job: Job) -> None:
    job.run(medians)


def test_a_way_that_cannot_be_timed_ends_all_ranks(job: Job) -> None:
    job.run(never)
