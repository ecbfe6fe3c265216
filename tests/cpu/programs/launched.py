"""Started by torchrun: initializes, calls every group, and writes what it found to a file.

    launched.py FOLDER SIZES... [--leave-open]

Each of SIZES is one initialization, as JSON: ``{"tp": 4, "cp": 2}``. Rank r writes FOLDER/r.json.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import torch

import distcomm


def use(state: distcomm.ParallelState) -> dict[str, Any]:
    """The groups of this rank, and what all have summed up."""
    sums = {
        name: group.all_reduce(torch.tensor(group.rank)).item()
        for name, group in state.groups.items()
    }
    state.world.barrier()
    return {
        "local_rank": state.local_rank,
        "host_processes": state.world.all_gather_object((state.rank, os.getppid())),
        "groups": {name: group.ranks for name, group in state.groups.items()},
        "sums": sums,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("sizes", type=json.loads, nargs="+")
    parser.add_argument("--leave-open", action="store_true")
    arguments = parser.parse_args()
    found = []
    for sizes in arguments.sizes:
        with distcomm.init_distributed(**sizes, timeout=60) as state:
            found.append(use(state))
    if arguments.leave_open:
        found.append(use(distcomm.init_distributed(**arguments.sizes[0], timeout=60)))
    (arguments.folder / f"{os.environ['RANK']}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
