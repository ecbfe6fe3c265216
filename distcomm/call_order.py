"""What keeps collectives in compiled functions in their order."""

from __future__ import annotations

import torch

__all__ = ["CallOrder"]

_CPU = torch.device("cpu")


class CallOrder:
    """Tensors without content that all collectives of a job claim to write to.

    All ranks have to make the same calls in the same order, whatever else their graphs do and
    however these differ; and a compiler neither drops calls that write to a tensor which outlives
    their graph, nor makes them in another order. Collectives on CPU tensors and on the GPU's have
    orders of their own, because CUDA graphs can't have tensors on CPU.

    The price: torch refuses to compile collectives in branches of `torch.cond`, bodies of
    `while_loop` and regions of `nested_compile_region`, where nothing may be written to.

    What torch has for this, ordered effects, doesn't hold in Inductor (torch 2.11 to 2.13): there
    independent calls changed places, on one rank and not on the other.

    Args:
        device: the job's.
    """

    def __init__(self, device: torch.device = _CPU) -> None:
        self._of_cpu = _order_tensor(_CPU)
        self._of_gpu = self._of_cpu if device.type == "cpu" else _order_tensor(device)

    def of(self, x: torch.Tensor) -> torch.Tensor:
        """That of calls on tensors like `x`."""
        return self._of_gpu if x.is_cuda else self._of_cpu


def _order_tensor(device: torch.device) -> torch.Tensor:
    with torch.inference_mode(False):  # else nothing outside of that mode may write to it
        order = torch.zeros(1, dtype=torch.int8, device=device)
    # What torch._dynamo.mark_static_address does, without importing all of Dynamo, which takes a
    # second: CUDA graphs may write to it where it lies.
    order._dynamo_static_input_type = "unguarded"  # type: ignore[attr-defined]
    return order
