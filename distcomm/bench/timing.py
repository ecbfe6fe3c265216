"""Times of calls on the GPU: medians, of the slowest rank."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping

import torch

from ..group import GroupCoordinator

__all__ = ["CapturedCalls", "Timed", "elapsed_us", "slowest_medians"]

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


class CapturedCalls:
    """A call, captured several times into a CUDA graph. Construction is collective.

    Args:
        group: whose collectives the call makes.
        call: its tensors have to live as long as this object, as they do if it refers to them.
        num_calls: how often it is captured.
        num_replays: how often the graph is replayed to be timed once.
    """

    def __init__(
        self,
        group: GroupCoordinator,
        call: Callable[[], object],
        num_calls: int,
        num_replays: int = 4,
    ) -> None:
        self._call = call
        self._num_calls = num_calls
        self._num_replays = num_replays
        self._graph = torch.cuda.CUDAGraph()
        with group.graph_capture() as c, torch.cuda.graph(self._graph, stream=c.stream):
            for _ in range(num_calls):
                call()

    def replay(self) -> None:
        self._graph.replay()

    def time(self) -> float:
        """Microseconds a call. Collective."""

        def replays() -> None:
            for _ in range(self._num_replays):
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
