"""Where the buffers of collectives lie, compared between ranks.

NCCL's symmetric kernels take the same offset of the same window on every rank, and don't check.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ..errors import CaptureMismatchError, GroupMember, SymmetricMismatchError
from ..meeting import bring
from ..objects import ObjectChannel
from .reports import unusual
from .windows import GroupWindows, meet_members

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

__all__ = ["CaptureLog", "placement_check"]

logger = logging.getLogger(__name__)

Observer = Callable[[str, tuple[torch.Tensor, ...], bool], None]


def _record(
    windows: GroupWindows, group: str, op: str, tensors: Sequence[torch.Tensor], placed: bool
) -> list[Any]:
    """What has to be the same on all ranks about one call, as JSON values."""
    places: list[Any] = []
    for tensor in tensors:
        found = windows.find(tensor.data_ptr()) if placed and tensor.numel() else None
        known = found is not None and found.window
        places.append([found.ordinal, found.offset] if found is not None and known else None)
    sizes = [tensor.nbytes for tensor in tensors]
    parts = [_part_of(windows.member, index, places, sizes) for index in range(len(tensors))]
    return [
        op,
        group,
        *(
            [str(tensor.dtype).removeprefix("torch."), tensor.nbytes, place if of is None else of]
            for tensor, place, of in zip(tensors, places, parts, strict=True)
        ),
    ]


def _part_of(
    member: GroupMember, index: int, places: Sequence[Any], sizes: Sequence[int]
) -> int | None:
    """Of which other buffer a buffer is this rank's part, as in an all-gather in place."""
    place, size = places[index], sizes[index]
    for other, (whole, whole_size) in enumerate(zip(places, sizes, strict=True)):
        if (
            place is not None
            and whole is not None
            and whole_size == size * member.world_size > size
            and place == [whole[0], whole[1] + member.rank_in_group * size]
        ):
            return other
    return None


def _text(entry: Sequence[Any] | None) -> str:
    """An entry, as a person reads it."""
    if entry is None:
        return "nothing"
    op, group, *buffers = entry
    texts = [f"{dtype} {num_bytes} bytes {_place_text(at)}" for dtype, num_bytes, at in buffers]
    return f"{op} in '{group}'" + "".join(f", {text}" for text in texts)


def _place_text(place: Any) -> str:
    if place is None:
        return "in no window"
    if isinstance(place, int):
        return f"in place, this rank's part of buffer {place}"
    return f"at segment #{place[0]} offset {place[1]}"


def placement_check(windows: GroupWindows, group: str, channel: ObjectChannel) -> Observer:
    """An observer of collectives that compares their buffers between ranks before each call.

    It raises `SymmetricMismatchError` on every rank, naming those whose op, dtype, bytes, segment
    or offset differ. Each call costs a CPU collective: for debugging.
    """
    member = windows.member

    def check(op: str, tensors: tuple[torch.Tensor, ...], placed: bool) -> None:
        mine = _record(windows, group, op, tensors, placed)
        texts = [_text(each) for each in channel.all_gather(mine)]
        odd = unusual(texts)
        if odd:
            raise SymmetricMismatchError(
                op,
                "the ranks' buffers differ",
                dict(zip(member.ranks, texts, strict=True)),
                [member.ranks[index] for index in odd],
                member=member,
            )

    return check


class CaptureLog:
    """What one rank captures of a group's collectives, and whether the others captured the same.

    Args:
        windows: of the group.
        group: its name.
        store: where its ranks meet; a new prefix for each log.
        timeout_s: seconds to wait for the last rank.
    """

    def __init__(self, windows: GroupWindows, group: str, store: Store, timeout_s: float) -> None:
        self._windows = windows
        self._group = group
        self._store = store
        self._timeout_s = timeout_s
        self._entries: list[list[Any]] = []

    def observe(self, op: str, tensors: tuple[torch.Tensor, ...], placed: bool) -> None:
        """Notes a call that is being captured; others don't matter."""
        if torch.cuda.is_current_stream_capturing():
            self._entries.append(_record(self._windows, self._group, op, tensors, placed))

    def compare(self) -> None:
        """Passes if every rank captured the same. Collective.

        Raises:
            CaptureMismatchError: the ranks differ, one failed or didn't come; names the first
                call that differs. Raised on every rank that came here.
        """
        text = json.dumps(self._entries)
        digest = hashlib.sha256(text.encode()).hexdigest()
        report = {"digest": digest, "calls": len(self._entries), "failure": None}
        reports = self._meet("digest", report)
        texts = [self._described(each) for each in reports]
        unwell = [i for i, each in enumerate(reports) if each is None or each["failure"]]
        if unwell:
            self._raise("a rank's capture failed", texts, unwell)
        if len({each["digest"] for each in reports if each is not None}) > 1:
            self._raise_first_difference()

    def tell(self, failure: str) -> None:
        """Tells the others that this rank's capture has failed, and doesn't wait for them."""
        report = {"digest": "", "calls": len(self._entries), "failure": failure}
        try:
            bring(self._store, "digest", self._windows.member.rank_in_group, report)
        except RuntimeError as error:  # they will find this rank absent
            logger.warning("graph_capture: %s [%s]", error, self._windows.member)

    def _raise_first_difference(self) -> None:
        logs = [each or [] for each in self._meet("calls", self._entries)]
        for index in range(max(map(len, logs))):
            entries = [log[index] if index < len(log) else None for log in logs]
            if any(entry != entries[0] for entry in entries):
                texts = [_text(entry) for entry in entries]
                self._raise(f"captured call {index} differs", texts, unusual(texts))
        self._raise("the captures differ", [f"captured {len(log)} calls" for log in logs], [])

    def _described(self, report: dict[str, Any] | None) -> str:
        if report is None:
            return f"did not come within {self._timeout_s:g} s"
        return str(report["failure"] or f"captured {report['calls']} calls")

    def _meet(self, stage: str, report: Any) -> list[Any | None]:
        member = self._windows.member
        return meet_members("graph_capture", self._store, stage, member, report, self._timeout_s)

    def _raise(self, problem: str, texts: Sequence[str], odd: Sequence[int]) -> None:
        member = self._windows.member
        raise CaptureMismatchError(
            "graph_capture",
            problem,
            dict(zip(member.ranks, texts, strict=True)),
            [member.ranks[index] for index in odd],
            member=member,
        )
