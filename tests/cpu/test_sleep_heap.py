"""The binding to the heap of memory that can sleep, on a stand-in for the CUDA driver.

The stand-in's memory is real: what was written is there or not, and what has no memory can't be
touched. distcomm looks for the driver once per process, so tests run in a worker of their own.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from distcomm.memory.sleep_heap import TagUsage
from tests.cpu.sleep_rig import CHUNK, FAILED, Rig, can_be_read, rig
from tests.fake_cuda import GRANULARITY, INJECTED, OUT_OF_MEMORY, on_fake_cuda
from tests.worker_pool import WorkerPool

ALLOCATING = ["cuMemGetAllocationGranularity", "cuMemAddressReserve", "cuMemCreate", "cuMemMap"]
ALLOCATING += ["cuMemSetAccess"]


@pytest.fixture(scope="module")
def process() -> Iterator[WorkerPool]:
    with WorkerPool(1) as pool:
        yield pool


# Blocks


@on_fake_cuda(rig)
def test_blocks_are_ranges_of_chunks(rig: Rig) -> None:
    sizes = [0, 1, GRANULARITY, CHUNK + 1, 2 * CHUNK]
    blocks = [rig.make(rig.weights, size) for size in sizes]
    rounded = [GRANULARITY, GRANULARITY, GRANULARITY, CHUNK + GRANULARITY, 2 * CHUNK]
    for size, block in zip(rounded, blocks, strict=True):
        ctypes.memset(block.address, 1, size)
    starts = sorted(zip((block.address for block in blocks), rounded, strict=True))
    assert all(one + size <= other for (one, size), (other, _) in itertools.pairwise(starts))
    live = rig.fake.live()
    assert (live.ranges, live.range_bytes) == (5, sum(rounded))
    assert (live.mappings, live.handles, live.device_bytes) == (7, 7, sum(rounded))
    assert rig.heap.usage(rig.weights) == TagUsage(sum(rounded), 0, 0)
    assert rig.heap.usage(rig.cache) == TagUsage()
    stats = rig.heap.stats()
    assert (stats["allocations"], stats["failed_allocations"]) == (5, 0)
    assert rig.heap.take_failure() is None


@on_fake_cuda(rig)
def test_a_block_is_freed_once(rig: Rig) -> None:
    block, other = rig.make(rig.weights), rig.make(rig.weights)
    assert not rig.heap.free(block.address + GRANULARITY)
    assert rig.heap.free(block.address)
    assert not rig.heap.free(block.address)
    assert rig.heap.stats()["unknown_frees"] == 2
    assert rig.heap.usage(rig.weights) == TagUsage(CHUNK)
    assert rig.fake.live().range_bytes == CHUNK
    assert other.is_intact()


@on_fake_cuda(rig)
def test_freeing_waits_for_the_device(rig: Rig) -> None:
    """As cudaFree does: the work of other streams may still read it. What sleeps isn't read."""
    block, asleep = rig.make(rig.weights), rig.make(rig.cache)
    rig.sleep(rig.cache)
    before = rig.fake.num_calls("cuCtxSynchronize")
    assert rig.heap.free(asleep.address)
    assert rig.fake.num_calls("cuCtxSynchronize") == before
    assert rig.heap.free(block.address)
    assert rig.fake.num_calls("cuCtxSynchronize") == before + 1


@on_fake_cuda(rig)
def test_what_waits_to_be_freed_is_freed_for_a_new_block(rig: Rig) -> None:
    block = rig.make(rig.weights, 2 * CHUNK)
    rig.fake.set_capturing(7)
    assert rig.heap.free(block.address, stream=7)
    rig.fake.set_capturing(None)
    rig.fake.set_limits(device_bytes=3 * CHUNK)
    assert rig.make(rig.weights, 2 * CHUNK).is_intact()
    assert rig.heap.take_failure() is None


@on_fake_cuda(rig)
def test_a_network_card_may_read_what_it_can(rig: Rig) -> None:
    rig.make(rig.weights)
    assert rig.fake.live().rdma_bytes == CHUNK
    rig.fake.set_rdma(False)
    rig.make(rig.weights)
    rig.fake.fail_call("cuDeviceGetAttribute", count=100)
    rig.make(rig.weights)
    assert rig.fake.live().rdma_bytes == CHUNK


