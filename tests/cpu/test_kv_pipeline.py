"""KV gathers that take turns in a few buffers."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from typing import Any

import pytest
import torch

from distcomm import (
    ContextParallelPlan,
    DistcommError,
    ParallelState,
    PipelinedKvGather,
)
from tests.cpu.job import Job
from tests.kv_cases import same_bits


def gather_layers(state: ParallelState, depth: int) -> None:
    """Results come in the order of the starts, and stay as long as is promised."""
    group, rng = state.cp, random.Random(depth)
    pipeline = PipelinedKvGather(group, 64, depth=depth)
    expected: deque[list[torch.Tensor]] = deque()
    valid: deque[tuple[list[torch.Tensor], tuple[torch.Tensor, ...]]] = deque(maxlen=depth)
    for number in range(40):
        if len(expected) == depth or (expected and rng.random() < 0.4):
            results = pipeline.finish()
            assert isinstance(results, tuple)
            valid.append((expected.popleft(), results))
        else:
            lengths = [rng.randrange(17) for _ in range(3)]
            plan = ContextParallelPlan(lengths, group.world_size)
            whole = [
                torch.full((plan.num_tokens, 2), float(number)),
                torch.arange(plan.num_tokens) + number,
            ]
            pipeline.start(plan, *(plan.shard(x, group.rank_in_group) for x in whole))
            expected.append(whole)
            while len(valid) + len(expected) > depth:
                valid.popleft()  # overwritten by this start
        assert pipeline.num_under_way == len(expected)
        for whole, results in valid:
            assert all(map(same_bits, results, whole))


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_results_come_in_order_and_stay_valid(job: Job, depth: int):
    job.run(gather_layers, depth)


def buffers_of(state: ParallelState) -> int:
    group = state.cp
    plan = ContextParallelPlan([12], group.world_size)
    pipeline = PipelinedKvGather(group, 20)
    addresses = []
    for _ in range(6):
        pipeline.start(plan, plan.shard(torch.zeros(12, 3), group.rank_in_group))
        result = pipeline.finish()
        assert isinstance(result, torch.Tensor)
        assert result.shape == (12, 3)
        addresses.append(result.data_ptr())
    assert addresses == addresses[:2] * 3
    return len(set(addresses))


def test_two_buffers_take_turns(job: Job):
    assert set(job.run(buffers_of)) == {2}


def errors_of(state: ParallelState) -> list[str]:
    group = state.cp
    plan = ContextParallelPlan([8], group.world_size)
    x = plan.shard(torch.arange(16.0).view(8, 2), group.rank_in_group)
    pipeline = PipelinedKvGather(group, 8)

    def error_of(call: Callable[[], Any]) -> str:
        try:
            call()
        except DistcommError as error:
            return str(error)
        return "none"

    errors = [
        error_of(lambda: PipelinedKvGather(group, -1)),
        error_of(lambda: PipelinedKvGather(group, 8, depth=0)),
        error_of(pipeline.finish),
    ]
    pipeline.start(plan, x)
    errors.append(error_of(lambda: pipeline.start(ContextParallelPlan([9], 2), x)))
    errors.append(error_of(lambda: pipeline.start(plan, x, x)))
    errors.append(error_of(lambda: pipeline.start(plan, x.double())))
    pipeline.start(plan, x)
    errors.append(error_of(lambda: pipeline.start(plan, x)))
    for _ in range(2):  # nothing was lost
        assert torch.equal(pipeline.finish(), torch.arange(16.0).view(8, 2))
    return errors


def test_bad_input(job: Job):
    for errors in job.run(errors_of):
        for error, text in zip(
            errors,
            (
                "PipelinedKvGather: max_tokens must be an integer >= 0; got -1",
                "PipelinedKvGather: depth must be an integer >= 1; got 0",
                "finish: no gather is under way",
                "plan must be of at most 8 tokens, the size of the buffers; got one of 9",
                "rows as in the first start, torch.float32 [2]; got torch.float32 [2], torch.fl",
                "got torch.float64 [2]",
                "2 gathers are under way, as many as there are buffers: finish one first",
            ),
            strict=True,
        ):
            assert text in error
