"""Reductions whose bits don't depend on how much is reduced at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..checks import check_output, check_peer, check_sizes, materialized, scattered_shapes
from ..errors import GroupMember
from .base import Backend
from .forwarding import ForwardingBackend

__all__ = ["OrderedBackend"]

# Of these, any order gives the same bits, whatever the dtype.
_EXACT = ("max", "min")


class OrderedBackend(ForwardingBackend):
    """Gathers all ranks' tensors, and reduces from the first rank to the last.

    In fp32, or in fp64 where that is the dtype, rounded once: the bits of an element depend on the
    ranks' elements alone. Costs W times the memory and the bytes of an all-gather. Integers, and
    what is exact in any order, go to the other backend.

    Args:
        backend: gathers, and makes all other calls.
        member: this rank's place.
    """

    def __init__(self, backend: Backend, member: GroupMember) -> None:
        super().__init__(backend)
        self._member = member

    def all_reduce(
        self, x: torch.Tensor, op: str = "sum", out: torch.Tensor | None = None
    ) -> torch.Tensor:
        if not _depends_on_order(x, op):
            return self._backend.all_reduce(x, op, out)
        x = materialized(x)
        if out is not None and out is not x:
            check_output("all_reduce", "out", out, [x.shape], x, self._member)
        reduced = self._reduced(x, op)
        return reduced if out is None else out.copy_(reduced)

    def reduce(
        self, x: torch.Tensor, dst: int = 0, op: str = "sum", out: torch.Tensor | None = None
    ) -> torch.Tensor | None:
        if not _depends_on_order(x, op):
            return self._backend.reduce(x, dst, op, out)
        check_peer("reduce", "dst", dst, self._member)
        if self._member.rank_in_group == dst:
            return self.all_reduce(x, op, out)
        self._gathered(materialized(x))
        return None

    def reduce_scatter_tensor(
        self, output: torch.Tensor, input: torch.Tensor, op: str = "sum"
    ) -> torch.Tensor:
        if not _depends_on_order(input, op):
            return self._backend.reduce_scatter_tensor(output, input, op)
        call = "reduce_scatter_tensor"
        x = materialized(input)
        check_output(
            call, "output", output, scattered_shapes(call, x, self._member), x, self._member
        )
        shares = self._reduced(x, op).view(self._member.world_size, -1)
        return output.copy_(shares[self._member.rank_in_group].view(output.shape))

    def reduce_scatterv(
        self,
        x: torch.Tensor,
        sizes: Sequence[int],
        out: torch.Tensor | None = None,
        op: str = "sum",
    ) -> torch.Tensor:
        if not _depends_on_order(x, op):
            return self._backend.reduce_scatterv(x, sizes, out, op)
        check_sizes("reduce_scatterv", sizes, x, self._member, of="sum")
        reduced = self._reduced(materialized(x), op)
        start = sum(sizes[: self._member.rank_in_group])
        share = reduced[start : start + sizes[self._member.rank_in_group]]
        if out is None:
            return share.clone()
        check_output("reduce_scatterv", "out", out, [share.shape], share, self._member)
        return out.copy_(share)

    def _gathered(self, x: torch.Tensor) -> torch.Tensor:
        stacked = x.new_empty((self._member.world_size, *x.shape))
        return self._backend.all_gather_into_tensor(stacked, x)

    def _reduced(self, x: torch.Tensor, op: str) -> torch.Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        first, *others = self._gathered(x)
        total: torch.Tensor = first.to(wide)
        for each in others:
            total = total * each.to(wide) if op == "prod" else total + each.to(wide)
        if op == "avg":
            total = total / self._member.world_size
        return total.to(x.dtype)


def _depends_on_order(x: torch.Tensor, op: str) -> bool:
    return op not in _EXACT and (x.dtype.is_floating_point or x.dtype.is_complex)
