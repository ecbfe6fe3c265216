"""`SleepablePool`: what it refuses, what can fail, and that all can go on afterwards.

See test_sleepable_pool.py.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, NoReturn

import pytest
import torch

from distcomm.errors import ArgumentError, SleepError
from distcomm.memory import (
    SleepablePool,
    SleepOutOfMemoryError,
    Slept,
    TagUsage,
    sleepable_pools,
    torch_pools,
)
from distcomm.native import NativeLibrary
from tests.cpu.sleep_rig import CHUNK, NUM_DEVICES, PoolRig, pool_rig
from tests.fake_cuda import on_fake_cuda
from tests.worker_pool import WorkerPool


@pytest.fixture(scope="module")
def process() -> Iterator[WorkerPool]:
    with WorkerPool(1) as pool:
        yield pool


def error_of(call: Callable[[], object], kind: type[Exception] = SleepError) -> str:
    with pytest.raises(kind) as caught:
        call()
    assert type(caught.value) is kind, caught.value
    return str(caught.value)


def enter(pool: SleepablePool, tag: str = "a") -> None:
    with pool.use(tag):
        pass


# Arguments


@pytest.mark.parametrize("timeout", [0, -1.0, float("nan"), float("inf"), "1", None])
def test_a_timeout_that_is_no_time(timeout: Any) -> None:
    text = error_of(lambda: SleepablePool("cuda:0", timeout=timeout), ArgumentError)
    assert text == (
        f"SleepablePool: timeout must be a finite number of seconds > 0; got {timeout!r}"
    )


def test_a_device_without_cuda() -> None:
    text = error_of(lambda: SleepablePool("cpu"), ArgumentError)
    assert text == "SleepablePool: device must be a CUDA device; got cpu"


@on_fake_cuda(pool_rig)
def test_a_device_that_is_not_there(rig: PoolRig) -> None:
    text = error_of(lambda: SleepablePool(f"cuda:{NUM_DEVICES}"), ArgumentError)
    assert text == "SleepablePool: device must be one of 8 CUDA devices; got cuda:8"


@pytest.mark.parametrize("place", [None, "cuda:0"])
def test_a_machine_without_a_gpu(place: str | None) -> None:
    if NativeLibrary().functions.distcomm_has_cuda_driver():
        pytest.skip("it has one")
    assert "there is no CUDA driver (libcuda.so.1)" in error_of(lambda: SleepablePool(place))
    assert sleepable_pools() == []


@pytest.mark.parametrize("tag", ["", None, 3])
@on_fake_cuda(pool_rig)
def test_a_tag_that_is_none(rig: PoolRig, tag: Any) -> None:
    pool = rig.pool()
    text = error_of(lambda: enter(pool, tag), ArgumentError)
    assert text == f"use: tag must be a text that isn't empty; got {tag!r}"
    assert pool.usage() == {}
    assert pool.sleep() == Slept(0, 0), "no use has begun"


@pytest.mark.parametrize("tags", [["x"], ["a", "x"], "a"])
@on_fake_cuda(pool_rig)
def test_tags_that_were_never_used(rig: PoolRig, tags: Any) -> None:
    pool = rig.pool(name="llm")
    tensor = rig.make(pool, "a")
    calls = {
        "sleep: offload_tags": lambda: pool.sleep(tags),
        "sleep: tags": lambda: pool.sleep(tags=tags),
        "prepare_sleep: offload_tags": lambda: pool.prepare_sleep(tags),
        "prepare_sleep: tags": lambda: pool.prepare_sleep(tags=tags),
        "wake_up: tags": lambda: pool.wake_up(tags),
    }
    for argument, call in calls.items():
        assert error_of(call, ArgumentError) == (
            f"{argument} must be tags that were used here, of ['a']; got {tags!r} ['llm']"
        )
    assert tensor.is_intact()


@on_fake_cuda(pool_rig)
def test_only_what_sleeps_can_be_offloaded(rig: PoolRig) -> None:
    pool = rig.pool()
    for tag in ("a", "b", "c"):
        rig.make(pool, tag)
    for call in (pool.sleep, pool.prepare_sleep):
        text = error_of(lambda call=call: call(["b", "a"], tags=["c", "b"]), ArgumentError)
        assert text == (
            f"{call.__name__}: offload_tags must be among tags, ['b', 'c']; got ['a'] ['sleepable']"
        )
    assert pool.asleep_tags == ()


# use


@on_fake_cuda(pool_rig)
def test_a_tag_that_sleeps_cannot_be_used(rig: PoolRig) -> None:
    pool = rig.pool(name="llm")
    enter(pool, "a")
    enter(pool, "b")
    pool.sleep(tags=["a"])
    assert error_of(lambda: enter(pool)) == "use of 'llm': tag 'a' is asleep: wake_up() first"
    enter(pool, "b")
    assert rig.torch.allocates_from() is None
    pool.wake_up()
    enter(pool)


def refuse(*_: object) -> NoReturn:
    raise RuntimeError("refused")


@on_fake_cuda(pool_rig)
def test_a_use_that_cannot_begin_changes_nothing(rig: PoolRig) -> None:
    pool = rig.pool()
    enter(pool, "outer")
    with pool.use("outer"):
        begin, calls = rig.torch.begin, []

        def begin_once(device: int, number: int) -> None:
            """The first call makes the pool; the second one would enter it."""
            calls.append(number)
            if len(calls) == 2:
                refuse()
            begin(device, number)

        with rig.patch.context() as patch:
            patch.setattr(torch_pools, "_begin_in_thread", begin_once)
            assert error_of(lambda: enter(pool), RuntimeError) == "refused"
        rig.tensor()
    assert pool.usage() == {"outer": TagUsage(CHUNK), "a": TagUsage()}
    assert pool.sleep() == Slept(CHUNK, 0)


@pytest.mark.parametrize("name", ["_end_in_thread", "_empty_cache"])
@on_fake_cuda(pool_rig)
def test_a_use_that_torch_does_not_end_well_has_ended(rig: PoolRig, name: str) -> None:
    pool = rig.pool()
    enter(pool)
    with rig.patch.context() as patch:
        original = getattr(torch_pools, name)

        def end(*args: object) -> NoReturn:
            original(*args)
            refuse()

        with pool.use("b"):
            patch.setattr(torch_pools, name, end)
            error_of(lambda: enter(pool), RuntimeError)
            patch.setattr(torch_pools, name, original)
            rig.tensor()
    assert pool.usage() == {"a": TagUsage(), "b": TagUsage(CHUNK)}
    assert pool.sleep() == Slept(CHUNK, 0)


@on_fake_cuda(pool_rig)
def test_an_allocation_that_fails(rig: PoolRig) -> None:
    pool = rig.pool(name="llm")
    rig.fake.set_limits(device_bytes=3 * CHUNK)
    rig.make(pool, "a")
    with pytest.raises(SleepOutOfMemoryError) as caught:
        rig.make(pool, "a", 3 * CHUNK)
    error = caught.value
    assert isinstance(error, torch.OutOfMemoryError)
    assert (error.needed_bytes, error.free_bytes) == (3 * CHUNK, 2 * CHUNK)
    assert error.missing_bytes == CHUNK
    assert str(error) == (
        f"use('a') of 'llm': {3 * CHUNK} bytes of GPU memory are needed, {2 * CHUNK} are free, "
        f"{CHUNK} are missing: cuMemGetInfo failed with driver error 2 (out of memory); "
        "torch.cuda.empty_cache() before the block gives back what torch has cached"
    )
    assert isinstance(error.__cause__, torch.OutOfMemoryError)
    assert pool.usage() == {"a": TagUsage(CHUNK)}
    rig.make(pool, "a", 2 * CHUNK)


@on_fake_cuda(pool_rig)
def test_other_memory_that_runs_out(rig: PoolRig) -> None:
    """Also inside a `use` that had no trouble; and an inner one's error stays what it is."""
    pool = rig.pool(name="llm")
    with pytest.raises(torch.OutOfMemoryError, match=r"^ordinary$") as caught, pool.use("a"):
        raise torch.OutOfMemoryError("ordinary")
    assert type(caught.value) is torch.OutOfMemoryError
    rig.fake.set_limits(device_bytes=0)
    with pytest.raises(SleepOutOfMemoryError, match=r"^use\('b'\) of 'llm'"), pool.use("a"):
        rig.make(pool, "b")


