"""Making and closing a `PyNcclCommunicator` when something goes wrong: no rank waits for long, all
ranks learn who failed, and nothing is left behind.

The time limits here tell "was told" from "waited for its timeout"; they measure nothing.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from distcomm import native
from distcomm.errors import InitializationError, NcclError
from distcomm.nccl import NcclLibrary, PyNcclCommunicator, connection
from tests.nccl_on_cpu import (
    GROUP_NAME,
    becomes_true,
    communicator,
    fake_nccl_environment,
    gloo_group,
    num_calls,
    num_live_comms,
    with_environment,
)
from tests.worker_pool import WorkerError, WorkerPool, fresh_init_method

WORLD = 4
BROKEN = 2  # the rank on which things fail
LONG_S = 60.0  # longer than any test may take
QUICK_S = 10.0  # far longer than it takes to be told of a failure, even on a busy machine
SHORT_S = 1.5  # a timeout that is waited for


@pytest.fixture
def ranks() -> Iterator[WorkerPool]:
    """Fresh processes, because threads may be left behind in the stand-in."""
    with WorkerPool(WORLD, grace_s=QUICK_S) as pool:
        yield pool


# Ways to break one rank, each a context manager


@contextmanager
def failing(rule: str, only_on: int) -> Iterator[None]:
    with with_environment(FAKE_NCCL_FAIL=f"{rule}:rank={only_on}"):
        yield


@contextmanager
def hanging(rule: str, only_on: int) -> Iterator[None]:
    with with_environment(FAKE_NCCL_HANG=f"{rule}:rank={only_on}"):
        yield


@contextmanager
def failing_unique_id(rank: int) -> Iterator[None]:
    with with_environment(FAKE_NCCL_FAIL="ncclGetUniqueId"):
        yield


@contextmanager
def no_libnccl(rank: int) -> Iterator[None]:
    path = os.environ["DISTCOMM_NCCL_SO"]
    with with_environment(DISTCOMM_NCCL_SO="/nowhere/libnccl.so.2" if rank == BROKEN else path):
        yield


@contextmanager
def no_native_library(rank: int) -> Iterator[None]:
    name = "libabsent.so" if rank == BROKEN else native._FILE_NAME
    with mock.patch.object(native, "_FILE_NAME", name):
        yield


@contextmanager
def unexpected_error(rank: int) -> Iterator[None]:
    error = ZeroDivisionError("nobody thought of it") if rank == BROKEN else None
    loaded = NcclLibrary()
    with mock.patch.object(connection, "NcclLibrary", side_effect=error, return_value=loaded):
        yield


@contextmanager
def failing_init(rank: int) -> Iterator[None]:
    with failing("ncclCommInitRank:code=1", BROKEN):
        yield


@contextmanager
def failing_first_collective(rank: int) -> Iterator[None]:
    with failing("ncclAllReduce:code=3", BROKEN):
        yield


@contextmanager
def first_collective_that_does_nothing(rank: int) -> Iterator[None]:
    loaded = NcclLibrary()
    if rank == BROKEN:
        loaded.ncclAllReduce = lambda *_: 0  # type: ignore[method-assign]
    with mock.patch.object(connection, "NcclLibrary", return_value=loaded):
        yield


@contextmanager
def hanging_abort(rank: int) -> Iterator[None]:
    with failing_first_collective(rank), with_environment(FAKE_NCCL_HANG="ncclCommAbort"):
        yield


@contextmanager
def hanging_init(rank: int) -> Iterator[None]:
    with hanging("ncclCommInitRank", BROKEN):
        yield


@contextmanager
def hanging_first_collective(rank: int) -> Iterator[None]:
    with hanging("ncclAllReduce", BROKEN):
        yield


@contextmanager
def late_init(rank: int) -> Iterator[None]:
    """All ranks are made in the end, long after all have given up."""
    loaded = NcclLibrary()
    init = loaded.ncclCommInitRank

    def slow(*arguments: object) -> int:
        time.sleep(2 * SHORT_S)
        code: int = init(*arguments)
        return code

    if rank == BROKEN:
        loaded.ncclCommInitRank = slow  # type: ignore[method-assign]
    with mock.patch.object(connection, "NcclLibrary", return_value=loaded):
        yield


@contextmanager
def death(rank: int) -> Iterator[None]:
    loaded = NcclLibrary()
    if rank == BROKEN:
        loaded.ncclCommInitRank = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[method-assign]
    with mock.patch.object(connection, "NcclLibrary", return_value=loaded):
        yield


Breakage = Callable[[int], Any]


class Outcome(NamedTuple):
    """What one rank has seen of a construction that fails."""

    failures: dict[int, str]
    text: str
    elapsed_s: float


def fail_to_make(
    rank: int, world_size: int, url: str, breakage: Breakage, timeout_s: float
) -> Outcome:
    """A construction that fails, after which another one on the same process group works."""
    with gloo_group(rank, world_size, url) as group:
        start = time.monotonic()
        with breakage(rank), pytest.raises(InitializationError) as caught:
            PyNcclCommunicator(group, "cpu", name=GROUP_NAME, timeout_s=timeout_s)
        elapsed_s = time.monotonic() - start
        assert caught.value.rank == rank
        if breakage is late_init:
            assert num_live_comms() == 0, "it isn't made yet"
            assert becomes_true(lambda: num_calls("ncclCommAbort") == 1, QUICK_S)
        if breakage is not hanging_abort:
            assert becomes_true(lambda: num_live_comms() == 0, QUICK_S)
        before = num_live_comms()
        comm = PyNcclCommunicator(group, "cpu", name=GROUP_NAME, timeout_s=LONG_S)
        assert comm.all_reduce(torch.ones(3)).tolist() == [world_size] * 3
        comm.close()
        assert num_live_comms() == before
    return Outcome(caught.value.failures, str(caught.value), elapsed_s)


def outcomes(ranks: WorkerPool, breakage: Breakage, timeout_s: float) -> list[Outcome]:
    environment = {**fake_nccl_environment(), "FAKE_NCCL_TIMEOUT_S": str(LONG_S / 2)}
    return ranks.run(fail_to_make, fresh_init_method(), breakage, timeout_s, env=environment)


# Which rank is named, and with what
NAMED: dict[Breakage, tuple[int, list[str]]] = {
    failing_init: (BROKEN, ["ncclCommInitRank returned 1 (unhandled cuda error)"]),
    failing_first_collective: (BROKEN, ["ncclAllReduce returned 3 (internal error)"]),
    first_collective_that_does_nothing: (BROKEN, ["a first all-reduce of ones gave 1.0"]),
    hanging_abort: (BROKEN, ["ncclAllReduce returned 3"]),
    failing_unique_id: (0, ["ncclGetUniqueId returned 2 (unhandled system error)"]),
    no_libnccl: (BROKEN, ["no libnccl could be loaded", "/nowhere/libnccl.so.2"]),
    no_native_library: (BROKEN, ["libabsent.so doesn't exist", "make build"]),
    unexpected_error: (BROKEN, ["nobody thought of it"]),
}


@pytest.mark.parametrize("breakage", NAMED, ids=lambda breakage: breakage.__name__)
def test_all_ranks_name_the_one_that_fails(ranks: WorkerPool, breakage: Breakage) -> None:
    broken, texts = NAMED[breakage]
    for rank, outcome in enumerate(outcomes(ranks, breakage, LONG_S)):
        assert [*outcome.failures] == [broken], outcome.text
        assert outcome.elapsed_s < QUICK_S
        assert f"making the NCCL communicator of group '{GROUP_NAME}' failed" in outcome.text
        assert f"[raised on rank {rank}]" in outcome.text
        assert f"\n  rank {broken}: " in outcome.text
        for text in texts:
            assert text in outcome.failures[broken]


@pytest.mark.parametrize(
    "breakage",
    [hanging_init, hanging_first_collective, late_init],
    ids=lambda breakage: breakage.__name__,
)
def test_a_rank_that_hangs_ends_the_attempt_of_all(ranks: WorkerPool, breakage: Breakage) -> None:
    """Nobody can tell which rank hangs: those are named who were the first to lose patience.

    Communicators that are made after all, when nobody waits any more, are freed too.
    """
    for outcome in outcomes(ranks, breakage, SHORT_S):
        assert outcome.elapsed_s < QUICK_S
        assert outcome.failures
        for text in outcome.failures.values():
            assert text == "ncclCommInitRank and a first all-reduce did not return within 1.5 s"


def make_beside_the_dead(rank: int, world_size: int, url: str) -> None:
    with gloo_group(rank, world_size, url) as group, death(rank):
        PyNcclCommunicator(group, "cpu", timeout_s=SHORT_S)


def test_a_rank_that_dies_ends_the_attempt_of_all(ranks: WorkerPool) -> None:
    start = time.monotonic()
    with pytest.raises(WorkerError) as caught:
        ranks.run(make_beside_the_dead, fresh_init_method(), env=fake_nccl_environment())
    assert time.monotonic() - start < QUICK_S
    failures = {rank: failure.type_name for rank, failure in caught.value.exceptions.items()}
    assert failures.pop(BROKEN) == "WorkerDied"
    assert failures.keys() == {0, 1, 3}
    assert {*failures.values()} <= {
        "distcomm.errors.CollectiveError",
        "distcomm.errors.InitializationError",
    }


# One failure of one group is none of another's


def two_groups(rank: int, world_size: int, url: str) -> tuple[bool, int]:
    with gloo_group(rank, world_size, url):
        pair = dist.new_subgroups(2)[0]
        broken = rank >= 2
        with failing("ncclCommInitRank", 1) if broken else ExitStack():
            try:
                comm = PyNcclCommunicator(pair, "cpu", timeout_s=LONG_S)
            except InitializationError as error:
                return broken and [*error.failures] == [3], num_live_comms()
        total = comm.all_reduce(torch.ones(2)).tolist()
        comm.close()
        return not broken and total == [2, 2], num_live_comms()


def test_a_failure_stays_in_its_group(ranks: WorkerPool) -> None:
    results = ranks.run(two_groups, fresh_init_method(), env=fake_nccl_environment())
    assert results == [(True, 0)] * WORLD


# close()


@contextmanager
def warnings_of_close() -> Iterator[list[str]]:
    texts: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: texts.append(record.getMessage())  # type: ignore[method-assign]
    connection.logger.addHandler(handler)
    try:
        yield texts
    finally:
        connection.logger.removeHandler(handler)


def close_quietly(rank: int, world_size: int, url: str) -> list[str]:
    with communicator(rank, world_size, url) as comm, warnings_of_close() as texts:
        comm.close()
    assert (num_calls("ncclCommDestroy"), num_calls("ncclCommAbort")) == (1, 0)
    return texts


def test_close_frees_without_a_word(ranks: WorkerPool) -> None:
    assert ranks.run(close_quietly, fresh_init_method(), env=fake_nccl_environment()) == [[]] * 4


def close_while_destroy_hangs(rank: int, world_size: int, url: str) -> list[str]:
    with communicator(rank, world_size, url) as comm, warnings_of_close() as texts:
        destroy = comm.nccl.ncclCommDestroy
        released = threading.Event()

        def held(handle: int) -> int:
            released.wait(LONG_S)
            code: int = destroy(handle)
            return code

        held.__name__ = "ncclCommDestroy"
        comm.nccl.ncclCommDestroy = held  # type: ignore[method-assign]
        start = time.monotonic()
        comm.close()
        comm.close()
        assert time.monotonic() - start < QUICK_S
        assert not comm.enabled
        assert num_live_comms() == 1
        released.set()
        assert becomes_true(lambda: num_live_comms() == 0, QUICK_S)
        assert num_calls("ncclCommAbort") == 0
    return texts


def test_close_does_not_wait_for_a_communicator_that_cannot_be_freed_yet(
    ranks: WorkerPool,
) -> None:
    args = close_while_destroy_hangs, fresh_init_method()
    for rank, texts in enumerate(ranks.run(*args, env=fake_nccl_environment())):
        (text,) = texts
        assert "ncclCommDestroy did not return within 3 s" in text
        assert f"group '{GROUP_NAME}', rank {rank}" in text


def close_while_work_hangs(rank: int, world_size: int, url: str, how: str) -> list[str]:
    with communicator(rank, world_size, url) as comm, warnings_of_close() as texts:
        comm._timeout_s = SHORT_S

        def wait() -> None:
            if how == "fails":
                raise RuntimeError("CUDA error: an illegal memory access was encountered")
            time.sleep(LONG_S)

        comm._wait_for_device = wait  # type: ignore[method-assign]
        start = time.monotonic()
        comm.close()
        assert time.monotonic() - start < QUICK_S
        assert num_live_comms() == 0
    assert (num_calls("ncclCommDestroy"), num_calls("ncclCommAbort")) == (0, 1)
    return texts


@pytest.mark.parametrize("how", ["hangs", "fails"])
def test_close_aborts_when_the_work_under_way(ranks: WorkerPool, how: str) -> None:
    args = close_while_work_hangs, fresh_init_method(), how
    for rank, texts in enumerate(ranks.run(*args, env=fake_nccl_environment())):
        (text,) = texts
        cause = "CUDA error: an illegal" if how == "fails" else "did not return within 1.5 s"
        assert cause in text
        assert "aborting the communicator" in text
        assert f"group '{GROUP_NAME}', rank {rank}" in text


def close_after_a_failed_destroy(rank: int, world_size: int, url: str) -> list[str]:
    with communicator(rank, world_size, url) as comm, warnings_of_close() as texts:
        with with_environment(FAKE_NCCL_FAIL="ncclCommDestroy:code=6"):
            comm.close()
        comm.close()
    assert num_calls("ncclCommDestroy") == 1
    return texts


def test_close_reports_an_error_of_nccl_and_goes_on(ranks: WorkerPool) -> None:
    """It doesn't raise: whoever closes several communicators must get to the others."""
    args = close_after_a_failed_destroy, fresh_init_method()
    for rank, texts in enumerate(ranks.run(*args, env=fake_nccl_environment())):
        (text,) = texts
        assert "ncclCommDestroy returned 6 (remote process exited" in text
        assert f"group '{GROUP_NAME}', rank {rank}" in text


