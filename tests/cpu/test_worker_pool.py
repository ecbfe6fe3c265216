"""The worker pool reports what its workers do, and survives what they do."""

import ctypes
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.worker_pool import WorkerError, WorkerPool, WorkerTimeout, fresh_init_method

VARIABLE = "WORKER_POOL_TEST"


@pytest.fixture(scope="module")
def pool() -> Iterator[WorkerPool]:
    with WorkerPool(4, timeout_s=30.0, grace_s=0.5) as pool:
        yield pool


def place(rank: int, world_size: int, offset: int = 0, *, sign: int = 1) -> tuple[int, int]:
    return sign * rank + offset, world_size


def pid(rank: int, world_size: int) -> int:
    return os.getpid()


def raise_on(rank: int, world_size: int, bad_ranks: list[int], delay_s: float = 0.0) -> None:
    time.sleep(delay_s if rank not in bad_ranks else 0)
    if rank in bad_ranks:
        raise LookupError(f"no key on {rank}")


def sleep_forever(rank: int, world_size: int) -> None:
    while True:
        time.sleep(60)


def return_or_hang(rank: int, world_size: int) -> None:
    if rank == 1:
        sleep_forever(rank, world_size)


def start_child_and_hang(rank: int, world_size: int, path: str) -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    Path(path).write_text(str(child.pid))
    sleep_forever(rank, world_size)


def die(rank: int, world_size: int, how: str) -> None:
    if rank != 1:
        return
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif how == "segfault":
        ctypes.string_at(0)
    elif how == "exit":
        os._exit(7)


def unpicklable(rank: int, world_size: int) -> object:
    return lambda: None


def leave(rank: int, world_size: int) -> None:
    sys.exit("leaving")


def variable(rank: int, world_size: int, name: str) -> str | None:
    return os.environ.get(name)


def payload(rank: int, world_size: int, data: torch.Tensor) -> torch.Tensor:
    return data + rank


def summed(rank: int, world_size: int, init_method: str) -> list[float]:
    dist.init_process_group("gloo", init_method=init_method, rank=rank, world_size=world_size)
    x = torch.full((3,), float(rank + 1))
    dist.all_reduce(x)
    dist.destroy_process_group()
    return x.tolist()


def is_gone(process_id: int) -> bool:
    """No such process, or one that only waits to be reaped."""
    for _ in range(100):
        try:
            stat = Path(f"/proc/{process_id}/stat").read_text()
            num_threads = len(os.listdir(f"/proc/{process_id}/task"))
        except (FileNotFoundError, ProcessLookupError):
            return True
        # Its first thread may be dead before the others; it can be reaped when all are.
        if stat.rpartition(")")[2].split()[0] == "Z" and num_threads <= 1:
            return True
        time.sleep(0.02)
    return False


def test_results_come_in_rank_order(pool: WorkerPool) -> None:
    assert pool.run(place) == [(0, 4), (1, 4), (2, 4), (3, 4)]
    assert pool.run(place, 10, sign=-1, ranks=2) == [(10, 2), (9, 2)]


def test_workers_stay_alive_and_ranks_choose_them(pool: WorkerPool) -> None:
    pids = pool.run(pid)
    assert len({*pids, os.getpid()}) == 5
    assert pool.run(pid, ranks=[3, 1]) == [pids[3], pids[1]]
    assert pool.run(place, ranks=[3, 1]) == [(0, 2), (1, 2)]


def test_tensors_larger_than_a_pipe_travel_both_ways(pool: WorkerPool) -> None:
    data = torch.arange(1 << 20)
    for rank, result in enumerate(pool.run(payload, data)):
        assert torch.equal(result, data + rank)


@pytest.mark.parametrize("ranks", [0, 5, [], [1, 1], [4], [-1]])
def test_a_bad_choice_of_ranks_is_refused(pool: WorkerPool, ranks: int | list[int]) -> None:
    with pytest.raises(ValueError, match=r"distinct workers of 0\.\.3, got"):
        pool.run(place, ranks=ranks)


def test_a_function_that_does_not_pickle_is_refused(pool: WorkerPool) -> None:
    with pytest.raises(TypeError, match="<lambda> and arguments must pickle"):
        pool.run(lambda rank, world_size: None)


def test_every_failing_rank_is_reported_and_the_workers_stay(pool: WorkerPool) -> None:
    pids = pool.run(pid)
    with pytest.raises(WorkerError) as caught:
        pool.run(raise_on, [1, 3], 0.1)
    assert sorted(caught.value.exceptions) == [1, 3]
    failure = caught.value.exceptions[3]
    assert failure[:2] == ("LookupError", "no key on 3")
    assert "in raise_on" in failure.traceback
    message = str(caught.value)
    assert "2 of 4 ranks failed in tests.cpu.test_worker_pool.raise_on" in message
    assert "rank 1: LookupError: no key on 1" in message
    assert failure.traceback in message
    assert pool.run(pid) == pids


def test_a_rank_that_outlives_a_failure_is_shown_and_replaced(pool: WorkerPool) -> None:
    with pytest.raises(WorkerError, match="no key on 0") as caught:
        pool.run(raise_on, [0], 600.0, ranks=2)
    assert list(caught.value.exceptions) == [0]
    assert "still running" in str(caught.value).partition("rank 1: ")[2]
    assert pool.run(place, ranks=2) == [(0, 2), (1, 2)]


