"""Ranks in step: a call that not all make alike changes nothing, and the next one finds them."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch.distributed as dist

from distcomm.errors import ArgumentError, SleepError
from distcomm.sleep_steps import SleepSteps

NUM_RANKS = 3
TIMEOUT_S = 0.3
LONG_S = 20.0  # never waited for


class Ranks:
    """Three ranks, each in a thread of its own, over one store."""

    def __init__(self, timeout_s: float = LONG_S) -> None:
        store = dist.HashStore()
        self.steps = [SleepSteps(store, rank, NUM_RANKS, timeout_s) for rank in range(NUM_RANKS)]

    def run(self, *works: Callable[[SleepSteps], Any] | None) -> list[Any]:
        """What each rank's work returns or raises; None for a rank that stays away."""

        def attend(pair: tuple[SleepSteps, Callable[[SleepSteps], Any] | None]) -> Any:
            steps, work = pair
            if work is None:
                return None
            try:
                return work(steps)
            except Exception as error:  # noqa: BLE001 - looked at by the test
                return error

        with ThreadPoolExecutor(NUM_RANKS) as threads:
            return list(threads.map(attend, zip(self.steps, works, strict=True)))


def begun(call: str = "sleep", error: Exception | None = None, **arguments: Any) -> Any:
    def work(steps: SleepSteps) -> str:
        steps.begin(call, arguments, error)
        return "begun"

    return work


def test_the_same_call_passes_on_all():
    ranks = Ranks()
    for call in ("sleep", "wake_up", "sleep"):
        assert ranks.run(*[begun(call, tags=["a"])] * NUM_RANKS) == ["begun"] * NUM_RANKS


def test_a_failure_is_told_to_all():
    ranks = Ranks()
    cause = ArgumentError("tags", "known", "x")
    results = ranks.run(begun(), begun(error=cause), begun())
    for rank, error in enumerate(results):
        assert isinstance(error, SleepError)
        assert f"sleep failed on ranks [1]: nothing has changed [raised on rank {rank}]" in str(
            error
        )
        assert "rank 1: tags must be known; got x" in str(error)
    assert results[1].__cause__ is cause
    assert ranks.run(*[begun()] * NUM_RANKS) == ["begun"] * NUM_RANKS


def test_other_arguments_and_other_calls_are_named():
    ranks = Ranks()
    results = ranks.run(begun(symmetric=True), begun(symmetric=True), begun(symmetric=False))
    for error in results:
        assert "rank 2: calls sleep(symmetric=False), others sleep(symmetric=True)" in str(error)
    for error in ranks.run(begun(), begun("wake_up"), begun()):
        assert "rank 1: calls wake_up(), others sleep()" in str(error)
    assert ranks.run(*[begun()] * NUM_RANKS) == ["begun"] * NUM_RANKS


@pytest.mark.parametrize("absent", range(NUM_RANKS))
def test_a_rank_that_misses_a_call_is_in_step_at_the_next(absent: int):
    ranks = Ranks(TIMEOUT_S)
    results = ranks.run(*[None if rank == absent else begun() for rank in range(NUM_RANKS)])
    for rank, error in enumerate(results):
        if rank != absent:
            assert f"failed on ranks [{absent}]" in str(error)
            assert f"rank {absent}: did not come within {2 * TIMEOUT_S:g} s" in str(error)
    assert ranks.run(*[begun("wake_up")] * NUM_RANKS) == ["begun"] * NUM_RANKS


def test_a_rank_alone_waits_so_long_and_no_longer():
    """One whose call the others have given up on, and who don't call again."""
    ranks = Ranks(TIMEOUT_S)
    ranks.run(begun(), begun(), None)
    start = time.monotonic()
    error = ranks.run(None, None, begun())[2]
    assert "failed on ranks [0, 1]" in str(error)
    assert time.monotonic() - start < LONG_S
    assert ranks.run(*[begun()] * NUM_RANKS) == ["begun"] * NUM_RANKS


def test_stages_of_a_call_bring_all_reports():
    ranks = Ranks()

    def work(steps: SleepSteps) -> list[Any]:
        steps.begin("sleep", {}, None)
        first = steps.exchange("one", {"rank": steps._rank})
        second = steps.exchange("two", [])
        steps.conclude([])
        return [first, second]

    expected = [[{"rank": rank} for rank in range(NUM_RANKS)], [[]] * NUM_RANKS]
    for _ in range(2):  # under the same names
        assert ranks.run(*[work] * NUM_RANKS) == [expected] * NUM_RANKS


def test_a_rank_that_does_not_come_to_a_stage_is_named():
    ranks = Ranks(TIMEOUT_S)

    def work(steps: SleepSteps) -> None:
        steps.begin("sleep", {}, None)
        if steps._rank != 1:
            steps.exchange("windows", {})

    results = ranks.run(*[work] * NUM_RANKS)
    assert results[1] is None
    for error in (results[0], results[2]):
        assert "sleep failed on ranks [1]: it has not come to 'windows'" in str(error)


def test_what_went_wrong_on_the_way_is_raised_on_all():
    ranks = Ranks()
    errors = [SleepError("no memory"), SleepError("no window")]

    def work(steps: SleepSteps) -> None:
        steps.begin("wake_up", {}, None)
        steps.conclude(errors if steps._rank == 2 else [])

    for error in ranks.run(*[work] * NUM_RANKS):
        assert "wake_up failed on ranks [2]: what went well stays as it is" in str(error)
        assert "rank 2: no memory; no window" in str(error)


def test_a_process_alone_raises_its_own_errors():
    steps = SleepSteps(None, 0, 1, 0.0)
    cause = ArgumentError("tags", "known", "x")
    with pytest.raises(ArgumentError):
        steps.begin("sleep", {}, cause)
    steps.begin("sleep", {}, None)
    assert steps.exchange("windows", {"a": 1}) == [{"a": 1}]
    with pytest.raises(SleepError, match="first"):
        steps.conclude([SleepError("first"), SleepError("second")])
    steps.conclude([])


def test_a_lost_store_is_an_error_that_says_so():
    class Lost(dist.HashStore):
        def set(self, key: str, value: str) -> None:
            raise RuntimeError("connection reset")

    steps = SleepSteps(Lost(), 0, 2, TIMEOUT_S)
    with pytest.raises(SleepError, match=r"sleep: the job's store can't be reached: connection"):
        steps.begin("sleep", {}, None)
