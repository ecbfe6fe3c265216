"""Command line of the benchmarks: ``host`` under torchrun, one process a GPU; ``layout`` alone."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .. import env
from ..parallel_state import init_distributed
from .conditions import write_result
from .host import format_host, run_host
from .layout import format_layout, run_layout


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m distcomm.bench", description=__doc__)
    parser.add_argument(
        "benchmark",
        choices=["host", "layout"],
        help="host: CPU cost of a call; layout: time to find a rank's groups",
    )
    parser.add_argument("--json", type=Path, help="write the result to this file")
    options = parser.parse_args()
    if options.benchmark == "layout":
        result = run_layout()
        _report(options, result, format_layout(result))
        return
    world_size = env.read_int("WORLD_SIZE") or 1
    with init_distributed(tp=world_size, device="cuda", timeout=60) as state:
        result = run_host(state)
        if state.rank == 0:
            _report(options, result, format_host(result))


def _report(options: argparse.Namespace, result: dict[str, Any], table: str) -> None:
    print(table)
    if options.json is not None:
        write_result(options.json, options.benchmark, result)


if __name__ == "__main__":
    main()
