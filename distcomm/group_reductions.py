"""Reductions of a group.

Shapes: W group size, r rank_in_group, T rows of a rank; `sizes` count rows (dim 0).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch.compiler import is_dynamo_compiling

from .backends import Backend
from .checks import check_dim, materialized
from .errors import ArgumentError, GroupMember
from .graph_collectives import GraphCollectives
from .outside_graphs import outside_graphs
from .routing import Router

__all__ = ["Reductions"]


class Reductions:
    """The reductions of one group; `GroupCoordinator` is one. All calls are collective."""

    member: GroupMember
    world_size: int
    _in_graph: GraphCollectives
    _router: Router
    _route: Callable[..., Backend]

    def all_reduce(
        self, x: torch.Tensor, op: str = "sum", out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The reduction of all ranks' `x`, on every rank.

        Args:
            x: any shape, the same on all ranks. Unchanged, unless `out` is `x`.
            op: ``sum``, ``prod``, ``max``, ``min``, or ``avg`` (floating dtypes only).
            out: like `x`; where the result goes.

        Returns:
            `out`, or a new tensor.
        """
        if is_dynamo_compiling():
            return self._in_graph.all_reduce(x, op, out)
        if out is None and self._router.depends_on_output("all_reduce", x):
            x = materialized(x)
            out = torch.empty_like(x)
        return self._route("all_reduce", x, out, reduction=op).all_reduce(x, op, out)

    @outside_graphs
    def reduce(
        self, x: torch.Tensor, dst: int = 0, op: str = "sum", out: torch.Tensor | None = None
    ) -> torch.Tensor | None:
        """The reduction of all ranks' `x` on rank `dst`; None on the others.

        `op` and `out` as in `all_reduce`; `out` is looked at on `dst` alone.
        """
        return self._route("reduce", x).reduce(x, dst, op, out)

    def reduce_scatter(self, x: torch.Tensor, dim: int = -1, op: str = "sum") -> torch.Tensor:
        """This rank's share, along `dim`, of the reduction of all ranks' `x`.

        Args:
            x: the same shape on all ranks, divisible by W in `dim`.

        Returns:
            A new tensor: the r-th of W equal chunks of the sum along `dim`.
        """
        if is_dynamo_compiling():
            return self._in_graph.reduce_scatter(x, dim, op)
        call = "reduce_scatter"
        share = self.share_shape(call, x, dim)
        backend = self._route(call, x, reduction=op)
        dim %= x.dim()
        chunks = x.unflatten(dim, (self.world_size, share[dim])).movedim(dim, 0)
        return backend.reduce_scatter_tensor(x.new_empty(share), chunks, op)

    def reduce_scatter_tensor(
        self, output: torch.Tensor, input: torch.Tensor, op: str = "sum"
    ) -> torch.Tensor:
        """Writes this rank's share of the reduction of all ranks' `input` into `output`.

        Args:
            output: [T, ...].
            input: [W * T, ...] or [W, T, ...].

        Returns:
            `output`.
        """
        if is_dynamo_compiling():
            return self._in_graph.reduce_scatter_tensor(output, input, op)
        backend = self._route("reduce_scatter_tensor", input, output, reduction=op)
        return backend.reduce_scatter_tensor(output, input, op)

    def reduce_scatterv(
        self,
        x: torch.Tensor,
        sizes: Sequence[int],
        out: torch.Tensor | None = None,
        op: str = "sum",
    ) -> torch.Tensor:
        """This rank's share of `sizes[r]` rows of the reduction of all ranks' `x`.

        Args:
            x: [sum(sizes), ...].
            sizes: rows of each rank's share, the same on all ranks; may be 0.
            out: [sizes[r], ...].

        Returns:
            `out`, or a new tensor.
        """
        if is_dynamo_compiling():
            return self._in_graph.reduce_scatterv(x, sizes, out, op)
        return self._route("reduce_scatterv", x).reduce_scatterv(x, sizes, out, op)

    def share_shape(self, call: str, x: torch.Tensor, dim: int) -> list[int]:
        """The shape of one of W equal chunks of `x` along `dim`. Local.

        Raises:
            ArgumentError: it can't be divided so.
        """
        dim = check_dim(call, dim, x.dim(), self.member)
        shape = list(x.shape)
        if x.shape[dim] % self.world_size:
            raise ArgumentError(
                "x",
                f"divisible by the group size {self.world_size} in dim {dim}",
                f"shape {list(x.shape)}",
                call=call,
                member=self.member,
            )
        shape[dim] //= self.world_size
        return shape
