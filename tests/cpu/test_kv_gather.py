"""KV gathers over gloo, against the whole batch that every rank knows."""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from distcomm import (
    ContextParallelPlan,
    DistcommError,
    GroupCoordinator,
    KvGather,
    ParallelState,
    all_gather_kv,
    all_gather_kv_into_cache,
)
from distcomm.context_parallel import gather
from tests.cpu.job import Job
from tests.kv_cases import KvCase, random_case, same_bits, whole_batch

CP_SIZES = range(1, 9)
NUM_CASES = 25


def with_group(state: ParallelState, size: int, body: Callable[..., Any], *args: Any) -> Any:
    """``body(group, ...)`` on the first ranks of the job, in a group of their own."""
    if state.rank >= size:
        return None
    group = state.groups.get(f"first {size}") or state.create_group(f"first {size}", range(size))
    return body(group, *args)


def shards(group: GroupCoordinator, case: KvCase, whole: list[torch.Tensor]) -> list[torch.Tensor]:
    return [case.plan.shard(x, group.rank_in_group) for x in whole]


def gathered(result: Any, num_tensors: int) -> list[torch.Tensor]:
    return [result] if num_tensors == 1 else list(result)


# ---- what comes out -----------------------------------------------------------------------------


def gather_random_batches(group: GroupCoordinator) -> None:
    rng = random.Random(group.world_size)
    for number in range(NUM_CASES):
        case = random_case(rng, group.world_size)
        whole = whole_batch(case)
        mine = shards(group, case, whole)
        out: Any = None
        if number % 3 == 1:
            out = [torch.full_like(x, 1) for x in whole]
        if number % 5 == 2:  # rows of a wider tensor, as of a fused projection
            mine = [torch.stack((x, x), dim=1)[:, 1] for x in mine]
        stream = torch.cpu.Stream() if number % 2 else None
        result: Any = all_gather_kv(
            group, case.plan, *mine, out=out[0] if out and len(out) == 1 else out, stream=stream
        )
        if stream is not None:
            assert isinstance(result, KvGather)
            assert result.is_completed()
            result = result.wait()
        results = gathered(result, len(whole))
        assert all(map(same_bits, results, whole)), (number, case)
        if out:
            assert all(a is b for a, b in zip(results, out, strict=True))


def gather_into_caches(group: GroupCoordinator) -> None:
    rng = random.Random(1000 + group.world_size)
    for number in range(NUM_CASES):
        case = random_case(rng, group.world_size)
        whole = whole_batch(case)
        num_tokens = case.plan.num_tokens
        num_slots = num_tokens + rng.randrange(20)
        chosen = rng.sample(range(num_slots), num_tokens)
        slots = [-1 if rng.random() < 0.2 else slot for slot in chosen]
        mapping = torch.tensor(slots, dtype=rng.choice([torch.int32, torch.int64]))
        caches = [torch.full((num_slots, *x.shape[1:]), 3).to(x.dtype) for x in whole]
        if number % 4 == 3:  # keys and values of a slot side by side
            caches = [torch.stack((x, x), dim=1)[:, 0] for x in caches]
        expected = [cache.clone() for cache in caches]
        for cache, x in zip(expected, whole, strict=True):
            for token, slot in enumerate(slots):
                if slot >= 0:
                    cache[slot] = x[token]
        mine = shards(group, case, whole)
        result = all_gather_kv_into_cache(
            group, case.plan, mine, caches, mapping, validate=number % 2 == 0
        )
        assert all(a is b for a, b in zip(gathered(result, len(whole)), caches, strict=True))
        assert all(map(same_bits, caches, expected)), (number, case)


@pytest.mark.parametrize("size", CP_SIZES)
def test_random_batches(job: Job, size: int):
    job.run(with_group, size, gather_random_batches)


@pytest.mark.parametrize("size", CP_SIZES)
def test_into_caches(job: Job, size: int):
    job.run(with_group, size, gather_into_caches)


def use_both_groups(state: ParallelState) -> None:
    """Gathers over cp and over tp take turns; each has plans of its own."""
    rng = random.Random(7)
    for _ in range(5):
        for group in (state.cp, state.tp):
            case = random_case(rng, group.world_size)
            whole = whole_batch(case)
            mine = shards(group, case, whole)
            results = gathered(all_gather_kv(group, case.plan, *mine), len(whole))
            assert all(map(same_bits, results, whole))


def test_two_groups(job: Job):
    job.run(use_both_groups)


def inputs_stay(group: GroupCoordinator) -> None:
    plan = ContextParallelPlan([9, 4], group.world_size)
    x = plan.shard(torch.arange(13.0), group.rank_in_group)
    before = x.clone()
    result = all_gather_kv(group, plan, x)
    result.fill_(-1)
    assert torch.equal(x, before)


