"""Host cost of an all-reduce with another version of distcomm and with this one, in one process.

PYTHONPATH=. torchrun --standalone --nproc-per-node 2 scripts/compare_host.py --json FILE \
    --before FOLDER    # the distcomm folder of the other version, its C++ library built

Both versions are in the same job, and take turns within each round, so that a slow moment of the
machine hits both alike. Reported is the median of the rounds on the slowest rank.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

import distcomm
from distcomm.bench.conditions import conditions, write_result
from distcomm.bench.host import time_batch

_NUM_BYTES = 1024
_ROUNDS, _BATCH = 200, 40


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--before", type=Path, required=True, help="distcomm of the other version")
    parser.add_argument("--json", type=Path, required=True, help="write the result to this file")
    options = parser.parse_args()
    before = _loaded(options.before)
    rows = {}
    for tune in ("nccl", "shipped"):
        # The first one makes torch's default process group, in which the second one finds itself.
        with (
            distcomm.init_distributed(dp=_world_size(), tune=tune) as state,
            before.init_distributed(dp=_world_size(), tune=tune) as old_state,
        ):
            rows[tune] = _compared(old_state.world, state.world)
            result = {"conditions": {**conditions(state), "bytes": _NUM_BYTES}, "rows": rows}
            if state.rank == 0:
                print(tune, rows[tune], flush=True)
                write_result(options.json, "compare_host", result)


def _compared(before: Any, after: distcomm.GroupCoordinator) -> dict[str, dict[str, float]]:
    x = torch.zeros(_NUM_BYTES // 2, dtype=torch.bfloat16, device=after.device)
    calls = {
        "all_reduce(x)": {
            "before": lambda: before.all_reduce(x),
            "after": lambda: after.all_reduce(x),
        },
        "all_reduce(x, out=x)": {
            "before": lambda: before.all_reduce(x, out=x),
            "after": lambda: after.all_reduce(x, out=x),
        },
    }
    result = {}
    for name, versions in calls.items():
        times: dict[str, list[float]] = {version: [] for version in versions}
        for number in range(_ROUNDS + 10):
            for version in sorted(versions, reverse=bool(number % 2)):
                micros = time_batch(versions[version], _BATCH)
                if number >= 10:  # the first rounds warm up
                    times[version].append(micros)
        mine = {version: statistics.median(each) for version, each in times.items()}
        everyone = after.all_gather_object(mine)
        slowest = {version: max(each[version] for each in everyone) for version in versions}
        result[name] = {
            **{f"{version}_us": round(micros, 3) for version, micros in slowest.items()},
            "ratio": round(slowest["after"] / slowest["before"], 4),
        }
    return result


def _loaded(folder: Path) -> ModuleType:
    """The package in `folder`, under another name."""
    name = "distcomm_before"
    spec = importlib.util.spec_from_file_location(
        name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    if spec is None or spec.loader is None:
        raise SystemExit(f"no package in {folder}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _world_size() -> int:
    return distcomm.env.read_int("WORLD_SIZE") or 1


if __name__ == "__main__":
    main()
