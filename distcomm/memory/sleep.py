"""Pools of GPU memory that can be given back and taken again at the same addresses, by tags.

An engine that shares its GPU with training, or switches models, puts weights and KV cache to sleep:
their physical memory goes, their addresses stay, so that tensors and captured CUDA graphs are as
good as before once they are awake.
"""

from __future__ import annotations

import atexit
import functools
import logging
import math
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import count
from typing import NamedTuple

import torch

from ..errors import ArgumentError, SleepError
from ..native import NativeLibrary
from .sleep_gate import SleepGate
from .sleep_heap import HostMemoryError, SleepHeap, SleepOutOfMemoryError, TagUsage
from .sleep_tags import SleepTags
from .sleep_transfers import Progress, SleepTransfers
from .torch_pools import TorchPool, TorchPools

__all__ = ["SleepablePool", "Slept", "sleepable_pools"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Slept:
    """What a call of `sleep` has done.

    Attributes:
        freed_bytes: GPU memory that was given back.
        offloaded_bytes: of these, those whose content was copied to host memory.
    """

    freed_bytes: int
    offloaded_bytes: int


class _Frame(NamedTuple):
    """A `use` that a thread is in: what it allocates from, and the tag selected before."""

    pool: TorchPool
    former: int


class _Uses(threading.local):
    def __init__(self) -> None:
        self.frames: list[_Frame] = []


_numbers = count()
# Like torch's allocator settings, something that a process has only once: `distcomm.sleep()` is
# about all of its pools.
_pools: weakref.WeakSet[SleepablePool] = weakref.WeakSet()


def sleepable_pools() -> list[SleepablePool]:
    """This process's pools that aren't closed, the oldest first."""
    return sorted((pool for pool in _pools if not pool.closed), key=lambda pool: pool.number)


class SleepablePool:
    """GPU memory of one device by tags, each of which can sleep: without memory, at its addresses.

        pool = SleepablePool()
        with pool.use("weights"):
            model = load()
        pool.sleep(offload_tags=("weights",))   # the rest is discarded
        pool.wake_up()

    Not collective: each process has pools of its own, any number of them. Tensors that are made in
    a `use` live on after it, asleep or awake; while asleep they may be freed, but not read or
    written: the GPU would report an illegal address. What is freed after its `use` is kept by torch
    until the next call of this pool, or `torch.cuda.empty_cache()`. Methods
    are thread-safe, but while another stream or thread captures a CUDA graph nothing may be put to
    sleep, woken up or freed here: the driver would refuse to wait for the device, and break the
    capture off. A pool that is
    closed or dropped may have tensors that live on; at the end of the process it needs no `close`.

    Args:
        device: a CUDA device; by default the current one.
        name: for errors and logs.
        timeout: seconds that a transfer, or the work of the GPU before it, may take.

    Attributes:
        device, name, timeout_s: as given.
        number: of this pool, counted in this process.

    Raises:
        ArgumentError: `device` isn't a CUDA device, or `timeout` no number of seconds > 0.
        NativeLibraryError: the C++ library isn't built.
        SleepError: there is no CUDA driver that can map memory.
    """

    def __init__(
        self,
        device: torch.device | str | int | None = None,
        *,
        name: str = "sleepable",
        timeout: float = 300.0,
    ) -> None:
        if not _is_time(timeout):
            raise ArgumentError(
                "timeout", "a finite number of seconds > 0", repr(timeout), call="SleepablePool"
            )
        # torch takes an index for one of whatever accelerator there is, if any.
        named = torch.device("cuda", device) if isinstance(device, int) else device or "cuda"
        place = torch.device(named)
        if place.type != "cuda":
            raise ArgumentError("device", "a CUDA device", place, call="SleepablePool")
        native = NativeLibrary()
        index = _index_of(place)
        # Looks for the driver first, whose absence torch reports in other words.
        self._heap = SleepHeap(native, 0)
        if index is None:
            place = torch.device("cuda", torch.cuda.current_device())
        elif index >= _num_devices():
            raise ArgumentError(
                "device", f"one of {_num_devices()} CUDA devices", place, call="SleepablePool"
            )
        self._heap = SleepHeap(native, place.index)
        self.device = place
        self.name = name
        self.number = next(_numbers)
        self.timeout_s = float(timeout)
        self._gate = SleepGate(repr(name))
        self._tags = SleepTags(self._heap, repr(name))
        self._torch_pools = TorchPools(native, place, "distcomm_sleep_torch")
        self._transfers = SleepTransfers(
            self._heap, self._gate, self._torch_pools, place, self.timeout_s, self._tags.look_again
        )
        self._uses = _Uses()
        self._num_sleeps = self._num_wake_ups = 0
        _shut_down_at_exit(place.index)
        self._finalizer = weakref.finalize(self, _forget, self._heap, self._tags.numbers)
        self._finalizer.atexit = False  # all ends with the process, without waiting for the GPU
        _pools.add(self)

    def __repr__(self) -> str:
        return f"SleepablePool({self.name!r}, device={self.device}, tags={self._tags.names})"

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._gate.is_closed

    # ---- allocation -------------------------------------------------------------------------

    @contextmanager
    def use(self, tag: str = "default") -> Iterator[None]:
        """A block whose new CUDA tensors, of this thread and device, are in the pool, under `tag`.

        Nests, with other tags, pools and symmetric memory; the innermost counts, and whatever is
        raised, allocation goes on afterwards as before. Expandable segments are off inside, for
        the whole process. When the block ends, memory that no tensor uses is given back.

        Raises:
            ArgumentError: `tag` is no text, or empty.
            SleepError: `tag` is asleep, the pool is closed or about to sleep, or a CUDA graph is
                captured: a graph has memory of its own.
            SleepOutOfMemoryError: an allocation inside failed.
        """
        self._enter(tag)
        try:
            yield
        except torch.OutOfMemoryError as error:
            failure = self._heap.take_failure()
            if failure is None:  # it was other memory
                raise
            hint = "; torch.cuda.empty_cache() before the block gives back what torch has cached"
            raise SleepOutOfMemoryError(self._what(f"use({tag!r})"), failure, hint) from error
        finally:
            self._leave()

    @property
    def asleep_tags(self) -> tuple[str, ...]:
        """The tags that are asleep, in the order of their first use."""
        return self._tags.asleep

    def usage(self) -> dict[str, TagUsage]:
        """Bytes by tag: mapped, asleep, and of these offloaded."""
        return self._tags.usage()

    def stats(self) -> dict[str, int]:
        """Counters: ``sleeps`` and ``wake_ups`` of this pool that had something to do, and of all
        pools of the device the allocator's ``allocations``, ``failed_allocations``,
        ``failed_releases``, ``unknown_frees``, ``host_bytes`` (pinned) and of these
        ``free_host_bytes``."""
        return {
            "sleeps": self._num_sleeps,
            "wake_ups": self._num_wake_ups,
            **self._heap.stats(),
        }

    # ---- sleep ------------------------------------------------------------------------------

    def sleep(
        self,
        offload_tags: Sequence[str] = (),
        *,
        tags: Sequence[str] | None = None,
        progress: Progress | None = None,
    ) -> Slept:
        """Gives the GPU memory back, and keeps the addresses. Waits for the device.

        What is asleep already stays as it is, so that a second call does nothing.

        Args:
            offload_tags: tags whose content is kept, in pinned host memory; that of the others is
                lost, and undefined after `wake_up`. Host memory stays for the next time, and is
                never more than was needed at once; see `release_host_memory`.
            tags: the tags to put to sleep, among them `offload_tags`; by default all.
            progress: called now and then with the bytes copied so far, and all to be copied. What
                it raises is raised again at the end, when the pool is asleep.

        Raises:
            ArgumentError: a tag was never used here.
            SleepError: a thread is in `use`, a graph is captured, the pool is closed, the GPU was
                at work for too long, or the driver refused. Then all that was to be offloaded is
                there, some of it perhaps asleep: `wake_up` brings it back.
            HostMemoryError: host memory for the offloaded tags can't be had; nothing has changed.
        """
        self._transfers.recover()
        chosen, offloaded = self._tags.to_sleep("sleep", offload_tags, tags)
        with self._gate.transfer("sleep"):
            has_slept = False
            try:
                report = self._sleep(chosen, offloaded, progress)
                has_slept = True
            finally:
                if self._gate.is_prepared or not has_slept:
                    self._give_back_prepared()
        logger.info(
            "%s: %d bytes freed, %d of them offloaded",
            self,
            report.freed_bytes,
            report.offloaded_bytes,
        )
        return report

    def prepare_sleep(
        self, offload_tags: Sequence[str] = (), *, tags: Sequence[str] | None = None
    ) -> None:
        """Makes sure that `sleep` with the same arguments will go well, and changes nothing else.

        For processes that sleep together or not at all. The pool can't be used until it has slept,
        or `cancel_sleep` was called. Raises as `sleep`.
        """
        self._transfers.recover()
        offloaded = self._tags.to_sleep("prepare_sleep", offload_tags, tags)[1]
        with self._gate.transfer("prepare_sleep"):
            self._transfers.clean("prepare_sleep")
            self._reserve_host_memory("prepare_sleep", offloaded)
            self._gate.is_prepared = True

    def cancel_sleep(self) -> None:
        """Undoes `prepare_sleep`. Idempotent."""
        if self._gate.is_prepared:
            self._give_back_prepared()

    def wake_up(
        self, tags: Sequence[str] | None = None, *, progress: Progress | None = None
    ) -> int:
        """Takes GPU memory again, at the same addresses, with the content that was offloaded.

        What is awake already stays as it is.

        Args:
            tags: the tags to wake up; by default all.
            progress: as for `sleep`.

        Returns:
            Bytes of GPU memory taken.

        Raises:
            ArgumentError: a tag was never used here.
            SleepOutOfMemoryError: there isn't enough GPU memory; all stays asleep, and the call
                can be repeated.
            SleepError: the pool is closed, or the driver refused; all stays asleep.
        """
        self._transfers.recover()
        chosen = [
            tag for tag in self._tags.known("wake_up", "tags", tags) if tag in self._tags.asleep
        ]
        with self._gate.transfer("wake_up"):
            if not chosen:
                return 0
            self._transfers.clean("wake_up")  # what was freed meanwhile needs no memory
            before = self._tags.total().asleep_bytes
            failure = self._transfers.wake_up(self._tags.numbers(chosen), progress)
            if failure is not None:
                what = self._what("wake_up")
                if failure.free_bytes >= 0:
                    raise SleepOutOfMemoryError(what, failure)
                raise SleepError(f"{what}: {failure.text}; what was asleep still is")
            self._tags.wake_up(chosen)
            self._num_wake_ups += 1
            taken = before - self._tags.total().asleep_bytes
            self._transfers.raise_of_progress()
        return taken

    def release_host_memory(self) -> int:
        """Frees pinned host memory that no sleeping tag needs, of all pools of the device.

        Returns:
            How many bytes.

        Raises:
            SleepError: a transfer of a pool of the device is under way for too long.
        """
        return self._transfers.trim_host()

    def close(self) -> None:
        """Gives back all memory that no tensor uses, and host memory. Tensors live on; when they
        go, `torch.cuda.empty_cache()` gives their memory back. The content of what is asleep is
        lost. Idempotent.

        Raises:
            SleepError: a thread is in `use`, or a graph is captured.
        """
        if self._gate.close() and self._finalizer.detach():
            self._transfers.forget(self._tags.numbers())

    def __enter__(self) -> SleepablePool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- inside -----------------------------------------------------------------------------

    def _enter(self, tag: str) -> None:
        if not isinstance(tag, str) or not tag:
            raise ArgumentError("tag", "a text that isn't empty", repr(tag), call="use")
        self._transfers.recover()
        self._gate.begin_use()
        try:
            if tag in self._tags.asleep:
                raise SleepError(f"{self._what('use')}: tag {tag!r} is asleep: wake_up() first")
            pool = self._torch_pools.make()
            former = self._heap.select(self._tags.number(tag))
            try:
                self._torch_pools.begin(pool)
            except BaseException:
                self._heap.select(former)
                raise
        except BaseException:
            self._gate.end_use()
            raise
        self._uses.frames.append(_Frame(pool, former))

    def _leave(self) -> None:
        frame = self._uses.frames.pop()
        try:
            self._torch_pools.end(frame.pool)
        finally:
            self._heap.select(frame.former)
            try:
                self._torch_pools.drop([frame.pool])
            finally:
                self._gate.end_use()

    def _sleep(
        self, chosen: Sequence[str], offloaded: Sequence[str], progress: Progress | None
    ) -> Slept:
        if not chosen:
            return Slept(0, 0)
        self._transfers.clean("sleep")
        self._reserve_host_memory("sleep", offloaded)
        before = self._tags.total()
        numbers = self._tags.numbers(chosen), self._tags.numbers(offloaded)
        failure = self._transfers.sleep(*numbers, progress)
        usage = self._tags.usage()
        slept = chosen if failure is None else [tag for tag in chosen if usage[tag].asleep_bytes]
        self._tags.put_to_sleep(slept)
        self._num_sleeps += bool(slept)
        if failure is not None:
            raise SleepError(
                f"{self._what('sleep')}: {failure.text}; the content of {list(offloaded)} is not "
                f"lost, asleep are {list(self.asleep_tags)}"
            )
        self._transfers.raise_of_progress()
        after = self._tags.total()
        return Slept(
            before.mapped_bytes - after.mapped_bytes,
            after.offloaded_bytes - before.offloaded_bytes,
        )

    def _give_back_prepared(self) -> None:
        self._gate.is_prepared = False
        if self._gate.problem is None:
            self._transfers.cancel(self._tags.numbers())

    def _reserve_host_memory(self, call: str, offloaded: Sequence[str]) -> None:
        failure = self._transfers.prepare(self._tags.numbers(offloaded))
        if failure is not None:
            raise HostMemoryError(self._what(call), failure)

    def _what(self, call: str) -> str:
        return f"{call} of {self.name!r}"


def _is_time(value: object) -> bool:
    return isinstance(value, int | float) and 0 < value < math.inf


def _num_devices() -> int:
    return torch.cuda.device_count()


def _index_of(device: torch.device) -> int | None:
    return device.index


@functools.cache
def _shut_down_at_exit(device_index: int) -> None:
    """At the end of the process torch may give memory back when there is no driver any more."""
    atexit.register(SleepHeap(NativeLibrary(), device_index).shut_down)


def _forget(heap: SleepHeap, numbers: Callable[[], list[int]]) -> None:
    """What a dropped pool leaves behind: content that nobody can wake up any more.

    In a thread, because it waits for transfers of other pools, and who collects garbage shouldn't.
    """

    def forget() -> None:
        heap.forget(numbers())

    with suppress(RuntimeError):  # there are no new threads when the interpreter shuts down
        threading.Thread(target=forget, name="distcomm: forgetting a pool", daemon=True).start()
