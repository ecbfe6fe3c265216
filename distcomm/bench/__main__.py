"""Command line of the benchmarks; run it under torchrun, one process a GPU."""

from __future__ import annotations

import argparse
from pathlib import Path

from .. import env
from ..parallel_state import init_distributed
from .conditions import write_result
from .host import format_host, run_host


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m distcomm.bench", description=__doc__)
    parser.add_argument("benchmark", choices=["host"], help="host: CPU cost of a call")
    parser.add_argument("--json", type=Path, help="write the result to this file")
    options = parser.parse_args()
    with init_distributed(tp=env.read_int("WORLD_SIZE") or 1, device="cuda", timeout=60) as state:
        result = run_host(state)
        if state.rank == 0:
            print(format_host(result))
            if options.json is not None:
                write_result(options.json, options.benchmark, result)


if __name__ == "__main__":
    main()
