"""`ParallelState`: all groups of this rank, made together and closed together."""

from __future__ import annotations

import atexit
import hashlib
import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import TracebackType

import torch
from torch.distributed import distributed_c10d as c10d

from .algorithms import AlgorithmTable
from .backends import KernelCollectives
from .calibration import calibrate
from .communicators import GroupCommunicators, JobContext
from .errors import (
    ArgumentError,
    DistcommError,
    GroupClosedError,
    GroupMember,
    InitializationError,
    SleepError,
)
from .group import GroupCoordinator
from .group_memory import CHANNEL_BYTES, GraphCapture, capture_stream
from .kernels import MOST_RANKS
from .layout import ParallelLayout
from .memory import ASLEEP, MemoryContext, SymmetricPool
from .process_groups import (
    collective_errors,
    create_default_process_group,
    destroy_default_process_group,
)
from .rendezvous import Launch, pass_stage
from .sleep_steps import SleepSteps
from .waiting import run_bounded

__all__ = ["ParallelState"]

logger = logging.getLogger(__name__)

# gloo tries this much longer than its timeout to connect to a rank that has failed.
_GIVING_UP_S = 10.0


class ParallelState:
    """All groups of this rank. Made by `init_distributed`; a context manager that closes them.

    Groups of the same ranks share their communicators; each has its own name and counters.

    Attributes:
        layout: which ranks form which groups.
        rank, world_size, local_rank, device: this process's place.
        world, tp, cp, attn_tp, pp, dp, ep, moe_tp: the groups.
        symmetric_pool: this process's symmetric memory; None where there can't be any.
        sleep_steps: how the ranks fall asleep and wake up in step.
    """

    world: GroupCoordinator
    tp: GroupCoordinator
    cp: GroupCoordinator
    attn_tp: GroupCoordinator
    pp: GroupCoordinator
    dp: GroupCoordinator
    ep: GroupCoordinator
    moe_tp: GroupCoordinator

    def __init__(
        self, layout: ParallelLayout, launch: Launch, job: JobContext, reserved_bytes: int = 0
    ) -> None:
        self.layout = layout
        self.rank = launch.rank
        self.world_size = launch.world_size
        self.local_rank = job.local_rank
        self.device = job.device
        self.symmetric_pool: SymmetricPool | None = job.symmetric_pool
        self.sleep_steps = SleepSteps(
            c10d.PrefixStore("sleep", job.store), launch.rank, launch.world_size, job.timeout_s
        )
        self._job = job
        self._groups: dict[str, GroupCoordinator] = {}
        self._communicators: dict[tuple[int, ...], GroupCommunicators] = {}
        self._launch = launch
        self._owns_default_group = launch.init_method is not None
        self._reserved_bytes = reserved_bytes
        self._uses_kernels = job.tune != "nccl"
        self._tables: dict[int, AlgorithmTable] = {}  # measured ones, by group size
        self._built = False
        self._closed = False
        atexit.register(self._leave)
        try:
            self._build_groups()
            self._built = True
            self._reserve(reserved_bytes)
            self._enable_kernels()
            self._calibrate(self._groups.values())
            self._log_known_issues()
        except RuntimeError as error:
            self.close()
            if isinstance(error, DistcommError):
                raise
            what = "building the process groups failed"
            raise InitializationError(what, {self.rank: str(error)}, rank=self.rank) from error

    @property
    def closed(self) -> bool:
        return self._closed

    @property
    def groups(self) -> dict[str, GroupCoordinator]:
        """All groups of this rank by name, also those of `create_group`."""
        return dict(self._groups)

    @property
    def communicators(self) -> list[GroupCommunicators]:
        """What the groups communicate through, each once, in the order of their making."""
        return list(self._communicators.values())

    def wait_for_device(self) -> None:
        """Waits for all work that this rank's GPU has been given; bounded by the timeout.

        Raises:
            SleepError: it takes longer.
        """

        def wait() -> None:
            torch.cuda.synchronize(self.device)

        try:
            run_bounded(wait, timeout_s=self._job.timeout_s, what="the work under way")
        except TimeoutError as error:
            raise SleepError(f"{error} [rank {self.rank}, {self.device}]") from error

    def create_group(self, name: str, ranks: Sequence[int]) -> GroupCoordinator:
        """Makes another group, of any ranks. Collective among `ranks` only; returns on none of them
        before all have made it.

        Args:
            name: a new name; the same on all members.
            ranks: global ranks in group order, the same on all members; this rank is one.

        Raises:
            ArgumentError: the name is taken, or `ranks` can't form a group.
            CollectiveError, SymmetricMismatchError: a member didn't come within the timeout.
            GroupClosedError: the state is closed.
            SleepError: the symmetric memory is asleep.
        """
        if self._closed:
            raise GroupClosedError(f"create_group: the state is closed [rank {self.rank}]")
        if self.symmetric_pool is not None and self.symmetric_pool.asleep:
            raise SleepError(f"create_group: {ASLEEP}: wake_up() first [rank {self.rank}]")
        if name in self._groups:
            raise ArgumentError(
                "name", "a new group name", f"{name!r} [rank {self.rank}]", call="create_group"
            )
        valid = all(type(r) is int and 0 <= r < self.world_size for r in ranks)
        if not valid or len(set(ranks)) != len(ranks) or self.rank not in ranks:
            raise ArgumentError(
                "ranks",
                f"distinct ranks from 0 to {self.world_size - 1}, the caller's among them",
                f"{list(ranks)} [rank {self.rank}]",
                call="create_group",
            )
        member = GroupMember(name, tuple(ranks), self.rank)
        with collective_errors("create_group", member):
            group = self._add_group(member)
            if self._uses_kernels and self._reserved_bytes and group.world_size > 1:
                group.enable_kernels()
                self._calibrate([group])
            return group

    def close(self) -> None:
        """Closes all groups and what this state has made. Idempotent; every wait is bounded.

        Not collective, but no rank should still be in a collective. torch's default process
        group is destroyed if `init_distributed` made it.
        """
        if self._closed:
            return
        self._closed = True
        atexit.unregister(self._leave)
        for group in self._groups.values():
            group.close()
        for communicators in reversed(self._communicators.values()):
            communicators.close()
        if self.symmetric_pool is not None:
            self._close_pool(self.symmetric_pool)
        self._end_process_groups()

    def describe(self) -> str:
        """The layout and what this rank runs on, as text."""
        nccl = self._job.nccl
        runs_on = f"NCCL {nccl.version_text} ({nccl.path})" if nccl else "gloo"
        return (
            f"{self.layout}\nrank {self.rank}: device {self.device}, local rank "
            f"{self.local_rank}, {runs_on}"
        )

    def __enter__(self) -> ParallelState:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @contextmanager
    def graph_capture(
        self, stream: torch.cuda.Stream | None = None, *, symmetric: bool = False
    ) -> Iterator[GraphCapture]:
        """`GroupCoordinator.graph_capture` for all groups of this rank. Collective among all.

        At the end, each group's members compare what they have captured in it. At the start, the
        symmetric memory of captured graphs returns that are gone on all ranks.
        """
        for group in self._groups.values():
            group.count_capture()
        if self.symmetric_pool is not None:
            self.symmetric_pool.settle(self.world_size)
        with ExitStack() as stack:
            capture = stack.enter_context(capture_stream(self._job, stream, symmetric))
            for group in self._groups.values():
                stack.enter_context(group.capturing())
            yield capture

    def suspend_symmetric_memory(self) -> MemoryContext:
        """A ``with`` block whose new tensors are ordinary memory, whatever contexts it is in."""
        return self.world.suspend_symmetric_memory()

    def _close_pool(self, pool: SymmetricPool) -> None:
        """Bounded, as freeing memory waits for the device, where a dead rank's peers may hang."""

        def close() -> None:
            torch.cuda.set_device(self.device)
            pool.close()

        try:
            run_bounded(close, timeout_s=self._job.timeout_s, what="freeing symmetric memory")
        except TimeoutError as error:
            logger.warning("close: %s [rank %d]", error, self.rank)

    def _leave(self) -> None:
        """All that a process which exits without closing needs. What NCCL holds ends with it."""
        if self.symmetric_pool is not None:
            self.symmetric_pool.shut_down()
        self._end_process_groups()

    def _end_process_groups(self) -> None:
        """Their threads must not run when the interpreter shuts down: it aborts the process."""
        for group in self._groups.values():
            group.close()
        for communicators in self._communicators.values():
            communicators.destroy_process_groups()
        if self._owns_default_group:
            destroy_default_process_group()

    def _build_groups(self) -> None:
        everyone = tuple(range(self.world_size))
        with self._together("world", everyone):
            self._communicators[everyone] = self._world_communicators(everyone)
            self.world = self._add_group(GroupMember("world", everyone, self.rank))
        for axis, ranks in self.layout.groups_of(self.rank).items():
            with self._together(axis, ranks):
                setattr(self, axis, self._add_group(GroupMember(axis, ranks, self.rank)))

    def _reserve(self, num_bytes: int) -> None:
        """Makes the slab that was agreed on and registers it, on all ranks or on none."""
        pool = self.symmetric_pool
        if pool is None or num_bytes == 0:
            return
        several = [ranks for ranks in self._communicators if 1 < len(ranks) <= MOST_RANKS]
        # For one more than there are: `create_group` may make another one.
        room = (len(several) + 1) * CHANNEL_BYTES if several and self._uses_kernels else 0
        failure = pool.make_slab(num_bytes + room)
        self._pass("symmetric/slab", None if failure is None else str(failure))
        problem = None
        try:
            for communicators in self._communicators.values():
                if communicators.windows is not None:
                    communicators.windows.register_new()
        except DistcommError as error:
            problem = str(error)
        self._pass("symmetric/windows", problem)
        pool.cut_signal_page(room)  # on all ranks alike, whichever groups need it

    def _enable_kernels(self) -> None:
        """Lets kernels run all groups' collectives, where there is memory for mailboxes."""
        if self._reserved_bytes == 0 or not self._uses_kernels:
            return
        problem = None
        try:
            for group in self._groups.values():
                if group.world_size > 1:
                    group.enable_kernels()
        except DistcommError as error:
            problem = str(error)
        self._pass("symmetric/kernels", problem)

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

    def _log_known_issues(self) -> None:
        if self.rank == 0 and self._job.issues is not None:
            several = [ranks for ranks in self._communicators if len(ranks) > 1]
            self._job.issues.log(self._job.topology(ranks) for ranks in several)

    def _world_communicators(self, everyone: tuple[int, ...]) -> GroupCommunicators:
        default_group = None
        if self._owns_default_group:
            default_group = create_default_process_group(
                self.rank, self.world_size, self._job.store, self._job.timeout_s
            )
        member = GroupMember("world", everyone, self.rank)
        return GroupCommunicators(member, self._job, _unique_name(everyone), default_group)

    @contextmanager
    def _together(self, axis: str, ranks: tuple[int, ...]) -> Iterator[None]:
        """The body makes the group of `axis`: on all ranks, or it fails on all of them.

        No rank goes on before all have made theirs, so that none can close while another one
        still connects to it.
        """
        if ranks in self._communicators or len(ranks) == 1:
            yield
            return
        failure = None
        try:
            yield
        except RuntimeError as error:
            failure = f"making the {axis} group failed: {error}"
        self._pass(f"groups/{axis}", failure)

    def _pass(self, stage: str, failure: str | None) -> None:
        """All ranks get past a stage of initialization, or all raise the same error."""
        wait_s = 2 * self._job.timeout_s + _GIVING_UP_S
        pass_stage(self._job.store, self._launch, stage, failure, wait_s)

    def _add_group(self, member: GroupMember) -> GroupCoordinator:
        ranks = member.ranks
        if ranks not in self._communicators:
            self._communicators[ranks] = self._new_communicators(member)
        self._communicators[ranks].serve(member.name)
        group = GroupCoordinator(member, self._communicators[ranks], self._job)
        self._groups[member.name] = group
        return group

    def _new_communicators(self, member: GroupMember) -> GroupCommunicators:
        """During initialization its stages do the rest. Later they come with windows of what there
        is already, and not before all ranks have made theirs."""
        communicators = GroupCommunicators(member, self._job, _unique_name(member.ranks))
        if not self._built or member.world_size == 1:
            return communicators
        try:
            if communicators.windows is not None and self.symmetric_pool is not None:
                communicators.windows.count_common()
                communicators.windows.register_common()
            # As in `_together`: none may close while another one still connects to it.
            communicators.wait_for_all()
        except RuntimeError:
            communicators.close()
            raise
        return communicators


def _unique_name(ranks: tuple[int, ...]) -> str:
    """A name for a set of ranks that is the same on all of them."""
    digest = hashlib.sha256(repr(ranks).encode()).hexdigest()
    return f"distcomm/{digest[:32]}"
