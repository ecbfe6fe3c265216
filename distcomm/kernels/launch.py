"""Launches of Triton kernels without Triton's own search for the compiled one."""

from __future__ import annotations

from collections.abc import Hashable
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
            tensors and annotated integers, of which none is specialized.
    """

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel
        self._compiled: dict[tuple[Any, ...], CompiledKernel] = {}

    def launch(
        self,
        num_blocks: int,
        arguments: tuple[torch.Tensor | int | None, ...],
        constants: tuple[Any, ...],
        *,
        types: tuple[Hashable, ...],
        device: torch.device,
        num_warps: int,
    ) -> None:
        """Launches `num_blocks` blocks on the current stream.

        Args:
            arguments: of the parameters that aren't constants.
            constants: of those that are; hashable.
            types: what tells apart all the types that the arguments may have, None's among them.
            device: the current one.
        """
        key = (device, num_warps, types, constants)
        compiled = self._compiled.get(key)
        if compiled is not None:
            compiled[num_blocks, 1, 1](*arguments, *constants)
            return
        made = self._kernel[(num_blocks,)](*arguments, *constants, num_warps=num_warps)
        if isinstance(made, CompiledKernel):  # Triton's interpreter has none
            self._compiled[key] = made