def test_results_share_nothing_with_the_inputs(job: Job):
    job.run(with_group, 4, inputs_stay)


def calls_of(group: GroupCoordinator, backend: str) -> dict[str, int]:
    counted = group.stats()["ops"].get("all_gather_kv", {})
    found = counted.get(backend, {"calls": 0, "bytes": 0})
    return {name: found[name] for name in ("calls", "bytes")}


def gather_over_one(group: GroupCoordinator) -> None:
    before = calls_of(group, "local")["calls"]
    plan = ContextParallelPlan([3, 0, 2], 1)
    k, v = torch.rand(5, 2), torch.rand(5)
    assert all_gather_kv(group, plan, k) is k
    assert all_gather_kv(group, plan, k, v) == (k, v)
    out = torch.zeros(5, 2)
    assert all_gather_kv(group, plan, k, out=out) is out
    assert torch.equal(out, k)
    handle = all_gather_kv(group, plan, k, stream=torch.cpu.Stream())
    assert handle.wait() is k
    assert calls_of(group, "local")["calls"] == before + 5  # two of them for k and v


def test_a_group_of_one_copies_nothing_unless_told(job: Job):
    job.run(with_group, 1, gather_over_one)


def count(group: GroupCoordinator) -> dict[str, Any]:
    plan = ContextParallelPlan([8], group.world_size)
    x = plan.shard(torch.zeros(8, 3), group.rank_in_group)
    before = calls_of(group, "gloo")
    all_gather_kv(group, plan, x, x)
    after = calls_of(group, "gloo")
    assert group.stats()["fallbacks"] == {}
    return {key: after[key] - before[key] for key in after}


def test_gathers_are_counted_by_tensor(job: Job):
    counts = job.run(with_group, 2, count)
    assert counts[:2] == [{"calls": 2, "bytes": 2 * 4 * 3 * 4}] * 2


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, q_positions: torch.Tensor
) -> torch.Tensor:
    """[S, H, D] queries at `q_positions` of a sequence, to keys and values [L, H, D]."""
    scores = torch.einsum("shd,lhd->hsl", q, k) / q.shape[-1] ** 0.5
    hidden = torch.arange(len(k)) > q_positions[:, None]
    weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
    return torch.einsum("hsl,lhd->shd", weights, v)


def attend_over_ranks(group: GroupCoordinator) -> None:
    """Zigzag shards, gathered keys and values, and the plan's lengths: full causal attention."""
    seq_lens = [29, 1, 0, 64, 5]
    plan = ContextParallelPlan(seq_lens, group.world_size)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(99, 2, 8, generator=generator) for _ in range(3))
    sequences = torch.tensor(seq_lens).cumsum(0).tolist()
    expected = torch.cat(
        [
            attend(*(x[end - length : end] for x in (q, k, v)), torch.arange(length))
            for end, length in zip(sequences, seq_lens, strict=True)
        ]
    )
    rank = group.rank_in_group
    all_k, all_v = all_gather_kv(group, plan, plan.shard(k, rank), plan.shard(v, rank))
    lengths = plan.attention_lengths(rank)
    blocks = plan.shard(q, rank).split([n for pair in lengths.q_lens for n in pair])
    kv_lens = [n for pair in lengths.kv_lens for n in pair]
    results = []
    for number, (block, kv_len) in enumerate(zip(blocks, kv_lens, strict=True)):
        start = sequences[number // 2] - seq_lens[number // 2]
        keys, values = all_k[start : start + kv_len], all_v[start : start + kv_len]
        # Bottom right: the last query sees all keys.
        results.append(attend(block, keys, values, torch.arange(kv_len - len(block), kv_len)))
    torch.testing.assert_close(torch.cat(results), plan.shard(expected, rank))


@pytest.mark.parametrize("size", [2, 4])
def test_attention_over_zigzag_shards(job: Job, size: int):
    job.run(with_group, size, attend_over_ranks)


# ---- bad input ----------------------------------------------------------------------------------


def error_of(call: Callable[[], Any]) -> tuple[str, str]:
    try:
        call()
    except DistcommError as error:
        return type(error).__name__, str(error)
    return "", ""


def is_fit_for_use(group: GroupCoordinator) -> bool:
    plan = ContextParallelPlan([6, 3], group.world_size)
    x = torch.arange(9.0)
    return torch.equal(all_gather_kv(group, plan, plan.shard(x, group.rank_in_group)), x)


def gather_badly(group: GroupCoordinator, bad: dict[str, Any], odd_ranks: set[int]) -> Any:
    """A gather in which some ranks have other arguments than the rest."""
    plan = ContextParallelPlan([6, 3], group.world_size)
    arguments: dict[str, Any] = {
        "plan": plan,
        "tensors": [plan.shard(torch.arange(9.0), group.rank_in_group)],
    }
    if group.rank in odd_ranks:
        arguments.update(bad)
    given, tensors = arguments.pop("plan"), arguments.pop("tensors")
    result = error_of(lambda: all_gather_kv(group, given, *tensors, **arguments))
    assert is_fit_for_use(group)
    return result


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "rows": ({"tensors": [torch.zeros(7)]}, r"tensors must be of \d rows.*shape \[7\]"),
    "scalar": ({"tensors": [torch.tensor(1.0)]}, r"tensors must be of \d rows"),
    "no tensors": ({"tensors": []}, "tensors must be at least one tensor"),
    "a list": ({"tensors": [[torch.zeros(3)]]}, "tensors must be tensors; got list"),
    "out of numbers": ({"out": [0.0]}, "out must be tensors; got float"),
    "no plan": ({"plan": [6, 3]}, r"plan must be a ContextParallelPlan; got \[6, 3\]"),
    "cp_size": (
        {"plan": ContextParallelPlan([9], 2)},
        "plan must be for 3 ranks, as the group has; got one with cp_size=2",
    ),
    "small out": ({"out": torch.zeros(8)}, r"out must be of shape \[9\]; got \[8\]"),
    "dtype of out": ({"out": torch.zeros(9).double()}, "out must be of dtype torch.float32"),
    "strided out": ({"out": torch.zeros(18)[::2]}, "out must be contiguous"),
    "two outs": ({"out": [torch.zeros(9)] * 2}, "out must be 1 tensors, as many as are gathered"),
    "method": ({"method": "magic"}, "method must be one of auto, collective, kernel, copy_engine"),
}


