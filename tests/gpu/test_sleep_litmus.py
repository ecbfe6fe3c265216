"""Memory that sleeps in processes of their own: torch's allocator settings, and the exit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.gpu.test_symmetric_litmus import EXPANDABLE, ROOT, expect_good_ends
from tests.gpu.test_symmetric_memory import MIB

SETTINGS = """
import torch
from distcomm import SleepablePool

MIB = 1 << 20

def in_force():
    found = torch.cuda.memory._snapshot()["allocator_settings"]
    names = "expandable_segments", "max_split_size", "garbage_collection_threshold"
    return [found[name] for name in names], found["PYTORCH_CUDA_ALLOC_CONF"]

def check(pool, tag, mib):
    with pool.use(tag):
        assert not in_force()[0][0]
        small = torch.ones(100, device="cuda")
        with pool.use(tag + ", nested"):
            nested = torch.full((mib * MIB // 4,), 2.0, device="cuda")
        large = torch.ones(mib * MIB // 4, device="cuda")
    kept.append((small, nested, large))
    places = [x.data_ptr() for x in kept[-1]]
    pool.sleep((tag, tag + ", nested"))
    assert sum(usage.mapped_bytes for usage in pool.usage().values()) == 0
    ordinary = torch.full((30 * MIB,), 3.0, device="cuda")
    pool.wake_up()
    assert [x.data_ptr() for x in kept[-1]] == places
    assert (small == 1).all() and (nested == 2).all() and (large == 1).all()
    assert (ordinary == 3).all()

torch.ones(1, device="cuda")
pool = SleepablePool()
kept = []
check(pool, "before", 24)
torch.cuda.empty_cache()
if {at_run_time!r}:
    torch.cuda.memory._set_allocator_settings({at_run_time!r})
ordinary = torch.ones(30 * MIB, device="cuda")
before = in_force()
assert before[0][:2] == {expected!r}, before
check(pool, "after", 100)
assert in_force() == before, in_force()
try:
    with pool.use("after"), pool.use("more"):
        raise ZeroDivisionError
except ZeroDivisionError:
    assert in_force() == before, in_force()
del kept[0]
check(pool, "again", 20)
assert in_force() == before, in_force()
more = torch.ones(60 * MIB, device="cuda")
expandable = {{
    segment["is_expandable"]
    for segment in torch.cuda.memory_snapshot()
    if segment["segment_pool_id"] == (0, 0) and segment["total_size"] >= 64 * MIB
}}
assert expandable == {{before[0][0]}}, expandable
"""

THRESHOLD = EXPANDABLE + ",garbage_collection_threshold:0.8"
CASES = {
    "expandable": ("PYTORCH_CUDA_ALLOC_CONF", THRESHOLD, "", [True, 64 * MIB]),
    "expandable, other name": ("PYTORCH_ALLOC_CONF", THRESHOLD, "", [True, 64 * MIB]),
    "expandable at run time": ("", "", THRESHOLD, [True, 64 * MIB]),
    "split size": ("PYTORCH_ALLOC_CONF", "max_split_size_mb:32", "", [False, 32 * MIB]),
}


EXITS = {
    "awake": "",
    "asleep": "pool.sleep(('weights',))",
    "partly asleep": "pool.sleep(tags=('kv',))",
    "pool dropped": "del pool; gc.collect(); assert (weights == 1).all()",
    "pool dropped asleep": "pool.sleep(('weights',)); del pool; gc.collect()",
    "closed": "pool.close(); assert (weights == 1).all()",
    "closed asleep": "pool.sleep(('weights',)); pool.close()",
    "tensor dropped last": "pool.close(); del pool; gc.collect(); del weights, kv",
    "in a use": "(context := pool.use('kv')).__enter__(); more = torch.ones(9, device='cuda')",
    "at the exit": "atexit.register(pool.sleep, ('weights',))",
    "in a thread": "threading.Thread(target=lambda: time.sleep(0.5) or pool.sleep()).start()",
    "with a graph": """
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    captured = weights + 1
pool.sleep(('weights',))
""",
}

EXIT = """
import atexit, gc, threading, time
import torch
from distcomm import SleepablePool

pool = SleepablePool()
with pool.use("weights"):
    weights = torch.ones(24 << 20, dtype=torch.uint8, device="cuda")
with pool.use("kv"):
    kv = torch.ones(100, device="cuda")
{last}
"""


def started(text: str, script: Path, variable: str = "", value: str = "") -> subprocess.Popen[str]:
    """A program of one process, with no allocator settings but this one."""
    script.write_text(text)
    environment = {key: each for key, each in os.environ.items() if "ALLOC_CONF" not in key}
    if variable:
        environment[variable] = value
    return subprocess.Popen(
        [sys.executable, str(script)],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def test_allocator_settings(tmp_path: Path) -> None:
    """Pools work, and afterwards the settings in force are those from before."""
    jobs = {}
    for number, (name, (variable, value, at_run_time, expected)) in enumerate(CASES.items()):
        text = SETTINGS.format(at_run_time=at_run_time, expected=expected)
        jobs[name] = started(text, tmp_path / f"case_{number}.py", variable, value)
    expect_good_ends(jobs)


@pytest.mark.parametrize("group", range(3))
def test_exit_code(group: int, tmp_path: Path) -> None:
    """Each process ends well, in whatever state its pool and tensors are."""
    jobs = {}
    for number, name in enumerate([*EXITS][group::3]):
        text = EXIT.format(last=EXITS[name])
        jobs[name] = started(text, tmp_path / f"exit_{number}.py")
    expect_good_ends(jobs)
