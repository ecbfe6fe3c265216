"""NCCL from Python: the library (`NcclLibrary`) and one group's communicator on it."""

from .communicator import PyNcclCommunicator
from .library import NcclLibrary

__all__ = ["NcclLibrary", "PyNcclCommunicator"]
