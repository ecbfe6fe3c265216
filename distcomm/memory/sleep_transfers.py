"""The parts of sleeping and waking up that take time: bounded, with progress."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import torch

from ..errors import SleepError
from ..waiting import StillRunningError, run_bounded
from .sleep_gate import SleepGate
from .sleep_heap import SleepFailure, SleepHeap, TransferProgress
from .torch_pools import TorchPools

__all__ = ["Progress", "SleepTransfers"]

Progress = Callable[[int, int], None]
"""Called now and then with the bytes copied so far, and all to be copied."""

T = TypeVar("T")


class SleepTransfers:
    """What a pool asks of its heap, each call in a thread of its own that is waited for so long.

    After a call that wasn't waited for to the end nobody knows what the pool's memory is, so its
    gate stays shut until that call has ended.

    Args:
        heap, gate, torch_pools, device: the pool's.
        timeout_s: seconds that a call may take, and the GPU's work before it.
        on_recovery: called when such a call has ended after all.
    """

    def __init__(
        self,
        heap: SleepHeap,
        gate: SleepGate,
        torch_pools: TorchPools,
        device: torch.device,
        timeout_s: float,
        on_recovery: Callable[[], None],
    ) -> None:
        self._heap = heap
        self._gate = gate
        self._torch_pools = torch_pools
        self._device = device
        self._timeout_s = timeout_s
        self._on_recovery = on_recovery
        self._streams: tuple[torch.cuda.Stream, torch.cuda.Stream] | None = None
        self._error: BaseException | None = None
        self._unfinished: threading.Event | None = None

    def recover(self) -> None:
        """Opens the gate again if the call that nobody waited for has ended."""
        if self._unfinished is not None and self._unfinished.is_set():
            self._unfinished = None
            self._gate.problem = None
            self._on_recovery()

    def clean(self, call: str) -> None:
        """Gives back what isn't in use any more, once the GPU has ended its work.

        That may take for ever, and no lock is held meanwhile.

        Raises:
            SleepError: it takes too long; nothing has changed.
        """
        try:
            run_bounded(
                partial(_synchronize, self._device),
                timeout_s=self._timeout_s,
                what="the GPU's work under way",
            )
        except StillRunningError as error:
            raise SleepError(f"{call}: {error}; nothing has changed [{self._device}]") from error
        self._run_bounded(call, self._torch_pools.empty_unused)

    def prepare(self, tags: Sequence[int]) -> SleepFailure | None:
        """`SleepHeap.prepare`."""
        return self._run_bounded("prepare_sleep", partial(self._heap.prepare, tags))

    def cancel(self, tags: Sequence[int]) -> None:
        """`SleepHeap.cancel`."""
        self._run_bounded("cancel_sleep", partial(self._heap.cancel, tags))

    def sleep(
        self, tags: Sequence[int], offloaded: Sequence[int], progress: Progress | None
    ) -> SleepFailure | None:
        """`SleepHeap.sleep`."""
        now = TransferProgress()
        work = partial(self._heap.sleep, tags, offloaded, self._raw_streams(), now)
        return self._run("sleep", work, now, progress)

    def wake_up(self, tags: Sequence[int], progress: Progress | None) -> SleepFailure | None:
        """`SleepHeap.wake_up`."""
        now = TransferProgress()
        work = partial(self._heap.wake_up, tags, self._raw_streams(), now)
        return self._run("wake_up", work, now, progress)

    def trim_host(self) -> int:
        """`SleepHeap.trim_host`."""
        try:
            return run_bounded(
                self._heap.trim_host, timeout_s=self._timeout_s, what="release_host_memory"
            )
        except StillRunningError as error:  # because of a transfer of any pool
            raise SleepError(f"{error} [{self._device}]") from error

    def forget(self, tags: Sequence[int]) -> None:
        """Gives back the content of what is asleep, and all that has no user any more."""

        def forget() -> None:
            self._heap.forget(tags)
            self._torch_pools.empty_unused()
            self._heap.settle()

        self._run_bounded("close", forget)

    def raise_of_progress(self) -> None:
        """Raises what the latest call's `progress` has raised, now that all is as it should be."""
        error, self._error = self._error, None
        if error is not None:
            raise error

    # ---- inside -----------------------------------------------------------------------------

    def _run(
        self,
        call: str,
        work: Callable[[], T],
        now: TransferProgress,
        progress: Progress | None,
    ) -> T:
        self._error = None

        def tell() -> None:
            if progress is None or self._error is not None or not now.total:
                return
            try:
                progress(now.done, now.total)
            except BaseException as error:  # noqa: BLE001 - raised once the transfer has ended
                self._error = error

        result = self._run_bounded(call, work, tell)
        tell()
        return result

    def _run_bounded(
        self, call: str, work: Callable[[], T], poll: Callable[[], None] | None = None
    ) -> T:
        ended = threading.Event()

        def tracked() -> T:
            try:
                return work()
            finally:
                ended.set()

        try:
            return run_bounded(tracked, timeout_s=self._timeout_s, what=call, poll=poll)
        except StillRunningError as error:
            self._leave_behind(ended, f"an earlier call is still under way: {error}")
            raise SleepError(f"{error} [{self._device}]") from error
        except BaseException:
            if not ended.is_set():  # an interrupt
                self._leave_behind(ended, f"an earlier {call} is still under way")
            raise

    def _leave_behind(self, ended: threading.Event, problem: str) -> None:
        self._gate.problem = problem
        self._unfinished = ended

    def _raw_streams(self) -> tuple[int, int]:
        if self._streams is None:
            self._streams = _new_streams(self._device)
        first, second = self._streams
        return first.cuda_stream, second.cuda_stream


def _synchronize(device: torch.device) -> None:
    torch.cuda.synchronize(device)


def _new_streams(device: torch.device) -> tuple[torch.cuda.Stream, torch.cuda.Stream]:
    return torch.cuda.Stream(device), torch.cuda.Stream(device)
