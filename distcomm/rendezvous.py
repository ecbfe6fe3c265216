"""How the processes of a job find each other, and agree on what they are about to do.

Nothing here needs a process group: ranks meet in a key-value store. Every wait is bounded.
"""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d
from torch.distributed.rendezvous import rendezvous

from . import env
from .errors import InitializationError, LaunchError
from .meeting import absent_ranks, meet

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

__all__ = ["Launch", "MissedMeetingError", "check_in", "find_launch", "open_store", "pass_stage"]

_ENV_METHOD = "env://"
_ACKNOWLEDGE_S = 5.0


class MissedMeetingError(InitializationError):
    """The others have met and decided without this rank."""


@dataclass(frozen=True)
class Launch:
    """This process's place in the job.

    Attributes:
        rank, world_size: global rank, number of ranks.
        local_rank: index of this process on its host; None when nothing says so.
        init_method: where the ranks meet; None to use torch's existing default process group.
    """

    rank: int
    world_size: int
    local_rank: int | None
    init_method: str | None


def find_launch(
    init_method: str | None, rank: int | None, world_size: int | None, local_rank: int | None
) -> Launch:
    """What the caller gave, completed from torch's default process group or the environment.

    Raises:
        LaunchError: something is missing, or contradicts the existing process group.
    """
    if local_rank is None:
        local_rank = env.read_int("LOCAL_RANK")
    if dist.is_initialized():
        existing = Launch(dist.get_rank(), dist.get_world_size(), local_rank, None)
        for name, given, there in (
            ("rank", rank, existing.rank),
            ("world_size", world_size, existing.world_size),
            ("init_method", init_method, None),
        ):
            if given not in (None, there):
                raise LaunchError(
                    f"{name} must not be given, or be that of torch's existing default process "
                    f"group ({there}); got {given!r} [rank {existing.rank}]"
                )
        return existing
    rank = env.read_int("RANK") if rank is None else rank
    world_size = env.read_int("WORLD_SIZE") if world_size is None else world_size
    missing = [
        name for name, value in (("RANK", rank), ("WORLD_SIZE", world_size)) if value is None
    ]
    if init_method is None or init_method == _ENV_METHOD:
        missing += env.missing_meeting_point()
    if rank is None or world_size is None or missing:
        raise LaunchError(
            f"this process can't find its job: {', '.join(missing)} not set. Launch it with "
            "`torchrun --nproc-per-node N script.py`, or give init_method (e.g. "
            "'tcp://host:port'), rank and world_size"
        )
    if world_size < 1 or not 0 <= rank < world_size:
        raise LaunchError(f"rank must be within 0 to world_size - 1; got {rank} of {world_size}")
    return Launch(rank, world_size, local_rank, init_method or _ENV_METHOD)


def open_store(launch: Launch, timeout_s: float) -> Store:
    """The job's key-value store, with a key prefix of this initialization's own.

    Raises:
        InitializationError: rank 0's store can't be reached within the timeout.
    """
    store: Store
    if launch.init_method is None:
        store = c10d._get_default_store()
    else:
        url = _meeting_url(launch.init_method, launch.rank, launch.world_size)
        try:
            store, _, _ = next(rendezvous(url, timeout=timedelta(seconds=timeout_s)))
        except (RuntimeError, ValueError) as error:
            what = f"no store at {launch.init_method}, where rank 0 or its launcher serves one"
            raise InitializationError(what, {launch.rank: str(error)}, rank=launch.rank) from error
    store.set_timeout(timedelta(seconds=timeout_s))
    # Each rank counts its own initializations, so that all ranks of one initialization agree on
    # a number that no earlier one had: what those left in the store is never read again.
    generation = store.add(f"distcomm/generation/{launch.rank}", 1)
    return c10d.PrefixStore(f"distcomm/{generation}", store)


def _meeting_url(init_method: str, rank: int, world_size: int) -> str:
    """`init_method` with this rank's place in it.

    TCP stores aren't told the world size: rank 0's would wait in its constructor until all ranks
    have connected, and couldn't name the missing ones as `check_in` does.
    """
    counted = -1 if init_method.startswith(("tcp:", "env:")) else world_size
    separator = "&" if "?" in init_method else "?"
    return f"{init_method}{separator}rank={rank}&world_size={counted}"