CALLS = ("use", "sleep", "prepare_sleep", "wake_up", "close")


def call_of(pool: SleepablePool, name: str) -> Callable[[], object]:
    return (lambda: enter(pool)) if name == "use" else getattr(pool, name)


@on_fake_cuda(pool_rig)
def test_nothing_is_done_in_a_capture(rig: PoolRig) -> None:
    pool = rig.pool(name="llm")
    enter(pool)
    rig.torch.begin_capture()
    for name in CALLS:
        assert error_of(call_of(pool, name)) == (
            f"{name} of 'llm': a CUDA graph is being captured, which has memory of its own: call "
            f"{name} before or after the capture"
        )
    rig.torch.end_capture()
    assert pool.asleep_tags == ()


# Threads


@on_fake_cuda(pool_rig)
def test_nothing_sleeps_while_a_thread_allocates(rig: PoolRig) -> None:
    pool = rig.pool(name="llm")
    begun, done = threading.Event(), threading.Event()

    def use() -> None:
        with pool.use("a"):
            tensor = rig.tensor()
            begun.set()
            done.wait(30)
            assert tensor.is_intact()

    def check(num_uses: int) -> None:
        for name in ("sleep", "prepare_sleep", "wake_up", "close"):
            assert error_of(call_of(pool, name)) == (
                f"{name} of 'llm': {num_uses} uses have not ended, in this thread or another one: "
                "leave their blocks first"
            )

    with ThreadPoolExecutor(1) as thread:
        using = thread.submit(use)
        assert begun.wait(30)
        check(1)
        with pool.use("b"):
            check(2)
        done.set()
        using.result()
    assert not pool.closed
    assert pool.sleep() == Slept(CHUNK, 0)


