"""Small index tensors, made once per device and kept."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..errors import DistcommError
from ..symmetric import suspend_symmetric_memory

__all__ = ["DeviceTables"]


class DeviceTables:
    """Tensors by name and device.

    They lie in ordinary memory, also if made in a symmetric context: sizes differ between ranks.
    """

    def __init__(self) -> None:
        self._tables: dict[tuple[str, torch.device], torch.Tensor] = {}
        self._made: dict[tuple[str, torch.device], torch.cuda.Event] = {}
        # The streams that have waited for a table to be made, and that torch knows to use it.
        self._known: dict[tuple[str, torch.device], set[torch.cuda.Stream]] = {}

    def get(
        self,
        name: str,
        device: torch.device | str,
        build: Callable[[torch.device], torch.Tensor],
    ) -> torch.Tensor:
        """The table, for use on the current stream; ``build(device)`` makes it where there is none.

        Raises:
            DistcommError: it would have to be made while a CUDA graph is captured.
        """
        device = _with_index(torch.device(device))
        key = (name, device)
        table = self._tables.get(key)
        if device.type != "cuda":
            if table is None:
                with torch.inference_mode(False):  # they serve both modes
                    table = self._tables[key] = build(device)
            return table
        if torch.cuda.current_device() != device.index:
            with torch.cuda.device(device):
                return self.get(name, device, build)
        if torch.cuda.is_current_stream_capturing():
            if table is None:
                raise DistcommError(
                    f"the plan's index tensors ({name}) can't be made on {device} during a "
                    "CUDA graph capture: call prepare(group) of the plan before it"
                )
            return table  # torch.cuda.graph has waited for the device
        stream = torch.cuda.current_stream(device.index)
        if table is None:
            with suspend_symmetric_memory(), torch.inference_mode(False):
                table = self._tables[key] = build(device)
            self._made[key] = stream.record_event()
            self._known[key] = {stream}
        elif stream not in self._known[key]:
            stream.wait_event(self._made[key])
            table.record_stream(stream)
            self._known[key].add(stream)
        return table


def _with_index(device: torch.device) -> torch.device:
    without = torch.device("cuda")
    return torch.device("cuda", torch.cuda.current_device()) if device == without else device
