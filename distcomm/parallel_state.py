"""`init_distributed`: from a launch and a few sizes to the groups of this rank.

The one mutable state of this package is `_current`, the `ParallelState` in force.
"""

from __future__ import annotations

import atexit
import hashlib
import logging
import math
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from types import TracebackType

import torch

from . import env
from .agreement import Wish, agree_on_job
from .communicators import GroupCommunicators, JobContext
from .errors import (
    AlreadyInitializedError,
    ArgumentError,
    DistcommError,
    GroupClosedError,
    GroupMember,
    InitializationError,
    NotInitializedError,
)
from .group import GroupCoordinator
from .group_memory import GraphCapture, capture_stream
from .layout import ParallelLayout
from .memory import InactiveContext, MemoryContext, SuspendedContext, SymmetricPool
from .process_groups import (
    collective_errors,
    create_default_process_group,
    destroy_default_process_group,
)
from .rendezvous import Launch, find_launch, pass_stage
from .waiting import run_bounded

__all__ = [
    "ParallelState",
    "destroy_distributed",
    "get_attn_tp_group",
    "get_cp_group",
    "get_dp_group",
    "get_ep_group",
    "get_moe_tp_group",
    "get_parallel_state",
    "get_pp_group",
    "get_tp_group",
    "get_world_group",
    "graph_capture",
    "init_distributed",
    "is_initialized",
]

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
        self._job = job
        self._groups: dict[str, GroupCoordinator] = {}
        self._communicators: dict[tuple[int, ...], GroupCommunicators] = {}
        self._launch = launch
        self._owns_default_group = launch.init_method is not None
        self._built = False
        self._closed = False
        atexit.register(self._leave)
        try:
            self._build_groups()
            self._built = True
            self._reserve(reserved_bytes)
            self._log_known_issues()
        except RuntimeError as error:
            self.close()
            if isinstance(error, DistcommError):
                raise
            what = "building the process groups failed"
            raise InitializationError(what, {self.rank: str(error)}, rank=self.rank) from error

    @property
    def groups(self) -> dict[str, GroupCoordinator]:
        """All groups of this rank by name, also those of `create_group`."""
        return dict(self._groups)

    def create_group(self, name: str, ranks: Sequence[int]) -> GroupCoordinator:
        """Makes another group, of any ranks. Collective among `ranks` only.

        Args:
            name: a new name; the same on all members.
            ranks: global ranks in group order, the same on all members; this rank is one.

        Raises:
            ArgumentError: the name is taken, or `ranks` can't form a group.
            CollectiveError, SymmetricMismatchError: a member didn't come within the timeout.
            GroupClosedError: the state is closed.
        """
        if self._closed:
            raise GroupClosedError(f"create_group: the state is closed [rank {self.rank}]")
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
            return self._add_group(member)

    def close(self) -> None:
        """Closes all groups and what this state has made. Idempotent; every wait is bounded.

        Not collective, but no rank should still be in a collective. torch's default process
        group is destroyed if `init_distributed` made it.
        """
        global _current
        if self._closed:
            return
        self._closed = True
        atexit.unregister(self._leave)
        if _current is self:
            _current = None
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
        symmetric memory returns that contexts inside of captures have used whose graphs are gone.
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
        if self.symmetric_pool is None:
            return InactiveContext()
        return SuspendedContext(self.symmetric_pool)

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
        failure = pool.make_slab(num_bytes)
        self._pass("symmetric/slab", None if failure is None else str(failure))
        problem = None
        try:
            for communicators in self._communicators.values():
                if communicators.windows is not None:
                    communicators.windows.register_new()
        except DistcommError as error:
            problem = str(error)
        self._pass("symmetric/windows", problem)
        pool.heap.settle()  # what the probes of peer memory have used

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
            self._communicators[ranks] = self._registered_communicators(member)
        self._communicators[ranks].serve(member.name)
        group = GroupCoordinator(member, self._communicators[ranks], self._job)
        self._groups[member.name] = group
        return group

    def _registered_communicators(self, member: GroupMember) -> GroupCommunicators:
        """Made after initialization: with windows of what there is already."""
        communicators = GroupCommunicators(member, self._job, _unique_name(member.ranks))
        pool = self.symmetric_pool
        if self._built and communicators.windows is not None and pool is not None:
            try:
                communicators.windows.count_common()
                communicators.windows.register_common()
            except DistcommError:
                communicators.close()
                raise
        return communicators


_current: ParallelState | None = None


