"""A process ends well while a thread is in ncclCommDestroy, which waits for CUDA graphs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

PROGRAM = """
import os, threading, time
import torch
from distcomm.nccl.process_end import note_destroy_under_way

class Graph(torch.cuda.CUDAGraph):
    def __new__(cls):
        return object.__new__(cls)
    def __init__(self):
        pass
    def __del__(self):
        os.write(1, b"graph gone;")
        gone.set()

def destroy():
    gone.wait()
    time.sleep({takes_s})
    os.write(1, b"destroyed;")

gone = threading.Event()
graph = Graph()
thread = threading.Thread(target=destroy, daemon=True)
thread.start()
note_destroy_under_way(thread)
{end}
"""


@pytest.mark.parametrize(
    ("end", "takes_s", "output"),
    [
        ("", 0, ""),
        ("graph = None", 0, "graph gone;destroyed;"),
        ("graph = None", 0.2, "graph gone;destroyed;"),
        ("graph = None; other = Graph()", 0.2, "graph gone;destroyed;"),
        ("graph = None; thread.join()", 0, "graph gone;destroyed;"),
    ],
    ids=["kept", "dropped", "dropped, slow", "one of two", "over before"],
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
