"""The life of one NCCL communicator: made by all ranks or by none, enabled, closed in time.

No constructor or method takes a stream and none is kept: as with any torch operation, the
stream is the one that is current on the communicator's device when a call is made.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from ..errors import CommunicatorDisabledError, DistcommError, GroupClosedError
from ..native import RaggedCollectives
from ..objects import ObjectChannel
from ..process_groups import member_of, process_group_store
from ..waiting import run_bounded
from .dtypes import REDUCTION_CODES
from .library import NcclLibrary, UniqueId

__all__ = ["NcclConnection"]

logger = logging.getLogger(__name__)


class NcclConnection:
    """One NCCL communicator of a group, without its collectives.

    Args:
        cpu_group: a gloo process group; its ranks become the communicator's. Construction is
            collective among them, and fails on all of them if it fails on one.
        device: where this rank's tensors are.
        name: the group's name, for errors.
        library: the libnccl to use; by default a new `NcclLibrary()`.
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
        library: NcclLibrary | None = None,
        timeout_s: float = 300.0,
    ) -> None:
        self.member = member_of(cpu_group, name)
        self.device = torch.device(device)
        self.world_size = self.member.world_size
        self._timeout_s = timeout_s
        self._enabled = True
        self._closed = False
        self._usable = False  # enabled and not closed: the one flag that the hot path reads
        self._grouped: list[torch.Tensor] | None = None  # kept alive until the NCCL group ends
        self._device_index = -1
        self._raw_stream: Callable[[int], int] = _no_stream
        if self.device.type == "cuda":
            self._device_index = (
                torch.cuda.current_device() if self.device.index is None else self.device.index
            )
            self._raw_stream = torch._C._cuda_getCurrentRawStream
        self._comm = self._connect(cpu_group, library)
        self._usable = True

    @property
    def enabled(self) -> bool:
        """Whether calls are accepted: not disabled by `change_state`, and not closed."""
        return self._usable

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
        calls made so far are still launched, as NCCL has no way to drop them.
        """
        if self._grouped is not None:
            yield
            return
        self._refuse_unless_usable("group")
        self.library.check("ncclGroupStart", self.library.ncclGroupStart(), member=self.member)
        self._grouped = []
        try:
            yield
        finally:
            code = self.library.ncclGroupEnd()
            self._grouped = None
            self._check("ncclGroupEnd", code)

    def close(self) -> None:
        """Waits for the device, then frees the communicator. Idempotent; local.

        A communicator whose work doesn't end within the timeout is aborted.
        """
        if self._closed:
            return
        self._closed = True
        self._usable = False
        comm, self._comm = self._comm, 0
        try:
            run_bounded(
                lambda: self._destroy(comm), timeout_s=self._timeout_s, what="ncclCommDestroy"
            )
        except (TimeoutError, RuntimeError) as error:
            logger.warning("%s; aborting the communicator [%s]", error, self.member)
            run_bounded(
                lambda: self.library.ncclCommAbort(comm),
                timeout_s=self._timeout_s,
                what="ncclCommAbort",
            )

    # ---- inside -----------------------------------------------------------------------------

    def _connect(self, cpu_group: dist.ProcessGroup, library: NcclLibrary | None) -> int:
        """Makes the communicator on every rank, or raises the same error on every rank."""
        channel = ObjectChannel(self.member, cpu_group)
        what = f"making the NCCL communicator of group '{self.member.name}' failed"
        unique_id, failure = b"", None
        try:
            self.library = library or NcclLibrary()
            self._ragged = RaggedCollectives(self.library.path)
            self._nccl_all_reduce = self.library.ncclAllReduce
            if self.member.rank_in_group == 0:
                unique_id = self.library.new_unique_id()
        except DistcommError as error:
            failure = str(error)
        channel.agree(what, failure)
        unique_id = channel.broadcast(unique_id, src=0)

        # A rank whose ncclCommInitRank fails would leave the others waiting inside theirs, so it
        # raises an alarm in the store, at which they look while they wait.
        store, alarm = process_group_store(cpu_group), f"nccl_alarm/{unique_id.hex()}"
        comm = ctypes.c_void_p()

        def look_for_alarm() -> None:
            if store.check([alarm]):
                raise _PeerFailed

        try:
            run_bounded(
                self._initializer(comm, UniqueId.from_bytes(unique_id)),
                timeout_s=self._timeout_s,
                what="ncclCommInitRank and a first all-reduce",
                poll=look_for_alarm,
            )
        except Exception as error:  # noqa: BLE001 - whatever it is, all ranks are told
            if not isinstance(error, _PeerFailed):
                failure = str(error)
                store.set(alarm, "")
            if isinstance(error, _PeerFailed | TimeoutError):
                comm = ctypes.c_void_p()  # a thread is still inside NCCL with the old one
        try:
            channel.agree(what, failure)
        except DistcommError:
            if comm.value:
                self.library.ncclCommAbort(comm)
            raise
        return comm.value or 0

    def _initializer(self, comm: ctypes.c_void_p, unique_id: UniqueId) -> Callable[[], None]:
        """The blocking part: makes `comm` and runs one all-reduce on the caller's stream.

        NCCL connects the ranks at their first collective. Done here, it can't fail or block
        later, least of all while a CUDA graph is captured.
        """
        stream = self._raw_stream(self._device_index)
        element = torch.ones(1, device=self.device)
        codes = REDUCTION_CODES[element.dtype, "sum"]
        library, member = self.library, self.member

        def initialize() -> None:
            if self.device.type == "cuda":
                torch.cuda.set_device(self.device)  # a new thread starts on device 0
            code = library.ncclCommInitRank(
                ctypes.byref(comm), member.world_size, unique_id, member.rank_in_group
            )
            library.check("ncclCommInitRank", code, member=member)
            pointer = element.data_ptr()
            code = library.ncclAllReduce(pointer, pointer, 1, *codes, comm, stream)
            library.check("ncclAllReduce", code, comm=comm.value, member=member)
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            total = element.item()
            if total != member.world_size:
                raise DistcommError(
                    f"a first all-reduce of ones gave {total}, not {member.world_size} [{member}]"
                )

        return initialize

    def _destroy(self, comm: int) -> None:
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
            torch.cuda.synchronize(self.device)
        self._check("ncclCommDestroy", self.library.ncclCommDestroy(comm))

    def _set_enabled(self, enabled: bool) -> None:
        self._enabled = enabled
        self._usable = enabled and not self._closed

    def _refuse_unless_usable(self, call: str) -> None:
        if self._closed:
            raise GroupClosedError(f"{call}: the communicator is closed [{self.member}]")
        if not self._enabled:
            raise CommunicatorDisabledError(
                f"{call}: the communicator is disabled; call it inside "
                f"`with change_state(enable=True)` [{self.member}]"
            )

    def _check(self, call: str, code: int) -> None:
        if code:
            self.library.check(call, code, comm=self._comm, member=self.member)

    def _stream(self) -> int:
        return self._raw_stream(self._device_index)


class _PeerFailed(Exception):  # noqa: N818 - a signal inside this module, not an error
    """Another rank has raised the alarm."""


def _no_stream(device_index: int) -> int:
    """The stream of a libnccl that works on host memory, as the tests' stand-in does."""
    return 0
