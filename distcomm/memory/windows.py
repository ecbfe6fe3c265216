"""The windows that one communicator has of the heap's segments: registered by all ranks or none."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from ..errors import GroupMember, NcclError, SymmetricMemoryError, SymmetricMismatchError
from ..meeting import absent_ranks, meet
from ..nccl import PyNcclCommunicator
from .alloc_conf import expandable_segments_off
from .peer_memory import PeerMemory
from .reports import Report, SegmentOrder, odd_ones, segment_set, unusual
from .segment_heap import HeapLocation, Segment, SegmentHeap

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

__all__ = ["ASLEEP", "GroupWindows", "meet_members"]

logger = logging.getLogger(__name__)

ASLEEP = "the symmetric memory is asleep"
"""Why there are no windows between `sleep` and `wake_up`."""

_CALL = "registering symmetric memory"
_LOOK_S = 1.0


def meet_members(
    call: str, store: Store, key: str, member: GroupMember, report: Any, timeout_s: float
) -> list[Any | None]:
    """`meeting.meet` of a group's members; the error of a lost store names the call and group."""
    try:
        return meet(store, key, member.rank_in_group, member.world_size, report, timeout_s)
    except RuntimeError as error:
        raise SymmetricMemoryError(
            f"{call}: the job's store can't be reached: {error} [{member}]"
        ) from error


