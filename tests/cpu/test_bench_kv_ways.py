"""What KV gathers are compared with in the benchmark gives right results, too."""

from __future__ import annotations

import random

import pytest
import torch

from distcomm import ContextParallelPlan, ParallelState
from distcomm.bench.kv_ways import GatherAndIndexCopy, PadGatherCat
from tests.cpu.job import Job


def pad_gather_cat(state: ParallelState, num_tokens: int) -> None:
    for group in (state.cp, state.tp):
        plan = ContextParallelPlan([num_tokens], group.world_size)
        whole = torch.randn(num_tokens, 2, 3, generator=torch.Generator().manual_seed(0))
        mine = plan.shard(whole, group.rank_in_group)
        for symmetric in (False, True):
            assert torch.equal(PadGatherCat(group, plan, mine, symmetric=symmetric)(), whole)


def gather_and_index_copy(state: ParallelState) -> None:
    rng = random.Random(0)
    group = state.cp
    plan = ContextParallelPlan([5, 0, 17, 2], group.world_size)
    k, v = torch.rand(24, 2), torch.arange(24)
    slots = torch.tensor(rng.sample(range(40), 24))
    caches = (torch.full((41, 2), -1.0), torch.full((41,), -1))
    k, v = state.cp.broadcast(k), state.cp.broadcast(v)
    mine = tuple(plan.shard(x, group.rank_in_group) for x in (k, v))
    GatherAndIndexCopy(group, plan, mine, caches, slots, symmetric=False)()
    for cache, x in zip(caches, (k, v), strict=True):
        assert torch.equal(cache[slots], x)
        others = sorted(set(range(40)) - set(slots.tolist()))
        assert bool((cache[others] == -1).all())


@pytest.mark.parametrize("num_tokens", [1, 7, 64, 99])
def test_pad_gather_cat(job: Job, num_tokens: int):
    job.run(pad_gather_cat, num_tokens)


def test_gather_and_index_copy(job: Job):
    job.run(gather_and_index_copy)
