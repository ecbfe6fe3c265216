"""GPU suite: worker processes, one a GPU, and the world sizes that this machine has GPUs for."""

from __future__ import annotations

import platform
from collections.abc import Iterator

import pytest
import torch

from distcomm import NcclLibrary
from tests.worker_pool import WorkerPool

NUM_GPUS = torch.cuda.device_count()


def pytest_report_header() -> str:
    """The conditions of the run, so that its output is a result file."""
    if NUM_GPUS == 0:
        return "GPUs: none"
    return (
        f"GPUs: {NUM_GPUS} x {torch.cuda.get_device_name(0)}; python {platform.python_version()}, "
        f"torch {torch.__version__}, NCCL {NcclLibrary().version_text}"
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
