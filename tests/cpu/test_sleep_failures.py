"""What the heap of memory that can sleep does when the driver refuses, or memory is short.

Content that was to be kept is never lost, and a call that has failed can be repeated.
"""

from __future__ import annotations

import ctypes
import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from distcomm.errors import SleepError
from distcomm.memory.sleep_heap import SleepFailure, SleepHeap, TagUsage
from distcomm.native import NativeLibrary
from tests.cpu.sleep_rig import CHUNK, FAILED, Block, Rig, can_be_read, rig
from tests.fake_cuda import GRANULARITY, INJECTED, OUT_OF_MEMORY, driver_with, on_fake_cuda
from tests.worker_pool import WorkerPool

DRIVER_FUNCTIONS = [
    "cuDevicePrimaryCtxRetain",
    "cuCtxPushCurrent_v2",
    "cuCtxPopCurrent_v2",
    "cuCtxSynchronize",
    "cuMemcpyAsync",
    "cuMemAddressReserve",
    "cuMemAddressFree",
    "cuMemCreate",
    "cuMemRelease",
    "cuMemMap",
    "cuMemSetAccess",
    "cuMemUnmap",
    "cuMemGetAllocationGranularity",
    "cuMemGetInfo_v2",
    "cuMemHostAlloc",
    "cuMemFreeHost",
    "cuStreamSynchronize",
]


@pytest.fixture(scope="module")
def process() -> Iterator[WorkerPool]:
    with WorkerPool(1) as pool:
        yield pool


def each_failure(
    rig: Rig, name: str, call: Callable[[], SleepFailure | None]
) -> Iterator[SleepFailure]:
    """Makes the first, second, ... driver call of this name fail, until there are no more."""
    for nth in range(1, 100):
        before = rig.fake.num_calls(name)
        rig.fake.fail_call(name, nth)
        failure = call()
        rig.fake.fail_no_call()
        if failure is None:
            assert nth > 1, f"{name} is never called"
            assert rig.fake.num_calls(name) - before == nth - 1
            return
        yield failure
    raise AssertionError("it never went well")


@on_fake_cuda(rig)
def test_the_first_reason_is_the_one_to_tell(rig: Rig) -> None:
    """Also if what was done can't be undone now."""
    rig.fake.fail_call("cuMemMap", 2)
    rig.fake.fail_call("cuMemUnmap")
    assert rig.alloc(rig.weights, 3 * CHUNK) == 0
    failure = rig.heap.take_failure()
    assert failure is not None
    assert (failure.needed_bytes, failure.text) == (3 * CHUNK, f"cuMemMap {FAILED}")
    assert rig.heap.usage(rig.weights) == TagUsage()
    rig.heap.settle()
    assert rig.fake.live().ranges == 0


# Sleep

SLEEPING = ["cuMemHostAlloc", "cuCtxSynchronize", "cuMemcpyAsync", "cuStreamSynchronize"]


@pytest.mark.parametrize("name", [*SLEEPING, "cuMemUnmap", "cuMemRelease"])
@on_fake_cuda(rig)
def test_a_sleep_that_fails_loses_nothing(rig: Rig, name: str) -> None:
    blocks = [rig.make(rig.weights, size) for size in (1, 3 * CHUNK, 2 * CHUNK)]

    def sleep() -> SleepFailure | None:
        rig.heap.trim_host()
        return rig.sleep(rig.weights, offloaded=(rig.weights,))

    for failure in each_failure(rig, name, sleep):
        assert (failure.code, failure.text) == (INJECTED, f"{name} {FAILED}")
        assert failure.free_bytes == -1
        assert all(block.is_intact() for block in blocks), "put back where it was"
        usage = rig.heap.usage(rig.weights)
        assert usage == TagUsage(5 * CHUNK + GRANULARITY)
    assert rig.wake_up(rig.weights) is None
    assert all(block.is_intact() for block in blocks)
    rig.fake.release_unmapped()


