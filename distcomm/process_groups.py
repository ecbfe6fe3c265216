"""The only place that creates torch process groups, and that reads their stores."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from .errors import CollectiveError, DistcommError, GroupMember, InitializationError

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

__all__ = [
    "all_gather_single",
    "building_errors",
    "collective_errors",
    "create_default_process_group",
    "create_process_group",
    "destroy_default_process_group",
    "destroy_process_group",
    "forget_process_group",
    "member_of",
    "process_group_store",
]

# Newer versions of torch have renamed it, and warn of the old name.
all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def create_process_group(
    backend: str,
    member: GroupMember,
    *,
    store: Store,
    unique_name: str,
    timeout_s: float,
) -> dist.ProcessGroup:
    """Creates a process group with local synchronization: only its members take part.

    Collective among `member.ranks`. Registered with `torch.distributed`, so that torch's own
    functions accept it.

    torch's `new_group(use_local_synchronization=True)` isn't used, because it derives the name
    under which the members meet from how many groups this process has: ranks that are in
    different numbers of groups would wait for each other for ever, and a group made again would
    read the old one's addresses from the store.

    Args:
        backend: ``"gloo"`` or ``"nccl"``.
        member: this rank's place.
        store: where the members meet.
        unique_name: the same on all members, and never used before with this store.
        timeout_s: seconds that creation and every operation of the group may take.
    """
    group: dist.ProcessGroup
    group, _ = c10d._new_process_group_helper(
        member.world_size,
        member.rank_in_group,
        list(member.ranks),
        c10d.Backend(backend),
        store,
        c10d.GroupName(unique_name),
        timeout=timedelta(seconds=timeout_s),
        group_desc=f"distcomm {member.name}",
    )
    c10d._world.pg_group_ranks[group] = {
        rank: rank_in_group for rank_in_group, rank in enumerate(member.ranks)
    }
    return group


def create_default_process_group(
    rank: int, world_size: int, store: Store, timeout_s: float
) -> dist.ProcessGroup:
    """Makes torch's default process group, on gloo. Collective among all ranks."""
    # torch names the default group after how many groups this process has made, also for an
    # initialization that then failed on this rank alone; ranks of other names never meet.
    c10d._world.group_count = 0
    dist.init_process_group(
        "gloo",
        store=store,
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=timeout_s),
    )
    group: dist.ProcessGroup = c10d._get_default_group()
    return group


def destroy_default_process_group() -> None:
    """Destroys torch's default process group, and with it all others. Local."""
    if dist.is_initialized():
        dist.destroy_process_group()


def destroy_process_group(group: dist.ProcessGroup) -> None:
    """Destroys a group of `create_process_group`. Local; nothing may be under way in it.

    Waits for CUDA graphs that have captured what NCCL does in it, however long they live.
    """
    # When the caller's default group has gone already, torch has destroyed ours with it.
    world = c10d._world
    if group in world.pg_map:
        tag = world.pg_to_tag.get(group, "")
        dist.destroy_process_group(group)
        if not world.tags_to_pg.get(tag, True):  # torch leaves an empty list for each group
            del world.tags_to_pg[tag]


def forget_process_group(group: dist.ProcessGroup) -> None:
    """Takes a group that can't be destroyed out of torch's books: torch won't try. Local."""
    world = c10d._world
    for book in (world.pg_map, world.pg_names, world.pg_group_ranks, world.pg_backend_config):
        book.pop(group, None)
    for groups in world.tags_to_pg.values():
        if group in groups:
            groups.remove(group)
    world.pg_to_tag.pop(group, None)
    c10d._unregister_process_group(group.group_name)  # type: ignore[attr-defined]


def process_group_store(group: dist.ProcessGroup) -> Store:
    """The key-value store of a process group, with the group's own key prefix."""
    store: Store = c10d._get_process_group_store(group)
    return store


def member_of(group: dist.ProcessGroup, name: str) -> GroupMember:
    """This process's place in a torch process group."""
    ranks: Sequence[int] = dist.get_process_group_ranks(group)
    return GroupMember(name, tuple(ranks), dist.get_rank())


@contextmanager
def collective_errors(call: str, member: GroupMember) -> Iterator[None]:
    """Turns what torch raises from a failed or timed-out operation into `CollectiveError`."""
    try:
        yield
    except DistcommError:
        raise
    except RuntimeError as error:
        raise CollectiveError(call, error, member=member) from error


@contextmanager
def building_errors(rank: int) -> Iterator[None]:
    """Turns what torch raises while groups are made into `InitializationError`."""
    try:
        yield
    except DistcommError:
        raise
    except RuntimeError as error:
        what = "building the process groups failed"
        raise InitializationError(what, {rank: str(error)}, rank=rank) from error
