"""`SleepablePool`: what is allocated where, what sleeps, and what is as before afterwards.

The C++ heap is real. torch's pools and the CUDA driver are stand-ins, so tests run in a worker.
test_sleepable_pool_errors.py has what goes wrong.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from distcomm.memory import SleepablePool, Slept, TagUsage, sleep, sleepable_pools
from distcomm.native import NativeLibrary
from tests.cpu.sleep_rig import CHUNK, DEVICE, PoolRig, can_be_read, pool_rig
from tests.fake_cuda import GRANULARITY, on_fake_cuda
from tests.worker_pool import WorkerPool


@pytest.fixture(scope="module")
def process() -> Iterator[WorkerPool]:
    with WorkerPool(1) as pool:
        yield pool


# Allocation


@on_fake_cuda(pool_rig)
def test_new_tensors_of_a_use_are_in_the_pool(rig: PoolRig) -> None:
    pool = rig.pool(name="llm")
    assert (pool.device, pool.name, pool.closed) == (DEVICE, "llm", False)
    with pool.use("weights"):
        used = rig.torch.allocators[rig.torch.allocates_from()]
        assert used.names == (str(NativeLibrary().path), "distcomm_sleep_torch")
        rig.tensor(3 * CHUNK)
    assert rig.torch.allocates_from() is None
    with pool.use():
        rig.tensor(1)
    assert pool.usage() == {"weights": TagUsage(3 * CHUNK), "default": TagUsage(GRANULARITY)}
    assert repr(pool) == "SleepablePool('llm', device=cuda:3, tags=['weights', 'default'])"


@on_fake_cuda(pool_rig)
def test_the_innermost_use_counts(rig: PoolRig) -> None:
    pool, other = rig.pool(), rig.pool()
    with pool.use("a"):
        outer = rig.torch.allocates_from()
        with other.use("a"):
            with pool.use("b"):
                rig.tensor(3 * CHUNK)
            rig.tensor(2 * CHUNK)
        assert rig.torch.allocates_from() == outer
        rig.tensor(CHUNK)
        with pool.use("a"):
            rig.tensor(CHUNK)
    assert pool.usage() == {"a": TagUsage(2 * CHUNK), "b": TagUsage(3 * CHUNK)}
    assert other.usage() == {"a": TagUsage(2 * CHUNK)}


@on_fake_cuda(pool_rig)
def test_an_exception_inside_leaves_all_as_before(rig: PoolRig) -> None:
    pool = rig.pool()
    with pool.use("a"):
        before = rig.torch.allocates_from()
        with pytest.raises(LookupError), pool.use("b"), pool.use("c"):
            raise LookupError(rig.tensor())
        assert rig.torch.allocates_from() == before
        rig.tensor()
    assert {tag: usage.mapped_bytes for tag, usage in pool.usage().items()} == {
        "a": CHUNK,
        "b": 0,
        "c": CHUNK,
    }
    assert pool.sleep() == Slept(2 * CHUNK, 0)
    pool.wake_up()


@on_fake_cuda(pool_rig)
def test_expandable_segments_are_off_inside_and_the_users_settings_back_after(
    rig: PoolRig,
) -> None:
    """torch would ask the driver for those, and not the pool."""
    pool = rig.pool()
    with pool.use("a"):
        assert not rig.settings.on
        with pytest.raises(LookupError, match="False"), pool.use("b"):
            raise LookupError(rig.settings.on)
        assert not rig.settings.on
    assert rig.settings.text == "expandable_segments:True"
    pool.sleep()
    assert rig.settings.on
    pool.wake_up()


@on_fake_cuda(pool_rig)
def test_memory_that_no_tensor_uses_is_given_back_when_a_use_ends(rig: PoolRig) -> None:
    pool = rig.pool()
    with pool.use("a"):
        kept, scratch = rig.tensor(), rig.tensor(4 * CHUNK)
        scratch.free()
        assert rig.fake.live().device_bytes == 5 * CHUNK, "cached, for the next tensor"
    assert rig.fake.live().device_bytes == CHUNK
    assert pool.usage() == {"a": TagUsage(CHUNK)}
    kept.free()
    with pool.use("b"):
        pass
    assert rig.fake.live().range_bytes == 0, "also what lay in the pools of earlier uses"


@on_fake_cuda(pool_rig)
def test_uses_of_threads_are_their_own(rig: PoolRig) -> None:
    pool = rig.pool()
    with ThreadPoolExecutor(2) as threads, pool.use("mine"):
        assert threads.submit(rig.torch.allocates_from).result() is None
        made = [threads.submit(rig.make, pool, f"theirs{i % 3}") for i in range(30)]
        mine = rig.tensor()
        assert all(each.result().is_intact() for each in made)
    assert mine.is_intact()
    theirs = {f"theirs{i}": TagUsage(10 * CHUNK) for i in range(3)}
    assert pool.usage() == {"mine": TagUsage(CHUNK), **theirs}


@pytest.mark.parametrize("place", [None, "cuda", "cuda:3", DEVICE])
@on_fake_cuda(pool_rig)
def test_the_device_of_a_pool(rig: PoolRig, place: torch.device | str | None) -> None:
    """By default the current one."""
    pool = SleepablePool(place)
    assert pool.device == DEVICE
    rig.make(pool, "a")
    assert pool.usage() == {"a": TagUsage(CHUNK)}


# Sleep


@on_fake_cuda(pool_rig)
def test_offloaded_content_comes_back_and_the_rest_does_not(rig: PoolRig) -> None:
    pool = rig.pool()
    weights, cache = rig.make(pool, "weights", 3 * CHUNK), rig.make(pool, "cache", 2 * CHUNK)
    assert pool.sleep(offload_tags=["weights"]) == Slept(5 * CHUNK, 3 * CHUNK)
    assert pool.asleep_tags == ("weights", "cache")
    assert not can_be_read(weights.address)
    assert not can_be_read(cache.address)
    assert (rig.fake.live().device_bytes, rig.fake.live().host_bytes) == (0, 3 * CHUNK)
    assert pool.usage() == {
        "weights": TagUsage(0, 3 * CHUNK, 3 * CHUNK),
        "cache": TagUsage(0, 2 * CHUNK, 0),
    }
    assert pool.wake_up() == 5 * CHUNK
    assert pool.asleep_tags == ()
    assert weights.is_intact()
    assert not cache.is_intact()
    assert can_be_read(cache.address)


@on_fake_cuda(pool_rig)
def test_tags_sleep_and_wake_up_on_their_own(rig: PoolRig) -> None:
    pool = rig.pool()
    tensors = {tag: rig.make(pool, tag) for tag in ("a", "b", "c")}
    assert pool.sleep(["c"], tags=["c", "a"]) == Slept(2 * CHUNK, CHUNK)
    assert pool.asleep_tags == ("a", "c")
    assert tensors["b"].is_intact()
    assert rig.make(pool, "b").is_intact(), "what is awake can be used"
    assert pool.wake_up(["c", "b"]) == CHUNK
    assert pool.asleep_tags == ("a",)
    assert tensors["c"].is_intact()
    assert pool.wake_up(["a"]) == CHUNK
    assert pool.asleep_tags == ()


@on_fake_cuda(pool_rig)
def test_a_second_call_does_nothing(rig: PoolRig) -> None:
    pool = rig.pool()
    tensor = rig.make(pool, "a")
    assert pool.wake_up() == 0
    pool.sleep(["a"])
    assert pool.sleep() == pool.sleep(["a"]) == Slept(0, 0), "the content that was kept still is"
    assert pool.wake_up() == CHUNK
    assert pool.wake_up() == pool.wake_up(["a"]) == 0
    assert tensor.is_intact()
    stats = pool.stats()
    assert (stats["sleeps"], stats["wake_ups"]) == (1, 1)
    assert stats["host_bytes"] == stats["free_host_bytes"] == CHUNK
    assert stats.keys() == {"sleeps", "wake_ups", *rig.heap.stats()}


@on_fake_cuda(pool_rig)
def test_a_tag_without_memory_sleeps_too(rig: PoolRig) -> None:
    """What is used next shouldn't depend on whether there was anything to free."""
    pool = rig.pool()
    assert pool.sleep() == Slept(0, 0)
    with pool.use("a"):
        pass
    assert pool.sleep() == Slept(0, 0)
    assert pool.asleep_tags == ("a",)
    assert pool.wake_up() == 0
    assert pool.asleep_tags == ()


