"""`ParallelState`: all groups of this rank, made together and closed together."""

from __future__ import annotations

import atexit
import logging
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from types import TracebackType
from typing import TYPE_CHECKING

import torch
from torch.distributed import distributed_c10d as c10d
from torch.distributed.device_mesh import DeviceMesh

from .agreement import LayoutWish, agree_on_layout
from .communicators import GroupCommunicators, JobContext
from .describe import describe_job
from .errors import (
    AlreadyInitializedError,
    ArgumentError,
    DistcommError,
    GroupClosedError,
    GroupMember,
    NotInitializedError,
    SleepError,
)
from .group import GroupCoordinator
from .group_memory import GraphCapture, capture_stream
from .job_groups import ALONE, JobGroups
from .layout import AXES, ParallelLayout
from .memory import ASLEEP, MemoryContext, SymmetricPool
from .mesh import make_device_mesh
from .process_groups import building_errors, collective_errors, destroy_default_process_group
from .rendezvous import Launch
from .sleep_steps import SleepSteps
from .waiting import run_bounded

__all__ = ["ParallelState"]

logger = logging.getLogger(__name__)

_LAID_OUT = ("layout", *AXES, ALONE)


class ParallelState:
    """All groups of this rank. Made by `init_distributed`; a context manager that closes them.

    It begins with the group of all ranks; `lay_out` makes the others. Until then, and after
    `clear_layout`, asking for them or for `layout` raises `NotInitializedError`.

    Groups of the same ranks share their communicators; each has its own name and counters.

    Attributes:
        layout: which ranks form which groups.
        rank, world_size, local_rank, device: this process's place.
        hosts: of each global rank, a name of the host that it is on.
        world, tp, cp, attn_tp, pp, dp, ep, moe_tp: the groups.
        rank_alone: a group of this rank, which is not in `groups`.
        symmetric_pool: this process's symmetric memory; None where there can't be any.
        sleep_steps: how the ranks fall asleep and wake up in step.
    """

    layout: ParallelLayout
    world: GroupCoordinator
    tp: GroupCoordinator
    cp: GroupCoordinator
    attn_tp: GroupCoordinator
    pp: GroupCoordinator
    dp: GroupCoordinator
    ep: GroupCoordinator
    moe_tp: GroupCoordinator
    rank_alone: GroupCoordinator

    def __init__(self, launch: Launch, job: JobContext) -> None:
        """Makes the group of all ranks. Collective among all ranks of the job."""
        self.rank = launch.rank
        self.world_size = launch.world_size
        self.local_rank = job.local_rank
        self.device = job.device
        self.hosts = tuple(job.hosts)
        self.symmetric_pool: SymmetricPool | None = job.symmetric_pool
        self.sleep_steps = SleepSteps(
            c10d.PrefixStore("sleep", job.store), launch.rank, launch.world_size, job.timeout_s
        )
        self._job = job
        self._launch = launch
        self._groups = JobGroups(launch, job)
        self._closed = False
        atexit.register(self._leave)
        try:
            with building_errors(self.rank):
                self.world = self._groups.make_world()
        except BaseException:  # also an interrupt: nothing is left half-made
            self.close()
            raise

    def lay_out(
        self, wish: LayoutWish, *, agreed: bool = False, problem: DistcommError | None = None
    ) -> None:
        """Makes the groups of all axes. Collective among all ranks of the job: on all, or on none.

        Symmetric memory that an earlier layout has reserved is used again; what is missing is
        reserved.

        Args:
            wish: the same on all ranks.
            agreed: whether they have compared it already.
            problem: what is wrong with the wish on this rank: raised here, and the others are told.

        Raises:
            AlreadyInitializedError: there is a layout; see `clear_layout`.
            GroupClosedError: the state is closed.
            LayoutError, ArgumentError: the wish can't be had.
            SleepError: the symmetric memory is asleep, or the GPU doesn't come to an end with what
                an earlier layout was given.
            InitializationError: any rank failed, didn't come, or wishes something else. It is
                raised on every rank and names the ranks.
        """
        if self._closed:
            raise GroupClosedError(f"lay_out: the state is closed [rank {self.rank}]")
        if self.is_laid_out:
            raise AlreadyInitializedError(
                f"there are groups already: call destroy_model_parallel() first [rank {self.rank}]"
            )
        if agreed:
            self._groups.begin_layout()
        else:
            problem = self._why_not_now() or problem
            begin = self._groups.begin_layout
            agree_on_layout(wish, self._launch, begin, problem, self._job.timeout_s)
        layout = wish.layout(self.world_size)
        if self.rank == 0 and wish.cp_layout == "auto" and layout.cp > 1:
            logger.info("cp_layout='auto' is %s for %d ranks", layout.cp_layout, self.world_size)
        try:
            with building_errors(self.rank):
                self._groups.lay_out(layout, wish.reserved_bytes(self._job))
                if wish.mesh is not None:
                    self._groups.adopt_device_groups(wish.mesh)
        except BaseException:
            self._groups.clear_layout()
            raise
        self.layout = layout
        for name in (*AXES, ALONE):
            setattr(self, name, self._groups.by_name[name])

    def clear_layout(self) -> None:
        """Closes the groups of all axes, and what only they communicated through. Idempotent.

        All ranks have to call it at the same point, although it doesn't wait for them; no rank
        should still be in a collective. CUDA graphs that have captured these groups' collectives
        can't be replayed any more. What stays: `world`, the groups of `create_group`, and the
        symmetric memory.
        """
        if self._closed or not self.is_laid_out:
            return
        for name in _LAID_OUT:
            delattr(self, name)
        self._groups.clear_layout()

    @property
    def is_laid_out(self) -> bool:
        """Whether there are groups of axes."""
        return "layout" in self.__dict__

    @property
    def closed(self) -> bool:
        return self._closed

    @property
    def groups(self) -> dict[str, GroupCoordinator]:
        """All groups of this rank by name, also those of `create_group`."""
        by_name = self._groups.by_name
        return {name: group for name, group in by_name.items() if name != ALONE}

    def find_group(self, name: str) -> GroupCoordinator | None:
        """One of `groups`, or `rank_alone`; None if there is none of that name."""
        return self._groups.by_name.get(name)

    @property
    def communicators(self) -> list[GroupCommunicators]:
        """What the groups communicate through, each once, in the order of their making."""
        return list(self._groups.communicators.values())

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
            name: a new name, none of an axis nor "rank_alone"; the same on all members.
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
        if name in (*AXES, ALONE) or name in self._groups.by_name:
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
            return self._groups.create(member)

    def device_mesh(self, *axes: str) -> DeviceMesh:
        """A torch `DeviceMesh` with a dim for each axis, whose process groups are these groups'
        `device_group`s: for DTensor, FSDP, pipelines and other code of torch's.

        Collective among all ranks of the job where a `device_group` is made: on GPUs each is a
        communicator of torch's own beside ours, because torch's NCCL process group takes none from
        outside; or it came with the mesh of `init_distributed(mesh=...)`. On CPU it is our own.

        If `axes` don't have all ranks together, the mesh has those that this rank has to do with.
        Slice one mesh rather than make several: torch wants meshes that are used together to come
        from one. Groups that torch makes when a mesh is flattened are torch's own. The mesh is dead
        once its groups are closed, by `close`, `clear_layout` or `destroy_distributed`.

        Args:
            axes: distinct ones of tp, cp, attn_tp, pp, dp, ep, moe_tp and world that lie side by
                side, outermost dim first. Inside tp lie ep and moe_tp, and, with cp_layout
                ``"inside_tp"``, cp and attn_tp.

        Raises:
            ArgumentError: `axes` don't; the message says which do.
            GroupClosedError: the state is closed.
            NotInitializedError: there is no layout yet.
        """
        if self._closed:
            raise GroupClosedError(f"device_mesh: the state is closed [rank {self.rank}]")
        return make_device_mesh(self.layout, self._groups.by_name, axes)

    def close(self) -> None:
        """Closes all groups and what this state has made. Idempotent; every wait is bounded.

        Not collective, but no rank should still be in a collective. torch's default process
        group is destroyed if `init_distributed` made it.
        """
        if self._closed:
            return
        self._closed = True
        atexit.unregister(self._leave)
        self._groups.close()
        if self.symmetric_pool is not None:
            self._close_pool(self.symmetric_pool)
        self._end_process_groups()

    def describe(self) -> str:
        """The layout, what this rank and its groups run on and why, as text. Local; also after
        `close()`."""
        return describe_job(
            self.rank,
            self._job,
            self.layout if self.is_laid_out else None,
            self.groups,
            closed=self._closed,
            ranges=self._groups.range_kind,
        )

    def profiler_ranges(self, kind: str | None) -> AbstractContextManager[object]:
        """Puts each call of all groups in a profiler range, from now on; local.

            with state.profiler_ranges("record_function"), torch.profiler.profile() as profile:
                ...

        A range has the call, the group, the bytes of its tensor argument and the backend or the
        algorithm for a name: ``distcomm.all_reduce tp 16384 B two_shot_push``. It is the call on
        the host, of whatever thread: not the work on the GPU, nor replays of a CUDA graph.

        Args:
            kind: ``"record_function"`` for torch's profiler, ``"nvtx"`` for Nsight Systems, or None
                for none, as at first, unless ``DISTCOMM_PROFILER_RANGES`` says so; calls then cost
                nothing more.

        Returns:
            What can be used as a ``with`` block, at whose end ranges are as before.

        Raises:
            ArgumentError: there is no such kind, or this torch has no NVTX.
        """
        before = self._groups.range_kind
        self._groups.use_profiler_ranges(kind)
        block = ExitStack()
        block.callback(self._groups.use_profiler_ranges, before)
        return block

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
        groups = list(self._groups.by_name.values())
        for group in groups:
            group.count_capture()
        if self.symmetric_pool is not None:
            self.symmetric_pool.settle(self.world_size)
        with ExitStack() as stack:
            capture = stack.enter_context(capture_stream(self._job, stream, symmetric))
            for group in groups:
                stack.enter_context(group.capturing())
            yield capture

    def suspend_symmetric_memory(self) -> MemoryContext:
        """A ``with`` block whose new tensors are ordinary memory, whatever contexts it is in."""
        return self.world.suspend_symmetric_memory()

    # ---- inside -----------------------------------------------------------------------------

    if not TYPE_CHECKING:  # else every name would be one

        def __getattr__(self, name: str) -> GroupCoordinator:
            if name in _LAID_OUT and not self._closed:
                raise NotInitializedError(
                    f"{name}: only the world group is there yet: call initialize_model_parallel() "
                    f"first [rank {self.rank}]"
                )
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def _why_not_now(self) -> DistcommError | None:
        """What is in the way of another layout on this rank."""
        if self.symmetric_pool is not None and self.symmetric_pool.asleep:
            return SleepError(f"lay_out: {ASLEEP}: wake_up() first [rank {self.rank}]")
        if self._groups.has_unreleased:  # peers write to memory that other groups will have
            try:
                self.wait_for_device()
            except SleepError as error:
                return error
        return None

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
        self._groups.destroy_process_groups()
        if self._launch.init_method is not None:
            destroy_default_process_group()
