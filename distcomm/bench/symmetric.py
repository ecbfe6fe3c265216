"""Symmetric memory: host cost of a context, and what it makes of NCCL's small collectives."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from ..group import GroupCoordinator
from ..state import ParallelState
from ..timing import CapturedCalls, Timed, slowest_medians
from .conditions import conditions

__all__ = ["format_symmetric", "run_symmetric"]

SIZES = [1 << power for power in range(10, 21)]
_CALLS_A_GRAPH = 20


def run_symmetric(state: ParallelState, *, num_rounds: int = 40) -> dict[str, Any]:
    """Times contexts in steady state, and all-reduces in CUDA graphs. Collective.

    Args:
        state: of a CUDA job with at least two ranks.

    Returns:
        Host microseconds a context; per size, GPU microseconds a call on ordinary and on
        symmetric buffers. Medians, of the slowest rank.
    """
    group = state.world
    if group.pynccl_comm is None:
        raise SystemExit("the symmetric benchmark needs a CUDA job with at least two ranks")
    return {
        "conditions": {**conditions(state), "dtype": "bfloat16", "calls_a_graph": _CALLS_A_GRAPH},
        "context_host_us": _time_contexts(state),
        "all_reduce_graph_us": _time_all_reduces(group, state.device, num_rounds),
    }


def format_symmetric(result: dict[str, Any]) -> str:
    """The result as two tables."""
    lines = [f"{'host µs of a context':<44} {'µs':>7}"]
    lines += [f"{name:<44} {micros:>7.2f}" for name, micros in result["context_host_us"].items()]
    lines += ["", f"{'all_reduce bytes':>16} {'ordinary µs':>12} {'symmetric µs':>13} {'ratio':>6}"]
    lines += [
        f"{row['bytes']:>16} {row['ordinary_us']:>12.2f} {row['symmetric_us']:>13.2f} "
        f"{row['ratio']:>6.2f}"
        for row in result["all_reduce_graph_us"]
    ]
    return "\n".join(lines)


def _time_contexts(state: ParallelState, batch: int = 1000) -> dict[str, float]:
    group = state.world

    def context() -> None:
        with group.symmetric_memory():
            pass

    def nested() -> None:
        with group.symmetric_memory(), group.symmetric_memory():
            pass

    def allocating() -> None:
        with group.symmetric_memory():
            torch.empty(1024, device=state.device)

    def disabled() -> None:
        with group.symmetric_memory(enabled=False):
            pass

    ways: dict[str, Callable[[], None]] = {
        "symmetric_memory(), entered and left": context,
        "the same, twice nested": nested,
        "with one torch.empty inside": allocating,
        "symmetric_memory(enabled=False)": disabled,
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(12):
        for name, way in ways.items():
            start = time.perf_counter_ns()
            for _ in range(batch):
                way()
            if number >= 2:  # the first rounds warm up
                times[name].append((time.perf_counter_ns() - start) / batch / 1000)
    medians = {name: statistics.median(each) for name, each in times.items()}
    everyone = group.all_gather_object(medians)
    return {name: round(max(each[name] for each in everyone), 3) for name in ways}


def _time_all_reduces(
    group: GroupCoordinator, device: torch.device, num_rounds: int
) -> list[dict[str, Any]]:
    rows = []
    for num_bytes in SIZES:
        ways = {kind: _timed(group, device, num_bytes, kind) for kind in ("ordinary", "symmetric")}
        medians = slowest_medians(group, ways, num_rounds)
        rows.append(
            {
                "bytes": num_bytes,
                "ordinary_us": round(medians["ordinary"], 3),
                "symmetric_us": round(medians["symmetric"], 3),
                "ratio": round(medians["ordinary"] / medians["symmetric"], 3),
            }
        )
    return rows


def _timed(group: GroupCoordinator, device: torch.device, num_bytes: int, kind: str) -> Timed:
    """Replays a graph of all-reduces on buffers of that kind, whose result was checked."""
    symmetric = kind == "symmetric"
    with group.symmetric_memory(enabled=symmetric):
        x = torch.ones(num_bytes // 2, dtype=torch.bfloat16, device=device)
        y = torch.zeros_like(x)
    if group.is_symmetric(x) != symmetric:
        raise SystemExit(f"the buffers are symmetric: {not symmetric}, wanted: {symmetric}")
    captured = CapturedCalls(group, lambda: group.all_reduce(x, out=y), _CALLS_A_GRAPH)
    captured.replay()
    if not bool((y == group.world_size).all()):
        raise SystemExit(f"all_reduce of {num_bytes} bytes is wrong on rank {group.rank}")

    return captured.time
