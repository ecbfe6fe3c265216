"""A backend that hands on its calls to another one, for backends that do some of them better."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .base import Backend

__all__ = ["ForwardingBackend"]


class ForwardingBackend:
    """Forwards every call.

    Args:
        backend: makes the calls.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    def all_reduce(
        self, x: torch.Tensor, op: str = "sum", out: torch.Tensor | None = None
    ) -> torch.Tensor:
        return self._backend.all_reduce(x, op, out)

    def reduce(
        self, x: torch.Tensor, dst: int = 0, op: str = "sum", out: torch.Tensor | None = None
    ) -> torch.Tensor | None:
        return self._backend.reduce(x, dst, op, out)

    def reduce_scatter_tensor(
        self, output: torch.Tensor, input: torch.Tensor, op: str = "sum"
    ) -> torch.Tensor:
        return self._backend.reduce_scatter_tensor(output, input, op)

    def reduce_scatterv(
        self,
        x: torch.Tensor,
        sizes: Sequence[int],
        out: torch.Tensor | None = None,
        op: str = "sum",
    ) -> torch.Tensor:
        return self._backend.reduce_scatterv(x, sizes, out, op)

    def all_gather_into_tensor(self, output: torch.Tensor, input: torch.Tensor) -> torch.Tensor:
        return self._backend.all_gather_into_tensor(output, input)

    def all_gatherv(
        self, x: torch.Tensor, sizes: Sequence[int], out: torch.Tensor | None = None
    ) -> torch.Tensor:
        return self._backend.all_gatherv(x, sizes, out)

    def all_to_all_single(
        self,
        output: torch.Tensor,
        input: torch.Tensor,
        output_splits: Sequence[int] | None = None,
        input_splits: Sequence[int] | None = None,
    ) -> torch.Tensor:
        return self._backend.all_to_all_single(output, input, output_splits, input_splits)

    def broadcast(self, x: torch.Tensor, src: int = 0) -> torch.Tensor:
        return self._backend.broadcast(x, src)

    def gather(
        self, x: torch.Tensor, dst: int = 0, out: torch.Tensor | None = None
    ) -> torch.Tensor | None:
        return self._backend.gather(x, dst, out)

    def send(self, x: torch.Tensor, dst: int) -> None:
        self._backend.send(x, dst)

    def recv(self, out: torch.Tensor, src: int) -> torch.Tensor:
        return self._backend.recv(out, src)
