"""`distcomm.sleep` and `wake_up` in a CPU job, which has nothing that could sleep but its steps."""

from __future__ import annotations

import pytest

import distcomm
from distcomm import ArgumentError, ParallelState, SleepError
from tests.cpu.job import Job


def check_nothing_to_do(state: ParallelState) -> None:
    for symmetric in (False, True):
        report = distcomm.sleep(symmetric=symmetric)
        assert (report.freed_bytes, report.pools, report.communicators, report.awake) == (
            0, {}, {}, {}
        )  # fmt: skip
        assert distcomm.wake_up() == 0


def test_a_job_without_gpus_has_nothing_to_put_to_sleep(job: Job):
    job.run(check_nothing_to_do)


def check_other_calls(state: ParallelState) -> None:
    odd = state.rank == 3
    with pytest.raises(SleepError, match=r"failed on ranks \[3\]") as caught:
        distcomm.wake_up() if odd else distcomm.sleep()
    assert "rank 3: calls wake_up(tags=None, symmetric=True), others sleep(" in str(caught.value)
    with pytest.raises(SleepError, match=r"rank 3: calls sleep\(.*symmetric=True, .*\), others"):
        distcomm.sleep(symmetric=odd)
    distcomm.sleep()
    distcomm.wake_up()


def test_ranks_that_call_otherwise_are_named(job: Job):
    job.run(check_other_calls)


def check_unknown_tags(state: ParallelState) -> None:
    bad = {"offload_tags": ("weights",)} if state.rank == 1 else {}
    with pytest.raises(SleepError, match=r"failed on ranks \[1\]: nothing has changed") as caught:
        distcomm.sleep(**bad)
    text = "offload_tags must be tags that were used in a sleepable pool, of []; got ('weights',)"
    assert text in str(caught.value)
    assert isinstance(caught.value.__cause__, ArgumentError) == (state.rank == 1)
    with pytest.raises(SleepError, match="wake_up: tags must be"):
        distcomm.wake_up(("kv",) if state.rank == 0 else None)
    distcomm.wake_up()


def test_an_unknown_tag_of_one_rank_is_an_error_of_all(job: Job):
    job.run(check_unknown_tags)


def test_without_a_job_a_process_is_alone():
    assert distcomm.sleep().freed_bytes == 0
    assert distcomm.wake_up() == 0
    for tags in (("weights",), "weights"):
        with pytest.raises(ArgumentError, match="sleep: offload_tags must be tags that were used"):
            distcomm.sleep(tags)
        with pytest.raises(ArgumentError, match="wake_up: tags must be tags"):
            distcomm.wake_up(tags)
        with pytest.raises(ArgumentError, match="sleep: tags must be tags"):
            distcomm.sleep(tags=tags)
