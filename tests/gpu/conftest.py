"""GPU suite: worker processes, one a GPU, and the world sizes that there are GPUs for."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator

import pytest
import torch

from distcomm import NcclLibrary
from tests.worker_pool import WorkerPool


def _take_gpus() -> int:
    """How many GPUs there are for tests.

    Under pytest-xdist every worker has as many as GPUS_PER_WORKER says, or an equal part of them.
    If there aren't that many, workers share them.
    """
    worker = os.environ.get("PYTEST_XDIST_WORKER")
    if worker is None:
        return torch.cuda.device_count()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = visible.split(",") if visible else [*map(str, range(torch.cuda.device_count()))]
    number, num_workers = int(worker[2:]), int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    if number >= num_workers:
        raise pytest.UsageError(f"{worker} stands in for a crashed worker, whose GPUs aren't known")
    share = _gpus_per_worker(len(gpus), num_workers)
    own = [gpus[(number * share + each) % len(gpus)] for each in range(share)]
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(own)
    return share


def _gpus_per_worker(num_gpus: int, num_workers: int) -> int:
    share = int(os.environ.get("GPUS_PER_WORKER", num_gpus // num_workers))
    if share > num_gpus:
        raise pytest.UsageError(f"GPUS_PER_WORKER is {share}, but there are {num_gpus} GPUs")
    return share


NUM_GPUS = _take_gpus()


def pytest_report_header(config: pytest.Config) -> str:
    """The conditions of the run, so that its output is a result file."""
    num_workers = config.getoption("numprocesses", None) or 0
    if NUM_GPUS == 0:
        return "GPUs: none"
    workers = ""
    if num_workers:  # this is the process that has started them, and has all GPUs
        workers = f", {_gpus_per_worker(NUM_GPUS, num_workers)} for each of {num_workers} workers"
    return (
        f"GPUs: {NUM_GPUS} x {torch.cuda.get_device_name(0)}{workers}; "
        f"python {platform.python_version()}, torch {torch.__version__}, "
        f"NCCL {NcclLibrary().version_text}"
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(pytest.mark.gpu)
        if NUM_GPUS == 0:
            item.add_marker(pytest.mark.skip(reason="no GPU"))


@pytest.fixture(scope="session")
def gpus() -> Iterator[WorkerPool]:
    with WorkerPool(NUM_GPUS, timeout_s=120) as pool:
        yield pool


@pytest.fixture(params=[2, 3, 4])
def world(request: pytest.FixtureRequest) -> int:
    """A number of ranks, each with a GPU of its own."""
    if request.param > NUM_GPUS:
        pytest.skip(f"needs {request.param} GPUs, there are {NUM_GPUS}")
    return request.param


@pytest.fixture
def most_ranks() -> int:
    """As many ranks as there are GPUs, for what is slow or doesn't depend on their number."""
    if NUM_GPUS < 2:
        pytest.skip("needs 2 GPUs")
    return NUM_GPUS
