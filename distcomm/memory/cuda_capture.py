"""What is asked of, and done to, a CUDA graph while it is captured (csrc/capture.cpp)."""

from __future__ import annotations

from ctypes import c_uint64

from ..errors import SymmetricMemoryError
from ..native import NativeNccl

__all__ = ["CaptureWatch"]

_BATCH = 64


class CaptureWatch:
    """Knows which capture a stream is in, and which captured graphs are gone.

    Args:
        nccl: the binding to the C++ library.
    """

    def __init__(self, nccl: NativeNccl) -> None:
        self._native = nccl.functions
        self._capture_id = self._native.distcomm_capture_id

    def capture_id(self, stream: int) -> int:
        """A number of the capture under way on a stream; 0 if there is none."""
        number: int = self._capture_id(stream)
        return number

    def watch(self, stream: int) -> None:
        """`take_ended` will tell when the graph that this stream captures is gone."""
        code = self._native.distcomm_watch_capture(stream)
        if code:
            raise SymmetricMemoryError(f"the CUDA driver doesn't watch a capture: error {code}")

    def take_ended(self) -> list[int]:
        """The captures watched whose graphs, and all made from them, are gone; each once."""
        numbers = (c_uint64 * _BATCH)()
        count = self._native.distcomm_take_ended_captures(numbers, _BATCH)
        return list(numbers[:count])