@on_fake_cuda(rig)
def test_what_is_selected_is_the_threads_and_the_heaps(rig: Rig) -> None:
    other = Rig(rig.fake)
    assert rig.heap.select(rig.weights) == 0
    with ThreadPoolExecutor(1) as thread:
        assert thread.submit(rig.heap.alloc, 1).result() == 0
        failure = thread.submit(rig.heap.take_failure).result()
    assert failure is not None
    assert failure.text == "this thread is in no block that allocates with a tag"
    assert (failure.code, failure.needed_bytes, failure.free_bytes) == (0, 1, -1)
    assert other.heap.alloc(1) == 0
    assert rig.heap.alloc(1)
    assert rig.heap.select(0) == rig.weights
    assert rig.heap.alloc(1) == 0


@on_fake_cuda(rig)
def test_a_captured_graph_gets_nothing(rig: Rig) -> None:
    """A graph has its addresses for good, and what it frees may be in use by its next replay."""
    block = rig.make(rig.weights)
    rig.fake.set_capturing(7)
    assert rig.alloc(rig.weights, 1, stream=7) == 0
    failure = rig.heap.take_failure()
    assert failure is not None
    assert failure.text == "a captured CUDA graph can't have memory of a sleepable pool"
    assert rig.heap.free(block.address, stream=7)
    rig.fake.set_capturing(None)
    assert block.is_intact()
    rig.heap.settle()
    assert rig.fake.live().ranges == 0


@pytest.mark.parametrize("name", [*ALLOCATING, "cuDevicePrimaryCtxRetain", "cuCtxPushCurrent"])
@on_fake_cuda(rig)
def test_a_failed_allocation_leaves_nothing(rig: Rig, name: str) -> None:
    nth = 2 if name in ("cuMemCreate", "cuMemMap", "cuMemSetAccess") else 1
    rig.fake.fail_call(name, nth)
    assert rig.alloc(rig.weights, 3 * CHUNK) == 0
    failure = rig.heap.take_failure()
    assert failure is not None
    if name in ALLOCATING:
        assert (failure.code, failure.text) == (INJECTED, f"{name} {FAILED}")
    else:
        assert (failure.code, failure.text) == (0, "the device can't be used")
    assert rig.heap.take_failure() is None
    assert rig.fake.live().ranges == rig.fake.live().device_bytes == 0
    assert rig.heap.stats()["failed_allocations"] == 1
    assert rig.make(rig.weights, 3 * CHUNK).is_intact()


@on_fake_cuda(rig)
def test_an_allocation_without_enough_memory(rig: Rig) -> None:
    rig.fake.set_limits(device_bytes=2 * CHUNK)
    assert rig.alloc(rig.weights, 3 * CHUNK) == 0
    with ThreadPoolExecutor(1) as thread:
        assert thread.submit(rig.heap.take_failure).result() is None, "it is the thread's own"
    failure = rig.heap.take_failure()
    assert failure is not None
    assert (failure.code, failure.needed_bytes) == (OUT_OF_MEMORY, 3 * CHUNK)
    assert failure.free_bytes == 2 * CHUNK
    assert failure.text == "cuMemGetInfo failed with driver error 2 (out of memory)"
    assert rig.fake.live().ranges == 0
    assert rig.alloc(rig.weights, (1 << 63) - 1) == 0, "larger than any memory"
    rig.make(rig.weights, 2 * CHUNK)
    assert rig.heap.take_failure() is None, "a later allocation has succeeded"


@on_fake_cuda(rig)
def test_memory_that_goes_while_allocating(rig: Rig) -> None:
    """Another process is faster, after there seemed to be enough."""
    rig.fake.fail_call("cuMemCreate", 3, code=OUT_OF_MEMORY)
    assert rig.alloc(rig.weights, 3 * CHUNK) == 0
    failure = rig.heap.take_failure()
    assert failure is not None
    assert (failure.code, failure.needed_bytes) == (OUT_OF_MEMORY, 3 * CHUNK)
    assert failure.free_bytes == 1 << 30, "with what it had taken already"
    assert failure.text == "cuMemCreate failed with driver error 2 (out of memory)"
    assert rig.fake.live().device_bytes == 0


