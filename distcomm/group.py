"""`GroupCoordinator`: everything one rank does with one group.

Shapes: W group size, r rank_in_group, T rows of a rank; `sizes` and splits count rows (dim 0).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from torch.compiler import is_dynamo_compiling

from .backends import Backend, RangedTorchPgBackend, TorchPgBackend
from .checks import check_dim, check_distinct, check_shape
from .communicators import GroupCommunicators, JobContext
from .errors import ArgumentError, GroupClosedError, GroupMember
from .graph_collectives import GraphCollectives
from .group_fused import FusedCollectives
from .group_memory import GroupMemory
from .group_objects import ObjectCollectives
from .group_reductions import Reductions
from .handles import AsyncHandle, CompletedHandle, WorkHandle
from .nccl import PyNcclCommunicator
from .objects import ObjectChannel
from .outside_graphs import outside_graphs
from .process_groups import collective_errors
from .routing import Router

__all__ = ["GroupCoordinator"]

_numbers = itertools.count()  # of the groups of this process


class GroupCoordinator(ObjectCollectives, GroupMemory, Reductions, FusedCollectives):
    """One rank's side of one group: its collectives, and what they run on.

    Made by `init_distributed` or `ParallelState.create_group`. Unless said otherwise, a call is
    collective: all ranks of the group make it, in the same order. `src`, `dst` are ranks in the
    group. Tensors may be on CPU, also in a CUDA job, and non-contiguous; outputs are contiguous.
    CUDA work goes to the current stream. A call returns its result and changes an argument only
    where its name or ``out`` says so. In a group of one nothing is copied: where no output is
    given, a result may be the argument itself.

    All calls raise `ArgumentError` before anything is sent if an argument doesn't fit,
    `CollectiveError` or `NcclError` if the collective fails, `GroupClosedError` afterwards.

    Attributes:
        name: the group's name.
        unique_name: one that no other group of this process ever has; what a compiled function
            knows the group by.
        rank: this process's global rank.
        ranks: global ranks of the group, in group order.
        world_size: number of ranks in the group.
        rank_in_group: this process's index in `ranks`.
        local_rank: index of this process on its host.
        device: this rank's device.
    """

    def __init__(
        self, member: GroupMember, communicators: GroupCommunicators, job: JobContext
    ) -> None:
        self.member = member
        self.name = member.name
        # Shapes depend on rank and size, and torch's caches on disk know graphs by this name.
        place = f"{member.rank_in_group}/{member.world_size}"
        self.unique_name = f"{member.name}#{next(_numbers)}:{place}"
        self.rank = member.rank
        self.ranks = list(member.ranks)
        self.world_size = member.world_size
        self.rank_in_group = member.rank_in_group
        self.local_rank = job.local_rank
        self.device = job.device
        self._job = job
        self._communicators = communicators
        self._closed = False
        self._router = Router(member, communicators, job)
        self._route = self._router.route
        self._in_graph = GraphCollectives(member, self.unique_name, job.call_order)
        self._prepare_memory()

    def __repr__(self) -> str:
        return f"GroupCoordinator({self.member}, device={self.device}, ranks={self.ranks})"

    # ---- identity ---------------------------------------------------------------------------

    @property
    def first_rank(self) -> int:
        """Global rank of the group's first member."""
        return self.ranks[0]

    @property
    def last_rank(self) -> int:
        """Global rank of the group's last member."""
        return self.ranks[-1]

    @property
    def is_first_rank(self) -> bool:
        return self.rank_in_group == 0

    @property
    def is_last_rank(self) -> bool:
        return self.rank_in_group == self.world_size - 1

    @property
    def next_rank(self) -> int:
        """Global rank of the next member; after the last comes the first."""
        return self.ranks[self._next_rank_in_group]

    @property
    def prev_rank(self) -> int:
        """Global rank of the previous member; before the first comes the last."""
        return self.ranks[self._prev_rank_in_group]

    @property
    def cpu_group(self) -> dist.ProcessGroup:
        """A gloo process group of these ranks, for use with `torch.distributed`."""
        self._refuse_if_closed("cpu_group")
        return self._communicators.cpu_group

    @property
    def device_group(self) -> dist.ProcessGroup:
        """torch's process group for `device`. Made, collectively, when first asked for."""
        self._refuse_if_closed("device_group")
        return self._communicators.device_group

    def forget_device_group(self) -> None:
        """The next use of `device_group` asks the communicators for it again. Local."""
        self._router.forget_device_group()

    @property
    def pynccl_comm(self) -> PyNcclCommunicator | None:
        """The NCCL communicator; None on CPU and in a group of one."""
        return self._communicators.pynccl

    @outside_graphs
    def stats(self) -> dict[str, Any]:
        """Counters of this rank. Not collective; readable after `close()`, and by another thread.

            {"sequence": number,
             "ops": {op: {backend: {"calls": count, "bytes": sum, "last": number}}},
             "fallbacks": {op: {reason: calls}},
             "algorithms": table,
             "symmetric_memory": {"contexts": count, "inactive": {reason: contexts},
                                  "windows": count}}

        ``sequence`` is how many collectives on tensors this rank has begun, also those that
        failed: the same on all ranks that are in step, so that the odd one of a job that hangs has
        another. ``last`` is what it was at the last such call. `send` and `recv` are counted but
        don't add to it, as two ranks make them; objects and `barrier` are not counted. A gather of
        keys and values counts once per tensor; an ``unfused`` call as itself and then as the
        all-reduce in it. In a CUDA graph a call counts when it is captured, and not when replayed.

        The backend is the algorithm where a kernel of ours has run. Bytes are those of the call's
        tensor argument. `table` says which table of algorithms there is, or why none; None on CPU
        and in a group of one.
        """
        kernels = self.kernels
        return {
            **self._router.stats(),
            "algorithms": self._why_no_kernels() if kernels is None else kernels.table.source,
            "symmetric_memory": self._memory_stats(),
        }

    def close(self) -> None:
        """Ends the group's use on this rank. Idempotent. Not collective.

        Its communicators live on for groups that share them. Those of a group of `create_group`,
        what it has of the symmetric reserve, and its name stay taken until the state is closed.
        """
        self._closed = True
        self._in_graph.close()
        self._close_memory()
        self._router.close()

    # ---- data movement, any dtype -----------------------------------------------------------

    def all_gather(self, x: torch.Tensor, dim: int = -1) -> torch.Tensor:
        """All ranks' `x`, concatenated along `dim` in group order.

        Args:
            x: the same shape on all ranks, at least one dim.
        """
        if is_dynamo_compiling():
            return self._in_graph.all_gather(x, dim)
        dim = check_dim("all_gather", dim, x.dim(), self.member)
        if self.world_size == 1:
            self._route("all_gather", x)
            return x
        stacked = x.new_empty((self.world_size, *x.shape))
        backend = self._route("all_gather", x, stacked)
        return _concatenated(backend.all_gather_into_tensor(stacked, x), dim)

    def all_gather_into_tensor(self, output: torch.Tensor, input: torch.Tensor) -> torch.Tensor:
        """Writes all ranks' `input` into `output`, in group order.

        Args:
            output: [W * T, ...] or [W, T, ...].
            input: [T, ...], the same shape on all ranks; may be this rank's share of `output`.

        Returns:
            `output`.
        """
        if is_dynamo_compiling():
            return self._in_graph.all_gather_into_tensor(output, input)
        backend = self._route("all_gather_into_tensor", input, output)
        return backend.all_gather_into_tensor(output, input)

    def all_gatherv(
        self, x: torch.Tensor, sizes: Sequence[int], out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """All ranks' `x`, which may differ in rows, one after another.

        Args:
            x: [sizes[r], ...].
            sizes: rows of each rank, the same on all ranks; may be 0.
            out: [sum(sizes), ...].

        Returns:
            `out`, or a new tensor.
        """
        if is_dynamo_compiling():
            return self._in_graph.all_gatherv(x, sizes, out)
        return self._route("all_gatherv", x).all_gatherv(x, sizes, out)

    @outside_graphs
    def cp_all_gather_into_tensor_async(
        self,
        output: torch.Tensor,
        input: torch.Tensor,
        stream: torch.cuda.Stream | None = None,
    ) -> AsyncHandle:
        """Starts an `all_gather_into_tensor` beside the caller's work.

        On CUDA it runs on `stream`, after all that the current stream was given before. `output`
        is ready, and `input` may be changed again, after the handle's `wait()`, which makes the
        current stream wait and doesn't block the host. On CPU `stream` is ignored, and
        `wait()` blocks.

        Args:
            output: [W * T, ...] or [W, T, ...].
            input: [T, ...], the same shape on all ranks.
            stream: a CUDA stream of this rank's device; required for CUDA tensors.
        """
        call = "cp_all_gather_into_tensor_async"
        backend = self._route(call, input)
        if input.is_cuda:
            stream = self.checked_stream(call, stream)
            stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(stream):
                backend.all_gather_into_tensor(output, input)
            return self.stream_handle(stream, (output, input))
        if isinstance(backend, TorchPgBackend | RangedTorchPgBackend):
            work = backend.all_gather_into_tensor_async(output, input)
            return WorkHandle(work, call, self.member, (output, input))
        backend.all_gather_into_tensor(output, input)
        return CompletedHandle()

    def all_to_all_single(
        self,
        output: torch.Tensor,
        input: torch.Tensor,
        output_splits: Sequence[int] | None = None,
        input_splits: Sequence[int] | None = None,
    ) -> torch.Tensor:
        """Sends the i-th piece of `input` to rank i, which gets it as piece r of `output`.

        Args:
            output: [sum(output_splits), ...].
            input: [sum(input_splits), ...]; must not overlap `output`.
            output_splits: rows that come from each rank; None: equal shares.
            input_splits: rows that go to each rank; None: equal shares.

        Returns:
            `output`.
        """
        if is_dynamo_compiling():
            return self._in_graph.all_to_all_single(output, input, output_splits, input_splits)
        backend = self._route("all_to_all_single", input)
        return backend.all_to_all_single(output, input, output_splits, input_splits)

    def broadcast(self, x: torch.Tensor, src: int = 0) -> torch.Tensor:
        """Overwrites `x` with rank `src`'s; same shape and dtype on all ranks. Returns `x`."""
        if is_dynamo_compiling():
            return self._in_graph.broadcast(x, src)
        backend = self._route("broadcast", x)
        if not x.is_contiguous():
            check_distinct("broadcast", "x", x, self.member)
        return backend.broadcast(x, src)

    @outside_graphs
    def gather(self, x: torch.Tensor, dst: int = 0, dim: int = -1) -> torch.Tensor | None:
        """All ranks' `x`, concatenated along `dim`, on rank `dst`; None on the others."""
        dim = check_dim("gather", dim, x.dim(), self.member)
        stacked = self._route("gather", x).gather(x, dst)
        return None if stacked is None else _concatenated(stacked, dim)

    @outside_graphs
    def send(self, x: torch.Tensor, dst: int | None = None) -> None:
        """Sends `x` to rank `dst` (default: the next), which must call `recv`. Not collective."""
        dst = self._next_rank_in_group if dst is None else dst
        self._route("send", x).send(x, dst)

    @outside_graphs
    def recv(
        self,
        shape_or_out: torch.Tensor | Sequence[int],
        dtype: torch.dtype | None = None,
        src: int | None = None,
    ) -> torch.Tensor:
        """What rank `src` (default: the previous) sends. Not collective.

        Args:
            shape_or_out: the tensor to overwrite, or the shape of a new one on `device`.
            dtype: of the new tensor; not given with a tensor to overwrite.
        """
        src = self._prev_rank_in_group if src is None else src
        if isinstance(shape_or_out, torch.Tensor):
            out = shape_or_out
            if dtype not in (None, out.dtype):
                raise ArgumentError(
                    "dtype", f"{out.dtype}, as out's", dtype, call="recv", member=self.member
                )
        elif dtype is None:
            raise ArgumentError(
                "dtype", "given with a shape", None, call="recv", member=self.member
            )
        else:
            shape = check_shape("recv", "shape_or_out", shape_or_out, self.member)
            out = torch.empty(shape, dtype=dtype, device=self.device)
        return self._route("recv", out).recv(out, src)

    @outside_graphs
    def barrier(self) -> None:
        """Waits on the host until all ranks have come; doesn't wait for CUDA work.

        Raises:
            CollectiveError: a rank didn't come within the timeout; rank 0's names all missing.
        """
        self._refuse_if_closed("barrier")
        if self.world_size > 1:
            in_range = self.profiler_range("barrier", "gloo")
            with collective_errors("barrier", self.member), in_range:
                self._communicators.wait_for_all()

    # ---- for collectives that are built on a group ------------------------------------------

    def route(self, op: str, x: torch.Tensor) -> Backend:
        """What runs `op` on tensors like `x`, found and counted as for the group's own calls."""
        return self._route(op, x)

    def count(self, op: str, how: str, num_bytes: int) -> None:
        """Counts a call in `stats` that no backend runs.

        Args:
            how: what runs it, in the place of a backend's name.
            num_bytes: of the call's tensor argument.
        """
        self._router.count(op, how, num_bytes)

    def count_fallback(self, op: str, how: str, reason: str) -> None:
        """Counts in `stats` why `op` goes another way than could be expected; logged once."""
        self._router.count_fallback(op, how, reason)

    def profiler_range(
        self, op: str, how: str, num_bytes: int | None = None
    ) -> AbstractContextManager[object]:
        """The profiler range of a call that no backend runs; a block that does nothing where ranges
        are off. `op`, `how` and `num_bytes` as for `count`."""
        return self._router.profiler_range(op, how, num_bytes)

    def use_profiler_ranges(self, kind: str | None) -> None:
        """What `ParallelState.profiler_ranges` does to this group, once `kind` is checked."""
        self._router.use_ranges(kind)

    def checked_stream(self, call: str, stream: object) -> torch.cuda.Stream:
        """`stream`, if it is one of the group's device.

        Raises:
            ArgumentError: it isn't.
        """
        if not isinstance(stream, torch.cuda.Stream) or stream.device != self.device:
            raise ArgumentError(
                "stream", f"a CUDA stream of {self.device}", stream, call=call, member=self.member
            )
        return stream

    # ---- inside -----------------------------------------------------------------------------

    def _channel(self, call: str) -> ObjectChannel:
        self._refuse_if_closed(call)
        return ObjectChannel(self.member, self.cpu_group if self.world_size > 1 else None)

    def _refuse_if_closed(self, call: str) -> None:
        if self._closed:
            raise GroupClosedError(f"{call}: the group is closed [{self.member}]")


def _concatenated(stacked: torch.Tensor, dim: int) -> torch.Tensor:
    """[W, *shape] -> shape with W times as much in `dim`; a view for dim 0, else a copy."""
    return stacked.movedim(0, dim).flatten(dim, dim + 1).contiguous()
