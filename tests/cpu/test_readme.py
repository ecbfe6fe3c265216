"""The README's quick start, run as printed."""

from __future__ import annotations

import contextlib
import io
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from distcomm import ParallelState
from tests.cpu.job import Job
from tests.worker_pool import WorkerPool

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
QUICK_START = re.search(r"```python\n# quickstart\.py\n(.*?)```", README, re.DOTALL)
NUM_RANKS = 4


def test_quick_start_runs_as_printed(tmp_path: Path) -> None:
    assert QUICK_START is not None
    assert f"torchrun --nproc-per-node {NUM_RANKS} quickstart.py" in README
    (tmp_path / "quickstart.py").write_text(QUICK_START[1])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(NUM_RANKS), str(tmp_path / "quickstart.py")]
    done = subprocess.run(
        command, cwd=ROOT, timeout=90, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for rank in range(NUM_RANKS):
        pair = sorted({rank, (rank + 2) % NUM_RANKS})
        assert f"rank {rank}: hello 6 (3, 3) [{pair[0]}.0, {pair[1]}.0]" in done.stdout


def test_quick_start_is_short() -> None:
    assert QUICK_START is not None
    assert len(QUICK_START[1].splitlines()) <= 25


def run_context_parallel_example(state: ParallelState, example: str) -> None:
    names: dict[str, Any] = {"torch": torch, "state": state}
    exec(compile(example, "README.md", "exec"), names)
    expected = names["tokens"][:, None].expand(-1, 128).bfloat16()
    assert torch.equal(names["all_k"], expected)
    assert torch.equal(names["all_v"], -expected)
    assert torch.equal(names["cache"][names["slots"]], expected)


def run_fast_collectives_example(state: ParallelState, example: str) -> None:
    tp = state.world
    names: dict[str, Any] = {"torch": torch, "state": state, "tp": tp}
    exec(compile(example, "README.md", "exec"), names)
    assert (names["total"] == tp.world_size).all()
    assert (names["residual"] == tp.world_size).all()
    assert (names["h"] == 1).all()


def example_of(title: str) -> str:
    section = README.split(f"## {title}")[1]
    example = re.search(r"```python\n(.*?)```", section, re.DOTALL)
    assert example is not None
    return example[1]


def test_context_parallel_example(job: Job) -> None:
    job.run(run_context_parallel_example, example_of("Context parallelism"))


def test_fast_collectives_example(job: Job) -> None:
    job.run(run_fast_collectives_example, example_of("Fast collectives"))


def run_compile_example(state: ParallelState, example: str) -> None:
    names: dict[str, Any] = {"torch": torch, "state": state, "tp": state.world}
    torch.manual_seed(1)
    exec(compile(example, "README.md", "exec"), names)
    arguments = (names[name] for name in ("x", "gate", "up", "gate"))
    torch.testing.assert_close(names["y"], names["mlp"](*arguments), atol=1e-2, rtol=1e-3)
    torch._dynamo.reset()


def run_mesh_example(state: ParallelState, example: str) -> None:
    names: dict[str, Any] = {"torch": torch, "state": state}
    exec(compile(example, "README.md", "exec"), names)
    share = torch.arange(64.0).reshape(8, 8).chunk(2)[state.cp.rank_in_group]
    assert torch.equal(names["rows"].to_local(), share)


def run_observability_example(state: ParallelState, example: str) -> str:
    names: dict[str, Any] = {"torch": torch, "state": state}
    with contextlib.redirect_stdout(io.StringIO()) as output:
        exec(compile(example, "README.md", "exec"), names)
    return output.getvalue()


def test_mesh_example(job: Job) -> None:
    job.run(run_mesh_example, example_of("DeviceMesh"))


def test_observability_example(job: Job) -> None:
    for output in job.run(run_observability_example, example_of("Observability")):
        assert "['distcomm.all_reduce tp 16384 B gloo']" in output
        assert "'gloo': {'calls': " in output


@pytest.mark.timeout(300)
def test_compile_example() -> None:
    with WorkerPool(2, timeout_s=200) as pool:
        job = Job(pool, 2, tp=2, timeout=100)
        job.run(run_compile_example, example_of("torch.compile"))
        job.close()


def test_every_environment_variable_is_listed() -> None:
    source = (ROOT / "distcomm" / "env.py").read_text()
    for name in set(re.findall(r'"([A-Z][A-Z_]+)"', source)):
        assert f"`{name}`" in README, name