@pytest.mark.parametrize("name", ["cuMemUnmap", "cuMemAddressFree", "cuCtxSynchronize"])
@on_fake_cuda(rig)
def test_a_block_that_the_driver_does_not_take_back(rig: Rig, name: str) -> None:
    """It is tried again later, once per call."""
    block = rig.make(rig.weights, 2 * CHUNK)
    rig.fake.fail_call(name)
    assert rig.heap.free(block.address)
    assert rig.fake.live().ranges == 1
    assert rig.heap.stats()["failed_releases"] == (name != "cuCtxSynchronize")
    rig.heap.settle()
    assert rig.fake.live().ranges == rig.fake.live().device_bytes == 0


@on_fake_cuda(rig)
def test_after_shut_down_memory_stays(rig: Rig) -> None:
    block = rig.make(rig.weights)
    rig.heap.shut_down()
    assert rig.heap.free(block.address)
    rig.heap.settle()
    assert block.is_intact()


# Sleep


@on_fake_cuda(rig)
def test_content_and_addresses_are_kept(rig: Rig) -> None:
    sizes = [1, GRANULARITY, 3 * CHUNK, 5 * GRANULARITY + 7]
    blocks = [rig.make(rig.weights, size) for size in sizes]
    total = rig.fake.live().device_bytes
    for _ in range(3):
        assert rig.sleep(rig.weights, offloaded=(rig.weights,)) is None
        assert not any(can_be_read(block.address) for block in blocks)
        live = rig.fake.live()
        assert (live.device_bytes, live.mappings, live.handles) == (0, 0, 0)
        assert (live.range_bytes, live.host_bytes) == (total, total)
        assert rig.heap.usage(rig.weights) == TagUsage(0, total, total)
        assert rig.progress() == (total, total)
        assert rig.wake_up(rig.weights) is None
        assert all(block.is_intact() for block in blocks)
        assert rig.heap.usage(rig.weights) == TagUsage(total)
        assert rig.progress() == (total, total)


@on_fake_cuda(rig)
def test_what_is_not_offloaded_is_lost(rig: Rig) -> None:
    """The driver gives other memory, at the same addresses, and no host memory was needed."""
    weights, cache = rig.make(rig.weights, 3 * CHUNK), rig.make(rig.cache, 3 * CHUNK)
    assert rig.sleep(rig.cache, rig.weights, offloaded=(rig.weights,)) is None
    assert rig.fake.live().host_bytes == 3 * CHUNK
    assert rig.heap.usage(rig.cache) == TagUsage(0, 3 * CHUNK, 0)
    assert rig.wake_up(rig.weights, rig.cache) is None
    assert weights.is_intact()
    assert ctypes.string_at(cache.address, 3 * CHUNK) == bytes(3 * CHUNK)


@on_fake_cuda(rig)
def test_tags_sleep_and_wake_up_on_their_own(rig: Rig) -> None:
    weights, cache = rig.make(rig.weights), rig.make(rig.cache)
    assert rig.sleep(rig.cache) is None
    assert weights.is_intact()
    assert not can_be_read(cache.address)
    assert rig.sleep(rig.weights, offloaded=(rig.weights,)) is None
    assert rig.wake_up(rig.cache) is None
    assert can_be_read(cache.address)
    assert not can_be_read(weights.address)
    assert rig.wake_up(rig.weights) is None
    assert weights.is_intact()


@on_fake_cuda(rig)
def test_a_second_call_does_nothing(rig: Rig) -> None:
    block = rig.make(rig.weights)
    calls = ("cuMemUnmap", "cuMemMap", "cuMemcpyAsync", "cuMemHostAlloc")

    def counts() -> list[int]:
        return [rig.fake.num_calls(name) for name in calls]

    rig.sleep(rig.weights, offloaded=(rig.weights,))
    before = counts()
    assert rig.sleep(rig.weights) is None, "without offloading: it has slept already"
    assert counts() == before
    rig.wake_up(rig.weights)
    before = counts()
    assert rig.wake_up(rig.weights) is None
    assert counts() == before
    assert block.is_intact()