@on_fake_cuda(rig)
def test_what_cannot_be_put_back_sleeps(rig: Rig) -> None:
    """The driver refuses the last chunk, and then to map the others again."""
    block = rig.make(rig.weights, 3 * CHUNK)
    rig.fake.fail_call("cuMemUnmap", 3)
    rig.fake.fail_call("cuMemCreate", count=100)
    failure = rig.sleep(rig.weights, offloaded=(rig.weights,))
    assert failure is not None
    assert failure.text == f"cuMemUnmap {FAILED}", "the first reason is the one to tell"
    rig.fake.fail_no_call()
    assert rig.heap.usage(rig.weights) == TagUsage(CHUNK, 2 * CHUNK, 2 * CHUNK)
    assert not can_be_read(block.address)
    assert rig.wake_up(rig.weights) is None
    assert block.is_intact()


@on_fake_cuda(rig)
def test_nothing_is_discarded_before_all_else_is_saved(rig: Rig) -> None:
    """Whatever the order of the addresses."""
    blocks = [rig.make(tag) for tag in (rig.cache, rig.weights, rig.cache)]
    for name in ("cuMemcpyAsync", "cuStreamSynchronize", "cuMemUnmap"):
        rig.fake.fail_call(name)
        assert rig.sleep(rig.cache, rig.weights, offloaded=(rig.weights,)) is not None
        assert all(block.is_intact() for block in blocks)


@on_fake_cuda(rig)
def test_a_tag_that_sleeps_in_part_goes_on(rig: Rig) -> None:
    blocks = [rig.make(rig.weights) for _ in range(3)]
    rig.fake.fail_call("cuMemUnmap", 2)
    assert rig.sleep(rig.weights) is not None
    assert rig.heap.usage(rig.weights) == TagUsage(2 * CHUNK, CHUNK, 0)
    kept = [block for block in blocks if can_be_read(block.address)]
    assert rig.sleep(rig.weights, offloaded=(rig.weights,)) is None
    assert rig.heap.usage(rig.weights) == TagUsage(0, 3 * CHUNK, 2 * CHUNK)
    assert rig.wake_up(rig.weights) is None
    assert len(kept) == 2
    assert all(block.is_intact() for block in kept)


@pytest.mark.parametrize("call", ["prepare", "sleep"])
@on_fake_cuda(rig)
def test_without_host_memory_nothing_changes(rig: Rig, call: str) -> None:
    blocks = [rig.make(rig.weights, 3 * CHUNK), rig.make(rig.cache)]
    rig.sleep(rig.cache, offloaded=(rig.cache,))
    rig.wake_up(rig.cache)
    rig.fake.set_limits(host_bytes=2 * CHUNK)
    before = rig.fake.live()
    for _ in range(2):
        if call == "prepare":
            failure = rig.heap.prepare([rig.weights])
        else:
            failure = rig.sleep(rig.weights, rig.cache, offloaded=(rig.weights,))
        assert failure == SleepFailure(
            OUT_OF_MEMORY,
            3 * CHUNK,
            -1,
            "cuMemHostAlloc failed with driver error 2 (out of memory)",
        )
        live = rig.fake.live()
        assert live.host_bytes <= before.host_bytes
        assert live.device_bytes == before.device_bytes
        assert all(block.is_intact() for block in blocks)
    rig.fake.set_limits()
    assert rig.sleep(rig.weights, rig.cache, offloaded=(rig.weights,)) is None


# Wake-up


@pytest.mark.parametrize(
    "name", ["cuMemCreate", "cuMemMap", "cuMemSetAccess", "cuMemcpyAsync", "cuStreamSynchronize"]
)
@on_fake_cuda(rig)
def test_a_wake_up_that_fails_leaves_all_asleep(rig: Rig, name: str) -> None:
    blocks = [rig.make(rig.weights, size) for size in (1, 3 * CHUNK)]
    rig.make(rig.cache, 2 * CHUNK)
    rig.sleep(rig.weights, rig.cache, offloaded=(rig.weights,))
    asleep = [rig.heap.usage(tag) for tag in (rig.weights, rig.cache)]
    for failure in each_failure(rig, name, lambda: rig.wake_up(rig.cache, rig.weights)):
        assert (failure.code, failure.text) == (INJECTED, f"{name} {FAILED}")
        assert [rig.heap.usage(tag) for tag in (rig.weights, rig.cache)] == asleep
        assert rig.fake.live().device_bytes == 0
        assert not any(can_be_read(block.address) for block in blocks)
    assert all(block.is_intact() for block in blocks)


