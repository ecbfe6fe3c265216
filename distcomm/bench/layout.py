"""Time in which one rank finds its groups in a large world. Needs no GPU and no other process."""

from __future__ import annotations

import platform
import statistics
import time
from typing import Any

from ..layout import ParallelLayout

__all__ = ["format_layout", "run_layout"]

_WORLD_SIZE = 524_288
_LAUNCHES: dict[str, dict[str, Any]] = {
    "tp=8 cp=2 pp=16, dp=4096": {"tp": 8, "cp": 2, "pp": 16, "dp": 4096},
    "tp=8 cp=2 ep=4, dp=65536": {"tp": 8, "cp": 2, "ep": 4, "dp": 65_536},
    "dp=524288": {"dp": 524_288},
    "tp=524288": {"tp": 524_288},
}


def run_layout(num_rounds: int = 20) -> dict[str, Any]:
    """Milliseconds to make the layout and all groups of the last rank, median of the rounds."""
    medians = {}
    for name, sizes in _LAUNCHES.items():
        times = []
        for _ in range(num_rounds):
            start = time.perf_counter()
            groups = ParallelLayout(_WORLD_SIZE, **sizes).groups_of(_WORLD_SIZE - 1)
            times.append((time.perf_counter() - start) * 1e3)
            del groups  # not timed: a job keeps them
        medians[name] = round(statistics.median(times), 4)
    return {
        "conditions": {
            "world_size": _WORLD_SIZE,
            "cpu": platform.machine(),
            "python": platform.python_version(),
            "rounds": num_rounds,
        },
        "median_ms": medians,
    }


def format_layout(result: dict[str, Any]) -> str:
    """The result as a table."""
    lines = [f"{'groups of one rank of 524,288':<32} {'ms':>8}"]
    lines += [f"{name:<32} {value:>8.3f}" for name, value in result["median_ms"].items()]
    return "\n".join(lines)
