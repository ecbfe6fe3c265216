"""What a group's collectives are inside of compiled functions: nodes of torch's graph.

`torch.compile` can't look into a collective. So `GroupCoordinator`'s methods, while they are
traced, hand over to the operators ``torch.ops.distcomm.*`` (`graph_ops.py`), which name the group
and find it when they run.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .call_order import CallOrder
from .errors import GroupMember

__all__ = ["GraphCollectives"]


class GraphCollectives:
    """The collectives of one group as nodes of the graph that is being traced.

    The methods mean what `GroupCoordinator`'s methods of the same names mean.

    Args:
        member: this rank's place in the group.
        unique_name: the group's, by which the operators find it.
        order: what keeps the calls of all groups in their order.
    """

    def __init__(self, member: GroupMember, unique_name: str, order: CallOrder) -> None:
        self._name = unique_name
        self._order = order
        self._alone = member.world_size == 1

    def close(self) -> None:
        """From now on the operators refuse, also in a group of one, which else needs few."""
        self._alone = False

    def all_reduce(self, x: torch.Tensor, op: str, out: torch.Tensor | None) -> torch.Tensor:
        if out is not None:
            torch.ops.distcomm.all_reduce_into(self._order.of(x), out, x, op, self._name)
            return out
        if self._alone:
            return x
        total: torch.Tensor = torch.ops.distcomm.all_reduce(self._order.of(x), x, op, self._name)
        return total

    def all_reduce_rms_norm(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        residual: torch.Tensor | None,
        eps: float,
        weight_bias: float,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        normed, new_residual = torch.ops.distcomm.all_reduce_rms_norm(
            self._order.of(x), x, weight, residual, eps, weight_bias, self._name
        )
        return normed if residual is None else (normed, new_residual)

    def reduce_scatter(self, x: torch.Tensor, dim: int, op: str) -> torch.Tensor:
        share: torch.Tensor = torch.ops.distcomm.reduce_scatter(
            self._order.of(x), x, dim, op, self._name
        )
        return share

    def reduce_scatter_tensor(
        self, output: torch.Tensor, input: torch.Tensor, op: str
    ) -> torch.Tensor:
        torch.ops.distcomm.reduce_scatter_tensor(
            self._order.of(input), output, input, op, self._name
        )
        return output

    def reduce_scatterv(
        self, x: torch.Tensor, sizes: Sequence[int], out: torch.Tensor | None, op: str
    ) -> torch.Tensor:
        order = self._order.of(x)
        if out is not None:
            torch.ops.distcomm.reduce_scatterv_into(order, out, x, sizes, op, self._name)
            return out
        share: torch.Tensor = torch.ops.distcomm.reduce_scatterv(order, x, sizes, op, self._name)
        return share

    def all_gather(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        if self._alone:
            return x
        gathered: torch.Tensor = torch.ops.distcomm.all_gather(
            self._order.of(x), x, dim, self._name
        )
        return gathered

    def all_gather_into_tensor(self, output: torch.Tensor, input: torch.Tensor) -> torch.Tensor:
        torch.ops.distcomm.all_gather_into_tensor(self._order.of(input), output, input, self._name)
        return output

    def all_gatherv(
        self, x: torch.Tensor, sizes: Sequence[int], out: torch.Tensor | None
    ) -> torch.Tensor:
        order = self._order.of(x)
        if out is not None:
            torch.ops.distcomm.all_gatherv_into(order, out, x, sizes, self._name)
            return out
        gathered: torch.Tensor = torch.ops.distcomm.all_gatherv(order, x, sizes, self._name)
        return gathered

    def all_to_all_single(
        self,
        output: torch.Tensor,
        input: torch.Tensor,
        output_splits: Sequence[int] | None,
        input_splits: Sequence[int] | None,
    ) -> torch.Tensor:
        torch.ops.distcomm.all_to_all_single(
            self._order.of(input), output, input, output_splits, input_splits, self._name
        )
        return output

    def broadcast(self, x: torch.Tensor, src: int) -> torch.Tensor:
        if not self._alone:
            torch.ops.distcomm.broadcast(self._order.of(x), x, src, self._name)
        return x
