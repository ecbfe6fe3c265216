"""Times of collectives on the GPU: medians, of the slowest rank."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from functools import partial

import torch

from .group import GroupCoordinator

__all__ = ["CapturedCalls", "Timed", "elapsed_us", "queued_us", "slowest_medians", "timed"]

# Some 50 µs of a GPU, more than the host takes for a call.
_HEAD_START_CYCLES = 100_000

Timed = Callable[[], float | None]
"""Does what is timed once; the microseconds it took, or None if something was in the way."""


def elapsed_us(work: Callable[[], object]) -> float:
    """Microseconds between the begin and the end of `work` on the current stream. Waits."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    work()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) * 1000


def queued_us(call: Callable[[], object], num_calls: int) -> float:
    """Microseconds of the GPU for one of several calls, for which the host has a head start, so
    that it is no matter how long launches take. Collective."""

    def calls() -> None:
        for _ in range(num_calls):
            call()

    torch.cuda._sleep(num_calls * _HEAD_START_CYCLES)
    call()  # afterwards the ranks' GPUs are in step
    return elapsed_us(calls) / num_calls


class CapturedCalls:
    """A call, captured several times into a CUDA graph. Construction is collective.

    Args:
        group: whose collectives the call makes.
        call: its tensors have to live as long as this object, as they do if it refers to them.
        num_calls: how often it is captured.
        num_replays: how often the graph is replayed to be timed once.
        symmetric: whether what the call allocates is symmetric.
    """

    def __init__(
        self,
        group: GroupCoordinator,
        call: Callable[[], object],
        num_calls: int,
        num_replays: int = 4,
        *,
        symmetric: bool = False,
    ) -> None:
        self._call = call
        self._num_calls = num_calls
        self._num_replays = num_replays
        self._graph = torch.cuda.CUDAGraph()
        with (
            group.graph_capture(symmetric=symmetric) as c,
            torch.cuda.graph(self._graph, pool=c.pool, stream=c.stream),  # type: ignore[arg-type]
        ):
            for _ in range(num_calls):
                call()

    def replay(self) -> None:
        self._graph.replay()

    def time(self) -> float:
        """Microseconds a call. Collective.

        What is timed follows a replay that isn't: the ranks' GPUs then begin at the same time, and
        without waiting for the host.
        """

        def replays() -> None:
            for _ in range(self._num_replays):
                self._graph.replay()

        self._graph.replay()
        return elapsed_us(replays) / (self._num_replays * self._num_calls)


def slowest_medians(
    group: GroupCoordinator, ways: Mapping[str, Timed], num_rounds: int, num_warm_up: int = 5
) -> dict[str, float]:
    """Each way's median over the rounds, on the slowest rank. Collective.

    All ways take turns within a round, so that a slow moment of the machine hits them alike.

    Raises:
        SystemExit: on all ranks, if something was always in the way of one.
    """
    times: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(num_warm_up + num_rounds):
        for name, timed in ways.items():
            micros = timed()
            if number >= num_warm_up and micros is not None:
                times[name].append(micros)
    mine = {name: statistics.median(each) for name, each in times.items() if each}
    everyone = group.all_gather_object(mine)
    untimed = [name for name in ways if any(name not in each for each in everyone)]
    if untimed:
        raise SystemExit(f"no round could time {', '.join(untimed)}")
    return {name: max(each[name] for each in everyone) for name in ways}


def timed(
    group: GroupCoordinator,
    calls: Mapping[str, Callable[[], object]],
    num_bytes: int,
    num_rounds: int,
    *,
    kind: str,
) -> dict[str, float]:
    """Microseconds of each of several calls. Collective.

    Args:
        num_bytes: of what they move, for which fewer calls are made if it is much.
        kind: ``"graph"``: in a CUDA graph. ``"eager"``: launched one by one, whether the GPU or the
            host is what takes the time. ``"queued"``: launched before the GPU comes to them.
    """
    num_calls = 20 if num_bytes < 8 << 20 else 4
    num_rounds = num_rounds if num_bytes < 64 << 20 else max(3, num_rounds // 4)
    runs: dict[str, Timed] = {}
    for name, call in calls.items():
        if kind == "graph":
            runs[name] = CapturedCalls(group, call, num_calls, num_replays=2).time
        else:
            runs[name] = partial(queued_us if kind == "queued" else _eager_us, call, num_calls)
    medians = slowest_medians(group, runs, num_rounds, num_warm_up=2)
    return {name: round(micros, 2) for name, micros in medians.items()}


def _eager_us(call: Callable[[], object], num_calls: int) -> float:
    def calls() -> None:
        for _ in range(num_calls):
            call()

    return elapsed_us(calls) / num_calls
