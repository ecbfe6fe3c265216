"""GPU kernels written in Triton, and the launchers that call them."""

from .place_rows import place_rows
from .push_rows import MAX_BLOCKS, PushedTensor, push_rows, signal_bytes

__all__ = ["MAX_BLOCKS", "PushedTensor", "place_rows", "push_rows", "signal_bytes"]
