"""`SleepablePool`: calls that don't return. They are waited for so long, and all can go on later.

See test_sleepable_pool.py.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest

from distcomm.errors import SleepError
from distcomm.memory import Slept, sleep_transfers
from distcomm.waiting import StillRunningError
from tests.cpu.sleep_rig import CHUNK, PoolRig, pool_rig
from tests.cpu.test_sleepable_pool_errors import call_of, enter, error_of
from tests.fake_cuda import on_fake_cuda
from tests.worker_pool import WorkerPool


@pytest.fixture(scope="module")
def process() -> Iterator[WorkerPool]:
    with WorkerPool(1) as pool:
        yield pool


@pytest.mark.parametrize("call", ["sleep", "prepare_sleep", "wake_up"])
@on_fake_cuda(pool_rig)
def test_a_gpu_that_is_at_work_for_too_long(rig: PoolRig, call: str) -> None:
    """It holds nobody up, and can be tried again."""
    pool = rig.pool(timeout=0.05)
    tensor = rig.make(pool, "a")
    if call == "wake_up":
        pool.sleep(["a"])
    usage = pool.usage()
    rig.gpu_is_idle.clear()
    assert error_of(getattr(pool, call)) == (
        f"{call}: the GPU's work under way did not return within 0.05 s; nothing has changed "
        "[cuda:3]"
    )
    assert pool.usage() == usage
    rig.gpu_is_idle.set()
    pool.sleep(["a"])
    pool.wake_up()
    assert tensor.is_intact()


STUCK = [
    ("sleep", "cuCtxSynchronize"),
    ("sleep", "cuStreamSynchronize"),
    ("prepare_sleep", "cuMemHostAlloc"),
    ("wake_up", "cuMemCreate"),
]


@pytest.mark.parametrize(("call", "driver_call"), STUCK)
@on_fake_cuda(pool_rig)
def test_a_transfer_that_is_stuck(rig: PoolRig, call: str, driver_call: str) -> None:
    """Nobody knows what the memory is then. If it ends after all, the pool can be used again."""
    pool = rig.pool(name="llm")
    tensor = rig.make(pool, "a", 3 * CHUNK)
    if call == "wake_up":
        pool.sleep(["a"])
    pool._transfers._timeout_s = 0.05
    args = [] if call == "wake_up" else [["a"]]
    with rig.fake.held(driver_call) as wait:
        with pytest.raises(SleepError) as caught:
            getattr(pool, call)(*args)
        wait()
        late = f"{call} did not return within 0.05 s"
        assert str(caught.value) == f"{late} [cuda:3]"
        problem = f"an earlier call is still under way: {late}"
        assert error_of(lambda: enter(pool)) == f"use of 'llm': {problem}"
        for name in ("sleep", "prepare_sleep", "wake_up"):
            assert error_of(call_of(pool, name)) == f"{name} of 'llm': {problem}"
        assert pool.usage().keys() == {"a"}
        assert pool.stats().keys() >= {"sleeps"}
    pool._transfers._timeout_s = 30.0
    cause = caught.value.__cause__
    assert isinstance(cause, StillRunningError)
    cause.thread.join(30)
    pool.wake_up()
    assert pool.asleep_tags == ()
    assert tensor.is_intact()
    assert pool.sleep(["a"]) == Slept(3 * CHUNK, 3 * CHUNK)
    pool.wake_up()
    assert tensor.is_intact()


@on_fake_cuda(pool_rig)
def test_a_stuck_sleep_that_ends_leaves_its_tags_asleep(rig: PoolRig) -> None:
    pool = rig.pool(name="llm", timeout=0.05)
    tensor = rig.make(pool, "a")
    with rig.fake.held("cuStreamSynchronize"):
        with pytest.raises(SleepError) as caught:
            pool.sleep(["a"])
    caught.value.__cause__.thread.join(30)  # type: ignore[union-attr]
    assert error_of(lambda: enter(pool)) == "use of 'llm': tag 'a' is asleep: wake_up() first"
    assert pool.wake_up() == CHUNK
    assert tensor.is_intact()


@on_fake_cuda(pool_rig)
def test_closing_while_a_transfer_is_stuck_is_bounded(rig: PoolRig) -> None:
    pool = rig.pool(timeout=0.05)
    rig.make(pool, "a")
    with rig.fake.held("cuCtxSynchronize"):
        error_of(lambda: pool.sleep(["a"]))
        assert error_of(pool.close) == "close did not return within 0.05 s [cuda:3]"


@on_fake_cuda(pool_rig)
def test_releasing_host_memory_while_a_transfer_is_stuck_is_bounded(rig: PoolRig) -> None:
    pool = rig.pool(timeout=0.05)
    rig.make(pool, "a")
    thread = threading.Thread(target=pool.release_host_memory, daemon=True)
    with rig.fake.held("cuCtxSynchronize"):
        error_of(lambda: pool.sleep(["a"]))
        thread.start()
        thread.join(1)
        is_stuck = thread.is_alive()
    thread.join(30)
    assert not is_stuck


@on_fake_cuda(pool_rig)
def test_a_prepared_sleep_that_is_stuck(rig: PoolRig) -> None:
    pool = rig.pool(timeout=0.05)
    rig.make(pool, "a")
    pool.prepare_sleep(["a"])
    with rig.fake.held("cuCtxSynchronize"):
        text = error_of(lambda: pool.sleep(["a"]))
    assert text == "sleep did not return within 0.05 s [cuda:3]"


@on_fake_cuda(pool_rig)
def test_an_interrupt_during_a_transfer(rig: PoolRig) -> None:
    pool = rig.pool(name="llm")
    tensor = rig.make(pool, "a")
    pool.sleep(["a"])
    threads: list[threading.Thread] = []

    def interrupted(
        work: Callable[[], object], *, what: str, timeout_s: float, poll: object = None
    ) -> object:
        if poll is None:  # not the transfer yet
            return work()
        threads.append(threading.Thread(target=work))
        threads[0].start()
        raise KeyboardInterrupt

    with rig.patch.context() as patch, rig.fake.held("cuMemCreate") as wait:
        patch.setattr(sleep_transfers, "run_bounded", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pool.wake_up()
        wait()
        problem = "an earlier wake_up is still under way"
        assert error_of(lambda: enter(pool)) == f"use of 'llm': {problem}"
        assert error_of(pool.wake_up) == f"wake_up of 'llm': {problem}"
    threads[0].join(30)
    enter(pool)
    assert tensor.is_intact()
    assert pool.asleep_tags == ()
