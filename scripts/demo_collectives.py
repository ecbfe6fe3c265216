"""The collectives that a rank makes: how many, of how many bytes, and how long they take."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from distcomm import GroupCoordinator, ParallelState

__all__ = ["CallCounts", "CallTimer", "collectives_table"]

_HEAD = ("op", "group", "backend", "calls", "bytes", "time (ms)")
_NUM_NAMES = 3  # columns of text, before those of numbers
_UNFUSED = "unfused"  # counted beside the all-reduce that it makes


class CallTimer:
    """Host time in collectives, by group and op: waiting for slower ranks included.

    A call starts when the current stream has done all earlier work, and ends when it has done
    the collective, so that no other work is counted.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seconds: defaultdict[tuple[str, str], float] = defaultdict(float)

    @contextmanager
    def __call__(self, group: GroupCoordinator, op: str) -> Iterator[None]:
        self._synchronize()
        start = time.perf_counter()
        yield
        self._synchronize()
        self._seconds[group.name, op] += time.perf_counter() - start

    def reset(self) -> None:
        """Forgets all calls so far."""
        self._seconds.clear()

    def milliseconds(self, group_name: str, op: str) -> float:
        return 1e3 * self._seconds[group_name, op]

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()


class CallCounts:
    """Calls and bytes of this rank's collectives, by op, group and backend."""

    def __init__(self, counts: Counter[tuple[str, str, str, str]] | None = None) -> None:
        self._counts = Counter() if counts is None else counts

    @classmethod
    def of(cls, state: ParallelState) -> CallCounts:
        """All so far."""
        counts: Counter[tuple[str, str, str, str]] = Counter()
        for group in state.groups.values():
            for op, backends in group.stats()["ops"].items():
                for backend, numbers in backends.items():
                    for unit, number in numbers.items():
                        counts[op, group.name, backend, unit] = number
        return cls(counts)

    def __add__(self, other: CallCounts) -> CallCounts:
        return CallCounts(self._counts + other._counts)

    def __sub__(self, other: CallCounts) -> CallCounts:
        return CallCounts(self._counts - other._counts)

    def __mul__(self, times: int) -> CallCounts:
        return CallCounts(Counter({key: times * n for key, n in self._counts.items()}))

    def rows(self) -> Iterator[tuple[str, str, str, int, int]]:
        """Op, group, backend, calls, bytes."""
        for op, group, backend, unit in self._counts:
            if unit == "calls" and self._counts[op, group, backend, unit]:
                calls, num_bytes = (self._counts[op, group, backend, u] for u in ("calls", "bytes"))
                yield op, group, backend, calls, num_bytes


def collectives_table(rank: int, counts: CallCounts, timed: CallTimer) -> str:
    """As text. A time is that of an op and group, in the row of its first backend."""
    rows = [_HEAD]
    total_calls, total_bytes, total_ms = 0, 0, 0.0
    seen: set[tuple[str, str]] = set()
    for op, group, backend, calls, num_bytes in counts.rows():
        elapsed_ms = timed.milliseconds(group, op) if (op, group) not in seen else 0.0
        seen.add((op, group))
        total_ms += elapsed_ms
        if backend != _UNFUSED:
            total_calls += calls
            total_bytes += num_bytes
        time_text = f"{elapsed_ms:.1f}" if elapsed_ms else "-"
        rows.append((op, group, backend, str(calls), f"{num_bytes:,}", time_text))
    rows.append(("total", "", "", str(total_calls), f"{total_bytes:,}", f"{total_ms:.1f}"))
    notes = ["-: not timed, because compiled or in a CUDA graph"]
    if all(row[-1] != "-" for row in rows):
        notes = []
    widths = [max(len(row[i]) for row in rows) for i in range(len(_HEAD))]
    lines = []
    for row in rows:
        cells = list(zip(row, widths, strict=True))
        names = [cell.ljust(width) for cell, width in cells[:_NUM_NAMES]]
        numbers = [cell.rjust(width) for cell, width in cells[_NUM_NAMES:]]
        lines.append("  ".join(names + numbers))
    head = (
        f"collectives of rank {rank} alone; bytes: of the tensors it passed in; "
        "time: in the calls,\nwaiting for slower ranks included"
    )
    return "\n".join([head, *lines, *notes])
