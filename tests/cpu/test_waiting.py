"""`run_bounded` passes on what a call does, and gives up on one that never returns."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from distcomm.waiting import run_bounded

LONG_S = 60.0  # never waited for


@pytest.fixture
def blocked() -> Iterator[threading.Event]:
    """What a call waits for that doesn't return by itself; set at the end."""
    event = threading.Event()
    yield event
    event.set()


def waiting_threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name.startswith("distcomm: ")]


def test_the_result_is_passed_on_at_once():
    start = time.monotonic()
    assert run_bounded(lambda: [1, 2], timeout_s=LONG_S, what="a call") == [1, 2]
    assert time.monotonic() - start < LONG_S / 2
    assert not waiting_threads()


def test_none_is_a_result():
    assert run_bounded(lambda: None, timeout_s=LONG_S, what="a call") is None


@pytest.mark.parametrize("error", [LookupError("no key"), SystemExit(3), TimeoutError("own")])
def test_an_exception_is_passed_on(error: BaseException):
    def fail() -> None:
        raise error

    with pytest.raises(type(error)) as caught:
        run_bounded(fail, timeout_s=LONG_S, what="a call")
    assert caught.value is error
    assert any(entry.name == "fail" for entry in caught.traceback)


@pytest.mark.parametrize("timeout_s", [0.0, 0.1])
def test_a_call_that_does_not_return_is_given_up(blocked: threading.Event, timeout_s: float):
    with pytest.raises(TimeoutError, match=rf"^joining did not return within {timeout_s:g} s$"):
        run_bounded(blocked.wait, timeout_s=timeout_s, what="joining")


def test_an_abandoned_call_does_not_keep_the_process(blocked: threading.Event):
    with pytest.raises(TimeoutError):
        run_bounded(blocked.wait, timeout_s=0.01, what="joining")
    thread = next(t for t in waiting_threads() if t.name == "distcomm: joining")
    assert thread.daemon
    blocked.set()
    thread.join(LONG_S)
    assert not thread.is_alive()


def test_poll_is_called_while_the_call_runs(blocked: threading.Event):
    polls = []

    def poll() -> None:
        polls.append(threading.current_thread())
        if len(polls) == 3:
            blocked.set()

    assert run_bounded(blocked.wait, timeout_s=LONG_S, what="a call", poll=poll) is True
    assert len(polls) >= 3
    assert set(polls) == {threading.current_thread()}


def test_poll_can_give_up_early(blocked: threading.Event):
    def poll() -> None:
        raise LookupError("a peer is gone")

    with pytest.raises(LookupError, match="a peer is gone"):
        run_bounded(blocked.wait, timeout_s=LONG_S, what="a call", poll=poll)


def test_a_call_that_polls_for_ever_still_ends(blocked: threading.Event):
    polls = []
    with pytest.raises(TimeoutError):
        run_bounded(
            blocked.wait, timeout_s=0.1, what="a call", poll=lambda: polls.append(time.monotonic())
        )
    assert polls


def test_calls_may_run_at_the_same_time():
    barrier = threading.Barrier(2, timeout=LONG_S)

    results: list[int] = []

    def wait_for_the_other() -> None:
        results.append(run_bounded(barrier.wait, timeout_s=LONG_S, what="meeting"))

    thread = threading.Thread(target=wait_for_the_other)
    thread.start()
    wait_for_the_other()
    thread.join(LONG_S)
    assert sorted(results) == [0, 1]