@on_fake_cuda(pool_rig)
def test_what_was_freed_asleep_is_not_taken_again(rig: PoolRig) -> None:
    pool = rig.pool()
    freed, kept = rig.make(pool, "a", 4 * CHUNK), rig.make(pool, "a")
    pool.sleep(["a"])
    freed.free()
    rig.fake.set_limits(device_bytes=CHUNK)
    assert pool.wake_up() == CHUNK
    assert kept.is_intact()
    assert rig.fake.live().range_bytes == CHUNK


@on_fake_cuda(pool_rig)
def test_what_torch_has_cached_is_not_offloaded(rig: PoolRig) -> None:
    pool = rig.pool()
    freed, _kept = rig.make(pool, "a", 4 * CHUNK), rig.make(pool, "a")
    freed.free()
    assert pool.sleep(["a"]) == Slept(CHUNK, CHUNK)
    assert rig.fake.live().host_bytes == CHUNK
    pool.wake_up()


@on_fake_cuda(pool_rig)
def test_pools_sleep_on_their_own(rig: PoolRig) -> None:
    """Also under the same tag."""
    pools = [rig.pool(name=f"p{i}") for i in range(3)]
    tensors = [rig.make(pool, "a") for pool in pools]
    assert pools[1].sleep(["a"]) == Slept(CHUNK, CHUNK)
    with pools[0].use("a"):
        assert tensors[0].is_intact()
    assert pools[2].asleep_tags == ()
    pools[1].wake_up()
    assert all(tensor.is_intact() for tensor in tensors)


