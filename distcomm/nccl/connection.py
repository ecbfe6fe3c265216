"""The life of one NCCL communicator: made by all ranks or by none, enabled, closed in time.

No constructor or method takes a stream and none is kept: as with any torch operation, the
stream is the one that is current on the communicator's device when a call is made.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

import torch
import torch.distributed as dist

from ..errors import (
    CommunicatorDisabledError,
    DistcommError,
    GroupClosedError,
    NcclError,
    SleepError,
)
from ..native import NativeNccl, RaggedCollectives
from ..objects import ObjectChannel
from ..process_groups import member_of, process_group_store
from ..waiting import StillRunningError, run_bounded
from .attempt import Attempt
from .dtypes import REDUCTION_CODES
from .libnccl import NcclLibrary, UniqueId
from .process_end import FREE_S, note_destroy_under_way

__all__ = ["NcclConnection"]

logger = logging.getLogger(__name__)

T = TypeVar("T")

# What an all-reduce needs of its communicator: ncclAllReduce, the handle, what finds the current
# stream of a device, and that device.
DirectCall = tuple[Callable[..., int], ctypes.c_void_p, Callable[[int], int], int]


class NcclConnection:
    """One NCCL communicator of a group, without its collectives.

    Args:
        cpu_group: a gloo process group; its ranks become the communicator's. Construction is
            collective among them, and fails on all of them if it fails on one.
        device: where this rank's tensors are.
        name: the group's name, for errors.
        nccl: the libnccl to use; by default a new `NcclLibrary()`.
        timeout_s: seconds that construction and `close()` may each take.

    Raises:
        InitializationError: a rank failed or didn't come; the error names the ranks.
    """

    def __init__(
        self,
        cpu_group: dist.ProcessGroup,
        device: torch.device | str | int,
        *,
        name: str = "pynccl",
        nccl: NcclLibrary | None = None,
        timeout_s: float = 300.0,
    ) -> None:
        self.member = member_of(cpu_group, name)
        self.device = torch.device(device)
        self.world_size = self.member.world_size
        self._timeout_s = timeout_s
        self._enabled = True
        self._closed = False
        self._fenced = False
        self._given_up = False
        self._not_now: str | None = None  # why calls are refused, apart from that
        self._on_close: list[Callable[[int, bool], None]] = []
        self._usable = False  # enabled, not closed, and there is no `_not_now`
        self._grouped: list[torch.Tensor] | None = None  # kept alive until the NCCL group ends
        self._device_index = -1
        self._raw_stream: Callable[[int], int] = _no_stream
        if self.device.type == "cuda":
            self._device_index = (
                torch.cuda.current_device() if self.device.index is None else self.device.index
            )
            # With its index, because the threads started here have another current device.
            self.device = torch.device("cuda", self._device_index)
            self._raw_stream = torch._C._cuda_getCurrentRawStream
        self._comm = self._connect(cpu_group, nccl)
        self._choose_functions()
        self._direct: DirectCall | None = None
        self._refresh()

    @property
    def enabled(self) -> bool:
        """Whether it is in use: not disabled by `change_state`, and not closed.

        A suspended one is, but its calls raise.
        """
        return self._enabled and not self._closed

    @property
    def handle(self) -> int:
        """NCCL's handle of the communicator; 0 after `close()`."""
        return self._comm

    def on_close(self, callback: Callable[[int, bool], None]) -> None:
        """`close()` will call ``callback(handle, orderly)`` before it frees the communicator.

        `orderly` is False when work is still under way, which is then aborted.
        """
        self._on_close.append(callback)

    def give_up(self) -> None:
        """`close()` will abort the communicator: a call to NCCL has not returned in time."""
        self._given_up = True

    def fence_captures(self) -> None:
        """From now on a captured collective fully depends on the work captured before it.

        See the known issue ``captured-symmetric-race``. Costs nothing outside captures.
        """
        self._fenced = True
        self._choose_functions()
        self._refresh()

    @contextmanager
    def change_state(self, enable: bool | None = None) -> Iterator[None]:
        """Enables (None or True) or disables calls for a ``with`` block.

        Not collective, but all ranks should do the same. Nests; the earlier state comes back
        when the block ends, also by an exception.
        """
        previous = self._enabled
        self._set_enabled(True if enable is None else enable)
        try:
            yield
        finally:
            self._set_enabled(previous)

    @contextmanager
    def group(self) -> Iterator[None]:
        """Fuses the calls of a ``with`` block into one NCCL launch (ncclGroupStart/End).

        Needed when one rank sends and receives in the same step. Nothing is enqueued before the
        block ends; tensors used inside are kept until then. Nests. When the block raises, the
        calls made so far are still launched, as NCCL has no way to drop them, unless it was an
        NCCL call of the block that failed.
        """
        if self._grouped is not None:
            yield
            return
        self._refuse_unless_usable("group")
        self.nccl.check("ncclGroupStart", self.nccl.ncclGroupStart(), member=self.member)
        self._grouped = []
        self._refresh()
        try:
            yield
        except BaseException:
            self._end_group()  # its code repeats the error of the block, or hides it
            raise
        self._check("ncclGroupEnd", self._end_group())

    def close(self) -> None:
        """Waits for the device, then frees the communicator. Idempotent; local.

        Work that doesn't end within the timeout is aborted. A communicator that a live CUDA
        graph has captured is freed once that graph is gone; until then a thread waits for it.
        What goes wrong is logged, not raised: closing goes on with other communicators.
        """
        if self._closed:
            return
        self._closed = True
        self._refresh()
        comm, self._comm = self._comm, 0
        free = self.nccl.ncclCommDestroy
        try:
            self.run_bounded(self._wait_for_device, self._timeout_s, "the work under way")
        except (TimeoutError, RuntimeError) as error:
            logger.warning("close: %s; aborting the communicator [%s]", error, self.member)
            self._given_up = True
        if self._given_up or self._not_now is not None:
            free = self.nccl.ncclCommAbort
        if not self._call_back(comm, orderly=not self._given_up):
            return  # somebody may still be using it
        try:
            code = self.run_bounded(lambda: free(comm), FREE_S, free.__name__)
            self._check(free.__name__, code)
        except StillRunningError as error:
            note_destroy_under_way(error.thread)
            logger.warning(
                "close: %s, probably because a CUDA graph that captured this communicator is "
                "alive; it is freed when that graph is [%s]",
                error,
                self.member,
            )
        except NcclError as error:
            logger.warning("close: %s", error)

    def run_bounded(
        self,
        work: Callable[[], T],
        timeout_s: float,
        what: str,
        poll: Callable[[], None] | None = None,
    ) -> T:
        """Runs `work` in a thread, on this communicator's device, and waits for it so long.

        Raises:
            StillRunningError: it takes longer; see `waiting.run_bounded`.

        A new thread starts on device 0, and NCCL puts back the device that it found: without
        setting it, every process would get a CUDA context on device 0.
        """

        def on_device() -> T:
            if self.device.type == "cuda":
                torch.cuda.set_device(self.device)
            return work()

        return run_bounded(on_device, timeout_s=timeout_s, what=what, poll=poll)

    # ---- inside -----------------------------------------------------------------------------

    def _call_back(self, comm: int, orderly: bool) -> bool:
        """False if a callback doesn't return in time."""
        for callback in self._on_close:
            try:
                self.run_bounded(partial(callback, comm, orderly), FREE_S, "ending its windows")
            except TimeoutError as error:
                logger.warning("close: %s; the communicator stays [%s]", error, self.member)
                return False
        return True

    def _choose_functions(self) -> None:
        """Of the three collectives for which NCCL has symmetric kernels."""
        self._all_reduce = self.nccl.ncclAllReduce
        self._all_gather = self.nccl.ncclAllGather
        self._reduce_scatter = self.nccl.ncclReduceScatter
        if self._fenced:
            native, symbols = self.native.functions, self.native.symbols
            self._all_reduce = partial(native.distcomm_fenced_all_reduce, symbols)
            self._all_gather = partial(native.distcomm_fenced_all_gather, symbols)
            self._reduce_scatter = partial(native.distcomm_fenced_reduce_scatter, symbols)

    def _end_group(self) -> int:
        code: int
        if self._fenced:
            native, symbols = self.native.functions, self.native.symbols
            code = native.distcomm_fenced_group_end(symbols, self._stream())
        else:
            code = self.nccl.ncclGroupEnd()
        self._grouped = None
        self._refresh()
        return code

    def _connect(self, cpu_group: dist.ProcessGroup, nccl: NcclLibrary | None) -> int:
        """Makes the communicator on every rank, or raises the same error on every rank."""
        channel = ObjectChannel(self.member, cpu_group)
        what = f"making the NCCL communicator of group '{self.member.name}' failed"
        unique_id, failure = b"", None
        try:
            self.nccl = nccl or NcclLibrary()
            self.native = NativeNccl(self.nccl.path)
            self._ragged = RaggedCollectives(self.native)
            if self.member.rank_in_group == 0:
                unique_id = self.nccl.new_unique_id()
        except Exception as error:  # noqa: BLE001 - whatever it is, all ranks are told
            failure = str(error)
        channel.agree(what, failure)
        unique_id = channel.broadcast(unique_id, src=0)

        # A rank whose ncclCommInitRank fails would leave the others waiting inside theirs, so it
        # raises an alarm in the store, at which they look while they wait.
        store, alarm = process_group_store(cpu_group), f"nccl_alarm/{unique_id.hex()}"
        attempt = Attempt(self.nccl)

        def look_for_alarm() -> None:
            if store.check([alarm]):
                raise _PeerFailed

        try:
            self.run_bounded(
                self._initializer(attempt, UniqueId.from_bytes(unique_id)),
                self._timeout_s,
                "ncclCommInitRank and a first all-reduce",
                poll=look_for_alarm,
            )
        except Exception as error:  # noqa: BLE001 - whatever it is, all ranks are told
            if not isinstance(error, _PeerFailed):
                failure = str(error)
                store.set(alarm, "")
        try:
            channel.agree(what, failure)
        except DistcommError:
            try:
                self.run_bounded(attempt.give_up, FREE_S, "ncclCommAbort")
            except (TimeoutError, RuntimeError) as error:
                logger.warning("%s: %s [%s]", what, error, self.member)
            raise
        return attempt.comm

    def _initializer(self, attempt: Attempt, unique_id: UniqueId) -> Callable[[], None]:
        """The blocking part: makes the communicator and runs one all-reduce on the caller's stream.

        NCCL connects the ranks at their first collective. Done here, it can't fail or block
        later, least of all while a CUDA graph is captured.
        """
        stream = self._raw_stream(self._device_index)
        element = torch.ones(1, device=self.device)
        codes = REDUCTION_CODES[element.dtype, "sum"]
        nccl, member = self.nccl, self.member

        def initialize() -> None:
            comm = ctypes.c_void_p()
            code = nccl.ncclCommInitRank(
                ctypes.byref(comm), member.world_size, unique_id, member.rank_in_group
            )
            nccl.check("ncclCommInitRank", code, member=member)
            attempt.made(comm.value or 0)
            pointer = element.data_ptr()
            code = nccl.ncclAllReduce(pointer, pointer, 1, *codes, comm, stream)
            nccl.check("ncclAllReduce", code, comm=comm.value, member=member)
            self._wait_for_device()
            total = element.item()
            if total != member.world_size:
                raise DistcommError(
                    f"a first all-reduce of ones gave {total}, not {member.world_size} [{member}]"
                )

        return initialize

    def _wait_for_device(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _set_enabled(self, enabled: bool) -> None:
        self._enabled = enabled
        self._refresh()

    def _refresh(self) -> None:
        """Renews what follows from being enabled, closed, or inside `group()`."""
        self._usable = self.enabled and self._not_now is None
        self._direct = None
        if self._usable and self._grouped is None:
            self._direct = self._direct_call()

    def _direct_call(self) -> DirectCall:
        # A ctypes object is passed on faster than an int, which is converted on each call.
        comm = ctypes.c_void_p(self._comm)
        return self._all_reduce, comm, self._raw_stream, self._device_index

    @property
    def why_unusable(self) -> str | None:
        """Why calls would raise; None if they wouldn't."""
        if self._usable:
            return None
        closed_or_disabled = "the communicator is " + ("closed" if self._closed else "disabled")
        return closed_or_disabled if not self.enabled else self._not_now

    def _refuse_unless_usable(self, call: str) -> None:
        if self._closed:
            raise GroupClosedError(f"{call}: the communicator is closed [{self.member}]")
        if not self._enabled:
            raise CommunicatorDisabledError(
                f"{call}: the communicator is disabled; call it inside "
                f"`with change_state(enable=True)` [{self.member}]"
            )
        if self._not_now is not None:
            raise SleepError(f"{call}: {self._not_now} [{self.member}]")

    def _check(self, call: str, code: int) -> None:
        if code:
            self.nccl.check(call, code, comm=self._comm, member=self.member)

    def _stream(self) -> int:
        return self._raw_stream(self._device_index)


class _PeerFailed(Exception):  # noqa: N818 - a signal inside this module, not an error
    """Another rank has raised the alarm."""


def _no_stream(device_index: int) -> int:
    """The stream of a libnccl that works on host memory, as the tests' stand-in does."""
    return 0
