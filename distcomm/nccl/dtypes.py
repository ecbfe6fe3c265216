"""NCCL's codes for element types and reductions (ncclDataType_t, ncclRedOp_t in nccl.h)."""

from __future__ import annotations

from ctypes import c_int

import torch

__all__ = ["REDUCE_OPS", "REDUCTION_CODES"]

REDUCE_OPS = {"sum": 0, "prod": 1, "max": 2, "min": 3, "avg": 4}

_FLOATING = {
    torch.float16: 6,
    torch.float32: 7,
    torch.float64: 8,
    torch.bfloat16: 9,
    torch.float8_e4m3fn: 10,
    torch.float8_e5m2: 11,
}
_INTEGER = {torch.int8: 0, torch.uint8: 1, torch.int32: 2, torch.int64: 4}

# (dtype, op) -> (data type code, op code): one lookup both validates a reduction and translates
# it, to ctypes objects, which are passed on faster than an int that is converted on each call.
# "avg" is left out for integers, where NCCL would truncate silently.
REDUCTION_CODES = {
    (dtype, op): (c_int(dtype_code), c_int(op_code))
    for op, op_code in REDUCE_OPS.items()
    for dtype, dtype_code in {**_FLOATING, **({} if op == "avg" else _INTEGER)}.items()
}
