"""Collectives over one torch process group: gloo for CPU tensors, torch's own NCCL for CUDA ones.

Shapes: W group size, r rank_in_group; `sizes` and splits count rows (dim 0).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from ..checks import (
    check_exchange,
    check_output,
    check_peer,
    check_sizes,
    check_splits,
    gathered_shapes,
    materialized,
    raise_bad_reduction,
    scattered_shapes,
)
from ..errors import ArgumentError, GroupMember
from ..nccl.dtypes import REDUCTION_CODES
from ..process_groups import all_gather_single, collective_errors

__all__ = ["TorchPgBackend"]

_OPS = {
    "sum": dist.ReduceOp.SUM,
    "prod": dist.ReduceOp.PRODUCT,
    "max": dist.ReduceOp.MAX,
    "min": dist.ReduceOp.MIN,
    "avg": dist.ReduceOp.AVG,
}
# What gloo can't add up, of what NCCL can.
_NOT_IN_GLOO = {torch.float8_e4m3fn, torch.float8_e5m2}


class TorchPgBackend:
    """The collectives of one group through `torch.distributed`.

    Data is moved as bytes, so that every dtype can be. A failed or timed-out operation raises
    `CollectiveError`.

    Args:
        member: this rank's place in the group.
        group: the process group.
        device: where this backend's tensors are.
    """

    def __init__(self, member: GroupMember, group: dist.ProcessGroup, device: torch.device) -> None:
        self._member = member
        self._group = group
        self._device = device
        self._is_gloo = dist.get_backend(group) == "gloo"
        self._reductions = {
            (dtype, op): codes
            for (dtype, op), codes in REDUCTION_CODES.items()
            if not (self._is_gloo and dtype in _NOT_IN_GLOO)
        }

    def all_reduce(
        self, x: torch.Tensor, op: str = "sum", out: torch.Tensor | None = None
    ) -> torch.Tensor:
        call = "all_reduce"
        self._check_reduction(call, x, op)
        if out is None:
            out = x.detach().clone(memory_format=torch.contiguous_format)
        else:
            check_output(call, "out", out, [x.shape], x, self._member)
            if out is not x:
                out.copy_(x.detach())
        if out.numel():
            with collective_errors(call, self._member):
                dist.all_reduce(out, self._torch_op(op), group=self._group)
        return self._finish(out, op)

    def reduce(
        self, x: torch.Tensor, dst: int = 0, op: str = "sum", out: torch.Tensor | None = None
    ) -> torch.Tensor | None:
        check_peer("reduce", "dst", dst, self._member)
        self._check_reduction("reduce", x, op)
        root = self._member.rank_in_group == dst
        if root and out is not None:
            check_output("reduce", "out", out, [x.shape], x, self._member)
        total = x.detach().clone(memory_format=torch.contiguous_format)
        self._reduce(total, dst, op, "reduce")
        if not root:
            return None
        total = self._finish(total, op)
        return total if out is None else out.copy_(total)

    def reduce_scatter_tensor(
        self, output: torch.Tensor, input: torch.Tensor, op: str = "sum"
    ) -> torch.Tensor:
        call = "reduce_scatter_tensor"
        self._check_reduction(call, input, op, "input")
        shapes = scattered_shapes(call, input, self._member)
        check_output(call, "output", output, shapes, input, self._member)
        pieces = input.reshape(self._member.world_size, *output.shape)
        self._reduce_scatter(pieces.unbind(0), output, op, call)
        return output

    def reduce_scatterv(
        self,
        x: torch.Tensor,
        sizes: Sequence[int],
        out: torch.Tensor | None = None,
        op: str = "sum",
    ) -> torch.Tensor:
        call = "reduce_scatterv"
        self._check_reduction(call, x, op)
        check_sizes(call, sizes, x, self._member, of="sum")
        out = self._output(call, out, sizes[self._member.rank_in_group], x)
        self._reduce_scatter(x.split_with_sizes(list(sizes)), out, op, call)
        return out

    def all_gather_into_tensor(self, output: torch.Tensor, input: torch.Tensor) -> torch.Tensor:
        work = self.all_gather_into_tensor_async(output, input)
        with collective_errors("all_gather_into_tensor", self._member):
            work.wait()
        return output

    def all_gather_into_tensor_async(self, output: torch.Tensor, input: torch.Tensor) -> dist.Work:
        """Starts an `all_gather_into_tensor`; the tensors are valid again after `wait()`."""
        call = "all_gather_into_tensor"
        self._check_device(call, "input", input)
        shapes = gathered_shapes(input, self._member.world_size)
        check_output(call, "output", output, shapes, input, self._member)
        with collective_errors(call, self._member):
            work: dist.Work = all_gather_single(
                _as_bytes(output), _as_bytes(input), group=self._group, async_op=True
            )
        return work

    def all_gatherv(
        self, x: torch.Tensor, sizes: Sequence[int], out: torch.Tensor | None = None
    ) -> torch.Tensor:
        call = "all_gatherv"
        self._check_device(call, "x", x)
        check_sizes(call, sizes, x, self._member, of="own entry")
        out = self._output(call, out, sum(sizes), x)
        self._exchange(call, [x] * self._member.world_size, out.split_with_sizes(list(sizes)))
        return out

    def all_to_all_single(
        self,
        output: torch.Tensor,
        input: torch.Tensor,
        output_splits: Sequence[int] | None = None,
        input_splits: Sequence[int] | None = None,
    ) -> torch.Tensor:
        call = "all_to_all_single"
        self._check_device(call, "input", input)
        send = check_splits(call, "input_splits", input_splits, input, self._member)
        shape = (*output.shape[:1], *input.shape[1:])
        check_output(call, "output", output, [shape], input, self._member)
        receive = check_splits(call, "output_splits", output_splits, output, self._member)
        check_exchange(call, output, input, receive, send, self._member)
        self._exchange(call, input.split_with_sizes(list(send)), output.split(list(receive)))
        return output

    def broadcast(self, x: torch.Tensor, src: int = 0) -> torch.Tensor:
        check_peer("broadcast", "src", src, self._member)
        self._check_device("broadcast", "x", x)
        buffer = materialized(x)
        if x.numel():
            with collective_errors("broadcast", self._member):
                dist.broadcast(_as_bytes(buffer), group=self._group, group_src=src)
        return x if buffer is x else x.copy_(buffer)

    def gather(
        self, x: torch.Tensor, dst: int = 0, out: torch.Tensor | None = None
    ) -> torch.Tensor | None:
        check_peer("gather", "dst", dst, self._member)
        self._check_device("gather", "x", x)
        world_size = self._member.world_size
        if self._member.rank_in_group != dst:
            self.send(x, dst)
            return None
        if out is None:
            out = x.new_empty((world_size, *x.shape))
        check_output("gather", "out", out, [(world_size, *x.shape)], x, self._member)
        nothing = x.new_empty(0)
        sends = [x if rank == dst else nothing for rank in range(world_size)]
        self._exchange("gather", sends, out.unbind(0))
        return out

    def send(self, x: torch.Tensor, dst: int) -> None:
        check_peer("send", "dst", dst, self._member, other=True)
        self._check_device("send", "x", x)
        if x.numel():
            with collective_errors("send", self._member):
                dist.send(_as_bytes(x), group=self._group, group_dst=dst)

    def recv(self, out: torch.Tensor, src: int) -> torch.Tensor:
        check_peer("recv", "src", src, self._member, other=True)
        self._check_device("recv", "out", out)
        check_output("recv", "out", out, [out.shape], out, self._member)
        if out.numel():
            with collective_errors("recv", self._member):
                dist.recv(_as_bytes(out), group=self._group, group_src=src)
        return out

    # ---- what the calls share ---------------------------------------------------------------

    def _check_device(self, call: str, argument: str, x: torch.Tensor) -> None:
        if x.device != self._device:
            raise ArgumentError(
                argument, f"on {self._device}", x.device, call=call, member=self._member
            )

    def _check_reduction(self, call: str, x: torch.Tensor, op: str, argument: str = "x") -> None:
        self._check_device(call, argument, x)
        if (x.dtype, op) not in self._reductions:
            raise_bad_reduction(call, x.dtype, op, self._reductions, self._member, argument)

    def _output(
        self, call: str, out: torch.Tensor | None, rows: int, like: torch.Tensor
    ) -> torch.Tensor:
        shape = (rows, *like.shape[1:])
        if out is None:
            out = like.new_empty(shape)
        check_output(call, "out", out, [shape], like, self._member)
        return out

    def _torch_op(self, op: str) -> dist.ReduceOp.RedOpType:
        return _OPS["sum"] if self._is_gloo and op == "avg" else _OPS[op]

    def _finish(self, total: torch.Tensor, op: str) -> torch.Tensor:
        """gloo has no average: it is a sum, divided here."""
        return total.div_(self._member.world_size) if self._is_gloo and op == "avg" else total

    def _reduce(self, total: torch.Tensor, dst: int, op: str, call: str) -> None:
        if total.numel():
            with collective_errors(call, self._member):
                dist.reduce(total, group=self._group, group_dst=dst, op=self._torch_op(op))

    def _reduce_scatter(
        self, pieces: Sequence[torch.Tensor], output: torch.Tensor, op: str, call: str
    ) -> None:
        """Piece i goes, reduced, to rank i: torch has no reduce-scatter of unequal pieces."""
        # Copies, because torch may leave partial sums in the tensors of the other ranks.
        totals = [piece.clone(memory_format=torch.contiguous_format) for piece in pieces]
        for dst, total in enumerate(totals):
            self._reduce(total, dst, op, call)
        output.copy_(self._finish(totals[self._member.rank_in_group], op).view_as(output))

    def _exchange(
        self, call: str, sends: Sequence[torch.Tensor], receives: Sequence[torch.Tensor]
    ) -> None:
        """Sends `sends[i]` to rank i and fills `receives[i]` from it; empty pieces don't travel."""
        own = self._member.rank_in_group
        receives[own].copy_(sends[own])
        operations = []
        for peer in range(self._member.world_size):
            if peer == own:
                continue
            for start, piece in ((dist.isend, sends[peer]), (dist.irecv, receives[peer])):
                if piece.numel():
                    operation = dist.P2POp(
                        start, _as_bytes(piece), group=self._group, group_peer=peer
                    )
                    operations.append(operation)
        if operations:
            with collective_errors(call, self._member):
                for work in dist.batch_isend_irecv(operations):
                    work.wait()


def _as_bytes(x: torch.Tensor) -> torch.Tensor:
    """uint8 [B] over the memory of `x`, or of a copy where `x` isn't materialized."""
    # Not reshape: it keeps the stride 0 of an expanded dim, which `view` refuses.
    return materialized(x).as_strided((x.numel(),), (1,)).view(torch.uint8)
