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

__all__ = ["FREE_S", "note_destroy_under_way"]

# ncclCommDestroy takes milliseconds, or as long as a CUDA graph holds the communicator.
FREE_S = 3.0
# At the end, whether it waits for one of the graphs that are left or for none can't be told.
_BESIDE_GRAPHS_S = 0.5

_under_way: list[threading.Thread] = []


def note_destroy_under_way(thread: threading.Thread) -> None:
    """The process will end well although `thread` is in ncclCommDestroy. Local.

    At its end it keeps all CUDA graphs that there are, and gives the thread up to `FREE_S`
    seconds to finish, or less beside graphs that may be what it waits for.
    """
    _under_way[:] = [each for each in _under_way if each.is_alive()]
    _under_way.append(thread)


# Registered on import, and so called after what the user registers later, such as a close().
@atexit.register
def _end_well() -> None:
    if not any(thread.is_alive() for thread in _under_way):
        return
    graphs = [each for each in gc.get_objects() if issubclass(type(each), torch.cuda.CUDAGraph)]
    for graph in graphs:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(graph))  # for good
    deadline = time.monotonic() + (_BESIDE_GRAPHS_S if graphs else FREE_S)
    for thread in _under_way:
        thread.join(max(0.0, deadline - time.monotonic()))
