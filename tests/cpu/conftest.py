"""Fixtures of the CPU suite: worker processes, shared by all tests of a pytest process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.cpu.job import Job
from tests.worker_pool import WorkerPool


@pytest.fixture(scope="session")
def workers() -> Iterator[WorkerPool]:
    """Sixteen workers, each started when a test first uses it."""
    with WorkerPool(16) as pool:
        yield pool


@pytest.fixture(scope="module")
def job(workers: WorkerPool) -> Iterator[Job]:
    """Eight ranks in the state of ``init_distributed(tp=8, cp=2, ep=4)``."""
    job = Job(workers, 8, tp=8, cp=2, ep=4)
    yield job
    job.close()


@pytest.fixture(scope="session")
def compile_workers() -> Iterator[WorkerPool]:
    """Three workers with time to compile, which ranks aren't done with at once."""
    with WorkerPool(3, timeout_s=200) as pool:
        yield pool


@pytest.fixture(scope="module")
def compile_job(compile_workers: WorkerPool) -> Iterator[Job]:
    """Two ranks that wait for each other while they compile."""
    job = Job(compile_workers, 2, tp=2, timeout=100)
    yield job
    job.close()