@pytest.mark.parametrize("odd_ranks", [{1}, {0, 1, 2}], ids=["one rank", "all ranks"])
@pytest.mark.parametrize("what", BAD)
def test_bad_arguments_are_errors_on_all_ranks(job: Job, what: str, odd_ranks: set[int]):
    bad, text = BAD[what]
    for rank, (kind, message) in enumerate(
        job.run(with_group, 3, gather_badly, bad, odd_ranks)[:3]
    ):
        if rank in odd_ranks:
            assert kind == "ArgumentError"
            assert re.search(text, message), message
            assert f"rank {rank} ({rank} of 3)" in message
        else:
            assert kind == "PlanMismatchError"
            assert "all_gather_kv: ranks [1] differ" in message
            assert re.search(f"rank 1: failed: .*{text}", message), message


@pytest.mark.parametrize("method", ["kernel", "copy_engine"])
def test_methods_that_need_gpus_are_refused(job: Job, method: str):
    results = job.run(with_group, 2, gather_badly, {"method": method}, {0, 1})
    for kind, message in results[:2]:
        assert kind == "ArgumentError"
        assert f"method must be one that is possible here; got '{method}', but the" in message


def different_shards(group: GroupCoordinator, what: str) -> Any:
    """Each rank's arguments are fine by themselves, but rank 2 has another plan or row."""
    odd = group.rank == 2
    seq_lens, mode, row = [6, 3], "zigzag", (2,)
    if odd:
        seq_lens, mode, row = {
            "lengths": ([3, 6], mode, row),
            "mode": (seq_lens, "contiguous", row),
            "row": (seq_lens, mode, (2, 1)),
        }[what]
    plan = ContextParallelPlan(seq_lens, group.world_size, mode)
    x = plan.shard(torch.zeros(9, *row), group.rank_in_group)
    result = error_of(lambda: all_gather_kv(group, plan, x))
    assert is_fit_for_use(group)
    return result


@pytest.mark.parametrize("what", ["lengths", "mode", "row"])
def test_plans_that_differ_are_found_before_anything_is_sent(job: Job, what: str):
    for kind, message in job.run(with_group, 4, different_shards, what)[:4]:
        assert kind == "PlanMismatchError"
        assert "all_gather_kv: ranks [2] differ" in message
        assert message.count("ContextParallelPlan([6, 3], cp_size=4") == (
            3 if what == "lengths" else 4
        )


def count_comparisons(group: GroupCoordinator) -> list[int]:
    """How often the ranks have compared, after each of some gathers."""
    compare, calls, compared = gather.agree, [], []

    def counted(*args: Any) -> None:
        calls.append(args)
        compare(*args)

    gather.agree = counted
    try:
        plan, equal = (ContextParallelPlan([9], group.world_size) for _ in range(2))
        x = plan.shard(torch.zeros(9, 2), group.rank_in_group)
        for each in (plan, plan, equal, plan, equal):
            all_gather_kv(group, each, x)
            compared.append(len(calls))
    finally:
        gather.agree = compare
    return compared


def test_a_plan_is_compared_at_its_first_gather_alone(job: Job):
    assert job.run(with_group, 3, count_comparisons)[:3] == [[1, 1, 2, 2, 2]] * 3


