"""The process's symmetric pool: torch's memory pools over the segment heap, for all groups."""

from __future__ import annotations

import logging
import re
from typing import Any, NoReturn

import torch

from ..errors import ArgumentError, DistcommError, SymmetricMemoryError
from ..native import NativeNccl
from .pool_routing import PoolRouting
from .segment_heap import COUNTERS, AllocationFailure, SegmentHeap
from .windows import ASLEEP, GroupWindows

__all__ = ["SymmetricOutOfMemoryError", "SymmetricPool", "parse_num_bytes"]

logger = logging.getLogger(__name__)

_SIGNAL_PAGE_BYTES = 2 << 20  # what the heap cuts at least

_NUM_BYTES = re.compile(r"([0-9]+)\s*(?:([kmgt])i?)?b?")
_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


class SymmetricOutOfMemoryError(SymmetricMemoryError, torch.OutOfMemoryError):
    """An allocation of symmetric memory failed; the message has the pool's state.

    Attributes:
        failure: what the allocator says.
    """

    def __init__(self, what: str, failure: AllocationFailure, stats: dict[str, Any]) -> None:
        self.failure = failure
        hint = ""
        if failure.kind == "capturing":
            hint = (
                f"; reserve at least {failure.num_bytes} bytes more before the capture, with "
                "symmetric_reserve=... or reserve(), and capture again"
            )
        super().__init__(
            f"{what}: no {failure.num_bytes} bytes of symmetric memory: {failure.text}{hint}. "
            f"The pool has {stats['bytes_reserved']} bytes in {stats['segments']} segments, "
            f"{stats['bytes_used']} in use, at most {stats['largest_free']} in one piece"
        )


def parse_num_bytes(argument: str, value: int | str, call: str) -> int:
    """Bytes from an integer or a text such as ``"512MiB"`` or ``"4G"`` (powers of 1024).

    Raises:
        ArgumentError: it is neither.
    """
    if isinstance(value, str):
        parts = _NUM_BYTES.fullmatch(value.strip().lower())
        if parts is not None:
            return int(parts[1]) * _UNITS[parts[2] or ""]
    elif type(value) is int and value >= 0:
        return value
    raise ArgumentError(
        argument, "a number of bytes >= 0, or a text such as '512MiB' or '4GiB'", repr(value),
        call=call,
    )  # fmt: skip


