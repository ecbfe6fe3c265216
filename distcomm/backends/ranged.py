"""Profiler ranges around calls: the kinds that there are, and a backend that opens them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager

import torch
import torch.distributed as dist
from torch.autograd.profiler import record_function

from ..errors import ArgumentError
from .base import Backend
from .forwarding import ForwardingBackend
from .torch_pg import TorchPgBackend

__all__ = ["RangedBackend", "RangedTorchPgBackend", "check_range_kind", "open_range", "ranged"]


class _NvtxRange:
    """As `torch.cuda.nvtx.range`, which takes braces in a name for a format."""

    __slots__ = ("_name",)

    def __init__(self, name: str) -> None:
        self._name = name

    def __enter__(self) -> None:
        torch.cuda.nvtx.range_push(self._name)

    def __exit__(self, *_: object) -> None:
        torch.cuda.nvtx.range_pop()


_KINDS: Mapping[str, Callable[[str], AbstractContextManager[object]]] = {
    "record_function": record_function,
    "nvtx": _NvtxRange,
}


def check_range_kind(kind: object, argument: str, call: str) -> None:
    """Raises `ArgumentError` unless `kind` is None, or ranges that this torch can make.

    Args:
        argument, call: where `kind` comes from, for the error.
    """
    requirement = f"None or one of {', '.join(map(repr, _KINDS))}"
    if kind is not None and (not isinstance(kind, str) or kind not in _KINDS):
        raise ArgumentError(argument, requirement, repr(kind), call=call)
    if kind == "nvtx":
        try:
            with _NvtxRange("distcomm"):
                pass
        except RuntimeError as error:
            problem = f"'nvtx', which this torch can't do: {error}"
            raise ArgumentError(argument, requirement, problem, call=call) from error


def open_range(
    kind: str, op: str, group: str, how: str, num_bytes: int | None
) -> AbstractContextManager[object]:
    """A ``with`` block that is one range, such as ``distcomm.all_reduce tp 16384 B pynccl``.

    Args:
        kind: as `check_range_kind` lets pass.
        op, group, how: the call, the group's name, and the backend or the algorithm.
        num_bytes: of the call's tensor argument; None if it has none.
    """
    size = "" if num_bytes is None else f" {num_bytes} B"
    return _KINDS[kind](f"distcomm.{op} {group}{size} {how}")


def ranged(backend: Backend, kind: str, op: str, group: str, how: str) -> Backend:
    """`backend` with a range of `kind` around each call, named as by `open_range`."""
    if isinstance(backend, TorchPgBackend):
        return RangedTorchPgBackend(backend, kind, op, group, how)
    return RangedBackend(backend, kind, op, group, how)


class RangedBackend(ForwardingBackend):
    """Forwards to another backend, each call in a profiler range, which ends if the call raises.

    Args:
        backend: makes the calls.
        kind, op, group, how: as for `open_range`.
    """

    def __init__(self, backend: Backend, kind: str, op: str, group: str, how: str) -> None:
        super().__init__(backend)
        self._names = (kind, op, group, how)

    def all_reduce(
        self, x: torch.Tensor, op: str = "sum", out: torch.Tensor | None = None
    ) -> torch.Tensor:
        with self._range(x):
            return self._backend.all_reduce(x, op, out)

    def reduce(
        self, x: torch.Tensor, dst: int = 0, op: str = "sum", out: torch.Tensor | None = None
    ) -> torch.Tensor | None:
        with self._range(x):
            return self._backend.reduce(x, dst, op, out)

    def reduce_scatter_tensor(
        self, output: torch.Tensor, input: torch.Tensor, op: str = "sum"
    ) -> torch.Tensor:
        with self._range(input):
            return self._backend.reduce_scatter_tensor(output, input, op)

    def reduce_scatterv(
        self,
        x: torch.Tensor,
        sizes: Sequence[int],
        out: torch.Tensor | None = None,
        op: str = "sum",
    ) -> torch.Tensor:
        with self._range(x):
            return self._backend.reduce_scatterv(x, sizes, out, op)

    def all_gather_into_tensor(self, output: torch.Tensor, input: torch.Tensor) -> torch.Tensor:
        with self._range(input):
            return self._backend.all_gather_into_tensor(output, input)

    def all_gatherv(
        self, x: torch.Tensor, sizes: Sequence[int], out: torch.Tensor | None = None
    ) -> torch.Tensor:
        with self._range(x):
            return self._backend.all_gatherv(x, sizes, out)

    def all_to_all_single(
        self,
        output: torch.Tensor,
        input: torch.Tensor,
        output_splits: Sequence[int] | None = None,
        input_splits: Sequence[int] | None = None,
    ) -> torch.Tensor:
        with self._range(input):
            return self._backend.all_to_all_single(output, input, output_splits, input_splits)

    def broadcast(self, x: torch.Tensor, src: int = 0) -> torch.Tensor:
        with self._range(x):
            return self._backend.broadcast(x, src)

    def gather(
        self, x: torch.Tensor, dst: int = 0, out: torch.Tensor | None = None
    ) -> torch.Tensor | None:
        with self._range(x):
            return self._backend.gather(x, dst, out)

    def send(self, x: torch.Tensor, dst: int) -> None:
        with self._range(x):
            self._backend.send(x, dst)

    def recv(self, out: torch.Tensor, src: int) -> torch.Tensor:
        with self._range(out):
            return self._backend.recv(out, src)

    def _range(self, x: torch.Tensor) -> AbstractContextManager[object]:
        return open_range(*self._names, x.nbytes)


class RangedTorchPgBackend(RangedBackend):
    """The same for a `TorchPgBackend`, which can also start a gather without waiting for it."""

    _backend: TorchPgBackend

    def all_gather_into_tensor_async(self, output: torch.Tensor, input: torch.Tensor) -> dist.Work:
        with self._range(input):
            return self._backend.all_gather_into_tensor_async(output, input)
