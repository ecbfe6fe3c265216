"""Python imports this at its start where its folder is on the path: torch gets its operators, and
Triton's launches of distcomm's kernel go to what stands for it."""

from __future__ import annotations

import ctypes
import os
from ctypes import c_int, c_int64, c_void_p
from typing import Any

import torch
from triton.runtime.jit import JITFunction

LIBRARIES = os.environ["SIMULATED_GPU_LIBRARIES"]


class Pushed(ctypes.Structure):
    """As in kernels.cpp."""

    _fields_ = [
        *((name, c_int64) for name in ("source", "source_pitch", "output", "output_pitch")),
        ("deltas", c_void_p),
        ("row_bytes", c_int64),
    ]


class Push(ctypes.Structure):
    """As in kernels.cpp."""

    _fields_ = [
        *((name, c_void_p) for name in ("rows_to", "slots", "signals")),
        *((name, c_int64) for name in ("num_rows", "rank", "world_size", "num_blocks")),
        *((name, c_int) for name in ("rows_to_is_wide", "slots_are_wide", "opens", "closes")),
        ("tensors", Pushed * 2),
    ]


def address(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr() or None


def is_wide(tensor: torch.Tensor | None) -> bool:
    return tensor is not None and tensor.dtype == torch.int64


def push_rows(arguments: dict[str, Any], num_blocks: int) -> None:
    push = Push(
        **{name: address(arguments[name]) for name in ("rows_to", "slots", "signals")},
        **{name: arguments[name] for name in ("num_rows", "rank", "world_size")},
        num_blocks=num_blocks,
        rows_to_is_wide=is_wide(arguments["rows_to"]),
        slots_are_wide=is_wide(arguments["slots"]),
        opens=arguments["OPENS"],
        closes=arguments["CLOSES"],
    )
    for index, tensor in enumerate(push.tensors):
        for name in ("source", "source_pitch", "output", "output_pitch"):
            setattr(tensor, name, arguments[f"{name}_{index}"])
        tensor.deltas = address(arguments[f"deltas_{index}"])
        word_bytes = arguments[f"WORD_{index}"].primitive_bitwidth // 8
        tensor.row_bytes = arguments[f"ROW_WORDS_{index}"] * word_bytes
    stream = torch.cuda.current_stream().cuda_stream
    if code := cuda.simulated_push_rows(c_void_p(stream), ctypes.byref(push)):
        raise RuntimeError(f"CUDA error {code} in a simulated kernel")


def run(self: JITFunction, *args: Any, grid: Any, warmup: bool, **arguments: Any) -> Any:
    if self.fn.__name__ == "_push_rows_kernel" and not warmup:
        return push_rows(dict(zip(self.arg_names, args, strict=True)), grid[0])
    return run_on_gpu(self, *args, grid=grid, warmup=warmup, **arguments)


torch.set_num_threads(1)  # ranks share a machine, and a stream's thread may not start others
ctypes.CDLL(f"{LIBRARIES}/libsimulated_operators.so").simulated_gpu_replace_operators()
cuda = ctypes.CDLL(f"{LIBRARIES}/libcuda.so.1")
run_on_gpu, JITFunction.run = JITFunction.run, run