class SymmetricPool:
    """Symmetric memory of one process and device, for all its groups.

    Args:
        nccl: the libnccl to allocate with.
        device: this rank's device.
        chunk_bytes: the least size of a segment that is made when nothing fits.

    Attributes:
        heap: the segments and windows.
        routing: which threads allocate here.
        frozen: whether `freeze()` was called.
        asleep: whether the segments have no memory now.
        signal_page_bytes: size of the memory for groups' signals.
        signal_claims: what of it is taken: where in the page each part begins and ends.

    Raises:
        NativeLibraryError: this libnccl has no windows.
    """

    def __init__(
        self, nccl: NativeNccl, device: torch.device, *, chunk_bytes: int = 64 << 20
    ) -> None:
        self.device = device
        self.heap = SegmentHeap(nccl, device.index, chunk_bytes=chunk_bytes, shared=True)
        self.heap.freeze(False)
        self.heap.defer_frees(True)
        self._at_start = self.heap.stats()
        self.routing = PoolRouting(nccl, device)
        self._groups: list[GroupWindows] = []
        self.frozen = False
        self.asleep = False
        self._signal_pages: list[int] = []  # addresses; the last one is in use
        self.signal_page_bytes = 0
        self.signal_claims: list[tuple[int, int]] = []
        self._warned_frozen = False
        self._warned_not_mapped = False
        self._closed = False

    # ---- for users --------------------------------------------------------------------------

    def reserve(self, num_bytes: int | str) -> None:
        """Makes a slab and registers it with all groups. Collective among all ranks of the job.

        Args:
            num_bytes: the same on all ranks; bytes, or a text such as ``"4GiB"``.

        Raises:
            SymmetricMismatchError: a rank had no memory for it, or didn't come; on every rank.
            SymmetricOutOfMemoryError: this rank has no memory, and no group to tell.
        """
        size = parse_num_bytes("num_bytes", num_bytes, "reserve")
        self._refuse_if_closed("reserve")
        self._refuse_if_asleep("reserve")
        if self.frozen:
            raise SymmetricMemoryError("reserve: the pool is frozen: freeze() is for good")
        if size == 0:
            return
        self.register_common()  # what is pending, so that the slab is all that is new
        error = self.make_slab(size)
        try:
            self.register_new(None if error is None else str(error))
            if error is not None:  # and there is no group to tell
                raise error
        finally:
            del error  # a traceback would hold it, and it the traceback

    def freeze(self) -> None:
        """Ends growth for good: what no longer fits is ordinary memory. Collective.

        Segments that a group hasn't registered yet are registered first, if all of its ranks
        have them; after that nothing is.

        Raises:
            SymmetricMismatchError: a rank didn't come in time.
        """
        self._refuse_if_closed("freeze")
        self._refuse_if_asleep("freeze")
        try:
            self.register_common()
        finally:  # also if a rank didn't come, as those of other groups know nothing of it
            self.frozen = True
            self.heap.freeze(True)

    def stats(self) -> dict[str, Any]:
        """Bytes and counters of this rank's pool. Not collective.

        ``segments`` (of these ``slabs`` were reserved), ``bytes_reserved``, ``bytes_used``,
        ``bytes_free``, ``largest_free``, ``windows`` (per group), ``fallbacks`` (allocations that
        became ordinary memory, by reason), ``captures`` (pools of captured graphs that live), and
        the heap's counters.
        """
        captures = self.routing.num_captures()
        heap = self.heap.stats()
        for name in COUNTERS:  # the heap is the process's, and counts on
            heap[name] -= self._at_start[name]
        reason = "frozen: no room in the reserved segments"
        ordinary = heap["ordinary_allocations"]
        return {
            **heap,
            "bytes_free": heap["bytes_reserved"] - heap["bytes_used"],
            "windows": {windows.member.name: windows.num_windows for windows in self._groups},
            "fallbacks": {reason: ordinary} if ordinary else {},
            "captures": captures,
            "frozen": self.frozen,
            "asleep": self.asleep,
        }

    def sleep(self) -> NoReturn:
        """Refuses: see `distcomm.sleep`, whose argument `symmetric` says so explicitly.

        Raises:
            SymmetricMemoryError: always.
        """
        raise SymmetricMemoryError(
            "sleep: symmetric segments don't sleep by themselves: communicators hold windows of "
            "them, and captured CUDA graphs their addresses on all ranks. distcomm.sleep("
            "symmetric=True) on every rank ends the windows, and wake_up() registers them again; "
            f"their content is lost ({self.device})"
        )

    # ---- for the state and its groups -------------------------------------------------------

    def make_slab(self, num_bytes: int) -> SymmetricOutOfMemoryError | None:
        """Reserves memory on this rank alone, unregistered; the error if that fails."""
        self.heap.settle()
        self.heap.trim()
        if self.heap.reserve(num_bytes):
            self._warn_if_not_mapped()
            return None
        failure = self.heap.take_failure()
        return None if failure is None else self.out_of_memory("reserve", failure)

    def make_initial_slab(self, num_bytes: int) -> tuple[int | None, str | None]:
        """`make_slab` for a layout: the slab's number, or what is in the way."""
        if self.frozen:
            return None, "no symmetric memory can be reserved: freeze() is for good"
        ordinal = self.heap.next_ordinal()
        failure = self.make_slab(num_bytes)
        return (ordinal, None) if failure is None else (None, str(failure))

    def drop_slab(self, ordinal: int) -> None:
        """Gives a slab back that not all ranks have, or that isn't registered on all. Local."""
        self.heap.abandon(0, [ordinal])

    def register_common(self, payload: Any = None) -> dict[GroupWindows, list[Any]]:
        """`GroupWindows.register_common` with every group; the payloads by group. Collective."""
        self._warn_if_not_mapped()
        for windows in self._groups:
            windows.count_common()
        return {windows: windows.register_common(payload) for windows in self._groups}

    def register_new(self, failure: str | None = None) -> None:
        """`GroupWindows.register_new` with every group. Collective."""
        for windows in self._groups:
            windows.register_new(failure)

    def settle(self, num_ranks: int) -> None:
        """Registers what is pending, and gives back what captures whose graphs are gone have used.

        Collective among all ranks of the job, which give back the same. Where some have renewed
        their pools after an error, all do. While the memory is asleep, nothing is done.

        Args:
            num_ranks: how many there are.
        """
        if self.asleep:
            return
        alive, num_captured = self.routing.captured()
        generation = self.routing.generation
        mine = {"alive": alive, "captured": num_captured, "generation": generation}
        reports: list[Any] = [mine]
        if not self.frozen:
            told = self.register_common(mine).values()
            reports = next((each for each in told if len(each) == num_ranks), reports)
        else:
            for windows in self._groups:
                if windows.comm.world_size == num_ranks:
                    windows.count_common()
                    reports = windows.exchange(mine)
                    break
        anywhere = {number for report in reports for number in report["alive"]}
        generations = {report["generation"] for report in reports}
        if len(generations) > 1:  # some have given up segments, and what torch has cached there
            self.routing.renew(max(generations) + 1)
        self.routing.drop_captured(anywhere, max(report["captured"] for report in reports))
        self.heap.settle()

    @property
    def why_awake(self) -> str | None:
        """Why the memory can't sleep now; None if it can. Local."""
        return self.routing.why_in_use or self.heap.why_awake()

    def fall_asleep(self) -> tuple[int, str | None]:
        """Gives the segments' memory back; nothing may use it, and no group has windows. Local.

        Returns:
            How many bytes, and why not all.
        """
        self.heap.settle()
        num_bytes, failure = self.heap.fall_asleep()
        self.asleep = True
        return num_bytes, None if failure is None else f"{failure.text} ({self.device})"

    def wake_up(self) -> tuple[int, str | None]:
        """Takes memory for all segments again, its content undefined. Local.

        Returns:
            How many bytes, and why none.
        """
        num_bytes, failure = self.heap.wake_up()
        if failure is not None:
            missing = f"{failure.num_bytes} bytes of symmetric memory"
            return 0, f"{missing}: {failure.text} ({self.device})"
        self.asleep = False
        return num_bytes, None

    def add_group(self, windows: GroupWindows) -> None:
        """`reserve` and `freeze` register with this communicator too, after those added before."""
        self._groups.append(windows)

    def remove_group(self, windows: GroupWindows) -> None:
        """Undoes `add_group`. Idempotent."""
        if windows in self._groups:
            self._groups.remove(windows)

    def cut_signal_page(self, num_bytes: int = 0) -> None:
        """Keeps memory for the signals and mailboxes of groups to come. What others have taken
        of an earlier page stays theirs.

        To be called on all ranks alike. Groups of some ranks only then take theirs from it, and
        leave the others' memory where it is.
        """
        size = max(_SIGNAL_PAGE_BYTES, num_bytes)
        page = self.heap.alloc(size)
        if page:
            self._signal_pages.append(page)
            self.signal_page_bytes = size
            self.signal_claims = []
        else:
            self.heap.take_failure()

    def claim_signals(self, start: int, num_bytes: int) -> int:
        """The address of memory for a group's signals.

        Args:
            start: where in the page: where no rank of the group has a claim.
        """
        self.signal_claims.append((start, start + num_bytes))
        return self._signal_pages[-1] + start

    def release_signals(self, address: int) -> None:
        """Undoes `claim_signals`. Nothing may use that memory any more, on any rank."""
        start = address - self._signal_pages[-1]
        self.signal_claims = [claim for claim in self.signal_claims if claim[0] != start]

    @property
    def overflowed(self) -> bool:
        """Whether the pool, frozen, has given out ordinary memory."""
        return self.frozen and self.heap.num_ordinary() > self._at_start["ordinary_allocations"]

    def contains(self, address: int) -> bool:
        """Whether an address lies in a segment, whoever has a window of it."""
        return self.heap.find(0, address) is not None

    def out_of_memory(self, what: str, failure: AllocationFailure) -> SymmetricOutOfMemoryError:
        """The error for a failed allocation."""
        return SymmetricOutOfMemoryError(f"{what} on {self.device}", failure, self.heap.stats())

    def warn_if_overflowed(self) -> None:
        """Logs once that the pool, frozen, has given out ordinary memory."""
        if not self._warned_frozen and self.overflowed:
            self._warned_frozen = True
            logger.warning(
                "the frozen symmetric pool is full: further tensors are ordinary memory (%s)",
                self.device,
            )

    def close(self) -> None:
        """Gives back all memory that no tensor uses; the rest follows when its tensors go.

        Communicators must have been closed before. Idempotent; local.
        """
        if self._closed:
            return
        self._closed = True
        self.routing.close()
        for page in self._signal_pages:
            self.heap.free(page)
        self.heap.freeze(False)
        self.heap.defer_frees(False)  # what outlives the pool goes back at once
        self.heap.retire_all()

    def shut_down(self) -> None:
        """The process ends without `close`: what is freed from now on stays as it is."""
        self.heap.shut_down()

    # ---- inside -----------------------------------------------------------------------------

    def _warn_if_not_mapped(self) -> None:
        """Logs once that memory lies where NCCL has put it."""
        before = self._at_start["not_mapped"]
        if self._warned_not_mapped or self.heap.stats()["not_mapped"] == before:
            return
        self._warned_not_mapped = True
        logger.warning(
            "symmetric memory could not be mapped at rising addresses: ranks whose segments lie in "
            "another order can't use new ones (%s)",
            self.device,
        )

    def _refuse_if_asleep(self, call: str) -> None:
        if self.asleep:
            raise SymmetricMemoryError(f"{call}: {ASLEEP}: wake_up() first ({self.device})")

    def _refuse_if_closed(self, call: str) -> None:
        if self._closed:
            raise DistcommError(f"{call}: the symmetric pool is closed ({self.device})")
