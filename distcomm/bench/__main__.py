"""Command line of the benchmarks.

``host``, ``kv_gather`` and ``symmetric`` run under torchrun, one process a GPU; ``register`` in one
process with a GPU; ``layout`` anywhere.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .. import env
from ..parallel_state import init_distributed
from .conditions import write_result
from .host import format_host, run_host
from .kv_gather import format_kv_gather, run_kv_gather
from .layout import format_layout, run_layout
from .register import format_register, run_register
from .symmetric import format_symmetric, run_symmetric


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m distcomm.bench", description=__doc__)
    parser.add_argument(
        "benchmark",
        choices=["host", "kv_gather", "layout", "register", "symmetric"],
        help="host: CPU cost of a call; kv_gather: KV gathers of context parallelism; layout: time "
        "to find a rank's groups; register: cost of finding nothing to register; symmetric: "
        "contexts, and all-reduces on their tensors",
    )
    parser.add_argument("--json", type=Path, help="write the result to this file")
    options = parser.parse_args()
    if options.benchmark == "layout":
        result = run_layout()
        _report(options, result, format_layout(result))
        return
    run, table = _ON_GPUS[options.benchmark]
    # A process that torchrun hasn't started is a job of its own.
    with tempfile.TemporaryDirectory() as folder:
        alone = {"init_method": f"file://{folder}/store", "rank": 0, "world_size": 1}
        world_size = env.read_int("WORLD_SIZE")
        place: dict[str, Any] = {} if world_size else alone
        reserve = _RESERVES.get(options.benchmark, "auto")
        with init_distributed(
            tp=world_size or 1, device="cuda", symmetric_reserve=reserve, timeout=60, **place
        ) as state:
            result = run(state)
            if state.rank == 0:
                _report(options, result, table(result))


_ON_GPUS: dict[str, tuple[Callable[..., dict[str, Any]], Callable[[dict[str, Any]], str]]] = {
    "host": (run_host, format_host),
    "kv_gather": (run_kv_gather, format_kv_gather),
    "register": (run_register, format_register),
    "symmetric": (run_symmetric, format_symmetric),
}


# Captured calls can't make room for their outputs.
_RESERVES = {"kv_gather": "8GiB"}


def _report(options: argparse.Namespace, result: dict[str, Any], table: str) -> None:
    print(table)
    if options.json is not None:
        write_result(options.json, options.benchmark, result)


if __name__ == "__main__":
    main()
