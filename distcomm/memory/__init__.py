"""Memory that every rank has at the same place (segments, windows, pools), or that can sleep."""

from .alloc_conf import AllocatorSettings, block_settings, expandable_segments_off
from .peer_channel import PeerChannel
from .peer_copy import PeerCopies, PushedRows, RowRun, RowRuns
from .placement import CaptureLog, placement_check
from .segment_heap import next_ordinal_of_device
from .sleep import SleepablePool, Slept, sleepable_pools
from .sleep_heap import HostMemoryError, SleepOutOfMemoryError, TagUsage
from .symmetric_context import (
    InactiveContext,
    MemoryContext,
    SuspendedContext,
    SymmetricMemoryContext,
)
from .symmetric_pool import SymmetricOutOfMemoryError, SymmetricPool, parse_num_bytes
from .windows import ASLEEP, GroupWindows

__all__ = [
    "ASLEEP",
    "AllocatorSettings",
    "CaptureLog",
    "GroupWindows",
    "HostMemoryError",
    "InactiveContext",
    "MemoryContext",
    "PeerChannel",
    "PeerCopies",
    "PushedRows",
    "RowRun",
    "RowRuns",
    "SleepOutOfMemoryError",
    "SleepablePool",
    "Slept",
    "SuspendedContext",
    "SymmetricMemoryContext",
    "SymmetricOutOfMemoryError",
    "SymmetricPool",
    "TagUsage",
    "block_settings",
    "expandable_segments_off",
    "next_ordinal_of_device",
    "parse_num_bytes",
    "placement_check",
    "sleepable_pools",
]
