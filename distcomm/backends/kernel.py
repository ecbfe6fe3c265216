"""Collectives by kernels that write to, and read from, the other ranks' memory."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch

from ..algorithms import AlgorithmTable
from ..checks import check_output, gathered_shapes, materialized, scattered_shapes
from ..errors import ArgumentError, GroupMember, SymmetricMemoryError
from ..kernels import (
    DTYPES,
    VECTOR_BYTES,
    Mailboxes,
    NormedRows,
    PeerTensors,
    all_gather_direct,
    all_gather_push,
    meet,
    most_all_reduced,
    most_gathered,
    most_row_bytes,
    most_tokens,
    one_shot_push,
    one_shot_rms_norm,
    push_and_add,
    reduce_scatter_push,
    two_shot_direct,
    two_shot_push,
    two_shot_rms_norm,
)
from ..memory import PeerChannel
from .base import Backend
from .forwarding import ForwardingBackend

__all__ = ["KernelBackend", "KernelCollectives"]

_MOST_BYTES: dict[tuple[str, str], Callable[[int], int]] = {
    ("all_reduce", "one_shot_push"): most_all_reduced,
    ("all_gather", "push"): most_gathered,
}
_NORMS = {"one_shot_push": one_shot_rms_norm, "two_shot_push": two_shot_rms_norm}


@dataclass(eq=False)
class KernelCollectives:
    """What one set of ranks needs for collectives by kernels.

    Backends keep it, so a change of what it has is a change of all of them.

    Attributes:
        boxes: the ranks' mailboxes.
        channel: brings calls into order, and knows where symmetric tensors are.
        table: which algorithm for which size; the same on all ranks.
        deterministic: whether NCCL may make no sums; kernels make them in the order of ranks.
    """

    boxes: Mailboxes
    channel: PeerChannel
    table: AlgorithmTable
    deterministic: bool = False
    _choices: dict[tuple[str, int, torch.dtype, bool], tuple[str | None, str | None]] = field(
        default_factory=dict, init=False
    )

    def use_table(self, table: AlgorithmTable) -> None:
        """From now on algorithms are chosen by `table`."""
        self.table = table
        self._choices.clear()

    def reopen(self) -> None:
        """After the channel was: mailboxes are where it says now. Local.

        Raises:
            SymmetricMemoryError: there are none.
        """
        self._choices.clear()
        self.__dict__.pop("peers", None)
        if not self.channel.mailboxes:
            raise SymmetricMemoryError("the ranks' mailboxes are not evenly spaced any more")
        self.boxes = replace(self.boxes, base=self.channel.mailboxes, stride=self.channel.stride)
        self.boxes.turns.zero_()  # mailboxes are empty, as at first
        torch.cuda.current_stream(self.boxes.turns.device).synchronize()

    def backend(
        self, op: str, algorithm: str, nccl: Backend, member: GroupMember, device: torch.device
    ) -> KernelBackend:
        """One algorithm for `op`; all other calls are `nccl`'s."""
        return KernelBackend(nccl, _KERNELS[op, algorithm], self, member, device)

    def run(self, op: str, algorithm: str, x: torch.Tensor, output: torch.Tensor) -> None:
        """Fills `output` by one algorithm, on the current stream. Collective."""
        self.channel.follow()
        _KERNELS[op, algorithm](x, output, self)

    def most_bytes(self, op: str, algorithm: str) -> int:
        """The largest `x` that an algorithm takes."""
        most = _MOST_BYTES.get((op, algorithm))
        return sys.maxsize if most is None else most(self.boxes.world_size)

    def algorithm(self, op: str, x: torch.Tensor, output: torch.Tensor | None) -> str | None:
        """For `op`, a sum if it reduces, of such tensors; None if kernels can't do it.

        Args:
            output: None if it will be ordinary memory.
        """
        key = (op, x.nbytes, x.dtype, torch._C._cuda_isCurrentStreamCapturing())
        choice = self._choices.get(key)
        if choice is None:
            choice = self._choices[key] = self._choose(*key)
        ordinary, symmetric = choice
        if symmetric == ordinary or output is None or not self._is_within_reach(output):
            return ordinary
        return symmetric

    def depends_on_output(self, op: str, x: torch.Tensor) -> bool:
        """Whether `algorithm` depends on where the output lies."""
        key = (op, x.nbytes, x.dtype, torch._C._cuda_isCurrentStreamCapturing())
        ordinary, symmetric = self._choices.get(key) or self._choose(*key)
        return ordinary != symmetric

    def _choose(
        self, op: str, num_bytes: int, dtype: torch.dtype, capturing: bool
    ) -> tuple[str | None, str | None]:
        """For ordinary and for symmetric outputs."""
        adds = op != "all_gather"
        grain = VECTOR_BYTES * (self.boxes.world_size if op == "reduce_scatter" else 1)
        if num_bytes % grain or (adds and dtype not in DTYPES):
            return None, None
        call = "captured" if capturing else "eager"
        ordinary, symmetric = (
            self._possible(op, self.table.ranges[call, tensors, op].of(num_bytes), num_bytes)
            for tensors in ("ordinary", "symmetric")
        )
        if self.deterministic and adds:
            of_any_size = "push" if op == "reduce_scatter" else "two_shot_push"
            ordinary = of_any_size if ordinary == "nccl" else ordinary
            symmetric = ordinary if symmetric == "nccl" else symmetric
        if symmetric in ("copy", "two_shot_copy") and not self.channel.can_copy:
            symmetric = symmetric.replace("copy", "direct")
        return ordinary, symmetric

    def _possible(self, op: str, algorithm: str, num_bytes: int) -> str:
        """The table's algorithm, if it takes that much."""
        if num_bytes <= self.most_bytes(op, algorithm):
            return algorithm
        return "two_shot_push" if op == "all_reduce" else "nccl"

    @cached_property
    def peers(self) -> PeerTensors:
        """For kernels that have to do with symmetric tensors."""
        return PeerTensors(
            signals=self.channel.kernel_signals,
            stride=self.channel.stride,
            rank=self.boxes.rank,
            world_size=self.boxes.world_size,
        )

    def _is_within_reach(self, output: torch.Tensor) -> bool:
        """Whether all ranks can write to it, in whole vectors."""
        return (
            output.is_contiguous()
            and not output.data_ptr() % VECTOR_BYTES
            and self.channel.is_within_reach(output)
        )

    def norm_algorithm(self, rows: NormedRows) -> str | None:
        """For an all-reduce with RMSNorm of these rows; None if kernels can't do it, or shouldn't.

        Rows that don't fit into the mailboxes at once go in two steps.
        """
        algorithm = self.algorithm("all_reduce_rms_norm", rows.x, None)
        if algorithm == "one_shot_push" and not self.norm_fits(algorithm, rows):
            algorithm = "two_shot_push"
        if algorithm in (None, "nccl") or not self.norm_fits(algorithm, rows):
            return None
        return algorithm

    def norm_fits(self, algorithm: str, rows: NormedRows) -> bool:
        """Whether an algorithm can take these rows."""
        row_bytes = rows.row_vectors * VECTOR_BYTES
        if row_bytes != rows.x.shape[1] * rows.x.itemsize:
            return False
        if algorithm == "one_shot_push":
            return len(rows.x) <= most_tokens(rows.row_vectors, self.boxes.world_size)
        return row_bytes <= most_row_bytes(self.boxes.world_size)

    def norm(self, algorithm: str, rows: NormedRows) -> None:
        """All-reduce with RMSNorm by one of the algorithms, on the current stream. Collective."""
        self.channel.follow()
        _NORMS[algorithm](rows, self.boxes)


