"""How the ranks of a group write into each other's memory in step: flags, mailboxes, order."""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch

from ..errors import ArgumentError, PeerCopyError, SymmetricMemoryError
from .cuda_capture import CaptureWatch
from .peer_copy import PeerCopies, PushedRows, RowRuns
from .peer_memory import copy_bounded
from .segment_heap import HeapLocation
from .symmetric_context import SuspendedContext
from .symmetric_pool import SymmetricPool
from .windows import ASLEEP, GroupWindows

__all__ = ["PeerChannel"]

logger = logging.getLogger(__name__)

_CALL = "peer_channel"
_SIGNAL_ALIGNMENT = 128
_MAILBOX_ALIGNMENT = 4096
# A copy within the GPU of that size takes some 10 µs, more than what another stream costs.
_LEAST_OWN_BYTES = 8 << 20


class PeerChannel:
    """One group's signal areas, and the addresses of its symmetric tensors on every rank.

    Construction is collective. Either every rank can reach every other one, or `problem` says why
    there is no channel, the same on all ranks.

    Args:
        pool: the process's.
        windows: of the group.
        num_kernel_bytes: size of the signals for kernels, zeros at first; the same on all ranks.
        num_mailbox_bytes: size of the mailbox for kernels, all bits set at first; likewise.
        timeout_s: bound of the wait for the GPU.

    Attributes:
        problem: why the channel can't be used; None if it can. After an error that leaves the
            signals astray, on this rank alone.
        can_copy: whether all ranks' drivers have what `push` takes.
        kernel_signals: the address of every rank's signals for kernels, as this rank reaches it:
            int64 [W], on the device.
        deltas: from this rank's `alias` of a byte to the same byte of every rank.
        deltas_table: the same on the device, int64 [W].
        stride: from one rank's to the next one's; 0 if that differs between ranks.
        mailboxes: the address of rank 0's mailbox as this rank reaches it; the others' are
            `stride` apart. 0 if there is no room for mailboxes, or no stride.

    Raises:
        SymmetricMismatchError: a rank didn't come in time.
        SymmetricMemoryError: during a capture, where no rank may wait for another one.
    """

    deltas: list[int]
    deltas_table: torch.Tensor
    kernel_signals: torch.Tensor
    problem: str | None

    def __init__(
        self,
        pool: SymmetricPool,
        windows: GroupWindows,
        *,
        num_kernel_bytes: int,
        num_mailbox_bytes: int,
        timeout_s: float,
    ) -> None:
        self._windows = windows
        self._pool = pool
        self._device = pool.device
        self._native = windows.comm.native
        self._watch = CaptureWatch(self._native)
        self._rank = windows.member.rank_in_group
        self._shifts: dict[int, int] = {}  # from a segment's address to its alias, by ordinal
        self._timeout_s = timeout_s
        # By CUDA graph capture, 0 for none: the latest stream, and where its part ends; None for
        # wherever it is when another stream follows.
        self._last: dict[int, tuple[torch.cuda.Stream, torch.cuda.Event | None]] = {}
        self._followed: tuple[int, int] | None = None
        with torch.cuda.device(self._device):
            if torch.cuda.is_current_stream_capturing():
                raise SymmetricMemoryError(
                    f"{_CALL}: a group's first write to its peers' memory can't be captured: make "
                    f"the call once before the capture [{windows.member}]"
                )
            self._open(num_kernel_bytes, num_mailbox_bytes)

    def _open(self, num_kernel_bytes: int, num_mailbox_bytes: int) -> None:
        # Those of the copy engines come first.
        member = self._windows.member
        initial = PeerCopies.initial_signals(member.world_size)
        initial += bytes(-len(initial) % _SIGNAL_ALIGNMENT)
        kernel_at = len(initial)
        initial += bytes(num_kernel_bytes + -(kernel_at + num_kernel_bytes) % _MAILBOX_ALIGNMENT)
        self._initial = initial
        self._kernel_at = kernel_at
        self._num_mailbox_bytes = num_mailbox_bytes
        self._area = 0
        try:
            self._connect(self._claimed())
        except BaseException:  # nobody would have the channel, to release what it has claimed
            self.release_signals()
            raise
        self._worked = self.problem is None

    def pause(self) -> None:
        """The memory of its signals is about to go, with all windows. Local.

        One that never worked, as on all ranks, keeps saying why.
        """
        if self._worked:
            self.problem = ASLEEP

    def reopen(self) -> None:
        """After `pause`, with memory and windows again: as at first. Collective.

        Raises:
            SymmetricMismatchError: a rank didn't come in time.
            SymmetricMemoryError: it worked at first, and doesn't now; mostly on all ranks.
        """
        if not self._worked:
            return
        with torch.cuda.device(self._device):
            self._connect(None)
        if self.problem is not None:
            raise SymmetricMemoryError(f"{_CALL}: {self.problem} [{self._windows.member}]")

    def release_signals(self) -> None:
        """Gives the memory of its signals back, for other groups. Local.

        The group is closed, and nothing of it under way any more, on any rank.
        """
        if self._area:
            self._pool.release_signals(self._area)
            self._area = 0

    def _connect(self, problem: str | None) -> None:
        """Fills all that depends on where NCCL maps the ranks' memory."""
        self.deltas = []
        self.stride = 0
        self.mailboxes = 0
        self.can_copy = False
        self._shifts.clear()
        self._last.clear()
        self._followed = None
        self.problem = self._connected() if problem is None else problem
        if self.problem is not None:
            logger.warning("no direct writes to peers: %s [%s]", self.problem, self._windows.member)
            return
        alias = self.alias(self._area)
        signals = [alias + delta for delta in self.deltas]
        if self.stride and self._num_mailbox_bytes:
            self.mailboxes = signals[0] + len(self._initial)
        signals[self._rank] = self._area
        self._copies = PeerCopies(self._native, self._rank, signals)
        self._own_stream = torch.cuda.Stream(self._device)
        with SuspendedContext(self._pool):  # these are no tensors that all ranks' callers make
            self.kernel_signals = self._on_device([each + self._kernel_at for each in signals])
            self.deltas_table = self._on_device(self.deltas)

    def alias(self, address: int) -> int:
        """This rank's symmetric memory where NCCL has mapped all ranks' evenly spaced.

        Rank p's byte at the same place is at ``alias(address) + deltas[p]``. Makes no CUDA call.

        Raises:
            ArgumentError: the address isn't symmetric for this group, or not within all ranks'
                reach.
        """
        place = self._windows.find(address)
        shift = None if place is None else self._shifts.get(place.ordinal)
        if place is None or shift is None:
            addresses = self._windows.peer_addresses(address)
            if place is None or addresses is None or self._spacing(addresses) != self.deltas:
                raise ArgumentError(
                    "address",
                    "symmetric for this group, and within reach of all ranks",
                    hex(address),
                    call=_CALL,
                    member=self._windows.member,
                )
            shift = self._shifts[place.ordinal] = (addresses[self._rank] or 0) - address
        return address + shift

    def is_within_reach(self, x: torch.Tensor) -> bool:
        """Whether `x` is symmetric for this group, so that `alias` has an address."""
        return self._windows.is_symmetric(x)

    def of_first_rank(self, address: int) -> int:
        """The same byte of symmetric memory on rank 0 of the group; raises as `alias`."""
        return self.alias(address) + self.deltas[0]

    def addresses(self, address: int) -> list[int]:
        """The same byte of symmetric memory on every rank; this rank's own is `address` itself."""
        alias = self.alias(address)
        addresses = [alias + delta for delta in self.deltas]
        addresses[self._rank] = address
        return addresses

    @contextmanager
    def in_order(self) -> Iterator[torch.cuda.Stream]:
        """What the current stream is given in the block comes after what earlier calls gave.

        Gives the stream, of the current device, which must be the group's.

        Signals are in use from the beginning to the end of a block's work. That holds for eager
        calls, and within one CUDA graph; a replay has to be ordered by whoever replays.
        """
        stream = torch.cuda.current_stream(self._device.index)
        capture = self._watch.capture_id(stream.cuda_stream)
        self._wait_for_last(stream, capture)
        self._followed = None
        try:
            yield stream
        finally:  # also after an error, as a part may have been enqueued
            self._last[capture] = (stream, stream.record_event())

    def follow(self) -> None:
        """What the current stream is given next comes after what earlier calls gave.

        As `in_order`, for calls that have no microsecond for an event: a call on another stream
        later waits for all that this one has been given by then.
        """
        raw_stream = torch._C._cuda_getCurrentRawStream(self._device.index)
        capture = 0
        if torch._C._cuda_isCurrentStreamCapturing():
            capture = self._watch.capture_id(raw_stream)
        if self._followed == (raw_stream, capture):
            return
        stream = torch.cuda.current_stream(self._device.index)
        self._wait_for_last(stream, capture)
        self._last[capture] = (stream, None)
        self._followed = (raw_stream, capture)

    def _wait_for_last(self, stream: torch.cuda.Stream, capture: int) -> None:
        if capture:
            self._pool.routing.note_capture(capture, stream.cuda_stream)
        self._last = {key: last for key, last in self._last.items() if key in (0, capture)}
        last_stream, done = self._last.get(capture, (stream, None))
        if last_stream == stream:
            return
        if done is None:
            # A stream that is captured now isn't to wait for: captures begin when all is done.
            if self._watch.capture_id(last_stream.cuda_stream) != capture:
                return
            done = last_stream.record_event()
        stream.wait_event(done)

    def spread(self, source: int, address: int, num_bytes: int) -> None:
        """Copies what is at `source` to one place of every rank's symmetric memory, one peer after
        another, by copy engines. On the current stream.

        Args:
            address: this rank's place, which may be `source`; else what this rank keeps is copied
                beside the rest.

        Raises:
            ArgumentError: as `alias`.
            PeerCopyError: the driver refused a copy. The channel is of no use any more.
        """
        stream = torch.cuda.current_stream(self._device.index)
        addresses = self.addresses(address)
        try:
            if source != address:
                self._own_stream.wait_stream(stream)
                self._copy(address, source, num_bytes, self._own_stream)
            for step in range(1, len(addresses)):  # ranks begin with different peers
                peer = (self._rank + step) % len(addresses)
                self._copy(addresses[peer], source, num_bytes, stream)
        finally:
            if source != address:
                stream.wait_stream(self._own_stream)

    def _copy(self, to: int, source: int, num_bytes: int, stream: torch.cuda.Stream) -> None:
        copy = self._native.functions.distcomm_copy_async
        code = copy(to, source, num_bytes, stream.cuda_stream) if num_bytes else 0
        if code:
            error = PeerCopyError(code, rank_in_group=self._rank, world_size=len(self.deltas))
            self.problem = f"an earlier call failed: {error}"
            raise error

    def push(self, tensors: Sequence[PushedRows], runs: RowRuns, stream: torch.cuda.Stream) -> None:
        """`PeerCopies.push` on a stream. Collective.

        What this rank keeps is copied on another stream beside it, where it is much.

        Raises:
            PeerCopyError: the driver refused a part. The channel is of no use any more.
        """
        num_own_bytes = runs.num_rows * sum(rows.row_bytes for rows in tensors)
        own = self._own_stream if num_own_bytes >= _LEAST_OWN_BYTES else stream
        if own != stream:
            own.wait_stream(stream)
        try:
            self._copies.push(tensors, runs, stream.cuda_stream, own.cuda_stream)
        except PeerCopyError as error:
            self.problem = f"an earlier call failed: {error}"
            raise
        finally:
            if own != stream:
                stream.wait_stream(own)

    def signals_are_at_rest(self) -> bool:
        """Whether this rank's signals and mailbox are as at first, as between calls. Waits."""
        initial = self._initial + b"\xff" * self._num_mailbox_bytes
        raw = ctypes.create_string_buffer(len(initial))
        with torch.cuda.device(self._device):
            code = self._native.functions.distcomm_read_device(raw, self._area, len(raw))
        return code == 0 and raw.raw == initial

    # ---- inside -----------------------------------------------------------------------------

    def _claimed(self) -> str | None:
        """Fills `_area`; or what is in the way, the same on all ranks."""
        pool, windows = self._pool, self._windows
        if not pool.signal_page_bytes:
            pool.cut_signal_page()
        windows.count_common()
        windows.register_common()  # the page may have needed a new segment
        windows.count_common()
        pages = windows.exchange([pool.signal_page_bytes, pool.signal_claims])
        room = min(size for size, _ in pages)
        claims = [claim for _, claims in pages for claim in claims]
        start = _first_gap(claims, len(self._initial) + self._num_mailbox_bytes, room)
        if start is None:
            self._num_mailbox_bytes = 0
            start = _first_gap(claims, len(self._initial), room)
        if start is None:
            return "no room for signals in the symmetric pool"
        self._area = pool.claim_signals(start, len(self._initial) + self._num_mailbox_bytes)
        return None

    def _connected(self) -> str | None:
        """Fills `deltas` and `stride`; or what is in the way, the same on all ranks."""
        windows = self._windows
        place, problem = self._prepared()
        where = None if place is None else [place.ordinal, place.offset]
        can_copy = bool(self._native.functions.distcomm_can_push())
        windows.count_common()
        everyone = windows.exchange({"place": where, "problem": problem, "can_copy": can_copy})
        self.can_copy = all(each["can_copy"] for each in everyone)
        problem = _first_problem(everyone)
        if problem is None:
            problem = self._find_peers([each["place"] for each in everyone])
        windows.count_common()
        everyone = windows.exchange({"problem": problem, "even": bool(self.stride)})
        if not all(each["even"] for each in everyone):
            self.stride = 0
        return _first_problem(everyone)

    def _prepared(self) -> tuple[HeapLocation | None, str | None]:
        """Writes what the area holds at first; where it is, or what is in the way."""
        place = self._windows.find(self._area)
        if place is None or not place.window:
            return None, "the signals' memory has no window"
        try:
            raw = torch.frombuffer(bytearray(self._initial), dtype=torch.uint8)
            signals = raw.pin_memory().to(self._device, non_blocking=True)
            fills = [(self._area + signals.numel(), 0xFF, self._num_mailbox_bytes)]
            copy_bounded(
                self._native,
                self._device,
                [(self._area, signals.data_ptr(), signals.numel())],
                self._timeout_s,
                fills if self._num_mailbox_bytes else (),
            )
        except RuntimeError as error:  # torch's, too: the others are told
            return place, str(error)
        return place, None

    def _find_peers(self, places: list[list[int]]) -> str | None:
        if any(place != places[0] for place in places):
            return "the ranks' signals are not at the same place of the symmetric pool"
        addresses = self._windows.peer_addresses(self._area) or []
        if not addresses or None in addresses:
            return "not every rank is within reach of every other one"
        self.deltas = self._spacing(addresses)
        steps = {after - before for before, after in pairwise(self.deltas)}
        self.stride = steps.pop() if len(steps) == 1 else 0
        return None

    def _spacing(self, addresses: Sequence[int | None]) -> list[int]:
        """From this rank's alias to every rank's address; a rank out of reach gives no distance."""
        own = addresses[self._rank] or 0
        return [-1 if each is None else each - own for each in addresses]

    def _on_device(self, values: list[int]) -> torch.Tensor:
        table = torch.tensor(values, dtype=torch.int64, device="cpu").pin_memory()
        return table.to(self._device, non_blocking=True)


def _first_gap(claims: Sequence[list[int]], num_bytes: int, room: int) -> int | None:
    """Where in a page of `room` bytes that many are free first; None if nowhere."""
    start = 0
    for begin, end in sorted(claims):
        if start + num_bytes <= begin:
            break
        start = max(start, end + -end % _MAILBOX_ALIGNMENT)
    return start if start + num_bytes <= room else None


def _first_problem(reports: list[Any]) -> str | None:
    return next((each["problem"] for each in reports if each["problem"] is not None), None)