def test_timeout_shows_the_stack_of_every_rank(pool: WorkerPool) -> None:
    start = time.monotonic()
    with pytest.raises(WorkerTimeout) as caught:
        pool.run(return_or_hang, timeout_s=1.5)  # enough for three to return on a busy machine
    assert time.monotonic() - start < 8
    header, *blocks = str(caught.value).split("--- ")
    assert "return_or_hang passed 1.5 s, 1 of 4 ranks running" in header
    assert [block[:7] for block in blocks] == ["rank 0:", "rank 1:", "rank 2:", "rank 3:"]
    assert "still running tests.cpu.test_worker_pool.return_or_hang" in blocks[1]
    assert "in sleep_forever" in blocks[1]
    for block in (blocks[0], blocks[2], blocks[3]):
        assert " finished " in block
        assert "in _worker_main" in block
    assert pool.run(place, ranks=2) == [(0, 2), (1, 2)]


def test_timeout_kills_what_a_worker_started(pool: WorkerPool, tmp_path: Path) -> None:
    path = tmp_path / "pid"
    with pytest.raises(WorkerTimeout):
        pool.run(start_child_and_hang, str(path), ranks=1, timeout_s=0.5)
    assert is_gone(int(path.read_text()))


@pytest.mark.parametrize(
    ("how", "text", "stack"),
    [
        ("kill", "was killed by SIGKILL", ""),
        ("segfault", "was killed by SIGSEGV", "in die"),
        ("exit", "exited with code 7", ""),
    ],
)
def test_a_dead_worker_is_reported(pool: WorkerPool, how: str, text: str, stack: str) -> None:
    start = time.monotonic()
    with pytest.raises(WorkerError, match=f"rank 1: WorkerDied: {text}") as caught:
        pool.run(die, how)
    assert time.monotonic() - start < 5
    assert list(caught.value.exceptions) == [1]
    assert caught.value.exceptions[1][:2] == ("WorkerDied", text)
    assert stack in caught.value.exceptions[1].traceback
    assert len(pool.run(pid)) == 4


def test_a_worker_that_died_idle_is_restarted_with_a_warning(pool: WorkerPool) -> None:
    before = pool.run(pid)
    os.kill(before[2], signal.SIGKILL)
    assert is_gone(before[2])
    with pytest.warns(UserWarning, match="idle worker 2 was killed by SIGKILL"):
        after = pool.run(pid)
    assert [a == b for a, b in zip(after, before, strict=True)] == [True, True, False, True]


def test_a_result_that_does_not_pickle_is_named(pool: WorkerPool) -> None:
    with pytest.raises(
        WorkerError, match=r"the function that .*unpicklable returned does not pickle"
    ):
        pool.run(unpicklable, ranks=1)


def test_sys_exit_is_an_ordinary_failure(pool: WorkerPool) -> None:
    with pytest.raises(WorkerError, match="leaving") as caught:
        pool.run(leave, ranks=1)
    assert caught.value.exceptions[0].type_name == "SystemExit"


def test_env_is_set_for_the_call_and_restored(pool: WorkerPool) -> None:
    assert pool.run(variable, VARIABLE, ranks=2, env={VARIABLE: "on"}) == ["on", "on"]
    assert pool.run(variable, VARIABLE, ranks=2) == [None, None]
    home = pool.run(variable, "PATH", ranks=1)
    assert pool.run(variable, "PATH", ranks=1, env={"PATH": None}) == [None]
    assert pool.run(variable, "PATH", ranks=1) == home
    with pytest.raises(WorkerError):
        pool.run(raise_on, [0], ranks=1, env={VARIABLE: "on"})
    assert pool.run(variable, VARIABLE, ranks=1) == [None]


def test_gloo_all_reduce_over_four_ranks(pool: WorkerPool) -> None:
    assert fresh_init_method() != fresh_init_method()
    for _ in range(2):
        assert pool.run(summed, fresh_init_method()) == [[10.0] * 3] * 4


def test_reset_gives_fresh_processes(pool: WorkerPool) -> None:
    before = pool.run(pid)
    pool.reset()
    assert all(is_gone(p) for p in before)
    assert not {*before} & {*pool.run(pid)}


def test_close_leaves_nothing_and_can_be_repeated() -> None:
    pool = WorkerPool(2)
    pids = pool.run(pid)
    files = [worker.stack_path for worker in pool._workers.values()]
    assert all(file.exists() for file in files)
    pool.close()
    pool.close()
    assert all(is_gone(p) for p in pids)
    assert not any(file.exists() for file in files)
    with pytest.raises(RuntimeError, match="the pool is closed"):
        pool.run(pid)


OWNER = """
import os, signal, sys
from tests.cpu.test_worker_pool import pid
from tests.worker_pool import WorkerPool, fresh_init_method
pool = WorkerPool(2)
print(*pool.run(pid), fresh_init_method(), flush=True)
if sys.argv[1] == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def short_path() -> Iterator[Path]:
    """A folder for the fork server's socket, whose whole path must fit in 107 bytes."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


@pytest.mark.parametrize("how", ["unclosed", "killed"])
def test_workers_end_with_their_owner(how: str, short_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", OWNER, how],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "TMPDIR": str(short_path)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    first, second, init_method = done.stdout.split()
    assert is_gone(int(first))
    assert is_gone(int(second))
    assert init_method.startswith(f"file://{short_path}/")
    if how == "unclosed":
        assert done.returncode == 0
        assert "Traceback" not in done.stderr
        assert list(short_path.iterdir()) == []