class KernelBackend(ForwardingBackend):
    """One algorithm: a kernel that sums up, or gathers. All other calls are another backend's.

    Tensors are in whole vectors of 16 bytes, and reductions sums, or the caller chooses otherwise.

    Args:
        backend: makes all other calls.
        kernel: of an all-reduce, a reduce-scatter or an all-gather, which is what is called.
        kernels: the group's.
        member: this rank's place.
        device: this rank's GPU.
    """

    def __init__(
        self,
        backend: Backend,
        kernel: _Kernel,
        kernels: KernelCollectives,
        member: GroupMember,
        device: torch.device,
    ) -> None:
        super().__init__(backend)
        self._kernel = kernel
        self._kernels = kernels
        self._member = member
        self._device = device

    def all_reduce(
        self, x: torch.Tensor, op: str = "sum", out: torch.Tensor | None = None
    ) -> torch.Tensor:
        source = self._input("all_reduce", "x", x)
        if out is None:
            out = torch.empty_like(source)
        elif out is not source:
            check_output("all_reduce", "out", out, (x.shape,), x, self._member)
        return self._run(source, out)

    def reduce_scatter_tensor(
        self, output: torch.Tensor, input: torch.Tensor, op: str = "sum"
    ) -> torch.Tensor:
        call = "reduce_scatter_tensor"
        source = self._input(call, "input", input)
        shapes = scattered_shapes(call, source, self._member)
        check_output(call, "output", output, shapes, source, self._member)
        return self._run(source, output)

    def all_gather_into_tensor(self, output: torch.Tensor, input: torch.Tensor) -> torch.Tensor:
        call = "all_gather_into_tensor"
        source = self._input(call, "input", input)
        shapes = gathered_shapes(source, self._member.world_size)
        check_output(call, "output", output, shapes, source, self._member)
        return self._run(source, output)

    def _input(self, call: str, argument: str, x: torch.Tensor) -> torch.Tensor:
        if x.device != self._device:
            raise ArgumentError(
                argument, f"on {self._device}", x.device, call=call, member=self._member
            )
        return materialized(x)

    def _run(self, source: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """Where a tensor begins is this rank's affair: it must not change what all ranks do."""
        if not source.numel():
            return out
        if torch._C._cuda_getDevice() != self._device.index:
            with torch.cuda.device(self._device):  # kernels go to the thread's current one
                return self._run(source, out)
        if source.data_ptr() % VECTOR_BYTES:
            source = source.clone()
        target = torch.empty_like(out) if out.data_ptr() % VECTOR_BYTES else out
        self._kernels.channel.follow()
        self._kernel(source, target, self._kernels)
        if target is not out:
            out.detach().copy_(target)
        return out


# ---- the algorithms -----------------------------------------------------------------------------


def _two_shot_direct(x: torch.Tensor, output: torch.Tensor, kernels: KernelCollectives) -> None:
    first = kernels.channel.of_first_rank(output.data_ptr())
    two_shot_direct(x, first, kernels.boxes, kernels.peers)


def _two_shot_copy(x: torch.Tensor, output: torch.Tensor, kernels: KernelCollectives) -> None:
    """Copy engines use links better than kernels do, but need time to start and to end.

    They needn't wait for the peers: this rank's sums have come from all of them, so they had begun,
    and sent what they had in their outputs' place if that was the input.
    """
    boxes = kernels.boxes
    share = -(-x.nbytes // VECTOR_BYTES // boxes.world_size) * VECTOR_BYTES
    begin = min(boxes.rank * share, x.nbytes)
    own = output.data_ptr() + begin
    push_and_add(x, own, boxes)
    kernels.channel.spread(own, own, min(share, x.nbytes - begin))
    meet(kernels.peers)  # all copies have arrived


def _all_gather_direct(x: torch.Tensor, output: torch.Tensor, kernels: KernelCollectives) -> None:
    first = kernels.channel.of_first_rank(output.data_ptr())
    all_gather_direct(x.data_ptr(), first, x.nbytes, kernels.peers)


def _all_gather_copy(x: torch.Tensor, output: torch.Tensor, kernels: KernelCollectives) -> None:
    own = output.data_ptr() + kernels.boxes.rank * x.nbytes
    meet(kernels.peers)  # what has used the outputs has ended
    kernels.channel.spread(x.data_ptr(), own, x.nbytes)
    meet(kernels.peers)  # all copies have arrived


# Fills the second tensor with what becomes of the first one, on all ranks.
_Kernel = Callable[[torch.Tensor, torch.Tensor, KernelCollectives], None]

_KERNELS: dict[tuple[str, str], _Kernel] = {
    ("all_reduce", "one_shot_push"): lambda x, output, k: one_shot_push(x, output, k.boxes),
    ("all_reduce", "two_shot_push"): lambda x, output, k: two_shot_push(x, output, k.boxes),
    ("all_reduce", "two_shot_direct"): _two_shot_direct,
    ("all_reduce", "two_shot_copy"): _two_shot_copy,
    ("reduce_scatter", "push"): lambda x, output, k: reduce_scatter_push(x, output, k.boxes),
    ("all_gather", "push"): lambda x, output, k: all_gather_push(x, output, k.boxes),
    ("all_gather", "direct"): _all_gather_direct,
    ("all_gather", "copy"): _all_gather_copy,
}
