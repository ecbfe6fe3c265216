"""Memory that can sleep on the stand-ins for the CUDA driver and for torch, with noise in it."""

from __future__ import annotations

import ctypes
import gc
import os
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from distcomm.memory import SleepablePool, sleep, sleep_transfers, sleepable_pools, torch_pools
from distcomm.memory.alloc_conf import ExpandableSegmentsGuard
from distcomm.memory.sleep_heap import SleepFailure, SleepHeap, TransferProgress
from distcomm.native import NativeLibrary
from tests.cpu.test_alloc_conf import FakeSettings
from tests.cpu.torch_stand_in import DEVICE_INDEX, Segment, Torch, patched
from tests.fake_cuda import GRANULARITY, FakeCuda, fake_cuda

__all__ = [
    "CHUNK",
    "DEVICE",
    "FAILED",
    "NUM_DEVICES",
    "STREAMS",
    "Block",
    "PoolRig",
    "Rig",
    "Tensor",
    "can_be_read",
    "pool_rig",
    "rig",
]

CHUNK = 2 * GRANULARITY
DEVICE = torch.device("cuda", DEVICE_INDEX)
NUM_DEVICES = 8
STREAMS = (11, 12)
FAILED = "failed with driver error 719 (unspecified launch failure)"  # on purpose


class Block:
    """A block with noise in it."""

    def __init__(self, address: int, num_bytes: int) -> None:
        self.address, self.num_bytes = address, num_bytes
        self.fill()

    def fill(self) -> None:
        self.noise = random.randbytes(self.num_bytes)
        ctypes.memmove(self.address, self.noise, self.num_bytes)

    def is_intact(self) -> bool:
        return ctypes.string_at(self.address, self.num_bytes) == self.noise


def can_be_read(address: int) -> bool:
    """Without the signal that reading it would raise."""
    library = ctypes.CDLL(None, use_errno=True)
    reading, writing = os.pipe()
    try:
        return library.write(writing, ctypes.c_void_p(address), 1) == 1
    finally:
        os.close(reading)
        os.close(writing)


class Rig:
    """A heap of its own, with some tags."""

    def __init__(self, fake: FakeCuda) -> None:
        self.fake = fake
        self.heap = SleepHeap(NativeLibrary(), 0, chunk_bytes=CHUNK, shared=False)
        self.weights, self.cache = self.heap.new_tag(), self.heap.new_tag()

    def alloc(self, tag: int, num_bytes: int, stream: int = 0) -> int:
        former = self.heap.select(tag)
        try:
            return self.heap.alloc(num_bytes, stream)
        finally:
            assert self.heap.select(former) == tag

    def make(self, tag: int, num_bytes: int = CHUNK) -> Block:
        address = self.alloc(tag, num_bytes)
        assert address, self.heap.take_failure()
        return Block(address, num_bytes)

    def sleep(self, *tags: int, offloaded: tuple[int, ...] = ()) -> SleepFailure | None:
        self._progress = TransferProgress()
        return self.heap.sleep(tags, offloaded, STREAMS, self._progress)

    def wake_up(self, *tags: int) -> SleepFailure | None:
        self._progress = TransferProgress()
        return self.heap.wake_up(tags, STREAMS, self._progress)

    def progress(self) -> tuple[int, int]:
        """Of the transfer under way, or the latest one."""
        return self._progress.done, self._progress.total


@contextmanager
def rig() -> Iterator[Rig]:
    """In the worker. Whatever the test has left in the heap goes with it, without a trace."""
    fake = fake_cuda()
    before = fake.live()
    rig = Rig(fake)
    try:
        yield rig
        fake.fail_no_call()
        assert fake.live().copies == 0
    finally:
        del rig.heap
    assert fake.live() == before


class Tensor(Block):
    """A tensor of torch's stand-in, with noise in it."""

    def __init__(self, segment: Segment, num_bytes: int) -> None:
        self.segment = segment
        super().__init__(segment.address, num_bytes)

    def free(self) -> None:
        self.segment.free()


class PoolRig:
    """What `SleepablePool` is made of, with stand-ins for torch and the driver.

    Attributes:
        fake, torch: the stand-ins.
        settings: of torch's allocator; expandable segments are on.
        patch: for the test; undone at its end.
        tensors: all that were made.
        gpu_is_idle: to be cleared while the GPU is to be at work.
    """

    def __init__(self, fake: FakeCuda, there: Torch, patch: pytest.MonkeyPatch) -> None:
        self.fake, self.torch, self.patch = fake, there, patch
        self.settings = FakeSettings("expandable_segments:True")
        patch.setattr(
            torch_pools, "expandable_segments_off", ExpandableSegmentsGuard(self.settings)
        )
        patch.setattr(torch.cuda, "current_device", lambda: DEVICE_INDEX)
        patch.setattr(sleep, "_num_devices", lambda: NUM_DEVICES)
        self.gpu_is_idle = threading.Event()
        self.gpu_is_idle.set()
        patch.setattr(sleep_transfers, "_synchronize", lambda device: self.gpu_is_idle.wait(60))
        streams = tuple(SimpleNamespace(cuda_stream=stream) for stream in STREAMS)
        patch.setattr(sleep_transfers, "_new_streams", lambda device: streams)
        # Pools have this heap, whose chunk size counts as the first one's.
        self.heap = SleepHeap(NativeLibrary(), DEVICE_INDEX, chunk_bytes=CHUNK)
        self.tensors: list[Tensor] = []

    def pool(self, **arguments: Any) -> SleepablePool:
        return SleepablePool(DEVICE, **arguments)

    def tensor(self, num_bytes: int = CHUNK) -> Tensor:
        """A new one of this thread, where it allocates from."""
        self.tensors.append(Tensor(self.torch.alloc(num_bytes), num_bytes))
        return self.tensors[-1]

    def make(self, pool: SleepablePool, tag: str, num_bytes: int = CHUNK) -> Tensor:
        """A new one under `tag`."""
        with pool.use(tag):
            return self.tensor(num_bytes)

    def finish(self) -> None:
        """All tensors go, and all pools."""
        self.fake.reset()
        assert self.settings.on, "expandable segments are still off"
        assert self.torch.routes == [], "a pool is still begun"
        assert self.heap.select(0) == 0, "a tag is still selected"
        for tensor in self.tensors:
            if tensor.segment.is_live:
                tensor.free()
        for pool in sleepable_pools():
            pool.close()
        self.torch.empty(self.torch.freeable)
        self.heap.settle()
        self.heap.trim_host()
        assert self.torch.segments == []
        assert self.torch.faults == []


@contextmanager
def pool_rig() -> Iterator[PoolRig]:
    """In the worker. All memory has gone when the test's tensors and pools have."""
    fake = fake_cuda()
    before = fake.live()
    patch = pytest.MonkeyPatch()
    with patched(patch) as there:
        rig = PoolRig(fake, there, patch)
        try:
            yield rig
        except BaseException:
            with suppress(AssertionError):  # for the sake of the next test
                rig.finish()
            raise
        rig.finish()
        gc.collect()
    assert fake.live() == before
