"""The contexts in which tensors are made in symmetric memory."""

from __future__ import annotations

from collections import Counter
from types import TracebackType
from typing import NoReturn, Protocol

import torch

from ..errors import SymmetricMemoryError, SymmetricMismatchError
from .segment_heap import AllocationFailure
from .symmetric_pool import SymmetricPool
from .windows import ASLEEP, GroupWindows

__all__ = ["InactiveContext", "MemoryContext", "SuspendedContext", "SymmetricMemoryContext"]


class MemoryContext(Protocol):
    """A ``with`` block; the same object may be entered again inside itself."""

    def __enter__(self) -> None: ...

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None: ...


class SymmetricMemoryContext:
    """What this thread allocates inside is symmetric memory, registered with the group on leaving.

    Leaving is collective where the pool has grown, and costs no communication otherwise. Contexts
    nest, of the same group and of others; whatever is raised, inside or on leaving, allocation
    goes on afterwards as before.

    Args:
        pool: the process's pool.
        windows: of the group.
        counters: ``contexts`` is counted here.

    Raises:
        SymmetricMemoryError: on entering, the memory is asleep.
        SymmetricMismatchError: on leaving; see `GroupWindows.register_new`.
        SymmetricOutOfMemoryError: an allocation inside failed, and all ranks know of it or none
            needs to.
        SymmetricMemoryError: on leaving, during a capture, which allows no registration.
    """

    __slots__ = ("_counters", "_pool", "_windows")

    def __init__(self, pool: SymmetricPool, windows: GroupWindows, counters: Counter[str]) -> None:
        self._pool = pool
        self._windows = windows
        self._counters = counters

    def __enter__(self) -> None:
        if self._pool.asleep:  # since this context was made
            raise SymmetricMemoryError(f"symmetric_memory: {ASLEEP} [{self._windows.member}]")
        self._pool.routing.enter()
        self._counters["contexts"] += 1

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._pool.routing.leave()
        pool, windows = self._pool, self._windows
        if exc is not None and isinstance(exc, torch.OutOfMemoryError):
            failure = pool.heap.take_failure()
            if failure is not None:  # else it is ordinary memory that has run out
                self._out_of_memory(failure, exc)
        if pool.frozen:
            pool.warn_if_overflowed()
        elif isinstance(exc, Exception | None):
            windows.register_new()

    def _out_of_memory(self, failure: AllocationFailure, exc: BaseException) -> NoReturn:
        """Tells the other ranks of a failed allocation, as they may be about to register theirs.

        During a capture no rank registers anything, so there is nobody to tell.
        """
        what = f"symmetric_memory of {self._windows.member}"
        alone = failure.kind == "capturing" or self._pool.frozen or self._windows.unsupported
        if not alone:
            try:
                self._windows.register_new(str(self._pool.out_of_memory(what, failure)))
            except SymmetricMismatchError as mismatch:
                raise mismatch from exc
        # Not by way of a variable: it would keep the traceback, hence the body's tensors, alive.
        raise self._pool.out_of_memory(what, failure) from exc


class SuspendedContext:
    """What this thread allocates inside is ordinary memory, whatever contexts it is in."""

    __slots__ = ("_pool",)

    def __init__(self, pool: SymmetricPool) -> None:
        self._pool = pool

    def __enter__(self) -> None:
        self._pool.heap.take_failure()  # one that the caller has got over is no news any more
        self._pool.routing.suspend()

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._pool.routing.leave()


class InactiveContext:
    """Does nothing but count why.

    Args:
        reason: why the memory inside is ordinary.
        counters: counted here by reason.
    """

    __slots__ = ("_counters", "_reason")

    def __init__(self, reason: str = "", counters: Counter[str] | None = None) -> None:
        self._reason = reason
        self._counters = counters

    def __enter__(self) -> None:
        if self._counters is not None:
            self._counters[self._reason] += 1

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Nothing was changed."""
