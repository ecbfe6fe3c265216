"""What other users of torch's memory pools fell over: settings, pools and tensors at the exit."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import subprocess
import sys
from pathlib import Path

import torch

from tests.gpu.test_symmetric_memory import MIB, symmetric_job
from tests.worker_pool import WorkerPool, fresh_init_method

ROOT = Path(__file__).parents[2]

PROGRAM = """
import torch
from distcomm import init_distributed

MIB = 1 << 20

def in_force():
    found = torch.cuda.memory._snapshot()["allocator_settings"]
    return found["expandable_segments"], found["max_split_size"]

def check(state, mib):
    with state.tp.symmetric_memory():
        small = torch.ones(100, device=state.device)
        large = torch.ones(mib * MIB // 4, device=state.device)
    for x in (small, large):
        assert state.tp.is_symmetric(x), x.shape
        assert (state.tp.all_reduce(x, out=x) == {world}).all()
    return small, large

state = init_distributed(tp={world}, device="cuda", timeout=60, symmetric_reserve="64MiB")
kept = [check(state, 30)]
if {at_run_time!r}:
    torch.cuda.memory._set_allocator_settings({at_run_time!r})
ordinary = torch.ones(30 * MIB, device=state.device)
before = in_force()
assert before == {expected!r}, before
kept.append(check(state, 100))
del kept[0]
kept.append(check(state, 20))
assert in_force() == before
more = torch.ones(60 * MIB, device=state.device)
expandable = {{
    segment["is_expandable"]
    for segment in torch.cuda.memory_snapshot()
    if segment["segment_pool_id"] == (0, 0) and segment["total_size"] >= 64 * MIB
}}
assert expandable == {{before[0]}}, expandable
graph = torch.cuda.CUDAGraph()
with state.graph_capture(symmetric=True) as c:
    with torch.cuda.graph(graph, pool=c.pool, stream=c.stream):
        captured = state.tp.all_reduce(kept[0][0])
graph.replay()
torch.cuda.synchronize()
assert state.tp.is_symmetric(captured)
assert captured[0].item() == {world} ** 2
if {close}:
    state.close()
    assert kept[0][1][5].item() == {world}
"""

EXPANDABLE = "expandable_segments:True,max_split_size_mb:64"
CASES = {
    "expandable": ("PYTORCH_CUDA_ALLOC_CONF", EXPANDABLE, "", (True, 64 * MIB), True),
    "expandable, other name": ("PYTORCH_ALLOC_CONF", EXPANDABLE, "", (True, 64 * MIB), False),
    "expandable at run time": ("", "", EXPANDABLE, (True, 64 * MIB), True),
    "split size": ("PYTORCH_ALLOC_CONF", "max_split_size_mb:32", "", (False, 32 * MIB), False),
}


FAILED_CAPTURE = """
import torch
from distcomm import init_distributed

state = init_distributed(tp={world}, device="cuda", timeout=60, symmetric_reserve="64MiB")
with state.tp.symmetric_memory():
    x = torch.ones(1000, device=state.device)
graph = torch.cuda.CUDAGraph()
try:
    with state.graph_capture(symmetric=True) as c:
        with torch.cuda.graph(graph, pool=c.pool, stream=c.stream):
            with state.tp.symmetric_memory():
                y = torch.empty_like(x)
            state.tp.all_reduce(x, out=y).sum().item()
except RuntimeError as error:
    print(error)
else:
    raise SystemExit("nothing was wrong with the capture")
del graph
state.close()
"""


def case_of(name: str, world: int, folder: Path) -> subprocess.Popen[str]:
    """A torchrun job of `PROGRAM` under one case's settings."""
    variable, value, at_run_time, expected, close = CASES[name]
    text = PROGRAM.format(world=world, at_run_time=at_run_time, expected=expected, close=close)
    return launched(text, world, folder / f"{name.replace(' ', '_')}.py", {variable: value})


def launched(
    text: str, world: int, script: Path, variables: dict[str, str]
) -> subprocess.Popen[str]:
    """A torchrun job of a program."""
    script.write_text(text)
    environment = {key: value for key, value in os.environ.items() if "ALLOC_CONF" not in key}
    environment.update({key: value for key, value in variables.items() if key})
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(world), str(script)]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def test_allocator_settings(most_ranks: int, tmp_path: Path) -> None:
    """Contexts work, the settings are as before, and each process ends well with all alive."""
    jobs = {name: case_of(name, most_ranks, tmp_path) for name in CASES}
    expect_good_ends(jobs)


def test_a_failed_capture_is_not_the_end(most_ranks: int, tmp_path: Path) -> None:
    """torch never notices the end of a capture that fails; all can be closed all the same."""
    text = FAILED_CAPTURE.format(world=most_ranks)
    expect_good_ends({"job": launched(text, most_ranks, tmp_path / "job.py", {})})


def expect_good_ends(jobs: dict[str, subprocess.Popen[str]]) -> None:
    try:
        outputs = {name: job.communicate(timeout=100)[0] for name, job in jobs.items()}
    finally:
        for job in jobs.values():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(job.pid, signal.SIGKILL)
    for name, job in jobs.items():
        assert job.returncode == 0, f"{name}:\n{outputs[name]}"


def tensors_outlive_the_pool(rank: int, world: int, method: str) -> None:
    """Memory goes back to NCCL when its last tensor goes, however long the pool has been gone."""
    with symmetric_job(rank, world, method) as state:
        with state.tp.symmetric_memory():
            x = torch.full((MIB,), rank + 1.0, device=state.device)
            y = torch.full((40 * MIB,), rank + 1.0, device=state.device)
        heap = state.symmetric_pool.heap
    assert heap.stats()["segments"] == 2
    assert (x == rank + 1).all()
    assert (y == rank + 1).all()
    del y
    gc.collect()
    torch.cuda.empty_cache()
    assert heap.stats()["segments"] == 1
    with symmetric_job(rank, world, method + "-again") as state:
        # What is left of the former job is neither registered nor allocated from.
        assert state.symmetric_pool.heap.find(state.tp.pynccl_comm.handle, x.data_ptr()).window == 0
        assert not state.tp.is_symmetric(x)
        with state.tp.symmetric_memory():
            z = torch.ones(MIB, device=state.device)
        assert state.tp.is_symmetric(z)
        assert (state.tp.all_reduce(z) == world).all()
        assert (state.tp.all_reduce(x) == world * (world + 1) / 2).all()
    del x, z
    gc.collect()
    torch.cuda.empty_cache()
    stats = heap.stats()
    assert (stats["segments"], stats["bytes_reserved"], stats["bytes_used"]) == (0, 0, 0)
    assert (stats["failed_releases"], stats["unknown_frees"]) == (0, 0)


def test_tensors_outlive_the_pool(gpus: WorkerPool, most_ranks: int) -> None:
    gpus.reset()
    gpus.run(tensors_outlive_the_pool, fresh_init_method(), ranks=most_ranks)
