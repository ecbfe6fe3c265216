"""Before the first gather with a plan, the ranks compare what they are about to do."""

from __future__ import annotations

import hashlib

import torch

from ..errors import ArgumentError, PlanMismatchError
from ..group import GroupCoordinator
from ..process_groups import all_gather_single, collective_errors

__all__ = ["agree", "tell_failure"]


def agree(group: GroupCoordinator, call: str, description: str) -> None:
    """Passes if all ranks are about to do the same, and none has failed. Collective.

    Args:
        description: what has to be the same on all ranks.

    Raises:
        PlanMismatchError: on every rank, naming the odd ones.
        CollectiveError: a rank didn't come within the group's timeout.
    """
    if _all_equal(group, call, description):
        return
    texts = group.all_gather_object(description)
    raise PlanMismatchError(call, dict(zip(group.ranks, texts, strict=True)), member=group.member)


def tell_failure(group: GroupCoordinator, error: ArgumentError) -> None:
    """This rank's part in an `agree` that it has made fail. Collective."""
    call = "all_gather_kv"
    _all_equal(group, call, f"{error} (rank {group.rank})")
    group.all_gather_object(f"failed: {error}")


def _all_equal(group: GroupCoordinator, call: str, text: str) -> bool:
    digest = hashlib.sha256(text.encode()).digest()
    mine = torch.frombuffer(bytearray(digest), dtype=torch.uint8)
    everyone = torch.empty(group.world_size * len(digest), dtype=torch.uint8, device="cpu")
    with collective_errors(call, group.member):
        all_gather_single(everyone, mine, group=group.cpu_group)
    return bool((everyone.view(group.world_size, -1) == mine).all())
