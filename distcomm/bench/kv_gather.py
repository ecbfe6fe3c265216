"""KV gathers under context parallelism: ours, and pad-gather-cat as engines do it.

One tensor [T, 8, 128] of bf16 (2 KiB a token) unless said otherwise. Every way's result is
compared with the whole batch before it is timed.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from ..context_parallel import (
    ContextParallelPlan,
    KvGather,
    all_gather_kv,
    all_gather_kv_into_cache,
)
from ..group import GroupCoordinator
from ..handles import AsyncHandle
from ..state import ParallelState
from ..timing import CapturedCalls, Timed, elapsed_us, slowest_medians
from .conditions import conditions
from .kv_ways import GatherAndIndexCopy, PadGatherCat

__all__ = ["format_kv_gather", "run_kv_gather"]

NUM_TOKENS = (2_048, 8_192, 32_768, 131_072)
_METHODS = ("collective", "kernel", "copy_engine", "auto")
_ROW = (8, 128)
_REFERENCE = "pad-gather-cat, symmetric"
# Capturing many calls of the largest sizes would take the memory of as many outputs.
_CALLS_A_GRAPH = {2_048: 20, 8_192: 20, 32_768: 8, 131_072: 4}
_MATRIX = (4096, 8192, 8192)
_BESIDE_TOKENS = 131_072


@dataclass(frozen=True)
class _Batch:
    """One batch on this rank: the plan, all rows on the CPU's side of a check, and this rank's."""

    plan: ContextParallelPlan
    whole: torch.Tensor
    mine: torch.Tensor


def run_kv_gather(state: ParallelState, *, num_rounds: int = 40) -> dict[str, Any]:
    """Times all ways. Collective.

    Args:
        state: of a CUDA job whose world is the context-parallel group.

    Returns:
        Microseconds, medians of the slowest rank: by tokens and way, eager and in a graph; into a
        paged cache; of a matrix product alone and beside gathers; and bytes of memory that a
        gather takes at most beyond its inputs, as a multiple of its output.
    """
    group = state.world
    if group.pynccl_comm is None:
        raise SystemExit("the kv_gather benchmark needs a CUDA job with at least two ranks")
    return {
        "conditions": {
            **conditions(state),
            "row": f"{list(_ROW)} bfloat16",
            "mode": "zigzag",
            "rounds": num_rounds,
        },
        "gather_us": [_gather_row(group, tokens, num_rounds) for tokens in NUM_TOKENS],
        "cache_us": _cache_row(group, num_rounds),
        "matrix_product_us": _beside(group, num_rounds),
        "peak_memory_in_outputs": _peak_memory(group),
    }


def format_kv_gather(result: dict[str, Any]) -> str:
    """The result as tables."""
    lines = []
    for row in result["gather_us"]:
        lines.append(
            f"{row['tokens']:,} tokens{'eager µs':>34} {'graph µs':>9} {'/ reference':>12}"
        )
        reference = row["graph"][_REFERENCE]
        for name, eager in row["eager"].items():
            graph = row["graph"][name]
            lines.append(f"  {name:<40} {eager:>8.1f} {graph:>9.1f} {reference / graph:>13.2f}")
    lines.append("K and V of 16 ragged sequences into a paged cache, in graphs, µs")
    lines += [f"  {name:<40} {micros:>7.1f}" for name, micros in result["cache_us"].items()]
    lines.append(f"matrix product {_MATRIX} beside gathers of 256 MiB, µs")
    lines += [
        f"  {name:<40} {micros:>7.1f}" for name, micros in result["matrix_product_us"].items()
    ]
    lines.append("most memory taken, in sizes of the output")
    lines += [
        f"  {name:<40} {times:>7.2f}" for name, times in result["peak_memory_in_outputs"].items()
    ]
    return "\n".join(lines)


def _batch(
    group: GroupCoordinator, seq_lens: list[int], *, row: tuple[int, ...] = _ROW, seed: int = 0
) -> _Batch:
    plan = ContextParallelPlan(seq_lens, group.world_size)
    generator = torch.Generator(group.device).manual_seed(seed)
    whole = torch.randn(
        (plan.num_tokens, *row), dtype=torch.bfloat16, device=group.device, generator=generator
    )
    return _Batch(plan, whole, plan.shard(whole, group.rank_in_group))


def _ways(group: GroupCoordinator, batch: _Batch) -> dict[str, Callable[[], torch.Tensor]]:
    ways: dict[str, Callable[[], torch.Tensor]] = {
        "pad-gather-cat": PadGatherCat(group, batch.plan, batch.mine, symmetric=False),
        _REFERENCE: PadGatherCat(group, batch.plan, batch.mine, symmetric=True),
    }
    for method in _METHODS:
        ways[f"all_gather_kv, {method}"] = partial(
            all_gather_kv, group, batch.plan, batch.mine, method=method
        )
    return ways


def _gather_row(group: GroupCoordinator, num_tokens: int, num_rounds: int) -> dict[str, Any]:
    batch = _batch(group, [num_tokens])
    ways = _ways(group, batch)
    eager: dict[str, Timed] = {}
    graphs: dict[str, Timed] = {}
    for name, way in ways.items():
        _check(group, name, [(way(), batch.whole)])
        eager[name] = partial(_eager_us, way)
        graphs[name] = CapturedCalls(group, way, _CALLS_A_GRAPH[num_tokens]).time
    return {
        "tokens": num_tokens,
        "eager": _rounded(slowest_medians(group, eager, num_rounds)),
        "graph": _rounded(slowest_medians(group, graphs, num_rounds)),
    }


def _eager_us(way: Callable[[], object], num_calls: int = 10) -> float:
    def calls() -> None:
        for _ in range(num_calls):
            way()

    return elapsed_us(calls) / num_calls


def _cache_row(group: GroupCoordinator, num_rounds: int) -> dict[str, float]:
    rng = random.Random(0)
    seq_lens = [rng.randrange(256, 4096) for _ in range(16)]
    k, v = (_batch(group, seq_lens, seed=seed) for seed in (0, 1))
    num_slots = 2 * k.plan.num_tokens
    slots = torch.tensor(rng.sample(range(num_slots), k.plan.num_tokens), device=group.device)
    with group.symmetric_memory():
        caches = tuple(
            torch.zeros((num_slots + 1, *_ROW), dtype=torch.bfloat16, device=group.device)
            for _ in range(2)
        )
    mine = (k.mine, v.mine)
    ways: dict[str, Callable[[], object]] = {
        "gather + index copy": GatherAndIndexCopy(
            group, k.plan, mine, caches, slots, symmetric=False
        ),
        "gather + index copy, symmetric": GatherAndIndexCopy(
            group, k.plan, mine, caches, slots, symmetric=True
        ),
    }
    for method in ("collective", "kernel"):
        ways[f"all_gather_kv_into_cache, {method}"] = partial(
            all_gather_kv_into_cache, group, k.plan, mine, caches, slots, method=method
        )
    timed: dict[str, Timed] = {}
    for name, way in ways.items():
        for cache in caches:
            cache.fill_(-1)
        way()
        pairs = zip(caches, (k.whole, v.whole), strict=True)
        _check(group, name, [(cache[slots], whole) for cache, whole in pairs])
        timed[name] = CapturedCalls(group, way, 4).time
    return _rounded(slowest_medians(group, timed, num_rounds))


def _beside(group: GroupCoordinator, num_rounds: int) -> dict[str, float]:
    """How long a matrix product takes while a gather of 256 MiB runs on another stream."""
    batch = _batch(group, [_BESIDE_TOKENS])
    rows, inner, columns = _MATRIX
    a = torch.randn(rows, inner, dtype=torch.bfloat16, device=group.device)
    b = torch.randn(inner, columns, dtype=torch.bfloat16, device=group.device)
    product = torch.empty(rows, columns, dtype=torch.bfloat16, device=group.device)
    stream = torch.cuda.Stream(group.device)
    with group.symmetric_memory():
        out = torch.empty_like(batch.whole)
        shares = torch.empty_like(batch.mine)
    shares.copy_(batch.mine)

    def alone() -> float:
        torch.cuda.synchronize()
        group.barrier()
        return elapsed_us(lambda: torch.mm(a, b, out=product))

    def beside(start: Callable[[], AsyncHandle | KvGather[torch.Tensor]]) -> float | None:
        torch.cuda.synchronize()
        group.barrier()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        gather = start()  # dropped, it would make the product wait for it
        end.record(stream)
        begin.record()
        micros = elapsed_us(lambda: torch.mm(a, b, out=product))
        gather.wait()
        torch.cuda.synchronize()
        was_beside = begin.elapsed_time(end) > 0  # else the host was late with the product
        return micros if was_beside else None

    def nccl() -> AsyncHandle:
        return group.cp_all_gather_into_tensor_async(out, shares, stream)

    ways: dict[str, Timed] = {
        "alone": alone,
        "beside NCCL's symmetric all-gather": partial(beside, nccl),
    }

    def ours(method: str) -> KvGather[torch.Tensor]:
        return all_gather_kv(group, batch.plan, batch.mine, out=out, stream=stream, method=method)

    for method in ("kernel", "copy_engine"):
        _check(group, method, [(ours(method).wait(), batch.whole)])
        ways[f"beside all_gather_kv, {method}"] = partial(beside, partial(ours, method))
    return _rounded(slowest_medians(group, ways, num_rounds))


def _peak_memory(group: GroupCoordinator) -> dict[str, float]:
    """What each way allocates at most, the result included, in sizes of the result."""
    batch = _batch(group, [32_768])
    peaks = {}
    for name, way in _ways(group, batch).items():
        way()  # what is made once has been made
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        way()
        peaks[name] = round((torch.cuda.max_memory_allocated() - before) / batch.whole.nbytes, 3)
    return peaks


def _check(
    group: GroupCoordinator, name: str, pairs: list[tuple[torch.Tensor, torch.Tensor]]
) -> None:
    """A wrong result isn't worth timing."""
    for result, expected in pairs:
        if not torch.equal(result, expected):
            raise SystemExit(f"{name} is wrong on rank {group.rank}")


def _rounded(micros: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 2) for name, value in micros.items()}
