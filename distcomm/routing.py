"""From a call to the backend that runs it: choices made once per kind of call, and counted."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from .backends import (
    Backend,
    LocalBackend,
    ObservedBackend,
    Observer,
    OrderedBackend,
    TorchPgBackend,
    open_range,
    ranged,
)
from .communicators import GroupCommunicators, JobContext
from .dispatch import Choice, GroupFacts, Request, choose_backend
from .errors import ArgumentError, GroupClosedError, GroupMember

__all__ = ["Router"]

logger = logging.getLogger(__name__)

# Calls whose algorithm depends on the size, and the op that they are.
_TUNED = {
    "all_reduce": "all_reduce",
    "reduce_scatter": "reduce_scatter",
    "reduce_scatter_tensor": "reduce_scatter",
    "all_gather": "all_gather",
    "all_gather_into_tensor": "all_gather",
}


_REDUCTIONS = (
    "all_reduce", "reduce", "reduce_scatter", "reduce_scatter_tensor", "reduce_scatterv",
)  # fmt: skip


# Made by two ranks of a group, so that they don't number its collectives.
_POINT_TO_POINT = ("send", "recv")

# Whether there are observers, and the kind of profiler ranges: what else a backend depends on.
_Mode = tuple[bool, str | None]

_NO_RANGE = nullcontext()

_DEVICE_GROUP = "torch_nccl"


class _Counter:
    """How often one way was taken, and the sequence number of the last time."""

    __slots__ = ("calls", "last", "name", "num_bytes")

    def __init__(self, name: str) -> None:
        self.name = name
        self.calls = 0
        self.num_bytes = 0
        self.last = 0

    def add(self, other: _Counter) -> None:
        self.calls += other.calls
        self.num_bytes += other.num_bytes
        self.last = max(self.last, other.last)


class _Route(_Counter):
    """The backend of one kind of call, and what it adds to the sequence number."""

    __slots__ = ("backend", "fallback_reason", "step", "uses")

    def __init__(self, backend: Backend, name: str, choice: Choice, step: int) -> None:
        super().__init__(name)
        self.backend = backend
        self.uses = choice.backend
        self.fallback_reason = choice.fallback_reason
        self.step = step


class Router:
    """Finds the backend for each call of one group.

    Args:
        member: this rank's place in the group.
        communicators: what the group communicates through.
        job: what all groups share.
    """

    def __init__(
        self, member: GroupMember, communicators: GroupCommunicators, job: JobContext
    ) -> None:
        self._member = member
        self._communicators = communicators
        self._job = job
        self._pynccl = communicators.pynccl
        self._notes_captures = job.symmetric_pool is not None
        self._backends: dict[str, Backend] = {}
        self._routes: dict[tuple[str, bool, bool, _Mode, str | None], _Route] = {}
        self._others: dict[tuple[str, str], _Counter] = {}
        self._fallbacks: Counter[tuple[str, str]] = Counter()
        self._observers: tuple[Observer, ...] = ()
        self._mode: _Mode = (False, None)
        self._mode_lock = threading.Lock()  # a profiler may be started by any thread
        self._sequence = 0
        self._closed = False
        self._stats_at_close: dict[str, Any] = {}

    def route(
        self,
        op: str,
        x: torch.Tensor,
        output: torch.Tensor | None = None,
        *,
        reduction: str = "sum",
    ) -> Backend:
        """The backend for `op` on tensors like `x`; counts the call.

        Args:
            op: the call.
            x: its tensor argument.
            output: where the result goes, if that exists.
            reduction: how it reduces, if it does.

        Raises:
            ArgumentError: the group can't take tensors of x's device.
            GroupClosedError: the group is closed.
        """
        on_cuda = x.is_cuda
        pynccl = self._pynccl
        algorithm = None
        kernels = self._communicators.kernels
        if kernels is not None and on_cuda and reduction == "sum" and op in _TUNED:
            algorithm = kernels.algorithm(_TUNED[op], x, output)
        if on_cuda and self._notes_captures and torch._C._cuda_isCurrentStreamCapturing():
            self._communicators.note_capture(x, output)
        enabled = pynccl is not None and pynccl.enabled
        key = (op, on_cuda, enabled, self._mode, algorithm)
        route = self._routes.get(key)
        if route is None:
            route = self._routes[key] = self._resolve(*key)
        route.calls += 1
        route.num_bytes += x.nbytes
        self._sequence = route.last = self._sequence + route.step
        return route.backend

    def depends_on_output(self, op: str, x: torch.Tensor) -> bool:
        """Whether `route` depends on where the output lies."""
        kernels = self._communicators.kernels
        return kernels is not None and x.is_cuda and kernels.depends_on_output(_TUNED[op], x)

    def count(self, op: str, how: str, num_bytes: int) -> None:
        """Counts a collective that no backend runs, before it is made.

        Raises:
            GroupClosedError: the group is closed.
        """
        if self._closed:
            raise GroupClosedError(f"{op}: the group is closed [{self._member}]")
        counter = self._others.setdefault((op, how), _Counter(how))
        counter.calls += 1
        counter.num_bytes += num_bytes
        self._sequence = counter.last = self._sequence + 1

    def profiler_range(
        self, op: str, how: str, num_bytes: int | None
    ) -> AbstractContextManager[object]:
        """A profiler range for a call that no backend runs; does nothing where there are none."""
        kind = self._mode[1]
        if kind is None:
            return _NO_RANGE
        return open_range(kind, op, self._member.name, how, num_bytes)

    def use_ranges(self, kind: str | None) -> None:
        """From now on each call is in a profiler range of this kind; None for none."""
        with self._mode_lock:
            self._mode = (self._mode[0], kind)

    def count_fallback(self, op: str, how: str, reason: str) -> None:
        """Counts why `op` goes another way than could be expected; logged once."""
        if not self._fallbacks[op, reason]:
            self._log_fallback(op, how, reason)
        self._fallbacks[op, reason] += 1

    def announce(self, op: str, tensors: tuple[torch.Tensor, ...], placed: bool) -> None:
        """Tells the observers of a call that no backend runs, before it is made."""
        self._tell(op, tensors, placed)

    def add_observer(self, observer: Observer) -> None:
        """From now on `observer` is told of every collective on the GPU before it is made."""
        with self._mode_lock:
            self._observe_by([*self._observers, observer])

    def remove_observer(self, observer: Observer) -> None:
        """Undoes one `add_observer`."""
        with self._mode_lock:
            observers = list(self._observers)
            observers.remove(observer)
            self._observe_by(observers)

    def stats(self) -> dict[str, Any]:
        """Calls, bytes and sequence numbers per op and backend, and how often a fallback was taken
        and why; see `GroupCoordinator.stats`. May be asked for by a thread that makes no calls.

        After `close()`, those of the time before.
        """
        routes = list(self._routes.items())  # at once, as calls may go on
        if self._closed:  # asked after that, as it may be closed meanwhile
            return self._stats_at_close
        counters: list[tuple[str, _Counter]] = [(key[0], route) for key, route in routes]
        counters += [(key[0], counter) for key, counter in list(self._others.items())]
        ops: dict[str, dict[str, dict[str, int]]] = {}
        for op, counter in counters:
            total = ops.setdefault(op, {}).setdefault(
                counter.name, {"calls": 0, "bytes": 0, "last": 0}
            )
            total["calls"] += counter.calls
            total["bytes"] += counter.num_bytes
            total["last"] = max(total["last"], counter.last)
        reasons = [(*key, calls) for key, calls in list(self._fallbacks.items())]
        reasons += [
            (key[0], route.fallback_reason, route.calls)
            for key, route in routes
            if route.fallback_reason is not None
        ]
        fallbacks: dict[str, Counter[str]] = {}
        for op, reason, calls in reasons:
            fallbacks.setdefault(op, Counter())[reason] += calls
        return {
            "sequence": self._sequence,
            "ops": ops,
            "fallbacks": {op: dict(counted) for op, counted in fallbacks.items()},
        }

    def forget_device_group(self) -> None:
        """Calls that torch's group of the device runs take the communicators' next one."""
        self._backends.pop(_DEVICE_GROUP, None)
        for key, route in list(self._routes.items()):
            if route.uses == _DEVICE_GROUP:
                del self._routes[key]
                self._others.setdefault((key[0], route.name), _Counter(route.name)).add(route)
                if route.fallback_reason is not None:
                    self._fallbacks[key[0], route.fallback_reason] += route.calls

    def close(self) -> None:
        """Later calls raise `GroupClosedError`. Idempotent."""
        self._stats_at_close = self.stats()
        self._closed = True
        self._routes, self._backends = {}, {}

    def _resolve(
        self,
        op: str,
        on_cuda: bool,
        pynccl_enabled: bool,
        mode: _Mode,
        algorithm: str | None,
    ) -> _Route:
        if self._closed:
            raise GroupClosedError(f"{op}: the group is closed [{self._member}]")
        job_device = self._job.device
        choice = choose_backend(
            Request(op, "cuda" if on_cuda else "cpu"),
            GroupFacts(self._member.world_size, job_device.type, pynccl_enabled),
        )
        if choice is None:
            raise ArgumentError(
                "x",
                f"on {job_device}, the device that init_distributed chose",
                "a CUDA tensor",
                call=op,
                member=self._member,
            )
        name, backend = choice.backend, self._backend(choice.backend)
        kernels = self._communicators.kernels
        if name == "pynccl" and kernels is not None and algorithm not in (None, "nccl"):
            name = algorithm or ""
            backend = kernels.backend(_TUNED[op], name, backend, self._member, job_device)
        elif self._job.deterministic and op in _REDUCTIONS and name != "local":
            name, backend = "ordered", OrderedBackend(backend, self._member)
        observed, range_kind = mode
        if observed and choice.backend == "pynccl":
            backend = ObservedBackend(backend, self._tell)
        if range_kind is not None:
            backend = ranged(backend, range_kind, op, self._member.name, name)
        if choice.fallback_reason is not None:
            self._log_fallback(op, choice.backend, choice.fallback_reason)
        return _Route(backend, name, choice, int(op not in _POINT_TO_POINT))

    def _observe_by(self, observers: list[Observer]) -> None:
        self._observers = tuple(observers)
        self._mode = (bool(observers), self._mode[1])

    def _log_fallback(self, op: str, how: str, reason: str) -> None:
        logger.warning("%s: using '%s', because %s [%s]", op, how, reason, self._member)

    def _tell(self, op: str, tensors: tuple[torch.Tensor, ...], placed: bool) -> None:
        for observer in self._observers:
            observer(op, tensors, placed)

    def _backend(self, name: str) -> Backend:
        if name not in self._backends:
            self._backends[name] = self._make_backend(name)
        return self._backends[name]

    def _make_backend(self, name: str) -> Backend:
        if name == "pynccl" and self._pynccl is not None:
            return self._pynccl
        if name == "gloo":
            group = self._communicators.cpu_group
            return TorchPgBackend(self._member, group, torch.device("cpu"))
        if name == _DEVICE_GROUP:
            group = self._communicators.device_group
            return TorchPgBackend(self._member, group, self._job.device)
        return LocalBackend(self._member)
