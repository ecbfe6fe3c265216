"""Host cost of one small all-reduce: what a call costs the CPU before it returns.

All ways are timed in turn within each round, so that a slow moment of the machine hits all of
them alike. A round enqueues a batch of calls and then waits for the GPU, so that no call waits
for room in the launch queue. Reported is the median of the rounds on the slowest rank.
"""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from ..nccl import PyNcclCommunicator
from ..nccl.dtypes import REDUCTION_CODES
from ..state import ParallelState
from .conditions import conditions

__all__ = ["format_host", "run_host", "time_batch"]

_BARE = "ctypes ncclAllReduce, arguments ready"
_PYNCCL = "PyNcclCommunicator.all_reduce(x, out=x)"
_TORCH = "torch.distributed.all_reduce(x)"
_NUM_BYTES = 1024


def run_host(state: ParallelState, *, num_rounds: int = 60, batch: int = 40) -> dict[str, Any]:
    """Times every way of calling an all-reduce of 1 KiB bf16. Collective.

    Args:
        state: of a CUDA job with at least two ranks.
        num_rounds: rounds to take the median of.
        batch: calls per way and round.

    Returns:
        Microseconds of host time a call, and ratios to the bare call and to torch.
    """
    group = state.world
    x = torch.zeros(_NUM_BYTES // 2, dtype=torch.bfloat16, device=state.device)
    comm = group.pynccl_comm
    if comm is None:
        raise SystemExit("the host benchmark needs a CUDA job with at least two ranks")
    _check(group.all_reduce, state)
    ways: dict[str, Callable[[], object]] = {
        _BARE: _bare_call(comm, x),
        _PYNCCL: lambda: comm.all_reduce(x, out=x),
        "PyNcclCommunicator.all_reduce(x)": lambda: comm.all_reduce(x),
        "GroupCoordinator.all_reduce(x, out=x)": lambda: group.all_reduce(x, out=x),
        "GroupCoordinator.all_reduce(x)": lambda: group.all_reduce(x),
        _TORCH: lambda: dist.all_reduce(x, group=group.device_group),
    }
    rounds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(num_rounds + 5):
        for name, call in ways.items():
            elapsed = time_batch(call, batch)
            if number >= 5:  # the first rounds warm up
                rounds[name].append(elapsed)
    medians = {name: statistics.median(times) for name, times in rounds.items()}
    everyone = group.all_gather_object(medians)
    micros = {name: max(each[name] for each in everyone) for name in ways}
    return {
        "conditions": {**conditions(state), "bytes": _NUM_BYTES, "rounds": num_rounds},
        "host_us": {name: round(value, 3) for name, value in micros.items()},
        "ratio_to_bare": {name: round(v / micros[_BARE], 3) for name, v in micros.items()},
        "ratio_to_torch": {name: round(v / micros[_TORCH], 3) for name, v in micros.items()},
    }


def format_host(result: dict[str, Any]) -> str:
    """The result as a table."""
    lines = [f"{'host cost of one call':<42} {'µs':>7} {'/ bare':>7} {'/ torch':>8}"]
    for name, micros in result["host_us"].items():
        bare, torch_ratio = result["ratio_to_bare"][name], result["ratio_to_torch"][name]
        lines.append(f"{name:<42} {micros:>7.2f} {bare:>7.2f} {torch_ratio:>8.2f}")
    return "\n".join(lines)


def _check(all_reduce: Callable[[torch.Tensor], torch.Tensor], state: ParallelState) -> None:
    """A wrong result isn't worth timing."""
    ones = torch.ones(_NUM_BYTES // 2, dtype=torch.bfloat16, device=state.device)
    if not bool((all_reduce(ones) == state.world_size).all()):
        raise SystemExit(f"all_reduce of ones is wrong on rank {state.rank}")


def _bare_call(comm: PyNcclCommunicator, x: torch.Tensor) -> Callable[[], object]:
    """The C call with every argument converted beforehand: the floor for any Python wrapper."""
    type_code, op_code = REDUCTION_CODES[x.dtype, "sum"]
    function = comm.nccl.ncclAllReduce
    pointer, stream = ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(comm._stream())
    count, handle = ctypes.c_size_t(x.numel()), ctypes.c_void_p(comm._comm)
    return lambda: function(pointer, pointer, count, type_code, op_code, handle, stream)


def time_batch(call: Callable[[], object], batch: int) -> float:
    """Host microseconds a call, over `batch` calls."""
    torch.cuda.synchronize()
    start = time.perf_counter_ns()
    for _ in range(batch):
        call()
    elapsed = time.perf_counter_ns() - start
    torch.cuda.synchronize()
    return elapsed / batch / 1000