@on_fake_cuda(rig)
def test_sleep_waits_for_the_device_first(rig: Rig) -> None:
    """Work that was launched before may still write."""
    block = rig.make(rig.weights)
    with ThreadPoolExecutor(1) as thread:
        with rig.fake.held("cuCtxSynchronize") as wait:
            slept = thread.submit(rig.sleep, rig.weights, offloaded=(rig.weights,))
            wait()
            block.fill()
        assert slept.result() is None
    rig.wake_up(rig.weights)
    assert block.is_intact()


@on_fake_cuda(rig)
def test_blocks_may_be_freed_asleep(rig: Rig) -> None:
    blocks = [rig.make(rig.weights) for _ in range(3)]
    rig.sleep(rig.weights, offloaded=(rig.weights,))
    assert rig.heap.free(blocks[1].address)
    assert rig.fake.live().ranges == 2
    assert rig.heap.usage(rig.weights) == TagUsage(0, 2 * CHUNK, 2 * CHUNK)
    assert rig.heap.stats()["free_host_bytes"] == CHUNK
    rig.wake_up(rig.weights)
    assert blocks[0].is_intact()
    assert blocks[2].is_intact()


@pytest.mark.parametrize("name", ["cuStreamSynchronize", "cuMemUnmap"])
@on_fake_cuda(rig)
def test_freeing_does_not_wait_for_a_transfer(rig: Rig, name: str) -> None:
    """A collection may free a tensor in any thread. It is given back when the transfer ends."""
    blocks = [rig.make(rig.weights, 2 * CHUNK) for _ in range(2)]
    with ThreadPoolExecutor(1) as thread:
        with rig.fake.held(name) as wait:
            slept = thread.submit(rig.sleep, rig.weights, offloaded=(rig.weights,))
            wait()
            assert rig.heap.free(blocks[0].address)
            assert rig.fake.live().ranges == 2
        assert slept.result() is None
    assert rig.fake.live().ranges == 1
    rig.wake_up(rig.weights)
    assert blocks[1].is_intact()


@on_fake_cuda(rig)
def test_other_tags_go_on_during_a_transfer(rig: Rig) -> None:
    """Allocating, freeing and asking don't wait for it: torch has its lock meanwhile."""
    rig.make(rig.weights, 2 * CHUNK)
    freed = rig.make(rig.cache)
    with ThreadPoolExecutor(1) as thread:
        with rig.fake.held("cuStreamSynchronize") as wait:
            slept = thread.submit(rig.sleep, rig.weights, offloaded=(rig.weights,))
            wait()
            assert rig.heap.free(freed.address)
            assert rig.fake.live().ranges == 1
            assert rig.make(rig.cache).is_intact()
            assert rig.heap.usage(rig.cache) == TagUsage(CHUNK)
            assert rig.heap.stats()["host_bytes"] == 2 * CHUNK
            assert rig.alloc(rig.weights, 1) == 0
            failure = rig.heap.take_failure()
            assert failure is not None
            assert failure.text == "the memory under this tag is being put to sleep or woken up"
        assert slept.result() is None


@on_fake_cuda(rig)
def test_progress_counts_what_was_copied(rig: Rig) -> None:
    rig.make(rig.weights, 3 * CHUNK)

    def seen_at(name: str, nth: int, call: Callable[[], object]) -> list[tuple[int, int]]:
        seen = []
        with ThreadPoolExecutor(1) as thread:
            with rig.fake.held(name, nth) as wait:
                done = thread.submit(call)
                wait()
                seen.append(rig.progress())
            assert done.result() is None
        return [*seen, rig.progress()]

    whole = (3 * CHUNK, 3 * CHUNK)
    for nth in (1, 2):
        asleep = seen_at(
            "cuMemUnmap", nth, lambda: rig.sleep(rig.weights, offloaded=(rig.weights,))
        )
        assert asleep == [((nth - 1) * CHUNK, 3 * CHUNK), whole]
        # A copy is known to be made when the next but one begins.
        awake = seen_at("cuMemMap", nth + 1, lambda: rig.wake_up(rig.weights))
        assert awake == [((nth - 1) * CHUNK, 3 * CHUNK), whole]
    rig.sleep(rig.weights)
    assert rig.progress() == (0, 0), "nothing is copied"


