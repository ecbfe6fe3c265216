"""Handles of collectives that run beside their caller."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import Protocol

import torch
import torch.distributed as dist

from .errors import GroupMember
from .outside_graphs import outside_graphs
from .process_groups import collective_errors

__all__ = ["AsyncHandle", "CompletedHandle", "StreamHandle", "WorkHandle"]


class AsyncHandle(Protocol):
    """A collective under way. It keeps its tensors alive until `wait()` has returned."""

    def wait(self) -> None:
        """Orders what the caller does next after the collective. May be called again."""

    def is_completed(self) -> bool:
        """Whether the collective has finished; never blocks."""


class StreamHandle:
    """A collective enqueued on a CUDA stream: `wait()` makes the current stream wait for it.

    The host doesn't block. Every stream that uses the result must wait on its own. To be made by
    the caller of the collective, with the caller's stream current.

    Args:
        stream: where the collective is.
        tensors: that it uses.
        symmetric: those of them that lie in symmetric memory.
        parked: takes what is dropped while the caller's stream captures a CUDA graph, where it
            can't wait for what was before; see `unpark`.
    """

    def __init__(
        self,
        stream: torch.cuda.Stream,
        tensors: Sequence[torch.Tensor],
        symmetric: Sequence[torch.Tensor],
        parked: list[StreamHandle],
    ) -> None:
        self._device = stream.device
        self._event = stream.record_event()
        self._caller = torch.cuda.current_stream(self._device)
        self._captured = torch.cuda.is_current_stream_capturing()
        self._tensors = tuple(tensors)
        self._symmetric = tuple(symmetric)
        self._parked = parked
        # Should the handle be dropped without a wait, the allocator still waits for the stream
        # before it gives the tensors' memory to someone else. When it notices that the stream is
        # done differs from rank to rank, so symmetric memory must not depend on that: there the
        # caller's stream waits instead.
        for tensor in tensors:
            tensor.record_stream(stream)

    @outside_graphs
    def wait(self) -> None:
        stream = torch.cuda.current_stream(self._device)
        stream.wait_event(self._event)
        if self._symmetric and stream != self._caller:
            self._caller.wait_event(self._event)
        self._tensors = self._symmetric = ()

    @outside_graphs
    def is_completed(self) -> bool:
        return bool(self._event.query())

    @staticmethod
    def unpark(parked: list[StreamHandle]) -> None:
        """Lets go of what was parked, if it is possible now."""
        waiting = parked[:]
        parked.clear()
        del waiting

    def __del__(self) -> None:
        # In a capture a handle without a wait is the caller's mistake, which torch reports.
        if not getattr(self, "_symmetric", ()) or self._captured:
            return
        with torch.cuda.stream(self._caller):
            if not torch.cuda.is_current_stream_capturing():
                self._caller.wait_event(self._event)
            else:
                self._parked.append(copy(self))  # this one is about to go


class WorkHandle:
    """A collective run by torch on CPU tensors: `wait()` blocks until it has finished."""

    def __init__(
        self, work: dist.Work, call: str, member: GroupMember, tensors: Sequence[torch.Tensor]
    ) -> None:
        self._work = work
        self._call = call
        self._member = member
        self._tensors = tuple(tensors)

    @outside_graphs
    def wait(self) -> None:
        with collective_errors(self._call, self._member):
            self._work.wait()
        self._tensors = ()

    @outside_graphs
    def is_completed(self) -> bool:
        return self._work.is_completed()


class CompletedHandle:
    """A collective that was finished before its call returned."""

    def wait(self) -> None:
        """Returns at once."""

    def is_completed(self) -> bool:
        return True