@on_fake_cuda(pool_rig)
def test_progress_is_told_of_what_is_copied(rig: PoolRig) -> None:
    pool = rig.pool()
    rig.make(pool, "a", 3 * CHUNK)
    told: list[tuple[int, int]] = []

    def tell(done: int, total: int) -> None:
        told.append((done, total))

    pool.sleep(["a"], progress=tell)
    pool.wake_up(progress=tell)
    assert [each for each in told if each[0] == each[1]] == [(3 * CHUNK, 3 * CHUNK)] * 2
    assert {total for _, total in told} == {3 * CHUNK}
    told.clear()
    pool.sleep(progress=tell)
    pool.wake_up(progress=tell)
    assert told == [], "nothing is copied"


@on_fake_cuda(pool_rig)
def test_progress_is_told_while_it_goes_on(rig: PoolRig) -> None:
    pool = rig.pool()
    rig.make(pool, "a", 3 * CHUNK)
    told: list[tuple[int, int]] = []
    with ThreadPoolExecutor(1) as thread:
        with rig.fake.held("cuMemUnmap") as wait:
            slept = thread.submit(pool.sleep, ["a"], progress=lambda *each: told.append(each))
            wait()
            while not told:
                assert not slept.done()
        slept.result()
    assert told[0] == (0, 3 * CHUNK)
    pool.wake_up()


@on_fake_cuda(pool_rig)
def test_host_memory_stays_until_it_is_released(rig: PoolRig) -> None:
    pool = rig.pool()
    rig.make(pool, "a", 3 * CHUNK)
    pool.sleep(["a"])
    assert pool.release_host_memory() == 0, "it has the content"
    pool.wake_up()
    assert rig.fake.live().host_bytes == 3 * CHUNK
    assert pool.release_host_memory() == 3 * CHUNK
    assert pool.release_host_memory() == rig.fake.live().host_bytes == 0


