"""The groups of one rank and what they communicate through: made on all ranks or on none."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import torch.distributed as dist

from .algorithms import AlgorithmTable
from .backends import KernelCollectives, check_range_kind
from .calibration import calibrate
from .communicators import GroupCommunicators, JobContext
from .errors import GroupMember
from .group import GroupCoordinator
from .group_memory import CHANNEL_BYTES
from .group_steps import GroupSteps
from .kernels import MOST_RANKS
from .layout import AXES, ParallelLayout
from .memory import PeerChannel, SymmetricPool
from .process_groups import create_default_process_group
from .rendezvous import Launch

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["ALONE", "JobGroups"]

ALONE = "rank_alone"
"""The group of this rank alone, which comes with a layout, for what the layout doesn't have."""


class JobGroups:
    """Makes the groups of one rank, and closes them.

    Groups of the same ranks share their communicators; each has its own name and counters.

    Args:
        launch: this process's place in the job.
        job: what all groups share.

    Attributes:
        by_name: the groups; those of `create` too.
        communicators: by ranks, in the order of their making.
        range_kind: of the profiler ranges around all groups' calls; None for none.
    """

    def __init__(self, launch: Launch, job: JobContext) -> None:
        self.by_name: dict[str, GroupCoordinator] = {}
        self.communicators: dict[tuple[int, ...], GroupCommunicators] = {}
        self.range_kind = job.profiler_ranges
        self._launch = launch
        self._job = job
        self._steps = GroupSteps(launch, job.store, job.timeout_s)
        self._everyone = tuple(range(launch.world_size))
        self._reserved_bytes = 0  # of what layouts have reserved: for users
        self._page_bytes: int | None = None  # and for mailboxes and flags
        self._uses_kernels = job.tune != "nccl"
        self._tables: dict[int, AlgorithmTable] = {}  # measured ones, by group size
        self._unreleased: list[PeerChannel] = []

    # ---- collective among all ranks ---------------------------------------------------------

    def make_world(self) -> GroupCoordinator:
        """The group of all ranks."""
        member = GroupMember("world", self._everyone, self._launch.rank)
        with self._steps.together("world", member.ranks):
            default_group = None
            if self._launch.init_method is not None:
                default_group = create_default_process_group(
                    member.rank, member.world_size, self._job.store, self._job.timeout_s
                )
            self.communicators[self._everyone] = GroupCommunicators(
                member, self._job, self._steps.layout_name(self._everyone), default_group
            )
            return self._add(member)

    def begin_layout(self) -> Store:
        """Where all ranks meet while they make the next layout."""
        return self._steps.begin_layout()

    def lay_out(self, layout: ParallelLayout, reserved_bytes: int) -> None:
        """The groups of all axes, after `begin_layout`.

        Nothing that a closed layout was given may be under way any more, on any rank.
        """
        pool = self._job.symmetric_pool
        while self._unreleased and pool is not None:
            self._unreleased.pop().release_signals()
        made = {self._everyone}
        for axis, ranks in layout.groups_of(self._launch.rank).items():
            member = GroupMember(axis, ranks, self._launch.rank)
            if ranks in made or len(ranks) == 1:  # as on all other ranks
                self._add(member)
                continue
            made.add(ranks)
            with self._steps.together(axis, ranks):
                self._add(member)
        self._add(GroupMember(ALONE, (self._launch.rank,), self._launch.rank))
        if pool is not None:
            several = [ranks for ranks in made if 1 < len(ranks) <= MOST_RANKS]
            self._reserve(pool, reserved_bytes, len(several))
        self._enable_kernels()
        self._calibrate_all()
        if self._launch.rank == 0 and self._job.issues is not None:
            groups = [ranks for ranks in self.communicators if len(ranks) > 1]
            self._job.issues.log(self._job.topology(ranks) for ranks in groups)

    # ---- collective among the ranks of a group ----------------------------------------------

    def create(self, member: GroupMember) -> GroupCoordinator:
        """Another group, with all that groups have by now; or nothing of it stays."""
        ranks = member.ranks
        try:
            if ranks not in self.communicators:
                self.communicators[ranks] = self._complete_communicators(member)
            group = self._add(member)
            if self._uses_kernels and self._reserved_bytes and group.world_size > 1:
                group.enable_kernels()
                self._calibrate([group])
        except BaseException:  # also an interrupt
            self._remove([member.name])
            raise
        return group

    # ---- local ------------------------------------------------------------------------------

    def use_profiler_ranges(self, kind: str | None) -> None:
        """Ranges of this kind, also around calls of groups to come; None for none."""
        check_range_kind(kind, "kind", "profiler_ranges")
        self.range_kind = kind
        for group in list(self.by_name.values()):
            group.use_profiler_ranges(kind)

    def clear_layout(self) -> None:
        """Closes the groups of all axes, and what only they communicated through."""
        self._remove((*AXES, ALONE))
        for communicators in self.communicators.values():
            communicators.forget_adopted()
        for group in self.by_name.values():
            group.forget_device_group()

    def adopt_device_groups(self, mesh: DeviceMesh) -> None:
        """Takes a mesh's NCCL process groups for `device_group`s, instead of making more."""
        for axis in mesh.mesh_dim_names or ():
            group = mesh.get_group(axis)
            if "cuda:nccl" in dist.get_backend_config(group):
                self.communicators[self.by_name[axis].member.ranks].adopt_device_group(group)

    @property
    def has_unreleased(self) -> bool:
        """Whether the GPU has to be idle before the next `lay_out`."""
        return bool(self._unreleased)

    def close(self) -> None:
        """Closes all groups. Idempotent."""
        for group in self.by_name.values():
            group.close()
        for communicators in reversed(self.communicators.values()):
            communicators.close()

    def destroy_process_groups(self) -> None:
        """Ends what torch has of them, also without `close`. Idempotent."""
        for group in self.by_name.values():
            group.close()
        for communicators in self.communicators.values():
            communicators.destroy_process_groups()

    # ---- inside -----------------------------------------------------------------------------

    def _add(self, member: GroupMember) -> GroupCoordinator:
        ranks = member.ranks
        if ranks not in self.communicators:
            self.communicators[ranks] = GroupCommunicators(
                member, self._job, self._steps.layout_name(ranks)
            )
        self.communicators[ranks].serve(member.name)
        group = GroupCoordinator(member, self.communicators[ranks], self._job)
        group.use_profiler_ranges(self.range_kind)
        self.by_name[member.name] = group
        return group

    def _remove(self, names: Iterable[str]) -> None:
        """Closes those groups of these names that there are, and what only they used."""
        for name in names:
            group = self.by_name.pop(name, None)
            if group is not None:
                group.close()
                self.communicators[group.member.ranks].no_longer_serve(name)
        used = {self._everyone, *(group.member.ranks for group in self.by_name.values())}
        for ranks in [ranks for ranks in self.communicators if ranks not in used]:
            communicators = self.communicators.pop(ranks)
            communicators.close()
            if isinstance(communicators.channel, PeerChannel):
                self._unreleased.append(communicators.channel)

    def _complete_communicators(self, member: GroupMember) -> GroupCommunicators:
        """With windows of what there is already, and not before all ranks have made theirs."""
        name = self._steps.meet_members(member)
        communicators = GroupCommunicators(member, self._job, name)
        if member.world_size == 1:
            return communicators
        try:
            if communicators.windows is not None:
                communicators.windows.count_common()
                communicators.windows.register_common()
            # As in `GroupSteps.together`: none may close while another one still connects to it.
            communicators.wait_for_all()
        except BaseException:
            communicators.close()
            raise
        return communicators

    def _reserve(self, pool: SymmetricPool, num_bytes: int, num_groups: int) -> None:
        """Makes what is missing of the memory that was agreed on, and registers all there is."""
        # For one more than there are: `create_group` may make another one.
        page_bytes = (num_groups + 1) * CHANNEL_BYTES if num_groups and self._uses_kernels else 0
        needs_page = num_bytes > 0 and (self._page_bytes is None or page_bytes > self._page_bytes)
        slab_bytes = max(0, num_bytes - self._reserved_bytes) + (page_bytes if needs_page else 0)
        ordinal = None
        # What there is already first: then the slab gets the same number on all ranks.
        problem = self._problem_of(pool.register_common)
        try:
            if slab_bytes:
                if problem is None:
                    ordinal, problem = pool.make_initial_slab(slab_bytes)
                self._steps.pass_stage("symmetric/slab", problem)
                problem = self._problem_of(pool.register_new)
            self._steps.pass_stage("symmetric/windows", problem)
        except BaseException:
            if ordinal is not None:
                pool.drop_slab(ordinal)
            raise
        self._reserved_bytes = max(self._reserved_bytes, num_bytes)
        if needs_page:
            pool.cut_signal_page(page_bytes)  # on all ranks alike, whichever groups need it
            self._page_bytes = page_bytes

    def _problem_of(self, work: Callable[[], object]) -> str | None:
        """What goes wrong on this rank, which the others are told of."""
        try:
            work()
        except Exception as error:  # noqa: BLE001 - whatever it is, all ranks are told
            return str(error)
        return None

    def _enable_kernels(self) -> None:
        """Lets kernels run all groups' collectives, where there is memory for mailboxes."""
        if self._reserved_bytes == 0 or not self._uses_kernels:
            return

        def enable() -> None:
            for group in self.by_name.values():
                if group.world_size > 1:
                    group.enable_kernels()

        self._steps.pass_stage("symmetric/kernels", self._problem_of(enable))

    def _calibrate_all(self) -> None:
        if self._job.tune == "startup":
            problem = self._problem_of(lambda: self._calibrate(self.by_name.values()))
            self._steps.pass_stage("calibration", problem)

    def _calibrate(self, groups: Iterable[GroupCoordinator]) -> None:
        """Measures which algorithms are the fastest, if asked to, once for each size of a group."""
        if self._job.tune != "startup":
            return
        done: list[KernelCollectives] = []  # of groups of the same ranks
        for group in groups:
            if group.kernels is None or group.kernels in done:
                continue
            # Another group of this rank may have measured; what its first rank knows, holds.
            table = group.broadcast_object(self._tables.get(group.world_size))
            table = calibrate(group) if table is None else table
            self._tables[group.world_size] = table
            group.use_table(table)
            done.append(group.kernels)
