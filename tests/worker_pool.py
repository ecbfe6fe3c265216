"""Worker processes that stay alive and run test functions as the ranks of a job.

A fork server imports torch once, so a worker starts in milliseconds, and a suite pays for its
ranks once and not once a test. The server never touches CUDA, so no worker inherits a context.

    with WorkerPool(4) as pool:
        results = pool.run(check_all_reduce, fresh_init_method())

calls ``check_all_reduce(rank, 4, url)`` in four processes and returns what each rank returned.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import faulthandler
import functools
import multiprocessing
import os
import pickle
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

__all__ = ["RankFailure", "WorkerError", "WorkerPool", "WorkerTimeout", "fresh_init_method"]

T = TypeVar("T")

PRELOAD = ["torch", "torch.distributed", "pytest", "distcomm"]
START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 2.0
STACK_TIMEOUT_S = 3.0
STACK_POLL_S = 0.1


class RankFailure(NamedTuple):
    """Why one rank failed. A worker that died has the type name ``WorkerDied``."""

    type_name: str
    message: str
    traceback: str


Outcome = RankFailure | tuple[Any]  # a result comes in a 1-tuple


class WorkerError(RuntimeError):
    """At least one rank raised or died; ``exceptions`` maps each such rank to its failure."""

    def __init__(self, message: str, exceptions: Mapping[int, RankFailure]) -> None:
        super().__init__(message)
        self.exceptions = dict(exceptions)


class WorkerTimeout(TimeoutError):  # noqa: N818 - a kind of TimeoutError
    """The deadline passed and no rank had failed; the message holds every rank's stack."""


