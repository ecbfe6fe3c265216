"""What a backend offers: the collectives of one group, for tensors of one kind of device.

The methods mean what `PyNcclCommunicator`'s methods of the same names mean, and check their
arguments likewise.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

__all__ = ["Backend"]


class Backend(Protocol):
    """The collectives of one group. `src` and `dst` are ranks in the group."""

    def all_reduce(
        self, x: torch.Tensor, op: str = "sum", out: torch.Tensor | None = None
    ) -> torch.Tensor: ...

    def reduce(
        self, x: torch.Tensor, dst: int = 0, op: str = "sum", out: torch.Tensor | None = None
    ) -> torch.Tensor | None: ...

    def reduce_scatter_tensor(
        self, output: torch.Tensor, input: torch.Tensor, op: str = "sum"
    ) -> torch.Tensor: ...

    def reduce_scatterv(
        self,
        x: torch.Tensor,
        sizes: Sequence[int],
        out: torch.Tensor | None = None,
        op: str = "sum",
    ) -> torch.Tensor: ...

    def all_gather_into_tensor(self, output: torch.Tensor, input: torch.Tensor) -> torch.Tensor: ...

    def all_gatherv(
        self, x: torch.Tensor, sizes: Sequence[int], out: torch.Tensor | None = None
    ) -> torch.Tensor: ...

    def all_to_all_single(
        self,
        output: torch.Tensor,
        input: torch.Tensor,
        output_splits: Sequence[int] | None = None,
        input_splits: Sequence[int] | None = None,
    ) -> torch.Tensor: ...

    def broadcast(self, x: torch.Tensor, src: int = 0) -> torch.Tensor: ...

    def gather(
        self, x: torch.Tensor, dst: int = 0, out: torch.Tensor | None = None
    ) -> torch.Tensor | None: ...

    def send(self, x: torch.Tensor, dst: int) -> None: ...

    def recv(self, out: torch.Tensor, src: int) -> torch.Tensor: ...
