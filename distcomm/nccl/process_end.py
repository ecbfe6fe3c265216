"""The end of a process in which ncclCommDestroy still waits for CUDA graphs.

NCCL frees a communicator only after the last graph that captured it has gone. When the interpreter
shuts down, it frees the graphs; NCCL would then go on in its thread while the process is torn
down around it, which now and then ends in a segmentation fault.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import threading
import time

import torch

__all__ = ["note_destroy_under_way"]

# With no graph left to wait for, ncclCommDestroy takes milliseconds.
_FREE_S = 3.0
# Whether it waits for a graph that is left or for none, can't be told.
_FREE_BESIDE_GRAPHS_S = 0.5

_under_way: list[threading.Thread] = []


def note_destroy_under_way(thread: threading.Thread) -> None:
    """The process will end well also if `thread`, in ncclCommDestroy, never gets any further."""
    if not _under_way:
        atexit.register(_end_well)
    _under_way.append(thread)


def _end_well() -> None:
    """Keeps the graphs that there are for good, and waits for those threads that need none."""
    if not any(thread.is_alive() for thread in _under_way):
        return
    graphs = [each for each in gc.get_objects() if issubclass(type(each), torch.cuda.CUDAGraph)]
    for graph in graphs:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(graph))
    deadline = time.monotonic() + (_FREE_BESIDE_GRAPHS_S if graphs else _FREE_S)
    for thread in _under_way:
        thread.join(max(0.0, deadline - time.monotonic()))
