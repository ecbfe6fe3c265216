"""Who may do what with a sleepable pool at a time: threads use it, or one moves what is in it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..errors import SleepError

__all__ = ["SleepGate"]


class SleepGate:
    """Uses by any number of threads and one transfer, which exclude each other. Thread-safe.

    Nobody waits: who can't get in is told why.

    Args:
        name: of the pool, for errors.

    Attributes:
        is_closed: whether `close` was called.
        is_prepared: whether the next transfer is to be a sleep, so that there may be no use.
        problem: why there can be no use and no transfer any more; None while there can.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._lock = threading.Lock()  # guards all below
        self._num_uses = 0
        self._transfer: str | None = None
        self.is_closed = False
        self.is_prepared = False
        self.problem: str | None = None

    def begin_use(self) -> None:
        """A thread begins to allocate; to be undone by `end_use`."""
        self._refuse_in_capture("use")
        with self._lock:
            self._refuse_if_closed("use")
            problem = self.problem
            if self._transfer is not None or self.is_prepared:
                problem = f"{self._transfer or 'sleep'} is under way"
            if problem is not None:
                raise SleepError(f"use of {self._name}: {problem}")
            self._num_uses += 1

    def end_use(self) -> None:
        with self._lock:
            self._num_uses -= 1

    @contextmanager
    def transfer(self, call: str) -> Iterator[None]:
        """Nobody uses the pool, or moves what is in it, during the block."""
        self._refuse_in_capture(call)
        with self._lock:
            self._refuse_if_closed(call)
            self._refuse_uses(call)
            problem = self.problem
            if self._transfer is not None:
                problem = f"{self._transfer} is under way"
            if problem is not None:
                raise SleepError(f"{call} of {self._name}: {problem}")
            self._transfer = call
        try:
            yield
        finally:
            with self._lock:
                self._transfer = None

    def close(self) -> bool:
        """Refuses all from now on; False if that is so already."""
        self._refuse_in_capture("close")
        with self._lock:
            if self.is_closed:
                return False
            self._refuse_uses("close")
            self.is_closed = True
            return True

    def _refuse_in_capture(self, call: str) -> None:
        if torch.cuda.is_current_stream_capturing():
            raise SleepError(
                f"{call} of {self._name}: a CUDA graph is being captured, which has memory of its "
                f"own: call {call} before or after the capture"
            )

    def _refuse_uses(self, call: str) -> None:
        if self._num_uses:
            raise SleepError(
                f"{call} of {self._name}: {self._num_uses} uses have not ended, in this thread or "
                "another one: leave their blocks first"
            )

    def _refuse_if_closed(self, call: str) -> None:
        if self.is_closed:
            raise SleepError(f"{call} of {self._name}: the pool is closed")
