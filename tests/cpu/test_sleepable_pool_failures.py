"""`SleepablePool`: shortage, a driver that refuses, progress that raises, preparing and closing.

See test_sleepable_pool.py.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from distcomm.errors import SleepError
from distcomm.memory import (
    HostMemoryError,
    SleepablePool,
    SleepOutOfMemoryError,
    Slept,
    TagUsage,
    sleep_transfers,
)
from tests.cpu.sleep_rig import CHUNK, FAILED, PoolRig, can_be_read, pool_rig
from tests.cpu.test_sleepable_pool_errors import CALLS, call_of, enter, error_of
from tests.fake_cuda import GRANULARITY, on_fake_cuda
from tests.worker_pool import WorkerPool


@pytest.fixture(scope="module")
def process() -> Iterator[WorkerPool]:
    with WorkerPool(1) as pool:
        yield pool


# Shortage


@on_fake_cuda(pool_rig)
def test_a_wake_up_without_enough_memory(rig: PoolRig) -> None:
    pool = rig.pool(name="llm")
    tensors = [rig.make(pool, tag, 3 * CHUNK) for tag in ("a", "b")]
    pool.sleep(["a", "b"])
    rig.fake.set_limits(device_bytes=5 * CHUNK)
    for _ in range(2):
        with pytest.raises(SleepOutOfMemoryError) as caught:
            pool.wake_up()
        error = caught.value
        assert isinstance(error, torch.OutOfMemoryError)
        assert (error.needed_bytes, error.free_bytes) == (6 * CHUNK, 5 * CHUNK)
        assert error.missing_bytes == CHUNK
        assert str(error) == (
            f"wake_up of 'llm': {6 * CHUNK} bytes of GPU memory are needed, {5 * CHUNK} are free, "
            f"{CHUNK} are missing: cuMemGetInfo failed with driver error 2 (out of memory)"
        )
        assert pool.asleep_tags == ("a", "b")
        assert error_of(lambda: enter(pool)).endswith("tag 'a' is asleep: wake_up() first")
    assert pool.stats()["wake_ups"] == 0
    assert pool.wake_up(["b"]) == 3 * CHUNK, "there is enough for a part"
    rig.fake.set_limits()
    assert pool.wake_up() == 3 * CHUNK
    assert all(tensor.is_intact() for tensor in tensors)


@pytest.mark.parametrize("call", ["sleep", "prepare_sleep"])
@on_fake_cuda(pool_rig)
def test_host_memory_that_cannot_be_had(rig: PoolRig, call: str) -> None:
    pool = rig.pool(name="llm")
    tensors = [rig.make(pool, "a", 3 * CHUNK), rig.make(pool, "b")]
    rig.fake.set_limits(host_bytes=3 * CHUNK - 1)
    for _ in range(2):
        with pytest.raises(HostMemoryError) as caught:
            getattr(pool, call)(["a"])
        assert isinstance(caught.value, MemoryError)
        assert caught.value.needed_bytes == 3 * CHUNK
        assert str(caught.value) == (
            f"{call} of 'llm': {3 * CHUNK} bytes of pinned host memory can't be had: "
            "cuMemHostAlloc failed with driver error 2 (out of memory); the pool stays awake"
        )
        assert pool.asleep_tags == ()
        assert rig.fake.live().host_bytes == 0
        assert all(tensor.is_intact() for tensor in tensors)
        enter(pool)
    assert pool.stats()["sleeps"] == 0
    assert pool.sleep(["b"], tags=["b"]) == Slept(CHUNK, CHUNK)
    pool.wake_up()


# A driver that refuses


@on_fake_cuda(pool_rig)
def test_a_sleep_that_the_driver_refuses(rig: PoolRig) -> None:
    pool = rig.pool(name="llm")
    tensor = rig.make(pool, "a", 3 * CHUNK)
    rig.fake.fail_call("cuMemcpyAsync", 2)
    assert error_of(lambda: pool.sleep(["a"])) == (
        f"sleep of 'llm': cuMemcpyAsync {FAILED}; the content of ['a'] is not lost, asleep are []"
    )
    assert tensor.is_intact()
    assert pool.stats()["sleeps"] == 0
    enter(pool)
    assert pool.sleep(["a"]) == Slept(3 * CHUNK, 3 * CHUNK)
    pool.wake_up()
    assert tensor.is_intact()


@pytest.mark.parametrize("then", ["wake_up", "sleep"])
@on_fake_cuda(pool_rig)
def test_a_sleep_that_goes_half_the_way(rig: PoolRig, then: str) -> None:
    """The driver takes back two chunks of three, and gives nothing for them."""
    pool = rig.pool(name="llm")
    tensor, other = rig.make(pool, "a", 3 * CHUNK), rig.make(pool, "b")
    rig.fake.fail_call("cuMemUnmap", 3)
    rig.fake.fail_call("cuMemCreate", count=100)
    assert error_of(lambda: pool.sleep(["a"])) == (
        f"sleep of 'llm': cuMemUnmap {FAILED}; the content of ['a'] is not lost, asleep are ['a']"
    )
    rig.fake.fail_no_call()
    assert pool.usage() == {"a": TagUsage(CHUNK, 2 * CHUNK, 2 * CHUNK), "b": TagUsage(CHUNK)}
    assert pool.asleep_tags == ("a",)
    error_of(lambda: enter(pool))
    assert other.is_intact()
    if then == "sleep":
        assert pool.sleep(["a"]) == Slept(2 * CHUNK, CHUNK)
        assert pool.wake_up() == 4 * CHUNK
    else:
        assert pool.wake_up() == 2 * CHUNK
        assert other.is_intact()
    assert tensor.is_intact()
    enter(pool)


@on_fake_cuda(pool_rig)
def test_a_wake_up_that_the_driver_refuses(rig: PoolRig) -> None:
    pool = rig.pool(name="llm")
    tensor = rig.make(pool, "a", 3 * CHUNK)
    pool.sleep(["a"])
    rig.fake.fail_call("cuMemSetAccess", 2)
    assert error_of(pool.wake_up) == (
        f"wake_up of 'llm': cuMemSetAccess {FAILED}; what was asleep still is"
    )
    assert pool.asleep_tags == ("a",)
    assert pool.wake_up() == 3 * CHUNK
    assert tensor.is_intact()


@on_fake_cuda(pool_rig)
def test_a_sleep_that_fails_keeps_no_host_memory(rig: PoolRig) -> None:
    pool = rig.pool()
    rig.make(pool, "a")
    rig.fake.fail_call("cuCtxSynchronize", 1)
    error_of(lambda: pool.sleep(["a"]))
    assert pool.release_host_memory() == CHUNK


# Progress


def raise_lookup_error(done: int, total: int) -> None:
    raise LookupError(done, total)


@on_fake_cuda(pool_rig)
def test_what_progress_raises_is_raised_at_the_end(rig: PoolRig) -> None:
    pool = rig.pool()
    tensor = rig.make(pool, "a", 3 * CHUNK)
    with pytest.raises(LookupError):
        pool.sleep(["a"], progress=raise_lookup_error)
    assert pool.asleep_tags == ("a",)
    assert pool.usage() == {"a": TagUsage(0, 3 * CHUNK, 3 * CHUNK)}
    assert pool.sleep() == Slept(0, 0), "it is raised once"
    with pytest.raises(LookupError):
        pool.wake_up(progress=raise_lookup_error)
    assert pool.asleep_tags == ()
    assert tensor.is_intact()
    stats = pool.stats()
    assert (stats["sleeps"], stats["wake_ups"]) == (1, 1)
    pool.sleep(["a"])
    assert pool.wake_up() == 3 * CHUNK


def fail_with_progress(rig: PoolRig) -> SleepablePool:
    """A pool that sleeps: waking up has failed, of which its progress has raised, too."""
    pool = rig.pool()
    rig.make(pool, "a")
    pool.sleep(["a"])
    rig.fake.fail_call("cuMemcpyAsync")
    error_of(lambda: pool.wake_up(progress=raise_lookup_error))
    return pool


@on_fake_cuda(pool_rig)
def test_what_progress_raised_of_a_failed_transfer_is_forgotten(rig: PoolRig) -> None:
    assert fail_with_progress(rig).wake_up() == CHUNK


@on_fake_cuda(pool_rig)
def test_a_sleep_with_nothing_to_do_raises_nothing(rig: PoolRig) -> None:
    assert fail_with_progress(rig).sleep() == Slept(0, 0)


def polling(rig: PoolRig, name: str) -> Callable[..., Any]:
    """In place of `run_bounded`: it polls three times, while the work is in this driver call."""

    def run(work: Callable[[], Any], *, poll: Callable[[], None] | None = None, **_: object) -> Any:
        if poll is None:
            return work()
        results: list[Any] = []
        thread = threading.Thread(target=lambda: results.append(work()))
        with rig.fake.held(name) as wait:
            thread.start()
            wait()
            for _ in range(3):
                poll()
        thread.join(30)
        return results[0]

    return run


@on_fake_cuda(pool_rig)
def test_progress_that_has_raised_is_told_no_more(rig: PoolRig) -> None:
    pool = rig.pool()
    rig.make(pool, "a", 3 * CHUNK)
    pool.prepare_sleep(["a"])
    told: list[tuple[int, int]] = []

    def tell(done: int, total: int) -> None:
        told.append((done, total))
        if len(told) == 2:
            raise LookupError

    rig.patch.setattr(sleep_transfers, "run_bounded", polling(rig, "cuMemUnmap"))
    with pytest.raises(LookupError):
        pool.sleep(["a"], progress=tell)
    assert told == [(0, 3 * CHUNK)] * 2


@on_fake_cuda(pool_rig)
def test_progress_is_told_nothing_of_an_earlier_transfer(rig: PoolRig) -> None:
    pool = rig.pool()
    rig.make(pool, "a", 3 * CHUNK)
    pool.sleep(["a"])
    pool.wake_up()
    pool.prepare_sleep(["a"])
    told: list[tuple[int, int]] = []
    rig.patch.setattr(sleep_transfers, "run_bounded", polling(rig, "cuCtxSynchronize"))
    pool.sleep(["a"], progress=lambda *each: told.append(each))
    assert told == [(3 * CHUNK, 3 * CHUNK)], "nothing was copied while the device was waited for"


# Preparing


@on_fake_cuda(pool_rig)
def test_a_prepared_sleep_goes_well(rig: PoolRig) -> None:
    pool = rig.pool(name="llm")
    tensor = rig.make(pool, "a", 3 * CHUNK)
    pool.prepare_sleep(["a"])
    assert tensor.is_intact()
    assert pool.asleep_tags == ()
    assert pool.release_host_memory() == 0
    assert error_of(lambda: enter(pool)) == "use of 'llm': sleep is under way"
    rig.fake.set_limits(host_bytes=0)
    assert pool.sleep(["a"]) == Slept(3 * CHUNK, 3 * CHUNK)
    pool.wake_up()
    assert tensor.is_intact()
    enter(pool)


@on_fake_cuda(pool_rig)
def test_a_prepared_sleep_can_be_cancelled(rig: PoolRig) -> None:
    pool = rig.pool()
    tensor, freed = rig.make(pool, "a", 3 * CHUNK), rig.make(pool, "a")
    freed.free()
    pool.prepare_sleep(["a"])
    assert rig.fake.live().host_bytes == 3 * CHUNK, "what no tensor uses needs none"
    for _ in range(2):
        pool.cancel_sleep()
    enter(pool)
    assert tensor.is_intact()
    assert pool.release_host_memory() == 3 * CHUNK
    assert pool.stats()["sleeps"] == 0


@on_fake_cuda(pool_rig)
def test_a_prepared_sleep_that_offloads_more(rig: PoolRig) -> None:
    pool = rig.pool()
    rig.make(pool, "a")
    pool.prepare_sleep()
    rig.fake.set_limits(host_bytes=GRANULARITY)
    error_of(lambda: pool.sleep(["a"]), HostMemoryError)


# Closing


@on_fake_cuda(pool_rig)
def test_a_closed_pool_does_nothing_any_more(rig: PoolRig) -> None:
    pool = rig.pool(name="llm")
    enter(pool)
    pool.close()
    for name in set(CALLS) - {"close"}:
        assert error_of(call_of(pool, name)) == f"{name} of 'llm': the pool is closed"
    assert pool.usage() == {"a": TagUsage()}
    assert pool.release_host_memory() == 0
    pool.cancel_sleep()


@on_fake_cuda(pool_rig)
def test_closing_a_pool_that_is_prepared(rig: PoolRig) -> None:
    pool = rig.pool()
    tensor = rig.make(pool, "a")
    pool.prepare_sleep(["a"])
    pool.close()
    assert tensor.is_intact()


@on_fake_cuda(pool_rig)
def test_closing_gives_back_what_was_prepared(rig: PoolRig) -> None:
    pool = rig.pool()
    rig.make(pool, "a")
    pool.prepare_sleep(["a"])
    pool.close()
    assert rig.fake.live().host_bytes == 0


@on_fake_cuda(pool_rig)
def test_closing_in_an_error_keeps_the_error(rig: PoolRig) -> None:
    with pytest.raises(LookupError), rig.pool() as pool:
        raise LookupError(rig.make(pool, "a"))
    assert pool.closed


@on_fake_cuda(pool_rig)
def test_freeing_after_closing(rig: PoolRig) -> None:
    """Tensors of closed pools are freed as ever, awake or asleep."""
    pool, other = rig.pool(), rig.pool()
    awake, asleep = rig.make(pool, "awake"), rig.make(pool, "asleep")
    pool.sleep(["asleep"], tags=["asleep"])
    pool.close()
    assert awake.is_intact()
    assert not can_be_read(asleep.address)
    awake.free()
    asleep.free()
    enter(other)
    assert rig.fake.live().range_bytes == 0
    with pytest.raises(SleepError):
        pool.wake_up()
