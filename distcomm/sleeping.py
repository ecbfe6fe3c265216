"""`sleep` and `wake_up`: what a process can do without for a while, on all ranks or on none."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from .communicators import GroupCommunicators
from .current import get_parallel_state, is_initialized
from .errors import ArgumentError, DistcommError, SleepError, SymmetricMismatchError
from .memory import SleepablePool, Slept, SymmetricPool, sleepable_pools
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
    communicators: bool = True,
) -> SleepReport:
    """Puts all sleepable pools of the process to sleep, and what else can. Collective among all
    ranks of the job, if there is one: all fall asleep, or none.

    Waits for the device. What is asleep already stays as it is.

    Args:
        offload_tags: as for `SleepablePool.sleep`; each pool takes those that it knows.
        tags: likewise.
        symmetric: also gives the symmetric memory back, whose content is lost. All windows end;
            `wake_up` registers them again. No CUDA graph may be alive that was captured with
            symmetric tensors or with collectives that write to their peers' memory. Until then
            collectives take the ordinary path through NCCL; tensors in symmetric memory mustn't be
            used.
        communicators: also gives NCCL's own buffers back, of communicators without windows, where
            NCCL can do that (2.29.7 and newer). These raise `SleepError` until they are woken up;
            all others go on working.

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
        "communicators": communicators,
    }
    report = SleepReport()
    errors: list[Exception] = []
    try:
        error = _tried(lambda: _prepare(state, pools, offload_tags, tags, symmetric))
        steps.begin("sleep", arguments, error, _extra_s(pools))
        for pool in pools:
            failed = _tried(partial(_put_to_sleep, pool, offload_tags, tags, report))
            errors += [failed] if failed is not None else []
    finally:
        for pool in pools:
            pool.cancel_sleep()
    if state is not None:
        parts = _SharedParts(state, steps, errors)
        parts.fall_asleep(symmetric, report)
        if communicators:
            parts.suspend(report)
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
    steps.begin("wake_up", arguments, error, _extra_s(pools))
    errors: list[Exception] = []
    taken: list[int] = []
    shared = None if state is None else _SharedParts(state, steps, errors)
    if shared is not None:
        shared.resume()
    for pool in pools:
        failed = _tried(partial(_wake_up, pool, tags, taken))
        errors += [failed] if failed is not None else []
    if shared is not None and symmetric:
        taken.append(shared.wake_up())
    steps.conclude(errors)
    return sum(taken)


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

    def fall_asleep(self, symmetric: bool, report: SleepReport) -> None:
        """Once all ranks are idle."""
        if self._pool is not None and symmetric:
            self._release_symmetric(self._pool, report)
        elif self._pool is not None and not self._pool.asleep:
            report.awake["symmetric memory"] = (
                "communicators hold windows of it; sleep(symmetric=True) ends them"
            )

    def suspend(self, report: SleepReport) -> None:
        """NCCL's own buffers, after `fall_asleep`."""
        whys = {each.ranks: each.why_not_suspended for each in self._state.communicators}
        told = self._steps.exchange("suspension", _as_json(whys))
        stays = {tuple(ranks): why for each in told for ranks, why in each if why is not None}

        def suspend(communicators: GroupCommunicators) -> None:
            comm = communicators.pynccl
            if comm is None or comm.is_suspended:
                return
            if communicators.ranks in stays:
                report.awake[comm.member.name] = stays[communicators.ranks]
            else:
                report.communicators[comm.member.name] = comm.suspend()

        self._on_all("suspended", suspend, "nccl")

    def resume(self) -> None:
        """NCCL's own buffers."""

        def resume(communicators: GroupCommunicators) -> None:
            comm = communicators.pynccl
            if comm is not None and comm.is_suspended:
                comm.resume()

        self._on_all("resumed", resume, "nccl")

    def wake_up(self) -> int:
        """Symmetric memory on all ranks or on none, with its windows; how many bytes.

        Also what an earlier call has left asleep, which was broken off.
        """
        pool = self._pool
        if pool is None:
            return 0
        mine = {
            "asleep": pool.asleep or any(each.is_asleep for each in self._state.communicators),
            "busy": _tried(self._state.wait_for_device) is not None,
        }
        told = self._steps.exchange("asleep", mine)
        if not any(each["asleep"] for each in told):
            return 0
        if any(each["busy"] for each in told):
            if mine["busy"]:
                self._errors.append(SleepError("the GPU is still at work"))
            return 0
        for communicators in self._state.communicators:  # all begin alike
            communicators.fall_asleep()
        num_bytes, problem = pool.wake_up()
        told = self._steps.exchange("symmetric memory", {"problem": problem})
        if any(each["problem"] is not None for each in told):
            if problem is not None:
                self._errors.append(SleepError(problem))
            pool.fall_asleep()  # what other ranks can't have, none has
            return 0
        self._on_all("woken up", GroupCommunicators.wake_up, "kernels")
        return num_bytes

    # ---- inside -----------------------------------------------------------------------------

    def _release_symmetric(self, pool: SymmetricPool, report: SleepReport) -> None:
        def release(communicators: GroupCommunicators) -> None:
            problem = communicators.fall_asleep()
            if problem is not None:
                raise SleepError(problem)

        # No rank's memory goes while another one still has windows of it.
        self._on_all("windows", release, "windows")
        report.symmetric_bytes, problem = pool.fall_asleep()
        if problem is not None:
            self._errors.append(SleepError(problem))

    def _on_all(self, stage: str, work: Callable[[GroupCommunicators], None], what: str) -> None:
        """Does so with each, and draws the same conclusion from how it went on all of its ranks.

        Args:
            what: of those that failed on a rank, what is no good any more on all of them:
                ``"nccl"``, ``"windows"``, or ``"kernels"``, which may be tried again.
        """
        failed: dict[tuple[int, ...], str] = {}
        for communicators in self._state.communicators:
            error = _tried(partial(work, communicators))
            if error is not None:
                self._errors.append(error)
                lost = isinstance(error, SymmetricMismatchError)
                failed[communicators.ranks] = "windows" if lost else what
        told = self._steps.exchange(stage, _as_json(failed))
        broken = {(tuple(ranks), what) for each in told for ranks, what in each}
        for communicators in self._state.communicators:
            for what in ("nccl", "windows"):
                if (communicators.ranks, what) in broken:
                    communicators.give_up(what)
            if (communicators.ranks, "kernels") in broken:
                communicators.pause_kernels()


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
    if state is not None and state.device.type == "cuda":
        if torch.cuda.is_current_stream_capturing():
            raise SleepError(f"a CUDA graph is being captured [rank {state.rank}]")
        # What others do with this rank's memory ends with work that it has been given, too.
        state.wait_for_device()
        memory = state.symmetric_pool
        if symmetric and memory is not None and memory.why_awake is not None:
            raise SleepError(
                f"symmetric memory can't sleep: {memory.why_awake} [rank {state.rank}]"
            )
    for pool in pools:
        pool.prepare_sleep(_known(pool, offload_tags) or (), tags=_known(pool, tags))


def _extra_s(pools: Sequence[SleepablePool]) -> float:
    """What other ranks may have to wait for this one's pools."""
    return sum(pool.timeout_s for pool in pools)


def _as_json(by_ranks: Mapping[tuple[int, ...], Any]) -> list[Any]:
    return [[list(ranks), value] for ranks, value in by_ranks.items()]


def _put_to_sleep(
    pool: SleepablePool,
    offload_tags: Sequence[str],
    tags: Sequence[str] | None,
    report: SleepReport,
) -> None:
    report.pools[pool] = pool.sleep(_known(pool, offload_tags) or (), tags=_known(pool, tags))


def _wake_up(pool: SleepablePool, tags: Sequence[str] | None, taken: list[int]) -> None:
    taken.append(pool.wake_up(_known(pool, tags)))


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
    except (DistcommError, RuntimeError, TimeoutError) as error:  # torch's, and late calls
        return error
    return None


def _current_state() -> ParallelState | None:
    return get_parallel_state() if is_initialized() else None


def _steps(state: ParallelState | None) -> SleepSteps:
    return SleepSteps(None, 0, 1, 0.0) if state is None else state.sleep_steps
