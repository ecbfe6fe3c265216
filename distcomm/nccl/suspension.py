"""NCCL communicators that give back their own GPU memory for a while."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import partial

from ..errors import NcclError
from .connection import NcclConnection

__all__ = ["SuspendableConnection"]

_SUSPENDED = "the communicator is suspended: wake_up() first"
_SUSPEND_MEMORY = 1  # NCCL_SUSPEND_MEM
_SUSPENDABLE_BYTES = 0  # ncclStatGpuMemSuspend


class SuspendableConnection(NcclConnection):
    """A connection that can be suspended, with NCCL 2.29.7 and newer (nccl.h of 2.29)."""

    @property
    def is_suspended(self) -> bool:
        """Whether `suspend` was called, and `resume` not yet."""
        return self._not_now == _SUSPENDED

    def suspend(self) -> int:
        """Gives back GPU memory that NCCL can do without while nothing is communicated.

        All ranks do so, with all work ended on all of them; calls raise `SleepError` until
        `resume`. Since NCCL 2.29.7.

        Returns:
            How many bytes, as NCCL counts them.

        Raises:
            NcclError, StillRunningError: NCCL failed, or didn't return in time. The communicator is
                of no use any more; `close` aborts it.
        """
        self._refuse_unless_usable("suspend")
        num_bytes = ctypes.c_uint64()
        comm, pointer = self._comm, ctypes.byref(num_bytes)
        code = self.nccl.ncclCommMemStats(comm, _SUSPENDABLE_BYTES, pointer)
        self._check("ncclCommMemStats", code)
        suspend = partial(self.nccl.ncclCommSuspend, comm, _SUSPEND_MEMORY)
        self._call_or_break("ncclCommSuspend", suspend)
        self._not_now = _SUSPENDED
        self._refresh()
        return num_bytes.value

    def resume(self) -> None:
        """Undoes `suspend`. Collective.

        Raises:
            NcclError, StillRunningError: as `suspend`.
        """
        self._call_or_break("ncclCommResume", partial(self.nccl.ncclCommResume, self._comm))
        self._not_now = None
        self._refresh()

    def break_off(self, reason: str) -> None:
        """Calls raise from now on, for good, and `close` aborts the communicator. Local."""
        self.give_up()
        self._not_now = reason
        self._refresh()

    def _call_or_break(self, call: str, work: Callable[[], int]) -> None:
        try:
            self._check(call, self.run_bounded(work, self._timeout_s, call))
        except (NcclError, TimeoutError) as error:
            self.break_off(f"{call} has failed: {error}")
            raise
