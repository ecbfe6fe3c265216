"""The tags of a sleepable pool: their numbers in the heap, and which of them are asleep."""

from __future__ import annotations

import threading
from collections.abc import Collection, Sequence

from ..errors import ArgumentError
from .sleep_heap import SleepHeap, TagUsage

__all__ = ["SleepTags"]


class SleepTags:
    """Tags by name, in the order of their first use. Thread-safe.

    Args:
        heap: where they have numbers.
        pool: its name, for errors.
    """

    def __init__(self, heap: SleepHeap, pool: str) -> None:
        self._heap = heap
        self._pool = pool
        self._lock = threading.Lock()  # guards the next two
        self._numbers: dict[str, int] = {}
        self._asleep: set[str] = set()

    @property
    def names(self) -> list[str]:
        return list(self._numbers)

    @property
    def asleep(self) -> tuple[str, ...]:
        return tuple(tag for tag in self.names if tag in self._asleep)

    def number(self, tag: str) -> int:
        """Of a tag that may be new."""
        with self._lock:
            if tag not in self._numbers:
                self._numbers[tag] = self._heap.new_tag()
            return self._numbers[tag]

    def numbers(self, tags: Sequence[str] | None = None) -> list[int]:
        """Of tags that are known; by default of all."""
        return [self._numbers[tag] for tag in (self.names if tags is None else tags)]

    def usage(self) -> dict[str, TagUsage]:
        """Bytes by tag."""
        return {tag: self._heap.usage(self._numbers[tag]) for tag in self.names}

    def total(self) -> TagUsage:
        """Bytes under all tags."""
        usages = self.usage().values()
        return TagUsage(*map(sum, zip(*usages, strict=True))) if usages else TagUsage()

    def put_to_sleep(self, tags: Collection[str]) -> None:
        with self._lock:
            self._asleep.update(tags)

    def wake_up(self, tags: Collection[str]) -> None:
        with self._lock:
            self._asleep.difference_update(tags)

    def look_again(self) -> None:
        """Asks the heap which are asleep, of those that it has memory of."""
        for tag, usage in self.usage().items():
            if usage.asleep_bytes:
                self.put_to_sleep([tag])
            elif usage.mapped_bytes:
                self.wake_up([tag])

    def known(self, call: str, argument: str, tags: Sequence[str] | None) -> list[str]:
        """`tags` in the order of their first use; None stands for all.

        Raises:
            ArgumentError: one was never used.
        """
        names = self.names
        if tags is None:
            return names
        if isinstance(tags, str) or any(tag not in names for tag in tags):
            requirement = f"tags that were used here, of {names}"
            raise ArgumentError(argument, requirement, f"{tags!r} [{self._pool}]", call=call)
        return [tag for tag in names if tag in tags]

    def to_sleep(
        self, call: str, offload_tags: Sequence[str], tags: Sequence[str] | None
    ) -> tuple[list[str], list[str]]:
        """Of all that is to sleep, what does not do so yet; and what of that is offloaded.

        Raises:
            ArgumentError: one was never used, or `tags` are some and don't have all the others.
        """
        offloaded = self.known(call, "offload_tags", offload_tags)
        chosen = self.known(call, "tags", tags)
        others = [tag for tag in offloaded if tag not in chosen]
        if others:
            actual = f"{others} [{self._pool}]"
            raise ArgumentError("offload_tags", f"among tags, {chosen}", actual, call=call)
        usage = self.usage()
        # A tag may be asleep in part, after a sleep that has failed.
        awake = [tag for tag in chosen if tag not in self._asleep or usage[tag].mapped_bytes]
        return awake, [tag for tag in offloaded if tag in awake]
