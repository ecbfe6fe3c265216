"""What ranks tell each other of their segments, and who differs from the rest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from .segment_heap import HeapLocation, Segment

__all__ = ["Report", "SegmentOrder", "odd_ones", "segment_set", "unusual"]

Report = dict[str, Any]


class SegmentOrder:
    """The order in which a communicator's segments lie in this rank's address space.

    Args:
        find: where an address lies; None if in no segment.
    """

    def __init__(self, find: Callable[[int], HeapLocation | None]) -> None:
        self._find = find
        self._addresses: dict[int, int] = {}  # by ordinal

    def add(self, segments: Sequence[Segment]) -> None:
        """These are registered."""
        self._addresses.update((segment.ordinal, segment.address) for segment in segments)

    def with_new(self, segments: Sequence[Segment]) -> list[int]:
        """The ordinals of the segments that were added and are there, and of these, by rising
        address."""
        self._addresses = {
            ordinal: address
            for ordinal, address in self._addresses.items()
            if (place := self._find(address)) is not None and place.ordinal == ordinal
        }
        addresses = self._addresses | {segment.ordinal: segment.address for segment in segments}
        return sorted(addresses, key=addresses.__getitem__)


def segment_set(report: Report) -> set[tuple[int, int]]:
    """Ordinal and size of each new segment that a rank reports."""
    return {(ordinal, num_bytes) for ordinal, num_bytes in report["segments"]}


def odd_ones(reports: Sequence[Report | None]) -> list[int]:
    """Ranks that are absent, have failed, or have other segments than most of the rest."""
    lists = [
        None if each is None or each["failure"] is not None else each["segments"]
        for each in reports
    ]
    present = [each for each in lists if each is not None]
    usual = max(present, key=present.count, default=None)  # of equally frequent ones the first
    return [index for index, each in enumerate(lists) if each is None or each != usual]


def unusual(values: Sequence[Any]) -> list[int]:
    """Which values are not the most frequent one; of equally frequent ones the first is right."""
    usual = max(values, key=values.count)
    return [index for index, value in enumerate(values) if value != usual]
