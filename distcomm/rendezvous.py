"""How the processes of a job find each other, and agree on what they are about to do.

Nothing here needs a process group: ranks meet in a key-value store. Every wait is bounded.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d
from torch.distributed.rendezvous import rendezvous

from . import env
from .errors import InitializationError, LaunchError

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

__all__ = ["Launch", "check_in", "find_launch", "open_store"]

_ENV_METHOD = "env://"
# Longer than rank 0 waits, so that its verdict, which names the missing ranks, arrives first.
_VERDICT_GRACE_S = 15.0
_ACKNOWLEDGE_S = 5.0


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
        try:
            store, _, _ = next(
                rendezvous(
                    launch.init_method,
                    launch.rank,
                    launch.world_size,
                    timeout=timedelta(seconds=timeout_s),
                )
            )
        except (RuntimeError, ValueError) as error:
            raise InitializationError(
                f"no store at {launch.init_method}", {launch.rank: str(error)}, rank=launch.rank
            ) from error
    store.set_timeout(timedelta(seconds=timeout_s))
    # Each rank counts its own initializations, so that all ranks of one initialization agree on
    # a number that no earlier one had: what those left in the store is never read again.
    generation = store.add(f"distcomm/generation/{launch.rank}", 1)
    return c10d.PrefixStore(f"distcomm/{generation}", store)


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
        InitializationError: a rank failed, disagrees with rank 0, or didn't come.
    """
    mine = {"report": dict(report), "agree": dict(must_agree), "failure": failure}
    store.set(f"hello/{launch.rank}", json.dumps(mine))
    if launch.rank == 0:
        verdict = _judge(store, launch.world_size, timeout_s)
        store.set("verdict", json.dumps(verdict))
    else:
        verdict = _await_verdict(store, timeout_s)
    failures = {int(rank): text for rank, text in verdict["failures"].items()}
    if failures:
        _acknowledge(store, launch, absent=verdict["absent"])
        raise InitializationError("initialization failed", failures, rank=launch.rank)
    reports: list[dict[str, Any]] = verdict["reports"]
    return reports


def _judge(store: Store, world_size: int, timeout_s: float) -> dict[str, Any]:
    """Rank 0's part: waits for all reports and compares them with its own."""
    deadline = time.monotonic() + timeout_s
    hellos: dict[int, dict[str, Any]] = {}
    for rank in range(world_size):
        key = f"hello/{rank}"
        remaining = max(deadline - time.monotonic(), 0.001)
        try:
            store.wait([key], timedelta(seconds=remaining))
        except RuntimeError:
            continue  # late: reported as absent below
        hellos[rank] = json.loads(store.get(key))
    absent = [rank for rank in range(world_size) if rank not in hellos]
    failures = dict.fromkeys(absent, f"did not come within {timeout_s:g} s")
    for rank, hello in hellos.items():
        if hello["failure"] is not None:
            failures[rank] = hello["failure"]
        elif hello["agree"] != hellos[0]["agree"]:
            failures[rank] = _difference(hello["agree"], hellos[0]["agree"])
    reports = [] if absent else [hellos[rank]["report"] for rank in range(world_size)]
    return {"failures": failures, "absent": absent, "reports": reports}


def _difference(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    return "; ".join(
        f"{name} is {theirs.get(name)!r}, on rank 0 {ours.get(name)!r}"
        for name in ours
        if theirs.get(name) != ours.get(name)
    )


def _await_verdict(store: Store, timeout_s: float) -> dict[str, Any]:
    wait_s = timeout_s + _VERDICT_GRACE_S
    try:
        store.wait(["verdict"], timedelta(seconds=wait_s))
        verdict: dict[str, Any] = json.loads(store.get("verdict"))
    except RuntimeError as error:
        return {"failures": {0: f"sent no verdict within {wait_s:g} s: {error}"}, "absent": [0]}
    return verdict


def _acknowledge(store: Store, launch: Launch, absent: list[int]) -> None:
    """Keeps rank 0, in whose process the store may live, until the others know the verdict."""
    if 0 in absent:
        return
    others = launch.world_size - 1 - len(absent)
    if launch.rank != 0:
        store.add("acknowledged", 1)
        return
    deadline = time.monotonic() + _ACKNOWLEDGE_S
    while store.add("acknowledged", 0) < others and time.monotonic() < deadline:
        time.sleep(0.01)
