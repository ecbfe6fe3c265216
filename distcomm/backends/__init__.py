"""Ways to run a collective; `dispatch` chooses one per call. `PyNcclCommunicator` is another."""

from .base import Backend
from .kernel import KernelBackend, KernelCollectives
from .local import LocalBackend
from .observed import ObservedBackend, Observer
from .ordered import OrderedBackend
from .ranged import RangedTorchPgBackend, check_range_kind, open_range, ranged
from .torch_pg import TorchPgBackend

__all__ = [
    "Backend",
    "LocalBackend",
    "ObservedBackend",
    "Observer",
    "OrderedBackend",
    "KernelBackend",
    "KernelCollectives",
    "RangedTorchPgBackend",
    "TorchPgBackend",
    "check_range_kind",
    "open_range",
    "ranged",
]