@on_fake_cuda(rig)
def test_a_wake_up_without_enough_memory_takes_none(rig: Rig) -> None:
    """Not for a moment: whoever has the memory may need what is free."""
    block = rig.make(rig.weights, 3 * CHUNK)
    rig.sleep(rig.weights, offloaded=(rig.weights,))
    rig.fake.set_limits(device_bytes=3 * CHUNK - GRANULARITY)
    created = rig.fake.num_calls("cuMemCreate")
    for _ in range(2):
        failure = rig.wake_up(rig.weights)
        assert failure is not None
        assert failure.code == OUT_OF_MEMORY
        assert (failure.needed_bytes, failure.free_bytes) == (3 * CHUNK, 3 * CHUNK - GRANULARITY)
        assert failure.text == "cuMemGetInfo failed with driver error 2 (out of memory)"
    assert rig.fake.num_calls("cuMemCreate") == created
    rig.fake.set_limits(device_bytes=3 * CHUNK)
    assert rig.wake_up(rig.weights) is None
    assert block.is_intact()


@on_fake_cuda(rig)
def test_memory_that_goes_while_waking_up(rig: Rig) -> None:
    """Another process is faster, after there seemed to be enough."""
    block = rig.make(rig.weights, 3 * CHUNK)
    rig.sleep(rig.weights, offloaded=(rig.weights,))
    rig.fake.fail_call("cuMemCreate", 3, code=OUT_OF_MEMORY)
    failure = rig.wake_up(rig.weights)
    assert failure is not None
    assert (failure.code, failure.needed_bytes) == (OUT_OF_MEMORY, 3 * CHUNK)
    assert failure.free_bytes == 1 << 30, "with what it had taken already"
    assert failure.text == "cuMemCreate failed with driver error 2 (out of memory)"
    assert rig.fake.live().device_bytes == 0
    assert rig.wake_up(rig.weights) is None
    assert block.is_intact()


@on_fake_cuda(rig)
def test_a_driver_that_does_not_say_what_is_free(rig: Rig) -> None:
    block = rig.make(rig.weights)
    rig.sleep(rig.weights, offloaded=(rig.weights,))
    rig.fake.fail_call("cuMemGetInfo", count=100)
    rig.fake.set_limits(device_bytes=0)
    failure = rig.wake_up(rig.weights)
    assert failure is not None
    assert (failure.code, failure.free_bytes) == (OUT_OF_MEMORY, -1)
    rig.fake.set_limits()
    assert rig.wake_up(rig.weights) is None
    assert block.is_intact()


@on_fake_cuda(rig)
def test_memory_that_the_driver_keeps_is_used_at_the_next_wake_up(rig: Rig) -> None:
    """A wake-up fails, and what it has mapped can't be unmapped: it isn't mapped twice."""
    block = rig.make(rig.weights, 3 * CHUNK)
    rig.sleep(rig.weights, offloaded=(rig.weights,))
    rig.fake.fail_call("cuMemcpyAsync", 2)
    rig.fake.fail_call("cuMemUnmap", count=100)
    assert rig.wake_up(rig.weights) is not None
    rig.fake.fail_no_call()
    assert rig.heap.usage(rig.weights) == TagUsage(0, 3 * CHUNK, 3 * CHUNK)
    rig.fake.set_limits(device_bytes=3 * CHUNK)
    assert rig.wake_up(rig.weights) is None
    assert block.is_intact()


