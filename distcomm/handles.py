"""Handles of collectives that run beside their caller."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.distributed as dist

from .errors import GroupMember
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

    The host doesn't block. Every stream that uses the result must wait on its own.
    """

    def __init__(self, stream: torch.cuda.Stream, tensors: Sequence[torch.Tensor]) -> None:
        self._device = stream.device
        self._event = stream.record_event()
        self._tensors = tuple(tensors)
        # Should the handle be dropped without a wait, the allocator still waits for the stream
        # before it gives the tensors' memory to someone else.
        for tensor in tensors:
            tensor.record_stream(stream)

    def wait(self) -> None:
        torch.cuda.current_stream(self._device).wait_event(self._event)
        self._tensors = ()

    def is_completed(self) -> bool:
        return bool(self._event.query())


class WorkHandle:
    """A collective run by torch on CPU tensors: `wait()` blocks until it has finished."""

    def __init__(
        self, work: dist.Work, call: str, member: GroupMember, tensors: Sequence[torch.Tensor]
    ) -> None:
        self._work = work
        self._call = call
        self._member = member
        self._tensors = tuple(tensors)

    def wait(self) -> None:
        with collective_errors(self._call, self._member):
            self._work.wait()
        self._tensors = ()

    def is_completed(self) -> bool:
        return self._work.is_completed()


class CompletedHandle:
    """A collective that was finished before its call returned."""

    def wait(self) -> None:
        """Returns at once."""

    def is_completed(self) -> bool:
        return True