@on_fake_cuda(pool_rig)
def test_cycles_leave_nothing_behind(rig: PoolRig) -> None:
    pool = rig.pool()
    tags = ("weights", "cache", "graphs")
    tensors = {tag: rig.make(pool, tag, i * CHUNK + 1) for i, tag in enumerate(tags)}
    first, pinned = rig.fake.live(), 0
    for cycle in range(50):
        kept = [tag for i, tag in enumerate(tags) if cycle >> i & 1]
        pool.sleep(kept, tags=tags if cycle % 5 else kept)
        pool.wake_up(tags[cycle % 3 :])
        with pool.use(f"scratch{cycle % 2}"):
            rig.tensor().free()
        pool.wake_up()
        for tag in kept:
            assert tensors[tag].is_intact(), (cycle, tag)
        for tensor in tensors.values():
            tensor.fill()
        live = rig.fake.live()
        assert live._replace(host_bytes=0, host_buffers=0) == first
        pinned = max(pinned, live.host_bytes)
    assert pinned == first.device_bytes, "never more than all of it"
    assert len(rig.torch.use_counts) == len(tags) + 1, "torch's pools have gone too"


# The end of a pool


@on_fake_cuda(pool_rig)
def test_closing_gives_back_what_no_tensor_uses(rig: PoolRig) -> None:
    pool = rig.pool()
    kept, freed = rig.make(pool, "a"), rig.make(pool, "a", 2 * CHUNK)
    pool.sleep(["a"])
    pool.wake_up()
    freed.free()
    pool.close()
    assert pool.closed
    assert (rig.fake.live().range_bytes, rig.fake.live().host_bytes) == (CHUNK, 0)
    assert kept.is_intact(), "awake tensors live on"
    pool.close()
    kept.free()
    other = rig.pool()
    rig.make(other, "a")
    assert rig.fake.live().range_bytes == CHUNK, "gone with the next use of any pool"


@on_fake_cuda(pool_rig)
def test_closing_discards_what_sleeps(rig: PoolRig) -> None:
    with rig.pool() as pool:
        tensor = rig.make(pool, "a")
        pool.sleep(["a"])
    assert pool.closed
    assert rig.fake.live().host_bytes == 0
    assert pool.usage() == {"a": TagUsage(0, CHUNK, 0)}
    assert not can_be_read(tensor.address)


@on_fake_cuda(pool_rig)
def test_a_pool_that_is_dropped(rig: PoolRig) -> None:
    """Its tensors live on, and nobody can wake up what sleeps: nobody needs its content."""
    pool = rig.pool()
    tensor, asleep = rig.make(pool, "awake"), rig.make(pool, "asleep")
    pool.sleep(["asleep"], tags=["asleep"])
    assert rig.fake.live().host_bytes == CHUNK
    other = rig.pool(name="other")
    with other.use():  # torch must not lose a pool while another one is begun
        del pool
        gc.collect()
    assert [pool.name for pool in sleepable_pools()] == ["other"]
    while rig.fake.live().host_bytes:  # in a thread: who collects garbage doesn't wait for the GPU
        time.sleep(1e-3)
    assert tensor.is_intact()
    asleep.free()
    tensor.free()
    with other.use():
        pass
    assert rig.fake.live().range_bytes == 0


@on_fake_cuda(pool_rig)
def test_the_pools_of_a_process(rig: PoolRig) -> None:
    pools = [rig.pool(name=f"p{i}") for i in range(3)]
    assert sleepable_pools() == pools
    assert pools[0].number < pools[1].number < pools[2].number
    pools[1].close()
    assert sleepable_pools() == [pools[0], pools[2]]
    del pools[0]
    gc.collect()
    assert [pool.name for pool in sleepable_pools()] == ["p2"]


@on_fake_cuda(pool_rig)
def test_at_the_end_of_the_process_memory_stays(rig: PoolRig) -> None:
    """There may be no driver any more: what is registered must not wait for it."""
    registered: list[Any] = []
    rig.patch.setattr("atexit.register", registered.append)
    sleep._shut_down_at_exit.cache_clear()
    pools = [rig.pool(), rig.pool()]
    assert [call.__self__.handle for call in registered] == [pools[0]._heap.handle]
    assert registered[0].__name__ == "shut_down"
    assert not pools[0]._finalizer.atexit
