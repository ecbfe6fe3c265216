"""Seeded random sequences of calls over overlapping groups; every call is checked.

All ranks draw the same sequence. A step names one group, and only its members make the call, so
ranks get ahead of each other as they do in a real job.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable

import pytest
import torch

from distcomm import AsyncHandle, GroupCoordinator, ParallelState
from tests.cpu.checked_calls import (
    MOVED_DTYPES,
    MOVEMENTS,
    REDUCED,
    REDUCTIONS,
    SHAPES,
    Case,
    checked_call,
)
from tests.cpu.job import Job

NUM_CALLS = 400
AXES = ["world", "tp", "attn_tp", "cp", "ep", "moe_tp"]
CREATED = {"trio": (5, 2, 7), "overlapping trio": (2, 5, 0), "backwards": (7, 6, 5, 4, 3, 2, 1, 0)}


def groups_by_ranks(state: ParallelState) -> dict[tuple[int, ...], list[GroupCoordinator]]:
    """This rank's groups; several of the same ranks share their communicators."""
    for name, ranks in CREATED.items():
        if name not in state.groups and state.rank in ranks:
            state.create_group(name, ranks)
    found: dict[tuple[int, ...], list[GroupCoordinator]] = {}
    for name in [*AXES, *CREATED]:
        if name in state.groups:
            group = state.groups[name]
            found.setdefault(tuple(group.ranks), []).append(group)
    return found


def all_group_ranks(state: ParallelState) -> list[tuple[int, ...]]:
    """The ranks of every group of the job, in an order that all ranks agree on."""
    everyone = tuple(range(state.world_size))
    of_axes = [ranks for axis in AXES[1:] for ranks in state.layout.groups(axis)]
    return [everyone, *of_axes, *CREATED.values()]


def draw_case(choose: random.Random, collective: str) -> Case:
    if collective in REDUCTIONS:
        dtype, op = choose.choice(REDUCED)
    else:
        dtype, op = choose.choice(MOVED_DTYPES), None
    return Case(choose.getrandbits(30), dtype, choose.choice(SHAPES), op)


def exchange_objects(group: GroupCoordinator, choose: random.Random) -> None:
    tag, src = choose.random(), choose.randrange(group.world_size)
    mine = {"from": group.rank, "tag": tag, "padding": b"." * choose.randrange(1000)}
    gathered = group.all_gather_object(mine)
    assert gathered == [{**mine, "from": rank} for rank in group.ranks]
    assert group.broadcast_object(mine, src) == {**mine, "from": group.ranks[src]}


def broadcast_a_dict(group: GroupCoordinator, choose: random.Random) -> None:
    src, size = choose.randrange(group.world_size), choose.randrange(4)
    expected = {"rows": [torch.full((size,), group.ranks[src])], "size": size}
    mine = {"rows": [torch.full((size,), group.rank)], "size": size}
    received = group.broadcast_tensor_dict(mine if group.rank_in_group == src else None, src)
    assert received["size"] == size
    assert torch.equal(received["rows"][0], expected["rows"][0])


def pass_barrier(group: GroupCoordinator, choose: random.Random) -> None:
    group.barrier()


OTHERS: list[Callable[[GroupCoordinator, random.Random], None]] = [
    exchange_objects,
    broadcast_a_dict,
    pass_barrier,
]


class Pending:
    """Gathers that were started and not waited for yet; at most a few."""

    def __init__(self) -> None:
        self._calls: list[tuple[AsyncHandle, torch.Tensor, torch.Tensor]] = []

    def start(self, group: GroupCoordinator, size: int) -> None:
        output = torch.full((group.world_size, size), -1)
        handle = group.cp_all_gather_into_tensor_async(output, torch.full((size,), group.rank))
        expected = torch.tensor(group.ranks).unsqueeze(1).expand(-1, size)
        self._calls.append((handle, output, expected))

    def finish(self, choose: random.Random, most: int) -> None:
        while len(self._calls) > most:
            handle, output, expected = self._calls.pop(choose.randrange(len(self._calls)))
            handle.wait()
            assert torch.equal(output, expected)


def play(state: ParallelState, seed: int) -> tuple[int, Counter[str]]:
    """Makes this rank's part of the sequence; returns what calls all ranks have drawn."""
    groups = groups_by_ranks(state)
    every_group = all_group_ranks(state)
    choose = random.Random(seed)
    own_choice = random.Random(seed * 100 + state.rank)
    pending = Pending()
    made: Counter[str] = Counter()
    for _ in range(NUM_CALLS):
        ranks = choose.choice(every_group)
        kind = choose.choice([*REDUCTIONS, *MOVEMENTS, "other", "pending"])
        case = draw_case(choose, kind)
        step = random.Random(choose.getrandbits(30))
        made[kind] += 1
        if state.rank not in ranks:
            continue
        group = step.choice(groups[ranks])
        if kind == "other":
            step.choice(OTHERS)(group, step)
        elif kind == "pending":
            pending.start(group, step.randrange(5))
        else:
            checked_call(kind, group, case)
        pending.finish(own_choice, most=3)
    pending.finish(own_choice, most=0)
    return choose.getrandbits(30), made


@pytest.mark.parametrize("seed", range(4))
def test_every_call_of_a_random_sequence_is_right(job: Job, seed: int):
    results = job.run(play, seed)
    assert len({state for state, _ in results}) == 1, "the ranks drew different sequences"
    made = results[0][1]
    assert made.total() == NUM_CALLS
    assert made.keys() == {*REDUCTIONS, *MOVEMENTS, "other", "pending"}