def init_distributed(  # noqa: PLR0913 - a launch and its sizes have that many parts
    tp: int = 1,
    cp: int = 1,
    pp: int = 1,
    dp: int = 1,
    ep: int = 1,
    *,
    cp_layout: str = "auto",
    order: str = "tp-cp-pp-dp",
    device: str = "auto",
    symmetric_reserve: int | str = "auto",
    verify_symmetric: bool = False,
    ignore_known_issues: Collection[str] = (),
    timeout: float | timedelta = 300.0,
    init_method: str | None = None,
    rank: int | None = None,
    world_size: int | None = None,
    local_rank: int | None = None,
) -> ParallelState:
    """Makes all groups of this rank. Collective among all ranks of the job.

    The ranks are found in torchrun's environment variables, in torch's default process group if
    there is one, or in `init_method`, `rank` and `world_size`.

    Args:
        tp, cp, pp, dp, ep: sizes of tensor, context, pipeline, data and expert parallelism.
        cp_layout: ``"inside_tp"``, ``"beside_tp"`` or ``"auto"``; see `ParallelLayout`.
        order: axes, fastest-varying first.
        device: ``"cuda"``, ``"cpu"``, or ``"auto"``: CUDA if every rank has a GPU of its own and
            can load NCCL, else CPU with gloo. Agreed by all ranks.
        symmetric_reserve: GPU memory to reserve and register for symmetric tensors: bytes, a text
            such as ``"4GiB"``, 0 for none, or ``"auto"``: 1 GiB, and at most 1/64 of the GPU.
            What doesn't fit later makes segments as needed, but not during CUDA graph captures.
        verify_symmetric: compares the buffers of every NCCL collective between ranks, and raises
            `SymmetricMismatchError` where they differ. Slow; for debugging.
        ignore_known_issues: names of known issues of NCCL versions to do nothing about, or
            ``("all",)``; see `distcomm.nccl.known_issues`.
        timeout: seconds that each step of initialization, each CPU collective and closing may
            take.
        init_method: where the ranks meet, e.g. ``"tcp://host:port"`` or ``"file:///path"``. A
            TCP store that rank 0 serves ends with the state: another initialization needs a new
            port. torchrun's store outlives it.
        rank, world_size: this process's global rank, and the number of processes.
        local_rank: index of this process on its host; chooses its GPU.

    Returns:
        The state, which the module-level getters read too. Close it with `destroy_distributed()`
        or a ``with`` block.

    Raises:
        AlreadyInitializedError: there is a state already.
        LaunchError: this process doesn't know its job.
        LayoutError: the sizes don't fit the world size.
        InitializationError: any rank failed, didn't come, or was given other arguments. It is
            raised on every rank and names the ranks. Nothing is left half-made.
    """
    global _current
    if _current is not None:
        raise AlreadyInitializedError(
            "init_distributed() was called before; call destroy_distributed() first "
            f"[rank {_current.rank}]"
        )
    timeout_s = _checked_timeout(timeout)
    launch = find_launch(init_method, rank, world_size, local_rank)
    wish = Wish(
        {"tp": tp, "cp": cp, "pp": pp, "dp": dp, "ep": ep},
        order,
        cp_layout,
        device,
        symmetric_reserve,
        ignore_known_issues,
        verify_symmetric or env.verifies_symmetric_memory(),
    )
    layout, job, reserved_bytes = agree_on_job(wish, launch, timeout_s)
    _current = ParallelState(layout, launch, job, reserved_bytes)
    return _current


def is_initialized() -> bool:
    """Whether there is a `ParallelState` in force."""
    return _current is not None


def destroy_distributed() -> None:
    """Closes the state in force, if there is one. Not collective; see `ParallelState.close`."""
    if _current is not None:
        _current.close()


def get_parallel_state() -> ParallelState:
    """The state in force.

    Raises:
        NotInitializedError: there is none. The getters below raise it too.
    """
    if _current is None:
        raise NotInitializedError("no groups yet: call init_distributed() first")
    return _current


@contextmanager
def graph_capture(
    stream: torch.cuda.Stream | None = None, *, symmetric: bool = False
) -> Iterator[GraphCapture]:
    """`GroupCoordinator.graph_capture` for all groups of the state in force."""
    with get_parallel_state().graph_capture(stream, symmetric=symmetric) as capture:
        yield capture


def get_world_group() -> GroupCoordinator:
    """The group of all ranks."""
    return get_parallel_state().world


def get_tp_group() -> GroupCoordinator:
    """This rank's tensor-parallel group."""
    return get_parallel_state().tp


def get_cp_group() -> GroupCoordinator:
    """This rank's context-parallel group."""
    return get_parallel_state().cp


def get_attn_tp_group() -> GroupCoordinator:
    """The ranks that share this rank's part of the sequence and split its attention heads."""
    return get_parallel_state().attn_tp


def get_pp_group() -> GroupCoordinator:
    """This rank's pipeline-parallel group."""
    return get_parallel_state().pp


def get_dp_group() -> GroupCoordinator:
    """This rank's data-parallel group."""
    return get_parallel_state().dp


def get_ep_group() -> GroupCoordinator:
    """This rank's expert-parallel group."""
    return get_parallel_state().ep


def get_moe_tp_group() -> GroupCoordinator:
    """The ranks that split the experts of this rank among them."""
    return get_parallel_state().moe_tp


def _checked_timeout(timeout: float | timedelta) -> float:
    seconds = timeout.total_seconds() if isinstance(timeout, timedelta) else timeout
    if not isinstance(seconds, int | float) or not 0 < seconds < math.inf:
        raise ArgumentError(
            "timeout", "a finite number of seconds > 0", repr(timeout), call="init_distributed"
        )
    return float(seconds)


def _unique_name(ranks: tuple[int, ...]) -> str:
    """A name for a set of ranks that is the same on all of them."""
    digest = hashlib.sha256(repr(ranks).encode()).hexdigest()
    return f"distcomm/{digest[:32]}"