# Host memory


@on_fake_cuda(rig)
def test_host_memory_is_used_again(rig: Rig) -> None:
    """Pinning takes much longer than copying."""
    rig.make(rig.weights, 3 * CHUNK)
    rig.make(rig.cache, 2 * CHUNK)
    rig.sleep(rig.weights, offloaded=(rig.weights,))
    rig.wake_up(rig.weights)
    pinned = rig.fake.num_calls("cuMemHostAlloc")
    for tag in (rig.weights, rig.cache):
        stats = rig.heap.stats()
        assert (stats["host_bytes"], stats["free_host_bytes"]) == (3 * CHUNK, 3 * CHUNK)
        assert rig.sleep(tag, offloaded=(tag,)) is None
        rig.wake_up(tag)
    assert rig.fake.num_calls("cuMemHostAlloc") == pinned
    assert rig.heap.trim_host() == 3 * CHUNK
    assert rig.fake.live().host_bytes == 0
    assert rig.heap.trim_host() == 0


@on_fake_cuda(rig)
def test_there_is_never_more_host_memory_than_was_needed_at_once(rig: Rig) -> None:
    """Buffers of sizes that nobody wants now go before others are made."""
    rig.make(rig.weights, 3 * CHUNK)
    rig.make(rig.cache, GRANULARITY)
    rig.sleep(rig.weights, offloaded=(rig.weights,))
    rig.wake_up(rig.weights)
    rig.fake.set_limits(host_bytes=3 * CHUNK)
    assert rig.sleep(rig.cache, offloaded=(rig.cache,)) is None
    assert rig.fake.live().host_bytes == GRANULARITY
    rig.wake_up(rig.cache)


@on_fake_cuda(rig)
def test_host_memory_in_use_is_not_trimmed(rig: Rig) -> None:
    weights, cache = rig.make(rig.weights), rig.make(rig.cache)
    rig.sleep(rig.weights, rig.cache, offloaded=(rig.weights, rig.cache))
    rig.wake_up(rig.cache)
    assert rig.heap.trim_host() == CHUNK
    assert rig.fake.live().host_bytes == CHUNK
    rig.wake_up(rig.weights)
    assert weights.is_intact()
    assert cache.is_intact()


@on_fake_cuda(rig)
def test_prepared_host_memory_is_there_at_sleep(rig: Rig) -> None:
    block = rig.make(rig.weights, 2 * CHUNK)
    assert rig.heap.prepare([rig.weights]) is None
    assert rig.heap.prepare([rig.weights]) is None, "once more changes nothing"
    assert rig.fake.live().host_bytes == 2 * CHUNK
    assert rig.heap.trim_host() == 0
    rig.fake.set_limits(host_bytes=0)
    assert block.is_intact()
    assert rig.sleep(rig.weights, offloaded=(rig.weights,)) is None
    rig.wake_up(rig.weights)
    assert block.is_intact()


@on_fake_cuda(rig)
def test_what_was_prepared_can_be_cancelled(rig: Rig) -> None:
    """But for what sleeps, whose content it is."""
    block = rig.make(rig.weights)
    rig.make(rig.cache)
    rig.sleep(rig.weights, offloaded=(rig.weights,))
    rig.heap.prepare([rig.weights, rig.cache])
    rig.heap.cancel([rig.weights, rig.cache])
    assert rig.heap.trim_host() == CHUNK
    rig.wake_up(rig.weights)
    assert block.is_intact()


@on_fake_cuda(rig)
def test_content_that_nobody_wants_is_discarded(rig: Rig) -> None:
    """Of what is asleep; what is awake keeps its own."""
    block, awake = rig.make(rig.weights), rig.make(rig.cache)
    rig.sleep(rig.weights, offloaded=(rig.weights,))
    rig.heap.discard([rig.weights, rig.cache])
    assert rig.heap.trim_host() == CHUNK
    assert rig.heap.usage(rig.weights) == TagUsage(0, CHUNK, 0)
    assert rig.wake_up(rig.weights) is None
    assert ctypes.string_at(block.address, CHUNK) == bytes(CHUNK)
    assert awake.is_intact()
