"""NCCL from Python: the library (`NcclLibrary`) and one group's communicator on it."""

from .communicator import PyNcclCommunicator
from .known_issues import KnownIssues, Topology
from .libnccl import NcclLibrary

__all__ = ["KnownIssues", "NcclLibrary", "PyNcclCommunicator", "Topology"]
