"""Waits that end: a blocking call is given a deadline, and something to look at meanwhile."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TypeVar

__all__ = ["StillRunningError", "run_bounded"]

T = TypeVar("T")

_POLL_S = 0.02


class StillRunningError(TimeoutError):
    """A call hasn't returned in time.

    Attributes:
        thread: in which it goes on.
    """

    def __init__(self, what: str, timeout_s: float, thread: threading.Thread) -> None:
        super().__init__(f"{what} did not return within {timeout_s:g} s")
        self.thread = thread


def run_bounded(
    work: Callable[[], T], *, timeout_s: float, what: str, poll: Callable[[], None] | None = None
) -> T:
    """Runs a call that may never return, and gives up on it after `timeout_s` seconds.

    The call runs in a daemon thread, because a C function that blocks can't be interrupted: after
    a timeout it stays behind, and what it works on must not be used any more.

    Args:
        work: the call; its result or exception is passed on.
        timeout_s: seconds to wait.
        what: names the call in the error.
        poll: called about every 20 ms while waiting; it may raise to give up early.

    Raises:
        StillRunningError: the call hasn't returned in time.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def target() -> None:
        try:
            results.append(work())
        except BaseException as error:  # noqa: BLE001 - passed on to the waiting thread
            errors.append(error)

    thread = threading.Thread(target=target, name=f"distcomm: {what}", daemon=True)
    thread.start()
    deadline = time.monotonic() + timeout_s
    while thread.is_alive():
        remaining = deadline - time.monotonic()
        if remaining <= 0:
            raise StillRunningError(what, timeout_s, thread)
        thread.join(min(_POLL_S, remaining))
        if poll is not None and thread.is_alive():
            poll()
    if errors:
        try:
            raise errors[0]
        finally:
            errors.clear()  # the traceback holds this list, and so would the list the traceback
    return results[0]
