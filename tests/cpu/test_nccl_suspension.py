"""Communicators that give back NCCL's memory for a while, on the NCCL stand-in."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from distcomm.errors import NcclError, SleepError
from distcomm.nccl import PyNcclCommunicator
from tests.nccl_on_cpu import (
    communicator,
    fake_nccl_environment,
    num_calls,
    num_live_comms,
    with_environment,
)
from tests.worker_pool import WorkerPool, fresh_init_method

WORLD = 2
VERSION = {"FAKE_NCCL_VERSION": "22907"}
Check = Callable[[PyNcclCommunicator], None]


def checked(rank: int, world: int, url: str, check: Check, timeout_s: float) -> None:
    with communicator(rank, world, url, timeout_s=timeout_s) as comm:
        check(comm)


def run(workers: WorkerPool, check: Check, *, timeout_s: float = 20.0) -> None:
    environment = {**fake_nccl_environment(), **VERSION}
    workers.run(checked, fresh_init_method(), check, timeout_s, ranks=WORLD, env=environment)


def total(comm: PyNcclCommunicator) -> float:
    return comm.all_reduce(torch.ones(1)).item()


def check_life(comm: PyNcclCommunicator) -> None:
    x = torch.ones(2)
    for _ in range(3):
        assert comm.suspend() == 12345
        assert comm.is_suspended
        assert comm.enabled  # so that nothing else takes its calls
        for call in (
            lambda: comm.all_reduce(x),
            lambda: comm.broadcast(x),
            lambda: comm.all_gather_into_tensor(torch.empty(4), x),
            comm.suspend,
        ):
            with pytest.raises(SleepError, match=r"is suspended: wake_up\(\) first"):
                call()
        with pytest.raises(SleepError), comm.group():
            pass
        comm.resume()
        assert not comm.is_suspended
        assert total(comm) == WORLD


def test_calls_are_refused_until_it_is_resumed(workers: WorkerPool):
    run(workers, check_life)


def check_close(comm: PyNcclCommunicator) -> None:
    before = num_calls("ncclCommAbort")
    comm.suspend()
    comm.close()
    assert num_calls("ncclCommAbort") == before + 1
    assert num_live_comms() == 0


def test_a_suspended_one_is_aborted_on_closing(workers: WorkerPool):
    run(workers, check_close)


def check_failure(comm: PyNcclCommunicator, function: str, *, hangs: bool) -> None:
    if function == "ncclCommResume":
        comm.suspend()
    call = comm.suspend if function == "ncclCommSuspend" else comm.resume
    trouble = {"FAKE_NCCL_HANG": function} if hangs else {"FAKE_NCCL_FAIL": function}
    with with_environment(**trouble), pytest.raises((NcclError, TimeoutError), match=function):
        call()
    assert not comm.is_suspended
    with pytest.raises(SleepError, match=f"{function} has failed"):
        total(comm)
    comm.close()
    assert num_live_comms() == 0


def check_failing_suspend(comm: PyNcclCommunicator) -> None:
    check_failure(comm, "ncclCommSuspend", hangs=False)


def check_failing_resume(comm: PyNcclCommunicator) -> None:
    check_failure(comm, "ncclCommResume", hangs=False)


def check_stuck_resume(comm: PyNcclCommunicator) -> None:
    check_failure(comm, "ncclCommResume", hangs=True)


@pytest.mark.parametrize("check", [check_failing_suspend, check_failing_resume])
def test_a_failure_ends_its_use(workers: WorkerPool, check: Check):
    run(workers, check)


def test_a_call_that_does_not_return_is_given_up(workers: WorkerPool):
    run(workers, check_stuck_resume, timeout_s=1.0)


def check_broken_off(comm: PyNcclCommunicator) -> None:
    comm.break_off("rank 7 has failed")
    with pytest.raises(SleepError, match="all_reduce: rank 7 has failed"):
        total(comm)


def test_one_that_failed_elsewhere_says_why(workers: WorkerPool):
    run(workers, check_broken_off)