class WorkerPool:
    """Up to ``size`` worker processes, started when first needed; not thread-safe.

    State left in a worker (a process group, a module global) is there in the next ``run``;
    ``reset`` gives fresh processes. The owner calls ``close`` or uses ``with``.

    Args:
        size: number of workers, at least 1.
        timeout_s: the deadline of a ``run`` that names none. Starting workers doesn't count.
        grace_s: how long the other ranks may still run once one has failed.
    """

    def __init__(self, size: int, timeout_s: float = 60.0, *, grace_s: float = 5.0) -> None:
        if size < 1:
            raise ValueError(f"WorkerPool: size must be at least 1, got {size}")
        self.size = size
        self.timeout_s = timeout_s
        self.grace_s = grace_s
        self._workers: dict[int, _Worker] = {}
        self._owner_pid = os.getpid()
        self._closed = False
        atexit.register(self.close)

    def run(
        self,
        fn: Callable[..., T],
        *args: Any,
        ranks: int | Sequence[int] | None = None,
        timeout_s: float | None = None,
        env: Mapping[str, str | None] | None = None,
        **kwargs: Any,
    ) -> list[T]:
        """Call ``fn(rank, world_size, *args, **kwargs)`` on each chosen worker; results by rank.

        Args:
            fn: a module-level function. It, its arguments and its results travel as plain pickles,
                so tensors are copied.
            ranks: the workers to use: all (None), the first n (an int), or these indices. ``rank``
                is the position in this choice and ``world_size`` its length.
            timeout_s: deadline of this call in place of the pool's.
            env: variables set in the workers during the call (None unsets one), then restored.

        Raises:
            WorkerError: a rank raised, or its worker died. Ranks still running ``grace_s`` later
                are shown with their stacks. After a death or a straggler all workers are replaced.
            WorkerTimeout: the deadline passed. All workers are replaced.
            TypeError: ``fn`` or its arguments do not pickle.
            ValueError: ``ranks`` names no worker, one twice, or one that the pool hasn't got.
        """
        if self._closed:
            raise RuntimeError("WorkerPool.run: the pool is closed; make a new one")
        indices = self._choose(self.size if ranks is None else ranks)
        timeout_s = self.timeout_s if timeout_s is None else timeout_s
        name = _name_of(fn)
        try:
            call = pickle.dumps((fn, args, kwargs))
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise TypeError(f"WorkerPool.run: {name} and arguments must pickle: {error}") from error
        try:
            team = dict(enumerate(self._started(indices)))
            for rank, worker in team.items():
                worker.send(pickle.dumps((rank, len(team), dict(env or {}), call)))
            outcomes = self._collect(team, time.monotonic() + timeout_s)
            failures = {r: o for r, o in outcomes.items() if isinstance(o, RankFailure)}
            running = {r: w for r, w in team.items() if r not in outcomes}
            stacks = _dump_stacks(running if failures else team) if running else {}
        except BaseException:  # an interrupt, or a test's own time limit
            self.reset()
            raise
        if running or any(failure.type_name == "WorkerDied" for failure in failures.values()):
            self.reset()
        if not failures and not running:
            return [o[0] for o in outcomes.values() if not isinstance(o, RankFailure)]
        late = f"{name} passed {timeout_s:g} s, {len(running)} of {len(team)} ranks running"
        report = [f"{len(failures)} of {len(team)} ranks failed in {name}" if failures else late]
        report += ["--- rank {}: {}: {}\n{}".format(r, *f) for r, f in failures.items()]
        for rank, stack in stacks.items():
            state = "still running" if rank in running else "finished"
            report.append(f"--- rank {rank}: {state} {name}\n{stack}")
        message = "\n".join(report)
        raise WorkerError(message, failures) if failures else WorkerTimeout(message)

    def reset(self) -> None:
        """Kill every worker; the next ``run`` starts fresh ones. Idempotent."""
        for worker in self._workers.values():
            worker.kill()
        self._workers.clear()

    def close(self) -> None:
        """Stop all workers and remove their files. Idempotent; also runs at exit."""
        if self._closed or os.getpid() != self._owner_pid:
            return
        self._closed = True
        atexit.unregister(self.close)
        for worker in self._workers.values():
            worker.send(b"")
        deadline = time.monotonic() + STOP_TIMEOUT_S
        for worker in self._workers.values():
            worker.process.join(max(0.0, deadline - time.monotonic()))
        self.reset()

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _choose(self, ranks: int | Sequence[int]) -> list[int]:
        indices = list(range(ranks) if isinstance(ranks, int) else ranks)
        if not indices or len({*indices}) < len(indices) or not {*indices} <= {*range(self.size)}:
            allowed = f"None, 1..{self.size}, or distinct workers of 0..{self.size - 1}"
            raise ValueError(f"WorkerPool.run: ranks must be {allowed}, got {ranks!r}")
        return indices

    def _started(self, indices: Iterable[int]) -> list[_Worker]:
        """The workers of these indices, all answering; missing and dead ones are started."""
        new = []
        for index in indices:
            worker = self._workers.get(index)
            if worker and worker.process.is_alive():
                continue
            if worker:
                warnings.warn(f"idle worker {index} {worker.exit_text()}; restarted", stacklevel=3)
                worker.kill()
            self._workers[index] = _Worker(index)
            new.append(self._workers[index])
        for worker in new:
            worker.wait_ready()
        return [self._workers[index] for index in indices]

    def _collect(self, team: Mapping[int, _Worker], deadline: float) -> dict[int, Outcome]:
        """The outcomes that came in time, by rank; the first failure moves the deadline forward."""
        outcomes: dict[int, Outcome] = {}
        while running := {r: w for r, w in team.items() if r not in outcomes}:
            handles = [h for w in running.values() for h in (w.conn, w.process.sentinel)]
            if not wait(handles, max(0.0, deadline - time.monotonic())):
                break
            for rank, worker in running.items():
                outcome = worker.outcome()
                if outcome is not None:
                    outcomes[rank] = outcome
                if isinstance(outcome, RankFailure):
                    deadline = min(deadline, time.monotonic() + self.grace_s)
        return dict(sorted(outcomes.items()))