@contextmanager
def while_asleep(
    rig: PoolRig, call: Callable[[], object], name: str = "cuStreamSynchronize"
) -> Iterator[Future[object]]:
    """A block during which `call` goes on in another thread, in a driver call of this name."""
    with ThreadPoolExecutor(1) as thread, rig.fake.held(name) as wait:
        future = thread.submit(call)
        wait()
        yield future


@pytest.mark.parametrize("call", ["sleep", "wake_up"])
@on_fake_cuda(pool_rig)
def test_one_transfer_at_a_time(rig: PoolRig, call: str) -> None:
    """Nobody waits: who can't get in is told why."""
    pool = rig.pool(name="llm")
    tensor = rig.make(pool, "a")
    if call == "wake_up":
        pool.sleep(["a"])
    work = (lambda: pool.sleep(["a"])) if call == "sleep" else pool.wake_up
    with while_asleep(rig, work) as future:
        assert error_of(lambda: enter(pool)) == f"use of 'llm': {call} is under way"
        with pytest.raises(SleepError, match=rf"^wake_up of 'llm': {call} is under way$"):
            pool.wake_up([])
    future.result()
    pool.wake_up()
    assert tensor.is_intact()


@on_fake_cuda(pool_rig)
def test_a_sleep_that_is_refused_leaves_what_was_prepared(rig: PoolRig) -> None:
    pool = rig.pool()
    rig.make(pool, "a")
    pool.prepare_sleep(["a"])
    rig.torch.begin_capture()
    error_of(lambda: pool.sleep(["a"]))
    rig.torch.end_capture()
    rig.fake.set_limits(host_bytes=0)
    assert pool.release_host_memory() == 0
    pool.sleep(["a"])


@on_fake_cuda(pool_rig)
def test_usage_while_a_thread_uses_a_new_tag(rig: PoolRig) -> None:
    pool = rig.pool()
    enter(pool)
    usage = pool._heap.usage

    def usage_meanwhile(tag: int) -> TagUsage:
        with ThreadPoolExecutor(1) as thread:
            thread.submit(enter, pool, "new").result()
        return usage(tag)

    rig.patch.setattr(pool._heap, "usage", usage_meanwhile)
    assert "a" in pool.usage()
