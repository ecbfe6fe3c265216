"""`sleep` and `wake_up`: what a process can do without for a while, on all ranks or on none."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from .communicators import GroupCommunicators
from .errors import ArgumentError, DistcommError, SleepError
from .memory import SleepablePool, Slept, sleepable_pools
from .parallel_state import get_parallel_state, is_initialized
from .sleep_steps import SleepSteps
from .state import ParallelState

__all__ = ["SleepReport", "sleep", "wake_up"]


@dataclass
class SleepReport:
    """What `sleep` has given back on this rank.

    Attributes:
        pools: what each sleepable pool has.
        symmetric_bytes: symmetric memory.
        communicators: GPU memory of NCCL's own, in bytes, by the name of the group.
        awake: what stays awake, and why: ``"symmetric memory"``, and communicators by name.
    """

    pools: dict[SleepablePool, Slept] = field(default_factory=dict)
    symmetric_bytes: int = 0
    communicators: dict[str, int] = field(default_factory=dict)
    awake: dict[str, str] = field(default_factory=dict)

    @property
    def freed_bytes(self) -> int:
        """All of it."""
        of_pools = sum(slept.freed_bytes for slept in self.pools.values())
        return of_pools + self.symmetric_bytes + sum(self.communicators.values())


def sleep(
    offload_tags: Sequence[str] = (),
    *,
    tags: Sequence[str] | None = None,
    symmetric: bool = False,
) -> SleepReport:
    """Puts all sleepable pools of the process to sleep, and what else can. Collective among all
    ranks of the job, if there is one: all fall asleep, or none.

    Waits for the device. Communicators give back NCCL's own buffers where NCCL can do that (2.29.7
    and newer) and they have no windows; they raise `SleepError` until they are woken up. All
    others go on working. What is asleep already stays as it is.

    Args:
        offload_tags: as for `SleepablePool.sleep`; each pool takes those that it knows.
        tags: likewise.
        symmetric: also gives the symmetric memory back, whose content is lost. All windows end;
            `wake_up` registers them again. No CUDA graph may be alive that was captured with
            symmetric tensors or with collectives that write to their peers' memory. Until then
            collectives take the ordinary path through NCCL; tensors in symmetric memory mustn't be
            used.

    Raises:
        ArgumentError: no pool knows a tag. In a job of several ranks a `SleepError` says so.
        SleepError: on a rank something is in the way (a pool in `use`, a capture under way, host
            memory, graphs), a rank made another call, or didn't come: on every rank that came,
            with nothing changed. Or a rank failed on the way, which the error says: then what is
            asleep can be woken up.
    """
    state = _current_state()
    steps = _steps(state)
    pools = sleepable_pools()
    arguments = {
        "offload_tags": list(offload_tags),
        "tags": None if tags is None else list(tags),
        "symmetric": symmetric,
    }
    try:
        error = _tried(lambda: _prepare(state, pools, offload_tags, tags, symmetric))
        steps.begin("sleep", arguments, error)
    except BaseException:
        for pool in pools:
            pool.cancel_sleep()
        raise
    report = SleepReport()
    errors: list[Exception] = []
    for pool in pools:
        failed = _tried(partial(_put_to_sleep, pool, offload_tags, tags, report))
        errors += [failed] if failed is not None else []
    if state is not None:
        _SharedParts(state, steps, errors).fall_asleep(symmetric, report)
    steps.conclude(errors)
    return report


def wake_up(tags: Sequence[str] | None = None, *, symmetric: bool = True) -> int:
    """Undoes `sleep`. Collective among all ranks of the job, if there is one.

    What is awake already stays as it is.

    Args:
        tags: of the sleepable pools, those to wake up; by default all.
        symmetric: also wakes the symmetric memory up, if it is asleep: all ranks have it again, or
            none. Its content is undefined.

    Returns:
        Bytes of GPU memory that this rank's pools and symmetric memory have taken.

    Raises:
        ArgumentError: no pool knows a tag. In a job of several ranks a `SleepError` says so.
        SleepOutOfMemoryError: there isn't enough GPU memory. In a job of several ranks a
            `SleepError` says so, on all ranks. The call can be repeated.
        SleepError: a rank failed, made another call, or didn't come; on every rank that came.
    """
    state = _current_state()
    steps = _steps(state)
    pools = sleepable_pools()
    error = _tried(lambda: _check_tags("wake_up", "tags", pools, tags))
    arguments = {"tags": None if tags is None else list(tags), "symmetric": symmetric}
    steps.begin("wake_up", arguments, error)
    errors: list[Exception] = []
    taken = 0
    shared = None if state is None else _SharedParts(state, steps, errors)
    if shared is not None:
        shared.resume()
    for pool in pools:
        try:
            taken += pool.wake_up(_known(pool, tags))
        except DistcommError as failed:
            errors.append(failed)
    if shared is not None and symmetric:
        taken += shared.wake_up()
    steps.conclude(errors)
    return taken


class _SharedParts:
    """What ranks have in common: symmetric memory and communicators.

    Args:
        state: the job's.
        steps: of the call that has begun.
        errors: what goes wrong on this rank is added here, and the call goes on: other ranks
            are in step with it.
    """

    def __init__(self, state: ParallelState, steps: SleepSteps, errors: list[Exception]) -> None:
        self._state = state
        self._pool = state.symmetric_pool
        self._steps = steps
        self._errors = errors
        # Of what failed here: what it was, and its communicators' ranks.
        self._broken: list[tuple[str, list[int]]] = []

    def fall_asleep(self, symmetric: bool, report: SleepReport) -> None:
        """Once all ranks are idle."""
        pool = self._pool
        if pool is not None and not pool.asleep:
            if symmetric:
                self._release_symmetric(report)
            else:
                report.awake["symmetric memory"] = (
                    "communicators hold windows of it; sleep(symmetric=True) ends them"
                )
        for communicators in self._state.communicators:
            self._suspend(communicators, report)
        self._give_up_everywhere()

    def resume(self) -> None:
        for communicators in self._state.communicators:
            comm = communicators.pynccl
            if comm is not None and comm.is_suspended:
                self._try("nccl", communicators, comm.resume)
        self._give_up_everywhere()

    def wake_up(self) -> int:
        """Symmetric memory on all ranks, with its windows; how many bytes."""
        pool = self._pool
        if pool is None or not pool.asleep:
            return 0
        problem = pool.wake_up()
        told = self._steps.exchange("symmetric memory", {"problem": problem})
        if any(each["problem"] is not None for each in told):
            if problem is None:
                pool.fall_asleep()  # what other ranks can't have, none has
            else:
                self._errors.append(SleepError(problem))
            return 0
        for communicators in self._state.communicators:
            self._try("windows", communicators, communicators.wake_up)
        return int(pool.stats()["bytes_reserved"])

    # ---- inside -----------------------------------------------------------------------------

    def _release_symmetric(self, report: SleepReport) -> None:
        for communicators in self._state.communicators:
            problem = communicators.fall_asleep()
            if problem is not None:
                self._failed("windows", communicators, SleepError(problem))
        # No rank's memory goes while another one still has windows of it.
        self._steps.exchange("windows", {})
        if self._pool is not None:
            report.symmetric_bytes, problem = self._pool.fall_asleep()
            if problem is not None:
                self._errors.append(SleepError(problem))

    def _suspend(self, communicators: GroupCommunicators, report: SleepReport) -> None:
        comm = communicators.pynccl
        if comm is None or comm.is_suspended:
            return

        def suspend() -> None:
            outcome = communicators.suspend()
            if isinstance(outcome, str):
                report.awake[comm.member.name] = outcome
            else:
                report.communicators[comm.member.name] = outcome

        self._try("nccl", communicators, suspend)

    def _try(self, what: str, communicators: GroupCommunicators, work: Callable[[], Any]) -> None:
        try:
            work()
        except (DistcommError, TimeoutError) as error:
            self._failed(what, communicators, error)

    def _failed(self, what: str, communicators: GroupCommunicators, error: Exception) -> None:
        self._errors.append(error)
        self._broken.append((what, list(communicators.ranks)))

    def _give_up_everywhere(self) -> None:
        """What failed on one rank of a communicator is of no use to the others either."""
        told = self._steps.exchange("communicators", {"broken": self._broken})
        broken = {(what, tuple(ranks)) for each in told for what, ranks in each["broken"]}
        for communicators in self._state.communicators:
            for what in ("windows", "nccl"):
                if (what, communicators.ranks) in broken:
                    communicators.give_up(what)


def _prepare(
    state: ParallelState | None,
    pools: Sequence[SleepablePool],
    offload_tags: Sequence[str],
    tags: Sequence[str] | None,
    symmetric: bool,
) -> None:
    """All that may be in the way of falling asleep, found before anything changes."""
    _check_tags("sleep", "offload_tags", pools, offload_tags)
    _check_tags("sleep", "tags", pools, tags)
    for pool in pools:
        pool.prepare_sleep(_known(pool, offload_tags) or (), tags=_known(pool, tags))
    if state is None or state.device.type != "cuda":
        return
    if torch.cuda.is_current_stream_capturing():
        raise SleepError(f"a CUDA graph is being captured [rank {state.rank}]")
    # What other ranks do with this one's memory ends with work that this one has been given, too.
    state.wait_for_device()
    memory = state.symmetric_pool
    if symmetric and memory is not None and not memory.asleep and memory.why_awake is not None:
        raise SleepError(f"symmetric memory can't sleep: {memory.why_awake} [rank {state.rank}]")


def _put_to_sleep(
    pool: SleepablePool,
    offload_tags: Sequence[str],
    tags: Sequence[str] | None,
    report: SleepReport,
) -> None:
    report.pools[pool] = pool.sleep(_known(pool, offload_tags) or (), tags=_known(pool, tags))


def _check_tags(
    call: str, argument: str, pools: Sequence[SleepablePool], tags: Sequence[str] | None
) -> None:
    known = sorted({tag for pool in pools for tag in pool.usage()})
    if tags is not None and (isinstance(tags, str) or any(tag not in known for tag in tags)):
        requirement = f"tags that were used in a sleepable pool, of {known}"
        raise ArgumentError(argument, requirement, repr(tags), call=call)


def _known(pool: SleepablePool, tags: Sequence[str] | None) -> list[str] | None:
    known = pool.usage()
    return None if tags is None else [tag for tag in tags if tag in known]


def _tried(work: Callable[[], Any]) -> Exception | None:
    """The error of this rank, which the others are told of before it is raised."""
    try:
        work()
    except (DistcommError, RuntimeError) as error:
        return error
    return None


def _current_state() -> ParallelState | None:
    return get_parallel_state() if is_initialized() else None


def _steps(state: ParallelState | None) -> SleepSteps:
    return SleepSteps(None, 0, 1, 0.0) if state is None else state.sleep_steps
