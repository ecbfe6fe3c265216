"""Ways to run a collective; `dispatch` chooses one per call. `PyNcclCommunicator` is another."""

from .base import Backend
from .local import LocalBackend
from .observed import ObservedBackend, Observer
from .torch_pg import TorchPgBackend

__all__ = ["Backend", "LocalBackend", "ObservedBackend", "Observer", "TorchPgBackend"]