def check_in(
    store: Store,
    launch: Launch,
    *,
    report: Mapping[str, Any],
    must_agree: Mapping[str, Any],
    failure: str | None,
    timeout_s: float,
) -> list[dict[str, Any]]:
    """Every rank reports; all go on, or all raise the same error. Collective.

    Args:
        report: what the others should know, as JSON values.
        must_agree: what has to be equal on all ranks, as JSON values.
        failure: why this rank can't go on; None if it can.
        timeout_s: seconds to wait for the last rank.

    Returns:
        All ranks' reports, in rank order.

    Raises:
        InitializationError: a rank failed, disagrees with most, or didn't come; a
            `MissedMeetingError` on one that came too late.
    """
    mine = {"report": dict(report), "agree": dict(must_agree), "failure": failure}
    what = "initialization failed"
    try:
        hellos = meet(store, "hello", launch.rank, launch.world_size, mine, timeout_s)
    except RuntimeError as error:
        failures = {launch.rank: f"lost the store: {error}"}
        raise InitializationError(what, failures, rank=launch.rank) from error
    failures = _judge(hellos, timeout_s)
    _acknowledge(store, launch.rank, len(hellos) - len(absent_ranks(hellos)))
    if hellos[launch.rank] is None:
        raise MissedMeetingError(what, failures, rank=launch.rank)
    if failures:
        raise InitializationError(what, failures, rank=launch.rank)
    return [hello["report"] for hello in hellos if hello is not None]


def pass_stage(
    store: Store, launch: Launch, stage: str, failure: str | None, timeout_s: float
) -> None:
    """All ranks get past `stage`, or all raise the same error. Collective.

    It goes through the store, and not through a process group, so that it may wait longer than
    the ranks that are about to fail by a process group's timeout.

    Args:
        stage: a name that is used once in this initialization.
        failure: why this rank can't go on; None if it can.
        timeout_s: seconds to wait for the last rank.

    Raises:
        InitializationError: a rank failed or didn't come.
    """
    own = c10d.PrefixStore(stage, store)
    check_in(own, launch, report={}, must_agree={}, failure=failure, timeout_s=timeout_s)


def _judge(hellos: Sequence[dict[str, Any] | None], timeout_s: float) -> dict[int, str]:
    """Which ranks can't go on and why, compared with what most ranks say."""
    failures = dict.fromkeys(absent_ranks(hellos), f"did not come within {timeout_s:g} s")
    present = {rank: hello for rank, hello in enumerate(hellos) if hello is not None}
    wishes = [json.dumps(hello["agree"]) for hello in present.values()]
    usual = Counter(wishes).most_common(1)[0][0]  # of equally frequent ones the lowest rank's
    usual_rank = list(present)[wishes.index(usual)]
    for rank, hello in present.items():
        if hello["failure"] is not None:
            failures[rank] = hello["failure"]
        elif hello["agree"] != present[usual_rank]["agree"]:
            failures[rank] = _difference(hello["agree"], present[usual_rank]["agree"], usual_rank)
    return failures


def _difference(theirs: Mapping[str, Any], usual: Mapping[str, Any], usual_rank: int) -> str:
    return "; ".join(
        f"{name} is {theirs.get(name)}, on rank {usual_rank} {usual.get(name)}"
        for name in usual
        if theirs.get(name) != usual.get(name)
    )


def _acknowledge(store: Store, rank: int, num_present: int) -> None:
    """Keeps rank 0, in whose process the store may live, until the others know the outcome."""
    others = num_present - 1
    if not others:
        return
    with contextlib.suppress(RuntimeError):  # a rank that has died meanwhile: nothing to wait for
        if rank == 0:
            store.wait(["acknowledged by all"], timedelta(seconds=_ACKNOWLEDGE_S))
        elif store.add("acknowledged", 1) == others:
            store.set("acknowledged by all", "")
