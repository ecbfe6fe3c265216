"""What follows a row's all-reduce in a transformer: the residual is added, RMSNorm taken.

Shapes: T tokens, H hidden size.
"""

# ruff: noqa: N803, PLR0913, RUF005
# mypy: disallow-untyped-decorators=False

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from ..errors import ArgumentError
from .mailbox import DTYPES
from .ptx import load_vectors, store_vectors
from .vectors import VECTOR_BYTES, pack, unpack

__all__ = ["NormedRows", "load_row", "norm_row"]

_MOST_THREADS = 512  # more are no faster, as one multiprocessor moves no more bytes for them


@triton.jit
def load_row(address: tl.tensor, ROW_VECTORS: tl.constexpr, THREADS: tl.constexpr,
             PARTS: tl.constexpr) -> Any:  # fmt: skip
    """The words of a row, PARTS vectors a thread: vector p * THREADS + t is thread t's."""
    words = ()
    for part in tl.static_range(PARTS):
        vector = part * THREADS + tl.arange(0, THREADS)
        a, b, c, d = load_vectors(address + vector * 16, vector < ROW_VECTORS)
        words = words + (a, b, c, d)  # type: ignore[assignment]
    return words


@triton.jit
def _add(word: tl.tensor, more: tl.tensor, DTYPE: tl.constexpr) -> Any:
    low, high = unpack(word, DTYPE)
    more_low, more_high = unpack(more, DTYPE)
    return low + more_low, high + more_high


@triton.jit
def _squares(low: tl.tensor, high: tl.tensor, DTYPE: tl.constexpr) -> tl.tensor:
    total = low * low
    if tl.float32 != DTYPE:
        total += high * high
    return total


@triton.jit
def _scaled(low: tl.tensor, high: tl.tensor, weight: tl.tensor, scale: tl.tensor,
            weight_bias: tl.tensor, DTYPE: tl.constexpr) -> tl.tensor:  # fmt: skip
    weight_low, weight_high = unpack(weight, DTYPE)
    low = low * scale * (weight_low + weight_bias)
    high = high * scale * (weight_high + weight_bias)
    return pack(low, high, DTYPE)


@triton.jit
def norm_row(sums: tl.tuple, old: tl.tuple, weights: tl.tuple,
             new_residual: tl.tensor, normed: tl.tensor, eps: tl.tensor, weight_bias: tl.tensor,
             DTYPE: tl.constexpr, ROW_VECTORS: tl.constexpr, ROW_ELEMENTS: tl.constexpr,
             THREADS: tl.constexpr, PARTS: tl.constexpr,
             HAS_RESIDUAL: tl.constexpr) -> None:  # fmt: skip
    """A row of sums, with the residual's, divided by their root mean square and weighted.

    Args:
        sums: the words of the row, rounded to DTYPE.
        old: of the residual's row, if there is one.
        weights: of the weights.
        new_residual, normed: addresses of the row's results.
    """
    squares = tl.zeros((THREADS,), tl.float32)
    lows = ()
    highs = ()
    for part in tl.static_range(PARTS):
        vector = part * THREADS + tl.arange(0, THREADS)
        active = vector < ROW_VECTORS
        for word in tl.static_range(4 * part, 4 * part + 4):
            if HAS_RESIDUAL:
                low, high = _add(sums[word], old[word], DTYPE)
            else:
                low, high = unpack(sums[word], DTYPE)
            squares += tl.where(active, _squares(low, high, DTYPE), 0.0)
            lows = lows + (low,)  # type: ignore[assignment]
            highs = highs + (high,)  # type: ignore[assignment]
        if HAS_RESIDUAL:
            store_vectors(
                new_residual + vector * 16,
                pack(lows[4 * part], highs[4 * part], DTYPE),
                pack(lows[4 * part + 1], highs[4 * part + 1], DTYPE),
                pack(lows[4 * part + 2], highs[4 * part + 2], DTYPE),
                pack(lows[4 * part + 3], highs[4 * part + 3], DTYPE),
                active,
            )
    scale = 1.0 / tl.sqrt(tl.sum(squares, axis=0) / ROW_ELEMENTS + eps)
    for part in tl.static_range(PARTS):
        vector = part * THREADS + tl.arange(0, THREADS)
        store_vectors(
            normed + vector * 16,
            _scaled(lows[4 * part], highs[4 * part], weights[4 * part], scale, weight_bias, DTYPE),
            _scaled(
                lows[4 * part + 1],
                highs[4 * part + 1],
                weights[4 * part + 1],
                scale,
                weight_bias,
                DTYPE,
            ),
            _scaled(
                lows[4 * part + 2],
                highs[4 * part + 2],
                weights[4 * part + 2],
                scale,
                weight_bias,
                DTYPE,
            ),
            _scaled(
                lows[4 * part + 3],
                highs[4 * part + 3],
                weights[4 * part + 3],
                scale,
                weight_bias,
                DTYPE,
            ),
            vector < ROW_VECTORS,
        )