@on_fake_cuda(rig)
def test_memory_that_was_mapped_without_access_is_mapped_anew(rig: Rig) -> None:
    block = rig.make(rig.weights)
    rig.sleep(rig.weights, offloaded=(rig.weights,))
    rig.fake.fail_call("cuMemSetAccess")
    rig.fake.fail_call("cuMemUnmap")
    failure = rig.wake_up(rig.weights)
    assert failure is not None
    assert failure.text == f"cuMemSetAccess {FAILED}", "the first reason is the one to tell"
    assert rig.heap.usage(rig.weights) == TagUsage(0, CHUNK, CHUNK)
    assert rig.wake_up(rig.weights) is None
    assert block.is_intact()


@pytest.mark.parametrize("name", ["cuDevicePrimaryCtxRetain", "cuCtxPushCurrent"])
@on_fake_cuda(rig)
def test_a_device_that_cannot_be_used(rig: Rig, name: str) -> None:
    block = rig.make(rig.weights)
    expected = "cuCtxPushCurrent failed with driver error 201 (invalid device context)"

    def check(failure: SleepFailure | None) -> None:
        assert failure is not None
        assert (failure.code, failure.text) == (201, expected)

    rig.fake.fail_call(name, count=100)
    check(rig.heap.prepare([rig.weights]))
    check(rig.sleep(rig.weights, offloaded=(rig.weights,)))
    check(rig.wake_up(rig.weights))
    assert rig.heap.trim_host() == 0
    assert rig.heap.free(block.address)
    assert block.is_intact()
    rig.fake.fail_no_call()
    rig.heap.settle()
    assert rig.fake.live().ranges == 0


# Random sequences


class Model:
    """What is where, by a few simple rules."""

    def __init__(self, rig: Rig, seed: int) -> None:
        self.rig, self.random = rig, random.Random(seed)
        self.tags = [rig.weights, rig.cache, rig.heap.new_tag()]
        self.blocks: list[tuple[int, Block]] = []
        self.asleep: dict[int, bool] = {}  # whether the content is kept

    def step(self) -> None:
        tag = self.random.choice(self.tags)
        chosen = self.random.sample(self.tags, self.random.randrange(1, 4))
        action = self.random.choice(["make", "make", "free", "sleep", "wake_up", "trim"])
        if action == "make" and tag not in self.asleep:
            size = self.random.randrange(1, 5 * GRANULARITY)
            self.blocks.append((tag, self.rig.make(tag, size)))
        elif action == "free" and self.blocks:
            _, block = self.blocks.pop(self.random.randrange(len(self.blocks)))
            assert self.rig.heap.free(block.address)
        elif action == "sleep":
            kept = tuple(tag for tag in chosen if self.random.random() < 0.5)
            self.sleep(chosen, kept)
        elif action == "wake_up":
            self.wake_up(chosen)
        elif action == "trim":
            self.rig.heap.trim_host()

    def sleep(self, chosen: list[int], kept: tuple[int, ...]) -> None:
        self.inject(["cuMemHostAlloc", "cuMemcpyAsync", "cuStreamSynchronize"])
        failure = self.rig.sleep(*chosen, offloaded=kept)
        self.rig.fake.fail_no_call()
        if failure is None:
            self.asleep.update({tag: tag in kept for tag in chosen if tag not in self.asleep})

    def wake_up(self, chosen: list[int]) -> None:
        self.inject(["cuMemCreate", "cuMemMap", "cuMemcpyAsync", "cuMemSetAccess"])
        failure = self.rig.wake_up(*chosen)
        self.rig.fake.fail_no_call()
        if failure is not None:
            return
        for tag in chosen:
            if self.asleep.pop(tag, True):
                continue
            for _, block in (each for each in self.blocks if each[0] == tag):
                block.fill()

    def inject(self, names: list[str]) -> None:
        if self.random.random() < 0.3:
            self.rig.fake.fail_call(self.random.choice(names), self.random.randrange(1, 6))

    def check(self) -> None:
        for tag, block in self.blocks:
            assert can_be_read(block.address) == (tag not in self.asleep)
            assert tag in self.asleep or block.is_intact()
        usages = [self.rig.heap.usage(tag) for tag in self.tags]
        live = self.rig.fake.live()
        assert live.device_bytes == sum(usage.mapped_bytes for usage in usages)
        assert live.range_bytes == live.device_bytes + sum(usage.asleep_bytes for usage in usages)
        stats = self.rig.heap.stats()
        assert live.host_bytes == stats["host_bytes"]
        in_use = stats["host_bytes"] - stats["free_host_bytes"]
        assert in_use == sum(usage.offloaded_bytes for usage in usages)


