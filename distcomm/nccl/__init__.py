"""NCCL from Python: the library (`NcclLibrary`) and one group's communicator on it."""

from .communicator import PyNcclCommunicator
from .known_issues import KnownIssues, Topology
from .libnccl import NcclLibrary
from .process_end import FREE_S, note_destroy_under_way

__all__ = [
    "FREE_S",
    "KnownIssues",
    "NcclLibrary",
    "PyNcclCommunicator",
    "Topology",
    "note_destroy_under_way",
]
