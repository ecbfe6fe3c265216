"""PyNCCL: the collectives of one NCCL communicator, on the current stream.

Shapes: W group size, r rank_in_group, T rows of a rank; `sizes` and splits count rows (dim 0).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from ctypes import c_int

import torch

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
from ..errors import ArgumentError
from .dtypes import REDUCTION_CODES
from .suspension import SuspendableConnection

__all__ = ["PyNcclCommunicator"]

# Data is moved as bytes, so that every dtype can be: NCCL doesn't look at what it copies.
_BYTES = 1  # ncclUint8


class PyNcclCommunicator(SuspendableConnection):
    """NCCL collectives of one group, on the current stream.

    Every collective must be called by all ranks of the group in the same order. Calls return
    once the work is enqueued; tensors follow torch's stream rules. Inputs may be
    non-contiguous (they are copied), outputs may not. `src` and `dst` are ranks in the group.

    All calls raise `ArgumentError` for arguments that don't fit, before anything is enqueued;
    `CommunicatorDisabledError` while disabled; `GroupClosedError` after `close()`;
    `SleepError` while suspended; `NcclError` when NCCL refuses.

    Construction, `close`, `change_state` and `group` are those of `NcclConnection`,
    `suspend` and `resume` those of `SuspendableConnection`.
    """

    # ---- reductions -------------------------------------------------------------------------

    def all_reduce(
        self, x: torch.Tensor, op: str = "sum", out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The reduction of all ranks' `x`, on every rank. Collective.

        Args:
            x: any shape, the same on all ranks.
            op: ``sum``, ``prod``, ``max``, ``min``, or ``avg`` (floating dtypes only).
            out: where the result goes; `x` itself reduces in place. None makes a new tensor.

        Returns:
            `out`, or a new contiguous tensor like `x`.
        """
        # The hot path: `_direct` stands for a communicator that is usable and not inside group(),
        # and the look-up both validates the dtype and op and translates them.
        direct = self._direct
        try:
            codes = REDUCTION_CODES[x.dtype, op]
        except KeyError:
            raise_bad_reduction("all_reduce", x.dtype, op, REDUCTION_CODES, self.member)
        if (
            direct is None
            or x.get_device() != direct[3]
            or not x.is_contiguous()
            or x.is_neg()  # a view that torch negates when it is read
        ):
            x = self._input("all_reduce", "x", x)
            direct = self._direct_call()
        if out is None:
            out = torch.empty_like(x)
        elif out is not x:
            check_output("all_reduce", "out", out, [x.shape], x, self.member)
        if self._grouped is not None:
            self._grouped.append(out)
        function, comm, raw_stream, device_index = direct
        send, count = x.data_ptr(), x.numel()
        receive = send if out is x else out.data_ptr()
        if count:
            stream = raw_stream(device_index)
            code = function(send, receive, count, codes[0], codes[1], comm, stream)
            if code:
                self._check("ncclAllReduce", code)
        return out

    def reduce(
        self, x: torch.Tensor, dst: int = 0, op: str = "sum", out: torch.Tensor | None = None
    ) -> torch.Tensor | None:
        """The reduction of all ranks' `x` on rank `dst`; None on the others. Collective.

        `out` is looked at on `dst` alone, and may be `x`.
        """
        check_peer("reduce", "dst", dst, self.member)
        root = self.member.rank_in_group == dst
        x, codes = self._reduction_input("reduce", x, op)
        if not root:
            out = None
        elif out is None:
            out = torch.empty_like(x)
        elif out is not x:
            check_output("reduce", "out", out, [x.shape], x, self.member)
        if out is not None:
            self._keep(out)
        if x.numel():
            receive = out.data_ptr() if out is not None else 0
            code = self.nccl.ncclReduce(
                x.data_ptr(), receive, x.numel(), *codes, dst, self._comm, self._stream()
            )
            self._check("ncclReduce", code)
        return out

    def reduce_scatter_tensor(
        self, output: torch.Tensor, input: torch.Tensor, op: str = "sum"
    ) -> torch.Tensor:
        """This rank's share of the reduction of all ranks' `input`. Collective.

        Args:
            output: [T, ...]; may be this rank's share of `input` itself.
            input: [W * T, ...] or [W, T, ...].

        Returns:
            `output`.
        """
        call = "reduce_scatter_tensor"
        x, codes = self._reduction_input(call, input, op, "input")
        check_output(call, "output", output, scattered_shapes(call, x, self.member), x, self.member)
        self._keep(output)
        if output.numel():
            code = self._reduce_scatter(
                x.data_ptr(),
                output.data_ptr(),
                output.numel(),
                *codes,
                self._comm,
                self._stream(),
            )
            self._check("ncclReduceScatter", code)
        return output

    def reduce_scatterv(
        self,
        x: torch.Tensor,
        sizes: Sequence[int],
        out: torch.Tensor | None = None,
        op: str = "sum",
    ) -> torch.Tensor:
        """Like `reduce_scatter_tensor` with a share of `sizes[r]` rows for rank r. Collective.

        Args:
            x: [sum(sizes), ...].
            sizes: rows of each rank's share, the same on all ranks.
            out: [sizes[r], ...]; None makes a new tensor.
        """
        call = "reduce_scatterv"
        x, (data_type, op_code) = self._reduction_input(call, x, op)
        check_sizes(call, sizes, x, self.member, of="sum")
        out = self._output(call, out, sizes[self.member.rank_in_group], x)
        row = _row_numel(x)
        if x.numel():
            code = self._ragged.reduce_scatterv(
                self._comm,
                x.data_ptr(),
                out.data_ptr(),
                [size * row for size in sizes],
                (x.element_size(), data_type, op_code),
                self._stream(),
            )
            self._check("ncclReduce in a group", code)
        return out

    # ---- data movement, any dtype -----------------------------------------------------------

    def all_gather_into_tensor(self, output: torch.Tensor, input: torch.Tensor) -> torch.Tensor:
        """All ranks' `input`, in group order. Collective.

        Args:
            output: [W * T, ...] or [W, T, ...].
            input: [T, ...], the same shape on all ranks; may be this rank's share of `output`.

        Returns:
            `output`.
        """
        call = "all_gather_into_tensor"
        x = self._input(call, "input", input)
        check_output(call, "output", output, gathered_shapes(x, self.world_size), x, self.member)
        self._keep(output)
        if x.numel():
            code = self._all_gather(
                x.data_ptr(), output.data_ptr(), x.nbytes, _BYTES, self._comm, self._stream()
            )
            self._check("ncclAllGather", code)
        return output

    def all_gatherv(
        self, x: torch.Tensor, sizes: Sequence[int], out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """All ranks' `x`, which may differ in rows, one after another. Collective.

        Args:
            x: [sizes[r], ...].
            sizes: rows of each rank, the same on all ranks.
            out: [sum(sizes), ...]; None makes a new tensor.
        """
        call = "all_gatherv"
        x = self._input(call, "x", x)
        check_sizes(call, sizes, x, self.member, of="own entry")
        out = self._output(call, out, sum(sizes), x)
        if out.numel():
            row = _row_bytes(x)
            code = self._ragged.all_gatherv(
                self._comm,
                x.data_ptr(),
                out.data_ptr(),
                [size * row for size in sizes],
                self._stream(),
            )
            self._check("ncclBroadcast in a group", code)
        return out

    def all_to_all_single(
        self,
        output: torch.Tensor,
        input: torch.Tensor,
        output_splits: Sequence[int] | None = None,
        input_splits: Sequence[int] | None = None,
    ) -> torch.Tensor:
        """Sends the i-th piece of `input` to rank i, which gets it as piece r. Collective.

        Args:
            output: [sum(output_splits), ...].
            input: [sum(input_splits), ...]; must not overlap `output`.
            output_splits: rows that come from each rank; None: equal shares.
            input_splits: rows that go to each rank; None: equal shares.

        Returns:
            `output`.
        """
        call = "all_to_all_single"
        x = self._input(call, "input", input)
        send = check_splits(call, "input_splits", input_splits, x, self.member)
        shape = (*output.shape[:1], *x.shape[1:])
        check_output(call, "output", output, [shape], x, self.member)
        receive = check_splits(call, "output_splits", output_splits, output, self.member)
        check_exchange(call, output, input, receive, send, self.member)
        self._keep(output)
        row = _row_bytes(x)
        if row:
            code = self._ragged.all_to_allv(
                self._comm,
                x.data_ptr(),
                [rows * row for rows in send],
                output.data_ptr(),
                [rows * row for rows in receive],
                self._stream(),
            )
            self._check("ncclSend/ncclRecv in a group", code)
        return output

    def broadcast(self, x: torch.Tensor, src: int = 0) -> torch.Tensor:
        """Overwrites `x` with rank `src`'s. Collective. Returns `x`, contiguous or not."""
        check_peer("broadcast", "src", src, self.member)
        buffer = self._input("broadcast", "x", x)
        if buffer is not x and self._grouped is not None:
            raise ArgumentError(
                "x", "contiguous inside group()", x.stride(), call="broadcast", member=self.member
            )
        if buffer.numel():
            pointer = buffer.data_ptr()
            code = self.nccl.ncclBroadcast(
                pointer, pointer, buffer.nbytes, _BYTES, src, self._comm, self._stream()
            )
            self._check("ncclBroadcast", code)
        if buffer is not x:
            x.copy_(buffer)
        return x

    def gather(
        self, x: torch.Tensor, dst: int = 0, out: torch.Tensor | None = None
    ) -> torch.Tensor | None:
        """All ranks' equal `x` as [W, *x.shape] on rank `dst`; None on the others. Collective.

        `out` is looked at on `dst` alone.
        """
        check_peer("gather", "dst", dst, self.member)
        x = self._input("gather", "x", x)
        if self.member.rank_in_group != dst:
            self.send(x, dst)
            return None
        if out is None:
            out = x.new_empty((self.world_size, *x.shape))
        check_output("gather", "out", out, [(self.world_size, *x.shape)], x, self.member)
        with self.group():
            for src in range(self.world_size):
                if src != dst:
                    self.recv(out[src], src)
        out[dst].copy_(x)
        return out

    def send(self, x: torch.Tensor, dst: int) -> None:
        """Sends `x` to rank `dst`, which must call `recv` with the same bytes."""
        check_peer("send", "dst", dst, self.member, other=True)
        x = self._input("send", "x", x)
        if x.numel():
            code = self.nccl.ncclSend(
                x.data_ptr(), x.nbytes, _BYTES, dst, self._comm, self._stream()
            )
            self._check("ncclSend", code)

    def recv(self, out: torch.Tensor, src: int) -> torch.Tensor:
        """Overwrites `out` with what rank `src` sends. Returns `out`."""
        check_peer("recv", "src", src, self.member, other=True)
        self._input("recv", "out", out)
        check_output("recv", "out", out, [out.shape], out, self.member)
        if out.numel():
            code = self.nccl.ncclRecv(
                out.data_ptr(), out.nbytes, _BYTES, src, self._comm, self._stream()
            )
            self._check("ncclRecv", code)
        return out

    # ---- what the calls share ---------------------------------------------------------------

    def _input(self, call: str, argument: str, x: torch.Tensor) -> torch.Tensor:
        """`x` or a contiguous copy of it, once this communicator can use it."""
        self._refuse_unless_usable(call)
        if x.get_device() != self._device_index:
            raise ArgumentError(
                argument, f"on {self.device}", x.device, call=call, member=self.member
            )
        x = materialized(x)
        self._keep(x)
        return x

    def _reduction_input(
        self, call: str, x: torch.Tensor, op: str, argument: str = "x"
    ) -> tuple[torch.Tensor, tuple[c_int, c_int]]:
        codes = REDUCTION_CODES.get((x.dtype, op))
        if codes is None:
            raise_bad_reduction(call, x.dtype, op, REDUCTION_CODES, self.member, argument)
        return self._input(call, argument, x), codes

    def _output(
        self, call: str, out: torch.Tensor | None, rows: int, like: torch.Tensor
    ) -> torch.Tensor:
        """`out` checked, or a new tensor, of `rows` rows like `like`."""
        shape = (rows, *like.shape[1:])
        if out is None:
            out = like.new_empty(shape)
        check_output(call, "out", out, [shape], like, self.member)
        self._keep(out)
        return out

    def _keep(self, tensor: torch.Tensor) -> None:
        if self._grouped is not None:
            self._grouped.append(tensor)


def _row_numel(x: torch.Tensor) -> int:
    """Elements of one row (one index of dim 0), also when there is no row."""
    return math.prod(x.shape[1:])


def _row_bytes(x: torch.Tensor) -> int:
    return _row_numel(x) * x.element_size()