@pytest.mark.parametrize("seed", range(4))
@on_fake_cuda(rig)
def test_random_sequences(rig: Rig, seed: int) -> None:
    model = Model(rig, seed)
    for _ in range(100):
        model.step()
        model.check()
    model.wake_up(model.tags)
    model.check()


@on_fake_cuda(rig)
def test_threads_allocate_and_free_while_one_sleeps(rig: Rig) -> None:
    def work(seed: int) -> None:
        tag = rig.heap.new_tag()
        for _ in range(30):
            blocks = [rig.make(tag, seed * GRANULARITY + 1) for _ in range(2)]
            assert all(block.is_intact() for block in blocks)
            assert all(rig.heap.free(block.address) for block in blocks)

    kept = rig.make(rig.weights, 3 * CHUNK)
    with ThreadPoolExecutor(4) as threads:
        working = [threads.submit(work, seed) for seed in range(3)]
        while not all(each.done() for each in working):
            assert rig.sleep(rig.weights, offloaded=(rig.weights,)) is None
            assert rig.wake_up(rig.weights) is None
        for each in working:
            each.result()
    rig.heap.settle()
    assert kept.is_intact()
    assert rig.fake.live().device_bytes == 3 * CHUNK


# Heaps


@on_fake_cuda(rig)
def test_heaps_of_their_own_share_nothing(rig: Rig) -> None:
    other = Rig(rig.fake)
    block = rig.make(rig.weights)
    assert not other.heap.free(block.address)
    assert other.weights == rig.weights
    assert other.sleep(other.weights) is None
    assert block.is_intact()


@on_fake_cuda(rig)
def test_a_device_has_one_shared_heap(rig: Rig) -> None:
    native = NativeLibrary()
    first = SleepHeap(native, 61, chunk_bytes=CHUNK)
    again, other = SleepHeap(native, 61, chunk_bytes=GRANULARITY), SleepHeap(native, 62)
    assert first.handle == again.handle != other.handle
    tag = first.new_tag()
    assert again.new_tag() == tag + 1
    again.select(tag)
    mappings = rig.fake.live().mappings
    address = again.alloc(2 * CHUNK)
    assert rig.fake.live().mappings == mappings + 2, "the chunk size of the first call"
    del first
    assert again.usage(tag) == TagUsage(2 * CHUNK)
    assert again.free(address)
    again.select(0)


@pytest.mark.parametrize("index", [-1, 64])
@on_fake_cuda(rig)
def test_a_device_that_cannot_be(rig: Rig, index: int) -> None:
    with pytest.raises(SleepError, match=f"there can't be a device {index}"):
        SleepHeap(NativeLibrary(), index)


# No driver, or an old one


def check_lacking_driver(_rank: int, _world_size: int, driver: str | None) -> None:
    if driver is not None:
        ctypes.CDLL(driver)
    native = NativeLibrary()
    if driver is None and native.functions.distcomm_has_cuda_driver():
        return  # a machine with a GPU
    for shared in (False, True):
        with pytest.raises(SleepError, match=r"no CUDA driver \(libcuda\.so\.1\), or one that"):
            SleepHeap(native, 0, shared=shared)


@pytest.mark.parametrize("missing", DRIVER_FUNCTIONS)
def test_a_driver_without_a_function(tmp_path: Path, missing: str) -> None:
    present = [name for name in DRIVER_FUNCTIONS if name != missing]
    with WorkerPool(1) as pool:
        pool.run(check_lacking_driver, str(driver_with(tmp_path, present)))


def test_no_driver() -> None:
    with WorkerPool(1) as pool:
        pool.run(check_lacking_driver, None)
