"""Collectives of a group that do more than communicate.

Shapes: T tokens, H hidden size; ``...`` stands for any leading dims.
"""

from __future__ import annotations

from dataclasses import replace
from typing import overload

import torch
from torch.compiler import is_dynamo_compiling

from .checks import materialized
from .communicators import GroupCommunicators
from .errors import ArgumentError, GroupMember
from .graph_collectives import GraphCollectives
from .kernels import VECTOR_BYTES, NormedRows
from .routing import Router

__all__ = ["FusedCollectives"]

_CALL = "all_reduce_rms_norm"


class FusedCollectives:
    """The fused collectives of one group; `GroupCoordinator` is one."""

    member: GroupMember
    device: torch.device
    _communicators: GroupCommunicators
    _router: Router
    _in_graph: GraphCollectives

    @overload
    def all_reduce_rms_norm(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        residual: None = None,
        *,
        eps: float = 1e-6,
        weight_bias: float = 0.0,
    ) -> torch.Tensor: ...

    @overload
    def all_reduce_rms_norm(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        residual: torch.Tensor,
        *,
        eps: float = 1e-6,
        weight_bias: float = 0.0,
    ) -> tuple[torch.Tensor, torch.Tensor]: ...

    def all_reduce_rms_norm(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        residual: torch.Tensor | None = None,
        *,
        eps: float = 1e-6,
        weight_bias: float = 0.0,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """The sum of all ranks' `x`, plus `residual`, RMS-normalized. Collective.

        ``h = sum of x, rounded to its dtype, + residual``, and the result is
        ``h / sqrt(mean(h * h over H) + eps) * (weight + weight_bias)``: in fp32, rounded at the
        end. On GPUs one kernel, where kernels run all-reduces of that size.

        Args:
            x: [..., H], floating, the same shape on all ranks.
            weight: [H], of x's dtype and device.
            residual: like `x`, the same on all ranks; unchanged.
            eps: what is added to the mean of the squares.
            weight_bias: 0, or 1 for weights that are stored as differences from 1.

        Returns:
            The normalized sum, like `x`; with `residual` also ``h``, rounded: the next residual.
        """
        if is_dynamo_compiling():
            return self._in_graph.all_reduce_rms_norm(x, weight, residual, eps, weight_bias)
        self.check_norm(x, weight, residual)
        x2 = materialized(x).detach().reshape(-1, x.shape[-1])
        residual2 = None if residual is None else materialized(residual).detach().view_as(x2)
        rows = NormedRows(
            x=x2,
            weight=materialized(weight).detach(),
            residual=residual2,
            normed=torch.empty_like(x2),
            new_residual=None if residual2 is None else torch.empty_like(x2),
            eps=eps,
            weight_bias=weight_bias,
        )
        if not self._done_by_kernel(rows):
            self._unfused(rows)
        normed = rows.normed.view(x.shape)
        return normed if rows.new_residual is None else (normed, rows.new_residual.view(x.shape))

    def _done_by_kernel(self, rows: NormedRows) -> bool:
        """Whether a kernel has done it."""
        kernels, pynccl = self._communicators.kernels, self._communicators.pynccl
        if kernels is None or pynccl is None or not pynccl.enabled or not rows.x.is_cuda:
            return False
        algorithm = kernels.norm_algorithm(rows)
        if algorithm is None or not rows.x.numel():
            return False
        rows = _aligned(rows)
        self._router.announce(_CALL, (rows.x,), False)
        self._router.count(_CALL, algorithm, rows.x.nbytes)
        in_range = self._router.profiler_range(_CALL, algorithm, rows.x.nbytes)
        with torch.cuda.device(self.device), in_range:
            kernels.norm(algorithm, rows)
        return True

    def _unfused(self, rows: NormedRows) -> None:
        self._router.count(_CALL, "unfused", rows.x.nbytes)
        with self._router.profiler_range(_CALL, "unfused", rows.x.nbytes):
            self._sum_and_norm(rows)

    def _sum_and_norm(self, rows: NormedRows) -> None:
        total = self._router.route("all_reduce", rows.x).all_reduce(rows.x).float()
        if rows.residual is not None and rows.new_residual is not None:
            total = total + rows.residual.float()
            rows.new_residual.copy_(total)
        mean = total.square().mean(dim=-1, keepdim=True)
        scaled = total * torch.rsqrt(mean + rows.eps)
        rows.normed.copy_(scaled * (rows.weight.float() + rows.weight_bias))

    def check_norm(
        self, x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor | None
    ) -> None:
        """What `all_reduce_rms_norm` requires of its tensors. Local.

        Raises:
            ArgumentError: they don't fit.
        """
        problem: tuple[str, str, object] | None = None
        if x.dim() == 0 or not x.dtype.is_floating_point:
            problem = ("x", "floating, with a dim to normalize over", f"{x.dtype} {list(x.shape)}")
        elif weight.shape != x.shape[-1:] or weight.dtype != x.dtype or weight.device != x.device:
            problem = (
                "weight",
                f"{x.dtype} {list(x.shape[-1:])} on {x.device}",
                f"{weight.dtype} {list(weight.shape)} on {weight.device}",
            )
        elif residual is not None and (residual.shape, residual.dtype, residual.device) != (
            x.shape,
            x.dtype,
            x.device,
        ):
            problem = (
                "residual",
                f"{x.dtype} {list(x.shape)} on {x.device}",
                f"{residual.dtype} {list(residual.shape)} on {residual.device}",
            )
        if problem is not None:
            raise ArgumentError(*problem, call=_CALL, member=self.member)


def _aligned(rows: NormedRows) -> NormedRows:
    """Where a tensor begins is this rank's affair: what doesn't suit kernels is copied."""

    def aligned(x: torch.Tensor) -> torch.Tensor:
        return x.clone() if x.data_ptr() % VECTOR_BYTES else x

    residual = None if rows.residual is None else aligned(rows.residual)
    return replace(rows, x=aligned(rows.x), weight=aligned(rows.weight), residual=residual)
