"""Starting `distcomm` in the ranks of a `WorkerPool`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import distcomm
from distcomm import ParallelState
from tests.worker_pool import WorkerPool, fresh_init_method

__all__ = ["Job", "start"]

T = TypeVar("T")

TIMEOUT_S = 20.0  # well below the pool's, so that a stuck call is reported by the library


def start(rank: int, world_size: int, url: str, **options: Any) -> ParallelState:
    """`init_distributed` on CPU with this worker's place given by hand."""
    options = {"device": "cpu", "timeout": TIMEOUT_S, **options}
    return distcomm.init_distributed(init_method=url, rank=rank, world_size=world_size, **options)


class Job:
    """Workers that stay in one `init_distributed` from call to call.

    Args:
        workers: where the ranks run.
        num_ranks: the size of the world.
        sizes: arguments of `init_distributed`.
    """

    def __init__(self, workers: WorkerPool, num_ranks: int, **sizes: Any) -> None:
        self._workers = workers
        self._num_ranks = num_ranks
        self._sizes = sizes
        self._url = fresh_init_method()

    def run(self, fn: Callable[..., T], *args: Any) -> list[T]:
        """Calls ``fn(state, *args)`` on every rank; the results by rank."""
        call = (self._url, self._sizes, fn, args)
        try:
            return self._workers.run(_call_in_state, *call, ranks=self._num_ranks)
        except BaseException:
            self._url = fresh_init_method()  # what a failure has left behind isn't used again
            raise

    def close(self) -> None:
        """Ends the state in all workers."""
        self._workers.run(_leave, ranks=self._num_ranks)


_joined: str | None = None  # in a worker: the url of the job whose state is in force


def _call_in_state(
    rank: int,
    world_size: int,
    url: str,
    sizes: dict[str, Any],
    fn: Callable[..., T],
    args: tuple[Any, ...],
) -> T:
    global _joined
    if _joined != url or not distcomm.is_initialized():
        distcomm.destroy_distributed()
        start(rank, world_size, url, **sizes)
        _joined = url
    return fn(distcomm.get_parallel_state(), *args)


def _leave(rank: int, world_size: int) -> None:
    distcomm.destroy_distributed()
