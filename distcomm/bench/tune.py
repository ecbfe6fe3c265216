"""Makes a table of algorithms: which one is the fastest, by size."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from ..algorithms import ALGORITHMS
from ..calibration import CALLS, TENSORS, measure, table_of
from ..state import ParallelState
from .conditions import conditions

__all__ = ["format_tune", "run_tune", "write_tables"]

# Between powers of two there is one size more, so that limits are not far off: but for the smallest
# ones, which differ little, and the largest, which take long.
_SIZES = tuple(
    size
    for power in range(10, 29)
    for size in (1 << power, (1 << power) + (1 << (power - 1)))
    if size & (size - 1) == 0 or 1 << 16 <= size < 1 << 26
)


def run_tune(state: ParallelState, *, num_rounds: int = 12) -> dict[str, Any]:
    """Times every algorithm of every op, eager and captured. Collective.

    Returns:
        Conditions, the measurements, and a table as `init_distributed(tune=)` takes it.
    """
    measured = measure(state.world, _SIZES, num_rounds)
    return {
        "conditions": conditions(state),
        "measured_us": measured,
        "tables": [table_of(measured, state.world)],
    }


def format_tune(result: Mapping[str, Any]) -> str:
    """The table."""
    lines = []
    for table in result["tables"]:
        for call, tensors, op in product(CALLS, TENSORS, ALGORITHMS):
            parts = [
                f"{name} up to {limit:,}" if limit is not None else name
                for limit, name in table[call][tensors][op]
            ]
            lines.append(f"{call:<9} {tensors:<10} {op:<20} {', '.join(parts)}")
    return "\n".join(lines)


def write_tables(path: Path, results: Sequence[Mapping[str, Any]]) -> None:
    """One file of the tables of several results, such as of several group sizes."""
    content = {
        "conditions": [result["conditions"] for result in results],
        "tables": [table for result in results for table in result["tables"]],
    }
    path.write_text(_text(content) + "\n")


def _text(value: Any, depth: int = 0) -> str:
    """JSON, with the ranges of an op in one line."""
    inner, outer = " " * 2 * (depth + 1), " " * 2 * depth
    if isinstance(value, dict):
        entries = [f"{json.dumps(key)}: {_text(each, depth + 1)}" for key, each in value.items()]
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        entries = [_text(each, depth + 1) for each in value]
    else:
        return json.dumps(value)
    begin, end = "{}" if isinstance(value, dict) else "[]"
    lines = f",\n{inner}".join(entries)
    return f"{begin}\n{inner}{lines}\n{outer}{end}"