class GroupWindows:
    """One communicator's share in the symmetric heap.

    Args:
        heap: the segments.
        comm: the communicator.
        store: where its ranks meet; private to this communicator.
        timeout_s: seconds that each meeting, and each registration, may take.
        on_give_up: called when segments were given up, so that nobody allocates there.

    Attributes:
        unsupported: why this communicator has no windows; None while it can have. The same on
            all ranks.
        peers: the other ranks' memory; None until something was registered.
    """

    def __init__(
        self,
        heap: SegmentHeap,
        comm: PyNcclCommunicator,
        store: Store,
        timeout_s: float,
        on_give_up: Callable[[], None],
    ) -> None:
        self.comm = comm
        self.unsupported: str | None = None
        self.peers: PeerMemory | None = None
        self._heap = heap
        self._store = store
        self._timeout_s = timeout_s
        self._on_give_up = on_give_up
        self._number = 0  # of the latest registration of new segments
        self._num_common = 0  # of register_common
        self._key = ""  # of the meetings of the registration under way
        self._stuck = False
        self._lock = threading.Lock()  # one registration at a time
        self._order = SegmentOrder(self.find)
        self._count_new = heap.counter_of_new(comm.handle)
        comm.on_close(self._forget)

    @property
    def member(self) -> GroupMember:
        return self.comm.member

    @property
    def num_new(self) -> int:
        """How many segments have not been registered yet. Costs a lock and a compare."""
        return 0 if self.unsupported is not None else self._count_new()

    @property
    def num_windows(self) -> int:
        return self._heap.num_windows(self.comm.handle)

    def register_new(self, failure: str | None = None) -> None:
        """Registers every new segment with the communicator. Collective if any rank has one.

        Without new segments on this rank, and without a failure, it returns at once. Otherwise
        the ranks first compare what they have; NCCL is called only if all have the same.

        Args:
            failure: why this rank can't take part; the others are told.

        Raises:
            SymmetricMismatchError: the ranks differ, one failed or didn't come in time; raised on
                every rank that came, also late. Nothing is registered then. Segments that not all
                ranks are known to have are given up: what lies in them is ordinary memory for this
                group, and nothing new is put there.
            SymmetricMemoryError: during a capture, which allows no registration.
        """
        if self.unsupported is not None or (failure is None and not self._count_new()):
            return
        with self._lock, self._heap.pinned_new(self.comm.handle) as segments:
            if self.comm.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                raise self._not_in_a_capture(segments)
            if segments or failure is not None:
                self._agree(segments, failure)
                self._register(segments)

    def count_common(self) -> None:
        """To be called before `register_common` or `exchange`, and before anything that may fail:
        ranks meet there by the number of the call."""
        self._num_common += 1

    def register_common(self, payload: Any = None) -> list[Any]:
        """Registers the new segments that all ranks have, and passes over the others. Collective.

        For calls in which ranks meet anyway: ranks may have made segments with other groups that
        this one's other members know nothing of.

        Args:
            payload: a JSON value to tell the others.

        Returns:
            All ranks' payloads.

        Raises:
            SymmetricMismatchError: a rank didn't come in time, NCCL failed on one, or the ranks'
                segments lie in different orders.
        """
        if self.unsupported is not None:
            return [payload]
        with self._lock, self._heap.pinned_new(self.comm.handle) as segments:
            reports = self._met(self._report(segments, None, payload))
            common = set.intersection(*(segment_set(report) for report in reports))
            others = [s.ordinal for s in segments if (s.ordinal, s.num_bytes) not in common]
            self._heap.pass_over(self.comm.handle, others)
            self._check_order(reports, common)
            self._register([s for s in segments if s.ordinal not in others])
            return [report["payload"] for report in reports]

    def exchange(self, payload: Any) -> list[Any]:
        """All ranks' payloads, as `register_common`, which registers nothing. Collective."""
        with self._lock:
            return [report["payload"] for report in self._met(self._report([], None, payload))]

    def fall_asleep(self) -> str | None:
        """Ends all windows, for as long as their memory is away; or says what is in the way.

        Local. Nobody may be using them, on any rank.
        """
        if self.unsupported is not None:
            return None
        self.unsupported = ASLEEP
        release = partial(self._heap.release_comm, self.comm.handle)
        try:
            code = self.comm.run_bounded(release, self._timeout_s, "ncclCommWindowDeregister")
        except TimeoutError as error:
            return f"{error} [{self.member}]"
        return f"ncclCommWindowDeregister returned {code} [{self.member}]" if code else None

    def wake_up(self) -> None:
        """Has windows of what all ranks have again. Collective; nothing if it wasn't asleep.

        Raises:
            SymmetricMismatchError: as `register_common`.
        """
        if self.unsupported == ASLEEP:
            self.unsupported = None
            self.count_common()
            self.register_common()

    def find(self, address: int) -> HeapLocation | None:
        """Where an address lies in the heap; None if in no segment."""
        return self._heap.find(self.comm.handle, address)

    def is_symmetric(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor's memory is all in a window of this communicator. Local.

        True says that NCCL was given the window, not that all ranks have the tensor at the same
        offset of theirs.
        """
        if self.unsupported or tensor.device != self.comm.device or not tensor.numel():
            return False
        found = self.find(tensor.data_ptr())
        return found is not None and found.window != 0

    def peer_addresses(self, address: int) -> list[int | None] | None:
        """The same byte on every rank, None where it is out of reach; None if in no window."""
        place = self.find(address)
        if place is None or not place.window:
            return None
        if self.peers is None:  # not probed yet, for want of room
            return [None] * self.comm.world_size
        return self.peers.addresses(place)

    # ---- agreement --------------------------------------------------------------------------

    def _report(
        self, segments: Sequence[Segment], failure: str | None, payload: Any = None
    ) -> Report:
        return {
            "segments": [[segment.ordinal, segment.num_bytes] for segment in segments],
            "order": self._order.with_new(segments),
            "failure": failure,
            "next": self._heap.next_ordinal(),
            "number": self._number,
            "payload": payload,
        }

    def _agree(self, segments: Sequence[Segment], failure: str | None) -> None:
        """Passes if all ranks came, none failed, and all have the same."""
        self._number += 1
        reports = self._meet_by_number(segments, failure)
        # Decided without this rank: it is late, or the others have met for something else.
        while reports[self.member.rank_in_group] is None and self._others_went_on():
            reports = self._meet_by_number(segments, failure)
        present = self._level(reports)
        odd = odd_ones(reports)
        if not odd:
            self._check_order(present, segment_set(present[0]))
            return
        common: set[tuple[int, int]] = set()
        if len(present) == len(reports):
            common = set.intersection(*(segment_set(report) for report in present))
        self._give_up([s.ordinal for s in segments if (s.ordinal, s.num_bytes) not in common])
        texts = [self._described(report) for report in reports]
        raise self._mismatch("the ranks' new segments differ", texts, odd)

    def _check_order(self, reports: Sequence[Report], new: Collection[tuple[int, int]]) -> None:
        """Passes if all ranks have their segments in the same order.

        torch chooses between free blocks of one size by address, so that ranks with another order
        would put their tensors at different places.
        """
        common = set.intersection(*(set(report["order"]) for report in reports))
        orders = [[each for each in report["order"] if each in common] for report in reports]
        odd = unusual(orders)
        if odd:
            self._give_up([ordinal for ordinal, _ in new])
            texts = [f"segments by address: {', '.join(f'#{o}' for o in each)}" for each in orders]
            problem = "the ranks' segments lie in different orders (reserve enough at the start)"
            raise self._mismatch(problem, texts, odd)

    def _met(self, report: Report) -> list[Report]:
        """All ranks' reports, if all came."""
        self._key = f"common/{self._num_common}"
        reports = self._meet("before", report)
        present = self._level(reports)
        if len(present) < len(reports):
            texts = [self._described(each) for each in reports]
            raise self._mismatch("not all ranks came", texts, absent_ranks(reports))
        self._number = max(each["number"] for each in present)
        return present

    def _meet_by_number(
        self, segments: Sequence[Segment], failure: str | None
    ) -> list[Report | None]:
        self._key = f"new/{self._number}"
        self._store.set(f"latest/{self.member.rank_in_group}", str(self._number))
        return self._meet("before", self._report(segments, failure))

    def _others_went_on(self) -> bool:
        """Whether other ranks have begun a later registration, which this one then takes for its.

        That is so when they have met before without this rank, which had nothing new then. They
        may come a little later than this rank, so it waits for them a while.
        """
        deadline = time.monotonic() + min(_LOOK_S, self._timeout_s / 2)
        others = [f"latest/{rank}" for rank in range(self.member.world_size)]
        while True:
            begun = [int(self._store.get(key)) for key in others if self._store.check([key])]
            if max(begun) > self._number:
                self._number = max(begun)
                return True
            if time.monotonic() > deadline:
                return False
            time.sleep(_LOOK_S / 20)

    def _level(self, reports: Sequence[Any | None]) -> list[Report]:
        """The reports of those that came, from whom the next segment gets the same number."""
        present = [report for report in reports if report is not None]
        self._heap.raise_ordinal(max(report["next"] for report in present))
        return present

    def _meet(self, stage: str, report: Any) -> list[Any | None]:
        key = f"{self._key}/{stage}"
        return meet_members(_CALL, self._store, key, self.member, report, self._timeout_s)

    def _not_in_a_capture(self, segments: Sequence[Segment]) -> SymmetricMemoryError:
        missing = sum(segment.num_bytes for segment in segments)
        return SymmetricMemoryError(
            f"{len(segments)} segments with {missing} bytes are not registered with this "
            "communicator, and can't be during a capture: enter and leave symmetric_memory() of "
            f"this group once before the capture, or reserve {missing} bytes at the start "
            f"[{self.member}]"
        )

    # ---- registration -----------------------------------------------------------------------

    def _register(self, segments: Sequence[Segment]) -> None:
        """Registers segments that all ranks have, and agrees on how that went."""
        if not segments:
            return
        null_windows, failure = self._call_nccl(segments[-1].ordinal)
        report = {"failure": failure, "null": null_windows, "stuck": self._stuck}
        self._conclude(self._meet("after", report), segments)
        self._order.add(segments)
        expandable_segments_off.refresh()  # the pool has grown
        if self.unsupported is not None or self.comm.device.type != "cuda":
            return
        if self.peers is None:
            peers = PeerMemory(self._heap, self.comm, self._meet, self._timeout_s)
            self.peers = None if peers.found_no_room else peers
        for segment in segments:
            place = self.find(segment.address)
            if place is not None and self.peers is not None:
                self.peers.learn(place)

    def _call_nccl(self, through: int) -> tuple[int, str | None]:
        """For how many segments NCCL gave no window, and what went wrong."""
        comm, heap = self.comm, self._heap

        def register() -> tuple[int, str | None]:
            code, null_windows = heap.register_new(comm.handle, through)
            failure = heap.take_failure() if code else None
            return null_windows, None if failure is None else failure.text

        try:
            return comm.run_bounded(register, self._timeout_s, "ncclCommWindowRegister")
        except TimeoutError as error:
            self._stuck = True
            heap.cancel_registration(comm.handle)
            comm.give_up()
            return 0, str(error)

    def _conclude(self, reports: Sequence[Any | None], segments: Sequence[Segment]) -> None:
        """All ranks draw the same conclusion from how the registration went on each."""
        odd = [
            index
            for index, report in enumerate(reports)
            if report is None or report["failure"] is not None
        ]
        if odd:
            self._give_up([segment.ordinal for segment in segments])
            if any(report is not None and report["stuck"] for report in reports):
                self.unsupported = "a registration got stuck"
            texts = [
                self._absence() if report is None else report["failure"] or "registered"
                for report in reports
            ]
            raise self._mismatch("NCCL didn't register on all ranks", texts, odd)
        if any(report["null"] for report in reports if report is not None):
            self.unsupported = f"NCCL {self.comm.nccl.version_text} gives no windows here"
            self._heap.release_comm(self.comm.handle)
            logger.warning("symmetric memory is off: %s [%s]", self.unsupported, self.member)

    def _give_up(self, ordinals: Sequence[int]) -> None:
        """On all ranks alike, also on one that has none of them: it would go on allocating from
        what torch has cached, where the others don't."""
        self._heap.abandon(self.comm.handle, ordinals)
        self._on_give_up()

    def _mismatch(
        self, problem: str, texts: Sequence[str], odd: Sequence[int]
    ) -> SymmetricMismatchError:
        ranks = self.member.ranks
        return SymmetricMismatchError(
            _CALL,
            problem,
            dict(zip(ranks, texts, strict=True)),
            [ranks[index] for index in odd],
            member=self.member,
        )

    def _described(self, report: Report | None) -> str:
        if report is None:
            return self._absence()
        if report["failure"] is not None:
            return str(report["failure"])
        if not report["segments"]:
            return "no new segment"
        segments = ", ".join(f"#{ordinal}: {size} bytes" for ordinal, size in report["segments"])
        return f"new segments {segments}"

    def _absence(self) -> str:
        return f"did not come within {self._timeout_s:g} s"

    def _forget(self, comm: int, orderly: bool) -> None:
        """Called before the communicator is freed; ends its windows if its work has ended."""
        self.unsupported = "the group is closed"
        code = self._heap.release_comm(comm, deregister=orderly)
        if code:
            error = NcclError("ncclCommWindowDeregister", code, "on closing", member=self.member)
            logger.warning("close: %s", error)
