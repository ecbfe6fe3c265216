"""How the ranks of a job make groups in step: where they meet, and names used only once."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from torch.distributed import distributed_c10d as c10d

from .errors import CollectiveError, GroupMember
from .meeting import absent_ranks, meet
from .rendezvous import Launch, pass_stage

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

__all__ = ["GroupSteps"]

# gloo tries this much longer than its timeout to connect to a rank that has failed.
_GIVING_UP_S = 10.0


class GroupSteps:
    """One rank's side of the making of groups.

    Layouts are numbered, and so are attempts at a group of some ranks. What all of them make
    together has the number in its name: gloo would read what an earlier one has left.

    Args:
        launch: this process's place in the job.
        store: the job's.
        timeout_s: what each step may take.
    """

    def __init__(self, launch: Launch, store: Store, timeout_s: float) -> None:
        self._launch = launch
        self._job_store = store
        self._timeout_s = timeout_s
        self._layout = 0
        self._layout_store = store
        self._attempts: Counter[tuple[int, ...]] = Counter()  # by ranks

    def begin_layout(self) -> Store:
        """Goes on to the next number; where all ranks meet while they make that layout. Local."""
        self._layout += 1
        self._layout_store = c10d.PrefixStore(f"layout/{self._layout}", self._job_store)
        return self._layout_store

    @contextmanager
    def together(self, axis: str, ranks: tuple[int, ...]) -> Iterator[None]:
        """The body makes the group of `axis`: on all ranks, or it fails on all of them.

        No rank goes on before all have made theirs, so that none can close while another one
        still connects to it. Collective among all ranks, unless `ranks` is one alone.

        Raises:
            InitializationError: the body failed on a rank, or one didn't come.
        """
        if len(ranks) == 1:
            yield
            return
        failure = None
        try:
            yield
        except Exception as error:  # noqa: BLE001 - whatever it is, all ranks are told
            failure = f"making the {axis} group failed: {error}"
        self.pass_stage(f"groups/{axis}", failure)

    def pass_stage(self, stage: str, failure: str | None) -> None:
        """All ranks get past a stage of this layout, or all raise the same error. Collective.

        Raises:
            InitializationError: a rank failed or didn't come.
        """
        wait_s = 2 * self._timeout_s + _GIVING_UP_S
        pass_stage(self._layout_store, self._launch, stage, failure, wait_s)

    def layout_name(self, ranks: tuple[int, ...]) -> str:
        """A name for these ranks' group of this layout: the same on all of them. Local."""
        return f"distcomm/layout/{self._layout}/{_digest(ranks)}"

    def meet_members(self, member: GroupMember) -> str:
        """A name for the next attempt at a group, once all members have come. Collective among
        them.

        A member that missed an attempt finds it decided without it, and goes on to the one that
        the others are at.

        Raises:
            CollectiveError: a member didn't come in time.
            RuntimeError: the store can't be reached (torch's own error).
        """
        own, size = member.rank_in_group, member.world_size
        came: list[str | None] = [None] * size
        while came[own] is None:
            self._attempts[member.ranks] += 1
            name = f"created/{_digest(member.ranks)}/{self._attempts[member.ranks]}"
            came = meet(self._job_store, name, own, size, "here", self._timeout_s)
        absent = [member.ranks[each] for each in absent_ranks(came)]
        if absent:
            problem = f"ranks {absent} did not come within {self._timeout_s:g} s"
            raise CollectiveError("create_group", problem, member=member)
        return f"distcomm/{name}"


def _digest(ranks: tuple[int, ...]) -> str:
    return hashlib.sha256(repr(ranks).encode()).hexdigest()[:32]