@dataclass(frozen=True, eq=False)
class NormedRows:
    """The tensors of a fused all-reduce and RMSNorm, all of one dtype and contiguous.

    Attributes:
        x: [T, H], bf16, fp16 or fp32: what is added up over the ranks.
        weight: [H].
        residual: [T, H], or None.
        normed: [T, H]: the result; `x` itself, or other memory.
        new_residual: [T, H], `residual` itself, or other memory; None if there is none.
        eps: what is added to the mean of the squares.
        weight_bias: what is added to the weights: 0, or 1 where these are stored as differences.
    """

    x: torch.Tensor
    weight: torch.Tensor
    residual: torch.Tensor | None
    normed: torch.Tensor
    new_residual: torch.Tensor | None
    eps: float
    weight_bias: float

    @property
    def row_vectors(self) -> int:
        """Vectors of a row."""
        return self.x.shape[-1] * self.x.itemsize // VECTOR_BYTES

    @property
    def threads(self) -> int:
        """Of a block, for a row: the same in all kernels, so that sums have the same bits."""
        return max(32, min(_MOST_THREADS, int(triton.next_power_of_2(self.row_vectors))))

    def addresses(self) -> tuple[int, int, int, int, int]:
        """Of x, weight, residual, normed and new_residual; 0 for none."""
        return (
            self.x.data_ptr(),
            self.weight.data_ptr(),
            0 if self.residual is None else self.residual.data_ptr(),
            self.normed.data_ptr(),
            0 if self.new_residual is None else self.new_residual.data_ptr(),
        )

    def check(self, call: str) -> None:
        """
        Raises:
            ArgumentError: a tensor doesn't fit.
        """
        x = self.x
        if (
            x.dim() != 2
            or x.dtype not in DTYPES
            or self.row_vectors * VECTOR_BYTES != (x.shape[1] * x.itemsize)
        ):
            raise ArgumentError(
                "x",
                f"[tokens, hidden] of bf16, fp16 or fp32, rows of whole {VECTOR_BYTES} bytes",
                f"{x.dtype} {list(x.shape)}",
                call=call,
            )
        tensors = {"x": (x, x.shape), "weight": (self.weight, x.shape[1:])}
        tensors["normed"] = (self.normed, x.shape)
        for name, tensor in (("residual", self.residual), ("new_residual", self.new_residual)):
            if (tensor is None) != (self.residual is None):
                raise ArgumentError(name, "given with `residual`", tensor, call=call)
            if tensor is not None:
                tensors[name] = (tensor, x.shape)
        for name, (tensor, shape) in tensors.items():
            fits = (
                tensor.shape == shape
                and tensor.dtype == x.dtype
                and tensor.device == x.device
                and tensor.is_contiguous()
                and tensor.data_ptr() % VECTOR_BYTES == 0
            )
            if not fits:
                raise ArgumentError(
                    name,
                    f"{x.dtype} {list(shape)} on {x.device}, contiguous, at a multiple of "
                    f"{VECTOR_BYTES} bytes",
                    f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}, strides "
                    f"{tensor.stride()}",
                    call=call,
                )
