"""How the ranks of a group write into each other's memory in step: flags, addresses, order."""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from ..errors import ArgumentError, PeerCopyError, SymmetricMemoryError
from .cuda_capture import CaptureWatch
from .peer_copy import PeerCopies, PushedRows, RowRuns
from .peer_memory import copy_bounded
from .segment_heap import HeapLocation
from .symmetric_context import SuspendedContext
from .symmetric_pool import SymmetricPool
from .windows import GroupWindows

__all__ = ["PeerChannel"]

logger = logging.getLogger(__name__)

_CALL = "peer_channel"
_SIGNAL_ALIGNMENT = 128
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
        timeout_s: bound of the wait for the GPU.

    Attributes:
        problem: why the channel can't be used; None if it can. After an error that leaves the
            signals astray, on this rank alone.
        can_copy: whether all ranks' drivers have what `push` takes.
        kernel_signals: the address of every rank's signals for kernels, as this rank reaches it:
            int64 [W], on the device.
        deltas: from this rank's `alias` of a byte to the same byte of every rank.
        deltas_table: the same on the device, int64 [W].

    Raises:
        SymmetricMismatchError: a rank didn't come in time.
        SymmetricMemoryError: during a capture, where no rank may wait for another one.
    """

    def __init__(
        self, pool: SymmetricPool, windows: GroupWindows, num_kernel_bytes: int, timeout_s: float
    ) -> None:
        self._windows = windows
        self._device = pool.device
        self._native = windows.comm.native
        self._watch = CaptureWatch(self._native)
        self._rank = windows.member.rank_in_group
        self._shifts: dict[int, int] = {}  # from a segment's address to its alias, by ordinal
        self._timeout_s = timeout_s
        # By CUDA graph capture, 0 for none: the stream and the end of the latest block.
        self._last: dict[int, tuple[torch.cuda.Stream, torch.cuda.Event]] = {}
        with torch.cuda.device(self._device):
            if torch.cuda.is_current_stream_capturing():
                raise SymmetricMemoryError(
                    f"{_CALL}: a group's first write to its peers' memory can't be captured: make "
                    f"the call once before the capture [{windows.member}]"
                )
            self._open(pool, num_kernel_bytes)

    def _open(self, pool: SymmetricPool, num_kernel_bytes: int) -> None:
        self.deltas: list[int] = []
        self._signals: list[int] = []
        # Those of the copy engines come first.
        member = self._windows.member
        initial = PeerCopies.initial_signals(member.world_size)
        gap = -len(initial) % _SIGNAL_ALIGNMENT
        initial += bytes(gap + num_kernel_bytes)
        self._initial = initial
        self.can_copy = False
        self._area = pool.take_signals(len(initial))
        self.problem = self._connected()
        if self.problem is None:
            self._copies = PeerCopies(self._native, self._rank, self._signals)
            self._own_stream = torch.cuda.Stream(self._device)
            at = len(initial) - num_kernel_bytes
            with SuspendedContext(pool):  # these are no tensors that all ranks' callers make
                self.kernel_signals = self._on_device([each + at for each in self._signals])
                self.deltas_table = self._on_device(self.deltas)
        else:
            logger.warning("no direct writes to peers: %s [%s]", self.problem, member)

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

    def addresses(self, address: int) -> list[int]:
        """The same byte of symmetric memory on every rank; this rank's own is `address` itself."""
        alias = self.alias(address)
        addresses = [alias + delta for delta in self.deltas]
        addresses[self._rank] = address
        return addresses

    @contextmanager
    def in_order(self) -> Iterator[torch.cuda.Stream]:
        """What the current stream is given in the block comes after what earlier blocks gave.

        Gives the stream, of the current device, which must be the group's.

        Signals are in use from the beginning to the end of a block's work. That holds for eager
        calls, and within one CUDA graph; a replay has to be ordered by whoever replays.
        """
        stream = torch.cuda.current_stream(self._device.index)
        capture = self._watch.capture_id(stream.cuda_stream)
        self._last = {key: last for key, last in self._last.items() if key in (0, capture)}
        last_stream, done = self._last.get(capture) or (stream, torch.cuda.Event())
        if last_stream != stream:
            stream.wait_event(done)
        try:
            yield stream
        finally:  # also after an error, as a part may have been enqueued
            done.record(stream)
            self._last[capture] = (stream, done)

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
        """Whether this rank's signals are as at first, as they are between calls. Waits."""
        raw = ctypes.create_string_buffer(len(self._initial))
        with torch.cuda.device(self._device):
            code = self._native.functions.distcomm_read_device(raw, self._area, len(raw))
        return code == 0 and raw.raw == self._initial

    # ---- inside -----------------------------------------------------------------------------

    def _connected(self) -> str | None:
        """Fills `_signals` and `deltas`; or what is in the way, the same on all ranks."""
        windows = self._windows
        windows.count_common()
        windows.register_common()  # the signal area may have needed a new segment
        place, problem = self._prepared()
        where = None if place is None else [place.ordinal, place.offset]
        can_copy = bool(self._native.functions.distcomm_can_push())
        windows.count_common()
        everyone = windows.exchange({"place": where, "problem": problem, "can_copy": can_copy})
        self.can_copy = all(each["can_copy"] for each in everyone)
        problem = _first_problem(everyone)
        if problem is None and place is not None:
            problem = self._find_signals(place, [each["place"] for each in everyone])
        windows.count_common()
        return _first_problem(windows.exchange({"problem": problem}))

    def _prepared(self) -> tuple[HeapLocation | None, str | None]:
        place = self._windows.find(self._area) if self._area else None
        if place is None or not place.window:
            return None, "no room for signals in the symmetric pool"
        try:
            raw = torch.frombuffer(bytearray(self._initial), dtype=torch.uint8)
            source = raw.pin_memory().to(self._device, non_blocking=True)
            copies = [(self._area, source.data_ptr(), source.numel())]
            copy_bounded(self._native, self._device, copies, self._timeout_s)
        except RuntimeError as error:  # torch's, too: the others are told
            return place, str(error)
        return place, None

    def _find_signals(self, place: HeapLocation, places: list[list[int]]) -> str | None:
        """Offsets may differ, as what the ranks have done before; the segment must be the same."""
        if any(ordinal != place.ordinal for ordinal, _ in places):
            return "the ranks' signal areas are in different segments"
        own = self._windows.peer_addresses(self._area) or []
        if not own or None in own:
            return "not every rank is within reach of every other one"
        self.deltas = self._spacing(own)
        for rank, (_, offset) in enumerate(places):
            alias = (own[self._rank] or 0) - place.offset + offset
            self._signals.append(alias + self.deltas[rank] if rank != self._rank else self._area)
        return None

    def _spacing(self, addresses: Sequence[int | None]) -> list[int]:
        """From this rank's alias to every rank's address; a rank out of reach gives no distance."""
        own = addresses[self._rank] or 0
        return [-1 if each is None else each - own for each in addresses]

    def _on_device(self, values: list[int]) -> torch.Tensor:
        table = torch.tensor(values, dtype=torch.int64, device="cpu").pin_memory()
        return table.to(self._device, non_blocking=True)


def _first_problem(reports: list[Any]) -> str | None:
    return next((each["problem"] for each in reports if each["problem"] is not None), None)
