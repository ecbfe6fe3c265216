"""A process ends well while a thread is in ncclCommDestroy, which waits for CUDA graphs."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from distcomm.nccl import process_end

ROOT = Path(__file__).parents[2]

PROGRAM = """
import atexit, os, threading, time
import torch
from distcomm.nccl.process_end import note_destroy_under_way

gone = threading.Event()

class Graph(torch.cuda.CUDAGraph):
    def __new__(cls):
        return object.__new__(cls)
    def __init__(self):
        pass
    def __del__(self, write=os.write, gone=gone):  # globals may have gone before
        write(1, b"graph gone;")
        gone.set()

# Of no module, as its frame would keep the module's globals, and so the graph.
destroy = eval(
    "lambda: (gone.wait(), time.sleep({takes_s}), os.write(1, b'destroyed;'))",
    {{"gone": gone, "time": time, "os": os}},
)
graph = Graph()
thread = threading.Thread(target=destroy, daemon=True)
thread.start()
{end}
"""


NOTE = "note_destroy_under_way(thread)"
GONE = "graph gone;destroyed;"


@pytest.mark.parametrize(
    ("end", "takes_s", "output"),
    [
        (NOTE, 0, ""),
        (f"atexit.register(lambda: {NOTE})", 0, ""),
        (f"{NOTE}; graph = None", 0, GONE),
        (f"{NOTE}; graph = None", 0.2, GONE),
    ],
    ids=["kept", "closed at the exit", "dropped", "slow"],
)
def test_exits(end: str, takes_s: float, output: str) -> None:
    """Graphs are kept; threads that need none of them are waited for."""
    program = PROGRAM.format(end=end, takes_s=takes_s)
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout == output


class Graph(torch.cuda.CUDAGraph):
    """One that needs no GPU."""

    def __new__(cls) -> Graph:
        return object.__new__(cls)

    def __init__(self) -> None:
        pass


@pytest.mark.parametrize("is_over", [False, True])
def test_only_what_may_be_waited_for_is_kept(
    is_over: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process_end, "_under_way", [])
    monkeypatch.setattr(process_end, "_BESIDE_GRAPHS_S", 0.01)
    released = threading.Event()
    thread = threading.Thread(target=released.wait, daemon=True)
    thread.start()
    process_end.note_destroy_under_way(thread)
    if is_over:
        released.set()
        thread.join()
    graph, other = Graph(), object()
    before = sys.getrefcount(graph), sys.getrefcount(other)
    process_end._end_well()
    kept = 0 if is_over else 1
    assert (sys.getrefcount(graph), sys.getrefcount(other)) == (before[0] + kept, before[1])
    released.set()
    thread.join()


def test_threads_that_are_over_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_end, "_under_way", [])
    for _ in range(3):
        thread = threading.Thread(target=int)
        thread.start()
        thread.join()
        process_end.note_destroy_under_way(thread)
    assert process_end._under_way == [thread]
