"""Every environment variable that distcomm reads, read here and nowhere else.

| variable | read for |
|---|---|
| ``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK`` | this process's place, as torchrun sets it |
| ``MASTER_ADDR``, ``MASTER_PORT`` | where the ranks meet (by torch's ``env://``) |
| ``DISTCOMM_NCCL_SO`` | path of the libnccl to load instead of the one torch uses |
| ``DISTCOMM_VERIFY_SYMMETRIC`` | compare every collective's buffers between ranks (1 or 0) |
| ``DISTCOMM_PROFILER_RANGES`` | ranges around calls from the start: record_function or nvtx |
| ``NCCL_HOSTID`` | NCCL's own: which ranks it takes to be on one host |
"""

from __future__ import annotations

import os

from .errors import LaunchError

__all__ = [
    "missing_meeting_point",
    "nccl_host_id",
    "nccl_library_path",
    "profiler_ranges",
    "read_int",
    "verifies_symmetric_memory",
]


def nccl_library_path() -> str | None:
    """The user's choice of libnccl (``DISTCOMM_NCCL_SO``), or None."""
    return os.environ.get("DISTCOMM_NCCL_SO") or None


def nccl_host_id() -> str | None:
    """What NCCL is told to take for the host's name (``NCCL_HOSTID``), or None."""
    return os.environ.get("NCCL_HOSTID") or None


def verifies_symmetric_memory() -> bool:
    """Whether ``DISTCOMM_VERIFY_SYMMETRIC`` is set, to something other than 0."""
    return bool(read_int("DISTCOMM_VERIFY_SYMMETRIC"))


def profiler_ranges() -> str | None:
    """The user's choice of profiler ranges (``DISTCOMM_PROFILER_RANGES``), unchecked, or None."""
    return os.environ.get("DISTCOMM_PROFILER_RANGES") or None


def missing_meeting_point() -> list[str]:
    """Those of ``MASTER_ADDR`` and ``MASTER_PORT`` that are not set."""
    return [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]


def read_int(name: str) -> int | None:
    """The non-negative integer in variable `name`; None when it is unset or empty.

    Raises:
        LaunchError: the variable holds something else.
    """
    text = os.environ.get(name, "")
    if not text:
        return None
    if not text.isdecimal():
        raise LaunchError(f"environment variable {name} must be an integer >= 0; got {text!r}")
    return int(text)
