"""Launches of Triton kernels without Triton's own search for the compiled one."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from triton.compiler import CompiledKernel

__all__ = ["KernelLauncher"]


class KernelLauncher:
    """Launches one Triton kernel.

    Triton looks at the type and value of every argument of a launch to find what it has compiled
    for them. Here that is looked up by what the result can depend on, if no value is specialized.

    Args:
        kernel: a ``triton.jit`` function with all its constants behind its other parameters,
            tensors and annotated numbers, of which none is specialized.
    """

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel
        # What Triton's own launch comes to in the end, and its first arguments after the stream.
        self._compiled: dict[tuple[Any, ...], tuple[Callable[..., None], Any, Any]] = {}

    def launch(
        self,
        num_blocks: int,
        arguments: tuple[torch.Tensor | float | None, ...],
        constants: tuple[Any, ...],
        *,
        types: tuple[Hashable, ...],
        device: torch.device,
        num_warps: int,
        launch_pdl: bool = False,
    ) -> None:
        """Launches `num_blocks` blocks on the current stream. Triton's launch hooks aren't called.

        Args:
            arguments: of the parameters that aren't constants.
            constants: of those that are; hashable.
            types: what tells apart all the types that the arguments may have, None's among them.
            device: the current one.
            launch_pdl: whether it may be launched before the kernel ahead has ended.
        """
        key = (device.index, num_warps, launch_pdl, types, constants)
        known = self._compiled.get(key)
        if known is not None:
            run, function, metadata = known
            stream = torch._C._cuda_getCurrentRawStream(device.index)
            run(num_blocks, 1, 1, stream, function, metadata, None, None, None,
                *arguments, *constants)  # fmt: skip
            return
        made = self._kernel[(num_blocks,)](
            *arguments, *constants, num_warps=num_warps, launch_pdl=launch_pdl
        )
        if isinstance(made, CompiledKernel):  # Triton's interpreter has none
            self._compiled[key] = (made.run, made.function, made.packed_metadata)