class _Worker:
    """The parent's side of one worker: its process, its pipe and the file its stacks go to."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.stack_path = _scratch_path()
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)  # skips what does not import
        self.conn, theirs = context.Pipe()
        args = (theirs, self.stack_path)
        self.process = context.Process(target=_worker_main, args=args, daemon=True)
        self.process.start()
        theirs.close()

    def wait_ready(self) -> None:
        """Return once stack dumps work, so that no later signal can kill a starting worker."""
        with contextlib.suppress(EOFError, OSError):
            if self.conn.poll(START_TIMEOUT_S) and self.conn.recv_bytes():
                return
        raise RuntimeError(f"worker {self.index} {self.exit_text()} while starting")

    def send(self, message: bytes) -> None:
        with contextlib.suppress(OSError):  # a dead worker is reported by whoever awaits its reply
            self.conn.send_bytes(message)

    def outcome(self) -> Outcome | None:
        """The outcome of the call; None while it runs."""
        alive = self.process.is_alive()  # asked first: an answer sent before death still counts
        try:
            if not self.conn.poll():
                if alive:
                    return None
                raise EOFError
            reply = self.conn.recv_bytes()
        except (EOFError, OSError):
            return RankFailure("WorkerDied", self.exit_text(), self.stack_path.read_text())
        try:
            value = pickle.loads(reply)
        except Exception as error:  # noqa: BLE001 - whatever a result's own __setstate__ raises
            return _failure(TypeError(f"the result does not unpickle: {error!r}"))
        return value if isinstance(value, RankFailure) else (value,)

    def exit_text(self) -> str:
        self.process.join(1.0)
        code = self.process.exitcode
        if code is None:
            return "did not answer"
        killed = {-s.value: f"was killed by {s.name}" for s in signal.Signals}
        return killed.get(code, f"exited with code {code}")

    def kill(self) -> None:
        """Kill the worker and, as it leads a session of its own, what it started."""
        if self.process.is_alive() and self.process.pid:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.kill()
        self.process.join(STOP_TIMEOUT_S)
        self.conn.close()
        self.stack_path.unlink(missing_ok=True)


def fresh_init_method() -> str:
    """A new ``file://`` init_method for one process group: there is no port to race for."""
    return f"file://{_scratch_path()}"


def _scratch_path() -> Path:
    return Path(tempfile.mktemp(dir=_scratch_folder()))


@functools.cache
def _scratch_folder() -> str:
    folder = tempfile.mkdtemp(prefix="distcomm-tests-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _dump_stacks(team: Mapping[int, _Worker]) -> dict[int, str]:
    """Every thread's Python stack by rank; bounded, whatever the processes are blocked in."""
    for worker in team.values():
        if worker.process.is_alive() and worker.process.pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(worker.process.pid, signal.SIGUSR1)
    deadline = time.monotonic() + STACK_TIMEOUT_S
    sizes: dict[int, int] = {}
    while time.monotonic() < deadline:  # a dump has no end mark: wait until no file grows
        time.sleep(STACK_POLL_S)
        before, sizes = sizes, {r: w.stack_path.stat().st_size for r, w in team.items()}
        if sizes == before and all(sizes.values()):
            break
    return {r: w.stack_path.read_text() or "(did not answer)\n" for r, w in team.items()}


def _name_of(fn: Callable[..., Any]) -> str:
    return f"{fn.__module__}.{fn.__qualname__}" if hasattr(fn, "__qualname__") else repr(fn)


def _failure(error: BaseException) -> RankFailure:
    name = _name_of(type(error)).removeprefix("builtins.")
    return RankFailure(name, str(error), "".join(traceback.format_exception(error)))


def _worker_main(conn: Connection, stack_path: Path) -> None:
    """Answer calls until the parent sends an empty message or is gone."""
    os.setsid()  # out of the terminal's Ctrl-C, and killable with all that it starts
    # 1 is PR_SET_PDEATHSIG. The parent is the fork server, which ends with the pool's process.
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # a kill loses no line
    with stack_path.open("w") as stacks, contextlib.suppress(EOFError, OSError):
        faulthandler.enable(stacks)
        faulthandler.register(signal.SIGUSR1, stacks, all_threads=True)
        torch.set_num_threads(1)
        conn.send_bytes(b"ready")
        while message := conn.recv_bytes():
            conn.send_bytes(_answer(message))


def _answer(message: bytes) -> bytes:
    """Make one call and return its result, or the RankFailure in its place, as a pickle."""
    rank, world_size, env, call = pickle.loads(message)
    before = _set_environment(env)
    try:
        fn, args, kwargs = pickle.loads(call)
        result = fn(rank, world_size, *args, **kwargs)
        try:
            return pickle.dumps(result)
        except Exception as error:
            what = f"the {type(result).__qualname__} that {_name_of(fn)} returned"
            raise TypeError(f"{what} does not pickle: {error}") from error
    except BaseException as error:  # noqa: BLE001 - SystemExit and pytest's skip are reported too
        return pickle.dumps(_failure(error))
    finally:
        _set_environment(before)


def _set_environment(env: Mapping[str, str | None]) -> dict[str, str | None]:
    """Set these variables, or unset those that are None; returns what undoes it."""
    before = {key: os.environ.get(key) for key in env}
    for key in env:
        os.environ.pop(key, None)
    os.environ.update({key: value for key, value in env.items() if value is not None})
    return before