def gather_overlapping(group: GroupCoordinator) -> Any:
    plan = ContextParallelPlan([8], group.world_size)
    out = torch.zeros(8)
    rows = plan.tokens_per_rank[group.rank_in_group]
    return error_of(lambda: all_gather_kv(group, plan, out[:rows], out=out))


def test_outputs_must_not_overlap_inputs(job: Job):
    for kind, message in job.run(with_group, 2, gather_overlapping)[:2]:
        assert kind == "ArgumentError"
        assert "out must be in other memory than what is gathered" in message


def gather_closed(state: ParallelState) -> Any:
    group = state.create_group("to be closed", range(state.world_size))
    plan = ContextParallelPlan([16], group.world_size)
    x = plan.shard(torch.zeros(16), group.rank_in_group)
    all_gather_kv(group, plan, x)
    group.close()
    other = ContextParallelPlan([16], group.world_size)
    return [error_of(lambda p=p: all_gather_kv(group, p, x)) for p in (plan, other)]


def test_a_closed_group(job: Job):
    for kind, message in itertools.chain(*job.run(gather_closed)):
        assert kind == "GroupClosedError"
        assert "the group is closed" in message


# ---- bad caches ---------------------------------------------------------------------------------


def fill_badly(group: GroupCoordinator, bad: dict[str, Any], odd_ranks: set[int]) -> Any:
    plan = ContextParallelPlan([6, 3], group.world_size)
    arguments: dict[str, Any] = {
        "tensors": plan.shard(torch.arange(18.0).view(9, 2), group.rank_in_group),
        "caches": torch.zeros(12, 2),
        "slot_mapping": torch.arange(9),
    }
    if group.rank in odd_ranks:
        arguments.update(bad)
    result = error_of(lambda: all_gather_kv_into_cache(group, plan, **arguments))
    assert is_fit_for_use(group)
    return result


BAD_CACHES: dict[str, tuple[dict[str, Any], str]] = {
    "row": ({"caches": torch.zeros(12, 3)}, r"caches must be of shape \['slots', 2\]; got \[12, 3"),
    "dtype": ({"caches": torch.zeros(12, 2).half()}, "caches must be of dtype torch.float32"),
    "strides": ({"caches": torch.zeros(2, 12).T}, "caches must be of contiguous slots"),
    "shared": ({"caches": torch.zeros(1, 2).expand(12, 2)}, "caches must be of contiguous slots"),
    "count": ({"caches": [torch.zeros(12, 2)] * 2}, "caches must be 1 tensors"),
    "slots": ({"slot_mapping": list(range(9))}, "slot_mapping must be tensors; got list"),
    "int16": ({"slot_mapping": torch.arange(9).short()}, "slot_mapping must be of dtype int32 or"),
    "short": ({"slot_mapping": torch.arange(8)}, r"slot_mapping must be of shape \[9\]"),
    "range": (
        {"slot_mapping": torch.arange(9) + 4, "validate": True},
        "slot_mapping must be below 12, the number of slots; got slot 12",
    ),
    "twice": (
        {"slot_mapping": torch.arange(9) // 2, "validate": True},
        "slot_mapping must be of distinct slots; got slot 0 more than once",
    ),
}


@pytest.mark.parametrize("what", BAD_CACHES)
def test_bad_caches_are_errors_on_all_ranks(job: Job, what: str):
    bad, text = BAD_CACHES[what]
    if "validate" in bad:  # all ranks must ask for it
        results = job.run(with_group, 3, fill_badly, bad, {0, 1, 2})
        odd_ranks = {0, 1, 2}
    else:
        results = job.run(with_group, 3, fill_badly, bad, {1})
        odd_ranks = {1}
    for rank, (kind, message) in enumerate(results[:3]):
        assert re.search(text, message), message
        assert kind == ("ArgumentError" if rank in odd_ranks else "PlanMismatchError")


def fill_differently(group: GroupCoordinator, validate: bool) -> Any:
    plan = ContextParallelPlan([6, 3], group.world_size)
    x = plan.shard(torch.zeros(9, 2), group.rank_in_group)
    slots, cache = torch.arange(9), torch.zeros(12, 2)
    all_gather_kv_into_cache(group, plan, x, cache, slots)  # the plan is known from here on
    if group.rank == 1:
        slots[3] = 11
    return error_of(
        lambda: all_gather_kv_into_cache(group, plan, x, cache, slots, validate=validate)
    )


def test_slots_that_differ_between_ranks_are_found_on_request(job: Job):
    for kind, message in job.run(with_group, 3, fill_differently, True)[:3]:
        assert kind == "PlanMismatchError"
        assert "all_gather_kv_into_cache: ranks [1] differ" in message
    assert job.run(with_group, 3, fill_differently, False)[:3] == [("", "")] * 3
