"""Sequence numbers, which ranks in step have in common and the odd one doesn't; fallbacks."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
import torch

from distcomm import ArgumentError, ContextParallelPlan, ParallelState, all_gather_kv
from tests.cpu.job import Job

ODD = 3
DEADLINE_S = 15.0


def last_of(stats: dict[str, Any]) -> dict[str, int]:
    """By op, of those that ran in one way."""
    return {op: way["last"] for op, ways in stats["ops"].items() for way in ways.values()}


def collectives_and_a_chain(state: ParallelState) -> tuple[int, dict[str, int]]:
    """Ranks send in a chain: the first only sends, the last only receives."""
    group = state.create_group("chain", range(8))
    x = torch.ones(4)
    group.all_reduce(x)
    if not group.is_first_rank:
        group.recv(x.shape, x.dtype)
    if not group.is_last_rank:
        group.send(x)
    group.broadcast(x)
    group.barrier()
    group.broadcast_object("text")
    group.all_reduce(x)
    if group.is_first_rank:
        group.send(x)
    if group.rank_in_group == 1:
        group.recv(x.shape, x.dtype)
    stats = group.stats()
    return stats["sequence"], last_of(stats)


def test_point_to_point_calls_dont_bring_ranks_out_of_step(job: Job):
    for rank, (sequence, last) in enumerate(job.run(collectives_and_a_chain)):
        assert sequence == 3
        assert last.pop("send", None) == (None if rank == 7 else 3 if rank == 0 else 1)
        assert last.pop("recv", None) == (None if rank == 0 else 3 if rank == 1 else 1)
        assert last == {"all_reduce": 3, "broadcast": 2}


def calls_that_are_more_than_one(state: ParallelState) -> list[tuple[int, dict[str, int]]]:
    group = state.create_group(f"pair of {state.rank}", [state.rank])
    fused = state.create_group("fused", range(8))
    fused.all_reduce_rms_norm(torch.ones(2, 4), torch.ones(4))
    plan = ContextParallelPlan([5], 1)
    all_gather_kv(group, plan, torch.ones(5, 2), torch.ones(5, 2))
    return [(each["sequence"], last_of(each)) for each in (fused.stats(), group.stats())]


def test_what_a_call_counts_as(job: Job):
    for fused, gathers in job.run(calls_that_are_more_than_one):
        assert fused == (2, {"all_reduce_rms_norm": 1, "all_reduce": 2})
        assert gathers == (2, {"all_gather_kv": 2})


def find_the_odd_rank(state: ParallelState) -> list[int]:
    """All ranks but one are in a collective; what a watchdog of each reads."""
    group = state.create_group("with an odd rank", range(7, -1, -1))  # not what `world` runs on
    group.all_reduce(torch.ones(1))
    call = threading.Thread(target=group.all_reduce, args=(torch.ones(1),), daemon=True)
    if state.rank != ODD:
        call.start()
        deadline = time.monotonic() + DEADLINE_S
        while group.stats()["sequence"] == 1 and time.monotonic() < deadline:
            time.sleep(0.01)
    read = state.world.all_gather_object(group.stats()["sequence"])
    if state.rank == ODD:
        call.start()
    call.join(DEADLINE_S)
    assert not call.is_alive()
    return read


def test_the_odd_rank_of_a_hang_has_another_number(job: Job):
    expected = [2] * 8
    expected[ODD] = 1
    assert job.run(find_the_odd_rank) == [expected] * 8


def fail_and_fall_back(state: ParallelState) -> list[dict[str, Any]]:
    group = state.create_group("failing", range(8))
    with pytest.raises(ArgumentError, match="op must be"):
        group.all_reduce(torch.ones(1), "median")
    failed = group.stats()
    for op, reason in (("first", "why"), ("first", "why"), ("first", "also"), ("second", "why")):
        group.count_fallback(op, "another way", reason)
    counted = group.stats()
    group.close()
    assert group.stats() == counted
    return [failed, counted]


def test_failed_calls_count_and_fallbacks_are_told_by_op(job: Job):
    for failed, counted in job.run(fail_and_fall_back):
        assert failed["sequence"] == 1
        assert failed["fallbacks"] == {}
        assert counted["sequence"] == 1
        assert counted["fallbacks"] == {"first": {"why": 2, "also": 1}, "second": {"why": 1}}
