"""The parts of sleeping and waking up that take time: bounded, with progress."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from ..errors import SleepError
from ..waiting import StillRunningError, run_bounded
from .sleep_gate import SleepGate
from .sleep_heap import SleepFailure, SleepHeap

__all__ = ["Progress", "SleepTransfers"]

Progress = Callable[[int, int], None]
"""Called now and then with the bytes copied so far, and all to be copied."""

T = TypeVar("T")


class SleepTransfers:
    """What a pool asks of its heap, each call in a thread of its own that is waited for so long.

    After a call that didn't end, nobody knows what the pool's memory is: its gate stays shut.

    Args:
        heap, gate, device: the pool's.
        timeout_s: seconds that a call may take.
    """

    def __init__(
        self, heap: SleepHeap, gate: SleepGate, device: torch.device, timeout_s: float
    ) -> None:
        self._heap = heap
        self._gate = gate
        self._device = device
        self._timeout_s = timeout_s
        self._streams: tuple[torch.cuda.Stream, torch.cuda.Stream] | None = None
        self._error: BaseException | None = None

    def prepare(self, tags: Sequence[int]) -> SleepFailure | None:
        """`SleepHeap.prepare`."""
        return self._run("prepare_sleep", lambda: self._heap.prepare(tags), None)

    def sleep(
        self, tags: Sequence[int], offloaded: Sequence[int], progress: Progress | None
    ) -> SleepFailure | None:
        """`SleepHeap.sleep`."""
        streams = self._raw_streams()
        return self._run("sleep", lambda: self._heap.sleep(tags, offloaded, streams), progress)

    def wake_up(self, tags: Sequence[int], progress: Progress | None) -> SleepFailure | None:
        """`SleepHeap.wake_up`."""
        streams = self._raw_streams()
        return self._run("wake_up", lambda: self._heap.wake_up(tags, streams), progress)

    def raise_of_progress(self) -> None:
        """Raises what the latest call's `progress` has raised, now that all is as it should be."""
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _run(self, call: str, work: Callable[[], T], progress: Progress | None) -> T:
        self._error = None

        def tell() -> None:
            done, total = self._heap.progress()
            if progress is None or self._error is not None or not total:
                return
            try:
                progress(done, total)
            except BaseException as error:  # noqa: BLE001 - raised once the transfer has ended
                self._error = error

        try:
            result = run_bounded(work, timeout_s=self._timeout_s, what=call, poll=tell)
        except StillRunningError as error:
            self._gate.problem = f"an earlier call is stuck: {error}"
            raise SleepError(f"{error}: is the GPU still at work? [{self._device}]") from error
        except BaseException:  # an interrupt: how it ends nobody knows
            self._gate.problem = f"an earlier {call} was interrupted"
            raise
        tell()
        return result

    def _raw_streams(self) -> tuple[int, int]:
        if self._streams is None:
            self._streams = _new_streams(self._device)
        first, second = self._streams
        return first.cuda_stream, second.cuda_stream


def _new_streams(device: torch.device) -> tuple[torch.cuda.Stream, torch.cuda.Stream]:
    return torch.cuda.Stream(device), torch.cuda.Stream(device)
