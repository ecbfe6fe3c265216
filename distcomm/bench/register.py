"""What it costs to find out that nothing has to be registered, as every context does on leaving.

Compared with the way that engines do it without a registry: a snapshot of the pool's segments,
each looked up in a set of those registered before. Both see the same number of segments.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from ..memory.segment_heap import ALIGNMENT, SegmentHeap
from ..nccl import PyNcclCommunicator
from ..state import ParallelState
from .conditions import conditions

__all__ = ["format_register", "run_register"]

NUM_SEGMENTS = (1, 4, 16, 64, 256, 512, 1024)
_SMALL = 1 << 20  # two tensors of this size fill one of torch's segments


def run_register(state: ParallelState, *, num_rounds: int = 25) -> dict[str, Any]:
    """Times both for 1 to 1024 segments, alternately. Needs one GPU and one process.

    Returns:
        Medians in microseconds, and their ratio.
    """
    comm = PyNcclCommunicator(state.world.cpu_group, state.device)
    heap = SegmentHeap(comm.native, state.device.index, chunk_bytes=ALIGNMENT, shared=False)
    comm.on_close(lambda handle, orderly: _forget(heap, handle))
    pool = torch.cuda.MemPool()
    tensors: list[torch.Tensor] = []
    rows = []
    for num_segments in NUM_SEGMENTS:
        while heap.stats()["segments"] < num_segments:
            if not heap.reserve(ALIGNMENT):
                raise SystemExit(f"no memory: {heap.take_failure()}")
        code, _ = heap.register_new(comm.handle, heap.next_ordinal())
        comm.nccl.check("ncclCommWindowRegister", code, comm=comm.handle)
        with torch.cuda.use_mem_pool(pool):
            while len(tensors) < 2 * num_segments:
                tensors.append(torch.empty(_SMALL, dtype=torch.uint8, device=state.device))
        snapshot = pool.snapshot()
        if len(snapshot) != num_segments:
            raise SystemExit(f"torch's pool has {len(snapshot)} segments, not {num_segments}")
        registered = {segment["address"] for segment in snapshot}
        ours, theirs = _timed(
            lambda: heap.num_new(comm.handle),
            lambda: _num_new_in_snapshot(pool, registered),  # noqa: B023 - called at once
            num_rounds,
        )
        rows.append(
            {
                "segments": num_segments,
                "registry_us": round(ours, 3),
                "snapshot_us": round(theirs, 3),
                "ratio": round(theirs / ours, 1),
            }
        )
    comm.close()
    version = comm.nccl.version_text
    return {"conditions": {**conditions(state), "nccl": version}, "rows": rows}


def format_register(result: dict[str, Any]) -> str:
    """The result as a table."""
    lines = [f"{'segments':>8} {'registry µs':>12} {'snapshot + set µs':>18} {'ratio':>8}"]
    for row in result["rows"]:
        lines.append(
            f"{row['segments']:>8} {row['registry_us']:>12.3f} {row['snapshot_us']:>18.1f} "
            f"{row['ratio']:>8.0f}"
        )
    return "\n".join(lines)


def _num_new_in_snapshot(pool: torch.cuda.MemPool, registered: set[int]) -> int:
    return sum(segment["address"] not in registered for segment in pool.snapshot())


def _timed(
    ours: Callable[[], int], theirs: Callable[[], int], num_rounds: int
) -> tuple[float, float]:
    """Median microseconds of a call of each, which must find nothing new."""
    batches = ((ours, 2000), (theirs, 4))
    times: list[list[float]] = [[], []]
    for _ in range(num_rounds):
        for index, (call, batch) in enumerate(batches):
            if call():
                raise SystemExit("something is new where nothing should be")
            start = time.perf_counter_ns()
            for _ in range(batch):
                call()
            times[index].append((time.perf_counter_ns() - start) / batch / 1000)
    return statistics.median(times[0]), statistics.median(times[1])


def _forget(heap: SegmentHeap, comm: int) -> None:
    heap.release_comm(comm)
    heap.retire_all()
