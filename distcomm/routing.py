"""From a call to the backend that runs it: choices made once per kind of call, and counted."""

from __future__ import annotations

import logging
from collections import Counter
from typing import Any

import torch

from .backends import (
    Backend,
    LocalBackend,
    ObservedBackend,
    Observer,
    OrderedBackend,
    TorchPgBackend,
)
from .communicators import GroupCommunicators, JobContext
from .dispatch import GroupFacts, Request, choose_backend
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


class _Counter:
    """How often one way was taken."""

    __slots__ = ("calls", "name", "num_bytes")

    def __init__(self, name: str) -> None:
        self.name = name
        self.calls = 0
        self.num_bytes = 0


class _Route(_Counter):
    """The backend of one kind of call, and how often it was taken."""

    __slots__ = ("backend", "fallback_reason")

    def __init__(self, backend: Backend, name: str, fallback_reason: str | None) -> None:
        super().__init__(name)
        self.backend = backend
        self.fallback_reason = fallback_reason


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
        self._routes: dict[tuple[str, bool, bool, bool, str | None], _Route] = {}
        self._others: dict[tuple[str, str], _Counter] = {}
        self._fallbacks: Counter[tuple[str, str]] = Counter()
        self._observers: tuple[Observer, ...] = ()
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
        key = (op, on_cuda, enabled, bool(self._observers), algorithm)
        route = self._routes.get(key)
        if route is None:
            route = self._routes[key] = self._resolve(*key)
        route.calls += 1
        route.num_bytes += x.nbytes
        return route.backend

    def depends_on_output(self, op: str, x: torch.Tensor) -> bool:
        """Whether `route` depends on where the output lies."""
        kernels = self._communicators.kernels
        return kernels is not None and x.is_cuda and kernels.depends_on_output(_TUNED[op], x)

    def count(self, op: str, how: str, num_bytes: int) -> None:
        """Counts a call that no backend runs.

        Raises:
            GroupClosedError: the group is closed.
        """
        if self._closed:
            raise GroupClosedError(f"{op}: the group is closed [{self._member}]")
        counter = self._others.setdefault((op, how), _Counter(how))
        counter.calls += 1
        counter.num_bytes += num_bytes

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
        self._observers = (*self._observers, observer)

    def remove_observer(self, observer: Observer) -> None:
        """Undoes one `add_observer`."""
        observers = list(self._observers)
        observers.remove(observer)
        self._observers = tuple(observers)

    def stats(self) -> dict[str, Any]:
        """Calls and bytes per op and backend, and how often a fallback was taken and why.

        After `close()`, those of the time before.
        """
        if self._closed:
            return self._stats_at_close
        ops: dict[str, dict[str, dict[str, int]]] = {}
        counters: list[tuple[str, _Counter]] = [(key[0], c) for key, c in self._routes.items()]
        counters += [(op, counter) for (op, _), counter in self._others.items()]
        for op, counter in counters:
            total = ops.setdefault(op, {}).setdefault(counter.name, {"calls": 0, "bytes": 0})
            total["calls"] += counter.calls
            total["bytes"] += counter.num_bytes
        fallbacks: Counter[str] = Counter()
        for (_, reason), calls in self._fallbacks.items():
            fallbacks[reason] += calls
        for route in self._routes.values():
            if route.fallback_reason is not None:
                fallbacks[route.fallback_reason] += route.calls
        return {"ops": ops, "fallbacks": dict(fallbacks)}

    def close(self) -> None:
        """Later calls raise `GroupClosedError`. Idempotent."""
        self._stats_at_close = self.stats()
        self._closed = True
        self._routes.clear()
        self._backends.clear()

    def _resolve(
        self,
        op: str,
        on_cuda: bool,
        pynccl_enabled: bool,
        observed: bool,
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
        if observed and choice.backend == "pynccl":
            backend = ObservedBackend(backend, self._tell)
        if choice.fallback_reason is not None:
            self._log_fallback(op, choice.backend, choice.fallback_reason)
        return _Route(backend, name, choice.fallback_reason)

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
        if name == "torch_nccl":
            group = self._communicators.device_group
            return TorchPgBackend(self._member, group, self._job.device)
        return LocalBackend(self._member)
