"""What one set of ranks communicates through; groups of the same ranks share it."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from .backends import KernelCollectives
from .call_order import CallOrder
from .errors import GroupClosedError, GroupMember
from .memory import ASLEEP, GroupWindows, PeerChannel, SymmetricPool
from .nccl import (
    FREE_S,
    KnownIssues,
    NcclLibrary,
    PyNcclCommunicator,
    Topology,
    note_destroy_under_way,
)
from .process_groups import create_process_group, destroy_process_group, forget_process_group
from .waiting import StillRunningError, run_bounded

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

__all__ = ["GroupCommunicators", "JobContext"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class JobContext:
    """What all groups of one `init_distributed` share.

    Attributes:
        device: this rank's device.
        local_rank: index of this process on its host.
        store: where ranks meet; private to this initialization.
        timeout_s: bound of every wait.
        nccl: the NCCL library; None in a CPU job.
        hosts: of each global rank, what NCCL takes for its host.
        gpu_memory: bytes of the smallest GPU of the job.
        gpu_names: of each global rank, its GPU's; none in a CPU job.
        issues: the known issues of that NCCL; None in a CPU job.
        symmetric_pool: this process's; None where there can't be one.
        no_symmetric: why there can't be one; the same on all ranks.
        verifies_symmetric: whether every collective's buffers are compared between ranks.
        tune, tables: which tables of algorithms there are, as `table_for` takes them; rank 0's.
        deterministic: whether reductions' bits may not depend on how much is reduced at once.
        profiler_ranges: the kind of ranges around calls at first; None for none. This rank's.
        call_order: what keeps collectives in compiled functions in their order.
    """

    device: torch.device
    local_rank: int
    store: Store
    timeout_s: float
    nccl: NcclLibrary | None
    hosts: Sequence[str] = ()
    gpu_memory: int = 0
    gpu_names: Sequence[str] = ()
    issues: KnownIssues | None = None
    symmetric_pool: SymmetricPool | None = None
    no_symmetric: str = "the job runs on CPU"
    verifies_symmetric: bool = False
    tune: str = "shipped"
    tables: Sequence[Mapping[str, Any]] = ()
    deterministic: bool = False
    profiler_ranges: str | None = None
    call_order: CallOrder = field(default_factory=CallOrder)

    def topology(self, ranks: Sequence[int]) -> Topology:
        """Where the ranks of a group are."""
        return Topology(len(ranks), len({self.hosts[rank] for rank in ranks}))


class GroupCommunicators:
    """The process groups and the PyNCCL communicator of one set of ranks.

    Construction is collective among the ranks. A single rank gets no communicator.

    Args:
        member: this rank's place.
        job: what all groups share.
        unique_name: the same on all ranks of the group, never used before in `job.store`.
        cpu_group: a gloo group of these ranks that exists already; it isn't destroyed here.

    Attributes:
        pynccl: the NCCL communicator; None on CPU and for a single rank.
        windows: its windows; None where there can't be any.
        channel: how kernels write into the ranks' memory, or why they can't; None at first.
        kernels: collectives by such kernels; None if there are none.
        no_kernels: why not, once it has been tried.
    """

    def __init__(
        self,
        member: GroupMember,
        job: JobContext,
        unique_name: str,
        cpu_group: dist.ProcessGroup | None = None,
    ) -> None:
        self._member = member
        self._job = job
        self._unique_name = unique_name
        self._owned: list[dist.ProcessGroup] = []
        self._cpu_group = cpu_group
        self._device_group: dist.ProcessGroup | None = None
        self._adopted: dist.ProcessGroup | None = None
        self._closed = False
        self._num_captures: Counter[str] = Counter()
        self.pynccl: PyNcclCommunicator | None = None
        self.windows: GroupWindows | None = None
        self.channel: PeerChannel | str | None = None
        self.kernels: KernelCollectives | None = None
        self.no_kernels: str | None = None
        self._sleeping_kernels: KernelCollectives | None = None
        if member.world_size == 1:
            return
        try:
            group = self.cpu_group
            if job.nccl is not None:
                self.pynccl = PyNcclCommunicator(
                    group,
                    job.device,
                    name=member.name,
                    nccl=job.nccl,
                    timeout_s=job.timeout_s,
                )
                self._prepare(self.pynccl)
        except BaseException:
            self.close()
            raise

    @property
    def ranks(self) -> tuple[int, ...]:
        """Global ranks, in group order."""
        return self._member.ranks

    @property
    def cpu_group(self) -> dist.ProcessGroup:
        """The gloo process group. That of a single rank is made when first asked for."""
        if self._cpu_group is None:
            self._cpu_group = self._create("gloo")
        return self._cpu_group

    @property
    def device_group(self) -> dist.ProcessGroup:
        """torch's own process group for the job's device; collective when first asked for.

        In a CUDA job an NCCL process group, which costs hundreds of MB of GPU memory; in a CPU
        job the `cpu_group`.
        """
        if self._job.device.type == "cpu":
            return self.cpu_group
        if self._device_group is None:
            group = self._adopted or self._create("nccl")
            if self._member.world_size > 1:
                # Connects all ranks now: torch's point-to-point calls would connect two of them.
                dist.all_reduce(torch.ones(1, device=self._job.device), group=group)
            self._device_group = group
        return self._device_group

    def adopt_device_group(self, group: dist.ProcessGroup) -> None:
        """Takes the caller's NCCL process group of these ranks for the `device_group` of a CUDA
        job. It isn't destroyed here. Local."""
        self._adopted = group

    def forget_adopted(self) -> None:
        """Undoes `adopt_device_group`: the next `device_group` is made here. Local."""
        if self._device_group is self._adopted:
            self._device_group = None
        self._adopted = None

    def wait_for_all(self) -> None:
        """Waits on the host until all ranks have come. Collective.

        Raises:
            RuntimeError: one didn't within the timeout; that of the group's first rank names all
                who didn't.
        """
        timeout = timedelta(seconds=self._job.timeout_s)
        dist.monitored_barrier(self.cpu_group, timeout, wait_all_ranks=True)

    def serve(self, name: str) -> None:
        """Takes in another group of the same ranks; NCCL's errors will name all groups served."""
        names = self._member.name.split("/")
        if name not in names:
            self._member = replace(self._member, name="/".join([*names, name]))
            if self.pynccl is not None:
                self.pynccl.member = self._member

    def no_longer_serve(self, name: str) -> None:
        """Undoes `serve`, unless it is the only one."""
        names = [each for each in self._member.name.split("/") if each != name]
        if names:
            self._member = replace(self._member, name="/".join(names))
            if self.pynccl is not None:
                self.pynccl.member = self._member

    def next_capture(self, name: str) -> int:
        """Counts a capture of the group `name`, also if there was another one of that name."""
        self._num_captures[name] += 1
        return self._num_captures[name]

    def note_capture(self, *tensors: torch.Tensor | None) -> None:
        """A CUDA graph captures a collective of these tensors, whose windows have to stay then."""
        pool, windows = self._job.symmetric_pool, self.windows
        if pool is None or windows is None:
            return
        if any(tensor is not None and windows.is_symmetric(tensor) for tensor in tensors):
            pool.routing.note_current_capture()

    @property
    def is_asleep(self) -> bool:
        """Whether windows or kernels are away until `wake_up`; on all ranks alike, unless a call
        was broken off."""
        channel = self.channel
        return (
            (self.windows is not None and self.windows.unsupported == ASLEEP)
            or (isinstance(channel, PeerChannel) and channel.problem == ASLEEP)
            or self._sleeping_kernels is not None
        )

    def fall_asleep(self) -> str | None:
        """Ends windows and all that writes to peers' memory, until `wake_up`; or why not. Local.

        Collectives go on, through NCCL. Nothing may be under way, on any rank. Idempotent.
        """
        if self.windows is None:
            return None
        self.pause_kernels()
        return self.windows.fall_asleep()

    def pause_kernels(self) -> None:
        """Nothing writes to peers' memory until `wake_up`. Local; idempotent."""
        if self.kernels is not None:
            self._sleeping_kernels, self.kernels = self.kernels, None
        if isinstance(self.channel, PeerChannel):
            self.channel.pause()

    def wake_up(self) -> None:
        """Undoes `fall_asleep`, with memory in place again. Collective among the group's ranks.

        After an error kernels are paused, and the call may be repeated, on all ranks alike.

        Raises:
            SymmetricMismatchError: a rank didn't come, or NCCL didn't register on all.
            SymmetricMemoryError, torch.OutOfMemoryError: kernels can't go on.
        """
        if self.windows is None:
            return
        self.windows.wake_up()
        if isinstance(self.channel, PeerChannel):
            self.channel.reopen()
        if self._sleeping_kernels is not None:
            self._sleeping_kernels.reopen()
            self.kernels, self._sleeping_kernels = self._sleeping_kernels, None

    def give_up(self, what: str) -> None:
        """For good, as it has failed on one of the ranks. Local.

        Args:
            what: ``"windows"``, which could not be ended or registered again, or ``"nccl"``, which
                could not be suspended or resumed.
        """
        reason = f"its {what} could not sleep or wake up on all ranks"
        self.pause_kernels()
        if self._sleeping_kernels is not None:
            self._sleeping_kernels, self.no_kernels = None, reason
        if self.windows is not None and self.windows.unsupported in (None, ASLEEP):
            self.windows.unsupported = reason
        if self.pynccl is not None and what == "nccl":
            self.pynccl.break_off(reason)

    @property
    def why_not_suspended(self) -> str | None:
        """Why NCCL's own buffers stay; None if they can go. Local: ranks have to compare."""
        comm = self.pynccl
        if comm is None:
            return "it has no NCCL communicator"
        if not comm.nccl.supports("comm_suspend"):
            return f"NCCL {comm.nccl.version_text} can't suspend it; 2.29.7 and newer can"
        if self.windows is not None and self.windows.unsupported is None:
            return "it has windows of symmetric memory, which sleep(symmetric=True) ends"
        return comm.why_unusable

    def close(self) -> None:
        """Closes everything that was made here. Idempotent; bounded by the timeout."""
        if self._closed:
            return
        self._closed = True
        if self.windows is not None and self._job.symmetric_pool is not None:
            self._job.symmetric_pool.remove_group(self.windows)
        if self.pynccl is not None:
            self.pynccl.close()
        self.destroy_process_groups()

    def destroy_process_groups(self) -> None:
        """Destroys the process groups that were made here, and forgets all. Idempotent; local.

        One that CUDA graphs have captured is destroyed once they are gone; a thread waits for that.
        """
        while self._owned:
            group = self._owned.pop()
            try:
                run_bounded(
                    partial(self._destroy, group), timeout_s=FREE_S, what="destroy_process_group"
                )
            except StillRunningError as error:
                forget_process_group(group)
                note_destroy_under_way(error.thread)
                logger.warning(
                    "close: %s, probably because a CUDA graph that captured torch's collectives is "
                    "alive; the process group ends when that graph does [%s]",
                    error,
                    self._member,
                )
        # A process group ends its threads when the last reference goes. One that outlives this
        # one, say in a traceback, would still have them when the interpreter shuts down.
        self._cpu_group = self._device_group = self._adopted = None

    def _destroy(self, group: dist.ProcessGroup) -> None:
        if self._job.device.type == "cuda":
            torch.cuda.set_device(self._job.device)  # else the new thread is on device 0
        destroy_process_group(group)

    def meeting_store(self, purpose: str) -> Store:
        """Where these ranks, and no others, can meet."""
        return c10d.PrefixStore(f"{self._unique_name}/{purpose}", self._job.store)

    def _prepare(self, comm: PyNcclCommunicator) -> None:
        """Works around what is known of this NCCL, and gives the group its windows. Local."""
        job = self._job
        if job.issues is not None:
            issue = job.issues.strictest("symmetric_capture", job.topology(self._member.ranks))
            if issue is not None and issue.action == "fence":
                comm.fence_captures()
        if job.symmetric_pool is not None:
            self.windows = GroupWindows(
                job.symmetric_pool.heap,
                comm,
                self.meeting_store("windows"),
                job.timeout_s,
                job.symmetric_pool.routing.renew,
            )
            job.symmetric_pool.add_group(self.windows)

    def _create(self, backend: str) -> dist.ProcessGroup:
        if self._closed:
            raise GroupClosedError(f"the group is closed [{self._member}]")
        group = create_process_group(
            backend,
            self._member,
            store=self._job.store,
            unique_name=f"{self._unique_name}/{backend}",
            timeout_s=self._job.timeout_s,
        )
        self._owned.append(group)
        return group
