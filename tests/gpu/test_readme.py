"""The README's example of symmetric memory, run as printed."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from tests.gpu.job import start
from tests.worker_pool import WorkerPool, fresh_init_method

README = (Path(__file__).parents[2] / "README.md").read_text()


def run_example(rank: int, world: int, method: str, example: str) -> None:
    with start(rank, world, method, cp=world) as state:
        names = {"torch": torch, "state": state}
        exec(compile(example, "README.md", "exec"), names)
        x, y, z = names["x"].fill_(rank + 1), names["y"], names["z"]
        state.tp.all_reduce(x, out=y)
        names["graph"].replay()
        assert (y == world * (world + 1) / 2).all()
        assert torch.equal(z, y)
        assert state.tp.is_symmetric(z)


def test_symmetric_memory_example(gpus: WorkerPool, most_ranks: int) -> None:
    section = README.split("## Symmetric memory")[1]
    example = re.search(r"```python\n(.*?)```", section, re.DOTALL)
    assert example is not None
    gpus.run(run_example, fresh_init_method(), example[1], ranks=most_ranks)
