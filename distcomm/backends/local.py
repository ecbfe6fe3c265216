"""The backend of a group of one: nothing is sent, arguments are checked all the same."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..checks import (
    check_output,
    check_peer,
    check_sizes,
    check_splits,
    gathered_shapes,
    raise_bad_reduction,
    scattered_shapes,
)
from ..errors import GroupMember
from ..nccl.dtypes import REDUCTION_CODES

__all__ = ["LocalBackend"]


class LocalBackend:
    """Collectives of a group of one, on any device.

    Every reduction of one value is the value: where no output is given, results are the
    argument itself, without a copy.
    """

    def __init__(self, member: GroupMember) -> None:
        self._member = member

    def all_reduce(
        self, x: torch.Tensor, op: str = "sum", out: torch.Tensor | None = None
    ) -> torch.Tensor:
        self._check_reduction("all_reduce", x, op)
        return self._into("all_reduce", out, x, [x.shape])

    def reduce(
        self, x: torch.Tensor, dst: int = 0, op: str = "sum", out: torch.Tensor | None = None
    ) -> torch.Tensor | None:
        check_peer("reduce", "dst", dst, self._member)
        self._check_reduction("reduce", x, op)
        return self._into("reduce", out, x, [x.shape])

    def reduce_scatter_tensor(
        self, output: torch.Tensor, input: torch.Tensor, op: str = "sum"
    ) -> torch.Tensor:
        call = "reduce_scatter_tensor"
        self._check_reduction(call, input, op, "input")
        shapes = scattered_shapes(call, input, self._member)
        return self._into(call, output, input, shapes, "output")

    def reduce_scatterv(
        self,
        x: torch.Tensor,
        sizes: Sequence[int],
        out: torch.Tensor | None = None,
        op: str = "sum",
    ) -> torch.Tensor:
        self._check_reduction("reduce_scatterv", x, op)
        check_sizes("reduce_scatterv", sizes, x, self._member, of="sum")
        return self._into("reduce_scatterv", out, x, [x.shape])

    def all_gather_into_tensor(self, output: torch.Tensor, input: torch.Tensor) -> torch.Tensor:
        call = "all_gather_into_tensor"
        return self._into(call, output, input, gathered_shapes(input, 1), "output")

    def all_gatherv(
        self, x: torch.Tensor, sizes: Sequence[int], out: torch.Tensor | None = None
    ) -> torch.Tensor:
        check_sizes("all_gatherv", sizes, x, self._member, of="own entry")
        return self._into("all_gatherv", out, x, [x.shape])

    def all_to_all_single(
        self,
        output: torch.Tensor,
        input: torch.Tensor,
        output_splits: Sequence[int] | None = None,
        input_splits: Sequence[int] | None = None,
    ) -> torch.Tensor:
        call = "all_to_all_single"
        check_splits(call, "input_splits", input_splits, input, self._member)
        check_splits(call, "output_splits", output_splits, output, self._member)
        return self._into(call, output, input, [input.shape], "output")

    def broadcast(self, x: torch.Tensor, src: int = 0) -> torch.Tensor:
        check_peer("broadcast", "src", src, self._member)
        return x

    def gather(
        self, x: torch.Tensor, dst: int = 0, out: torch.Tensor | None = None
    ) -> torch.Tensor | None:
        check_peer("gather", "dst", dst, self._member)
        return self._into("gather", out, x.unsqueeze(0), [(1, *x.shape)])

    def send(self, x: torch.Tensor, dst: int) -> None:
        check_peer("send", "dst", dst, self._member, other=True)

    def recv(self, out: torch.Tensor, src: int) -> torch.Tensor:
        check_peer("recv", "src", src, self._member, other=True)
        return out

    def _check_reduction(self, call: str, x: torch.Tensor, op: str, argument: str = "x") -> None:
        if (x.dtype, op) not in REDUCTION_CODES:
            raise_bad_reduction(call, x.dtype, op, REDUCTION_CODES, self._member, argument)

    def _into(
        self,
        call: str,
        out: torch.Tensor | None,
        x: torch.Tensor,
        shapes: Sequence[tuple[int, ...]],
        argument: str = "out",
    ) -> torch.Tensor:
        if out is None or out is x:
            return x
        check_output(call, argument, out, shapes, x, self._member)
        return out.copy_(x.reshape(out.shape))
