"""A meeting in a key-value store: every rank brings a report, all leave with the same list.

It needs no process group, and unlike a collective it survives a rank that doesn't come: those
that did go on, and the late one learns what was decided without it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

__all__ = ["absent_ranks", "bring", "meet"]

# Longer than the first rank waits, so that its list, which has all that came in time, is the one.
_GRACE_S = 15.0


def meet(
    store: Store, key: str, rank: int, num_ranks: int, report: Any, timeout_s: float
) -> list[Any | None]:
    """Every rank's report, in rank order; None where a rank didn't come. Collective.

    All ranks return the same list, also one that comes after the list was made without it, and
    finds None in its own place.

    Args:
        key: the name of the meeting, used once in `store`.
        rank, num_ranks: this rank, from 0, and how many there are.
        report: a JSON value other than None.
        timeout_s: seconds to wait for the last rank. The error of a rank 0 that doesn't come
            takes up to as much longer, at most 15 s.

    Raises:
        RuntimeError: the store can't be reached (torch's own error).
    """
    bring(store, key, rank, report)
    outcome = f"{key}/outcome"
    # If rank 0 doesn't come, the others make the list; the first to propose one decides.
    wait_s = 0.0 if rank == 0 else timeout_s + min(timeout_s, _GRACE_S)
    if not _comes(store, outcome, wait_s):
        reports = _collected(store, key, num_ranks, timeout_s if rank == 0 else 0.0)
        store.compare_set(outcome, "", json.dumps(reports))
    result: list[Any | None] = json.loads(store.get(outcome))
    return result


def bring(store: Store, key: str, rank: int, report: Any) -> None:
    """Brings a report to a meeting without waiting for the others."""
    store.set(f"{key}/{rank}", json.dumps(report))


def absent_ranks(reports: Sequence[Any | None]) -> list[int]:
    """Which ranks of a meeting didn't come."""
    return [rank for rank, report in enumerate(reports) if report is None]


def _collected(store: Store, key: str, num_ranks: int, timeout_s: float) -> list[Any | None]:
    deadline = time.monotonic() + timeout_s
    names = [f"{key}/{rank}" for rank in range(num_ranks)]
    present = [_comes(store, name, deadline - time.monotonic()) for name in names]
    return [
        json.loads(store.get(name)) if came else None
        for name, came in zip(names, present, strict=True)
    ]


def _comes(store: Store, name: str, timeout_s: float) -> bool:
    """Whether a key is set before `timeout_s` seconds, which may be none, have passed."""
    if store.check([name]):
        return True
    if timeout_s <= 0:
        return False
    try:
        store.wait([name], timedelta(seconds=max(timeout_s, 0.001)))
    except RuntimeError:
        return bool(store.check([name]))  # raises if it is the store that is gone
    return True
