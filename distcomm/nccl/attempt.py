"""A communicator that is being made in a thread, which nobody may be waiting for any more."""

from __future__ import annotations

import threading

from .libnccl import NcclLibrary

__all__ = ["Attempt"]


class Attempt:
    """A communicator that is being made in a thread, and is freed if nobody waits for it any more.

    Attributes:
        comm: the communicator; 0 until it is made.
    """

    def __init__(self, library: NcclLibrary) -> None:
        self.comm = 0
        self._library = library
        self._given_up = False
        self._lock = threading.Lock()

    def made(self, comm: int) -> None:
        """Called by the thread. Raises `_GivenUp`, and aborts `comm`, where it comes too late."""
        with self._lock:
            if not self._given_up:
                self.comm = comm
                return
        self._library.ncclCommAbort(comm)
        raise _GivenUp

    def give_up(self) -> None:
        """Aborts the communicator: now, which ends what the thread does with it, or once made."""
        with self._lock:
            self._given_up = True
        if self.comm:
            self._library.check("ncclCommAbort", self._library.ncclCommAbort(self.comm))


class _GivenUp(Exception):  # noqa: N818 - a signal inside this module, not an error
    """The communicator that a thread has made isn't wanted any more."""
