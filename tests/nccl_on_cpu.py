"""PyNCCL communicators on the NCCL stand-in: what test functions in worker processes share."""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

from distcomm.nccl import NcclLibrary, PyNcclCommunicator

from .fake_nccl import fake_nccl_path

__all__ = [
    "becomes_true",
    "communicator",
    "fake_nccl_environment",
    "gloo_group",
    "num_calls",
    "num_live_bytes",
    "num_live_comms",
    "num_live_windows",
    "with_environment",
]

GROUP_NAME = "trial"


def fake_nccl_environment() -> dict[str, str | None]:
    """For `WorkerPool.run`: distcomm loads the stand-in, and nothing fails by injection."""
    return {
        "DISTCOMM_NCCL_SO": str(fake_nccl_path()),
        "FAKE_NCCL_FAIL": None,
        "FAKE_NCCL_HANG": None,
        "FAKE_NCCL_MEMORY_BYTES": None,
        "FAKE_NCCL_MEMORY_DESCENDS": None,
        "FAKE_NCCL_NULL_WINDOW": None,
        "FAKE_NCCL_VERSION": None,
    }


@contextmanager
def gloo_group(rank: int, world_size: int, url: str) -> Iterator[dist.ProcessGroup]:
    """torch's default process group, for a ``with`` block."""
    dist.init_process_group("gloo", init_method=url, rank=rank, world_size=world_size)
    try:
        group = dist.group.WORLD
        assert group is not None
        yield group
    finally:
        dist.destroy_process_group()


@contextmanager
def communicator(
    rank: int, world_size: int, url: str, **options: Any
) -> Iterator[PyNcclCommunicator]:
    """A communicator of all ranks, closed when the block ends."""
    with gloo_group(rank, world_size, url) as group:
        comm = PyNcclCommunicator(group, "cpu", name=GROUP_NAME, **options)
        try:
            yield comm
        finally:
            comm.close()


@contextmanager
def with_environment(**variables: str) -> Iterator[None]:
    """Sets variables that the stand-in reads at every call, for a ``with`` block."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def num_live_comms() -> int:
    """Communicators that this process has made and neither destroyed nor aborted."""
    count: int = ctypes.CDLL(NcclLibrary().path).fake_nccl_live_comms()
    return count


def num_live_windows() -> int:
    """Windows that this process has neither deregistered nor lost with their communicator."""
    count: int = ctypes.CDLL(NcclLibrary().path).fake_nccl_live_windows()
    return count


def num_live_bytes() -> int:
    """Bytes that this process holds from ncclMemAlloc, which rounds up to 2 MiB."""
    library = ctypes.CDLL(NcclLibrary().path)
    library.fake_nccl_live_bytes.restype = ctypes.c_long
    count: int = library.fake_nccl_live_bytes()
    return count


def num_calls(function: str) -> int:
    """How often this process has called the stand-in's `function`."""
    library = ctypes.CDLL(NcclLibrary().path)
    library.fake_nccl_calls.restype = ctypes.c_long
    count: int = library.fake_nccl_calls(function.encode())
    return count


def becomes_true(condition: Callable[[], bool], within_s: float) -> bool:
    """Whether `condition` holds before `within_s` seconds have passed."""
    deadline = time.monotonic() + within_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True
