"""A process ends well while a thread is in ncclCommDestroy, which waits for CUDA graphs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

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
        (f"{NOTE}; graph = None; other = Graph()", 0, GONE),
        (f"{NOTE}; graph = None; thread.join()", 0, GONE),
        (f"{NOTE}; graph = None; thread.join(); other = Graph()", 0, f"{GONE}graph gone;"),
    ],
    ids=["kept", "closed at the exit", "dropped", "slow", "one of two", "over", "none is kept"],
)
def test_graphs_are_kept_and_threads_that_need_none_are_waited_for(
    end: str, takes_s: float, output: str
) -> None:
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
