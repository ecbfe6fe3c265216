"""torch's memory pools over an allocator of ours: how they are made, entered and ended."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch

from ..native import NativeLibrary
from .alloc_conf import expandable_segments_off

__all__ = ["TorchPool", "TorchPools"]

# Looked up once: contexts are entered and left around every layer of a model.
_begin_in_thread = torch._C._cuda_beginAllocateCurrentThreadToPool
_end_in_thread = torch._C._cuda_endAllocateToPool
_release = torch._C._cuda_releasePool
# Not in builds without CUDA.
_empty_cache: Callable[[], None] = getattr(torch._C, "_cuda_emptyCache", lambda: None)
_has_no_tensors = getattr(torch._C, "_cuda_checkPoolLiveAllocations", None)

_OWN_USES = 2  # a pool's MemPool's, and one more


@functools.cache
def _torch_allocator(path: str, prefix: str) -> torch._C._cuda_CUDAAllocator:
    """torch's name for a heap's two functions; kept, as tensors may outlive every pool."""
    functions = f"{prefix}_alloc", f"{prefix}_free"
    allocator: torch._C._cuda_CUDAAllocator
    allocator = torch.cuda.memory.CUDAPluggableAllocator(path, *functions).allocator()
    return allocator


class TorchPool:
    """One of torch's pools over a heap. Nothing that it refers to may refer to it: its memory
    has to go when its last user does, at the same point on every rank, not at a collection.

    It has one use of its own besides the MemPool's. torch empties a pool whose MemPool goes with
    its last use, and ends the process if any pool is begun or any capture is under way then, be it
    somebody else's, or one that has failed. So the MemPool goes first, and then that use.

    Attributes:
        id: torch's.
        generation: its maker's when this one was made; an older one isn't used again.
        mem_pool: torch's object; None once the pool has been dropped.
        is_begun: whether a thread allocates from it.
        num_entered: in how many contexts it is what was entered, suspended ones included.
    """

    __slots__ = ("generation", "id", "is_begun", "mem_pool", "num_entered")

    def __init__(self, mem_pool: torch.cuda.MemPool, generation: int) -> None:
        self.mem_pool: torch.cuda.MemPool | None = mem_pool
        self.id = mem_pool.id
        self.generation = generation
        self.is_begun = False
        self.num_entered = 0

    @property
    def is_unused(self) -> bool:
        """Whether no thread is in it or comes back to it, and no graph has it."""
        if self.mem_pool is None:
            return True
        return self.num_entered == 0 and self.mem_pool.use_count() <= _OWN_USES


class TorchPools:
    """Makes and ends pools of one device.

    Args:
        native: the C++ library, which has the allocator's functions.
        device: where memory is allocated.
        prefix: of the names of those functions.
    """

    def __init__(
        self, native: NativeLibrary, device: torch.device, prefix: str = "distcomm_torch"
    ) -> None:
        self._device = device
        self._device_index = device.index
        self._allocator = _torch_allocator(str(native.path), prefix)
        self._emptying = threading.Lock()  # guards the next: torch refuses to begin a pool twice
        self._never_used: dict[int, TorchPool] = {}  # by device

    def make(self, generation: int = 0) -> TorchPool:
        """A new pool."""
        expandable_segments_off.refresh()
        return self._make_on(self._device_index, generation)

    def begin(self, pool: TorchPool) -> None:
        """From here on this thread allocates from `pool`, until `end`; not if it was dropped."""
        if pool.mem_pool is None:
            return
        expandable_segments_off.enter()
        try:
            _begin_in_thread(self._device_index, pool.id)
        except BaseException:
            expandable_segments_off.leave()
            raise
        pool.is_begun = True

    def end(self, pool: TorchPool) -> None:
        """Undoes `begin`."""
        if not pool.is_begun:
            return
        pool.is_begun = False
        try:
            _end_in_thread(self._device_index, pool.id)
        finally:
            try:
                _release(self._device_index, pool.id)
            finally:
                expandable_segments_off.leave()

    def is_empty(self, pool: TorchPool) -> bool:
        """Whether no tensor lies in it. Otherwise torch would give back the rest of it at some
        later time, which differs between ranks."""
        return _has_no_tensors is None or bool(_has_no_tensors(self._device_index, pool.id, set()))

    def drop(self, pools: Sequence[TorchPool]) -> None:
        """Ends pools, and gives back what doesn't belong to live tensors or graphs."""
        for pool in pools:
            pool.mem_pool = None
            _release(self._device_index, pool.id)
        if pools:
            self.empty_unused()

    def empty_unused(self) -> None:
        """Gives back what lies in pools that have no use any more."""
        with self._emptying, ExitStack() as stack:
            for index in self._devices_in_use():
                stack.enter_context(self._keeping_cache(index))
            with torch.cuda.device(self._device):
                _empty_cache()

    # ---- inside -----------------------------------------------------------------------------

    @contextmanager
    def _keeping_cache(self, device_index: int) -> Iterator[None]:
        """While a pool is begun on a device, torch leaves its cache of ordinary memory there."""
        if device_index not in self._never_used:
            self._never_used[device_index] = self._make_on(device_index)
        pool_id = self._never_used[device_index].id
        _begin_in_thread(device_index, pool_id)
        try:
            yield
        finally:
            _end_in_thread(device_index, pool_id)
            _release(device_index, pool_id)

    def _make_on(self, device_index: int, generation: int = 0) -> TorchPool:
        with torch.cuda.device(device_index):  # a new thread has another current device
            pool = TorchPool(torch.cuda.MemPool(self._allocator), generation)
            _begin_in_thread(device_index, pool.id)  # the use of its own
            _end_in_thread(device_index, pool.id)
            return pool

    def _devices_in_use(self) -> list[int]:
        """This one, and those where torch has memory."""
        return [
            index
            for index in range(torch.cuda.device_count())
            if index != self._device_index and torch.cuda.memory_reserved(index)
        ] + [self._device_index]
