"""GPU suite: worker processes, one a GPU, and the world sizes that this machine has GPUs for."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.worker_pool import WorkerPool

NUM_GPUS = torch.cuda.device_count()


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