def close_beside_the_dead(rank: int, world_size: int, url: str) -> None:
    with communicator(rank, world_size, url, timeout_s=SHORT_S) as comm:
        assert comm.all_reduce(torch.ones(1)).item() == world_size
        if rank == BROKEN:
            os.kill(os.getpid(), signal.SIGKILL)
        with pytest.raises(NcclError), with_environment(FAKE_NCCL_TIMEOUT_S="1"):
            comm.all_reduce(torch.ones(1))
        start = time.monotonic()
        comm.close()
        assert time.monotonic() - start < QUICK_S
        assert num_live_comms() == 0
    raise LookupError("reached the end")


def test_close_beside_a_dead_rank(ranks: WorkerPool) -> None:
    with pytest.raises(WorkerError) as caught:
        ranks.run(close_beside_the_dead, fresh_init_method(), env=fake_nccl_environment())
    failures = {rank: failure.type_name for rank, failure in caught.value.exceptions.items()}
    assert failures.pop(BROKEN) == "WorkerDied"
    assert failures == dict.fromkeys((0, 1, 3), "LookupError"), caught.value


# Leaks


def in_use() -> dict[str, int]:
    """Threads, open files and communicators of this process."""
    threads, files = (len(list(Path("/proc/self", name).iterdir())) for name in ("task", "fd"))
    return {"threads": threads, "files": files, "communicators": num_live_comms()}


def make_and_close(rank: int, world_size: int, url: str, num_cycles: int) -> None:
    with gloo_group(rank, world_size, url) as group:
        for cycle in range(num_cycles):
            comm = PyNcclCommunicator(group, "cpu")
            assert comm.all_reduce(torch.ones(2)).tolist() == [world_size] * 2
            comm.close()
            dist.barrier()
            if cycle == 1:  # libraries are loaded, and gloo's threads run
                early = in_use()

        def flat() -> bool:  # a thread that has been joined may still be there for a moment
            return all(now <= early[what] for what, now in in_use().items())

        assert early["communicators"] == 0
        assert becomes_true(flat, QUICK_S), f"{early} after two cycles, {in_use()} in the end"


def test_twenty_cycles_leave_nothing_behind(ranks: WorkerPool) -> None:
    ranks.run(make_and_close, fresh_init_method(), 20, env=fake_nccl_environment())
