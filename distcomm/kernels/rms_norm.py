"""What follows a row's all-reduce in a transformer: the residual is added, RMSNorm taken.

Shapes: T tokens, H hidden size.
"""

# ruff: noqa: N803, PLR0913, RUF005
# mypy: disallow-untyped-decorators=False

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from ..errors import ArgumentError
from .mailbox import DTYPES
from .ptx import load_vectors, store_vectors
from .vectors import VECTOR_BYTES, pack, unpack

__all__ = [
    "NormedRows",
    "Shares",
    "add_residual",
    "add_shares",
    "load_share",
    "scale_of",
    "share_vectors",
    "shares_of",
    "store_scaled",
    "store_share",
    "sum_each",
]

_MOST_THREADS = 512


@triton.jit
def share_vectors(share: tl.tensor, part: tl.constexpr, SHARE: tl.constexpr,
                  ROW_VECTORS: tl.constexpr, THREADS: tl.constexpr) -> Any:  # fmt: skip
    """Of a row's vectors, those of a part of a share, one a thread, and which of them there are."""
    in_share = part * THREADS + tl.arange(0, THREADS)
    vector = share * SHARE + in_share
    return vector, (in_share < SHARE) & (vector < ROW_VECTORS)


@triton.jit
def load_share(address: tl.tensor, share: tl.tensor, PARTS: tl.constexpr, SHARE: tl.constexpr,
               ROW_VECTORS: tl.constexpr, THREADS: tl.constexpr) -> Any:  # fmt: skip
    """The words of a share of the row at `address`, four for each part."""
    words = ()
    for part in tl.static_range(PARTS):
        vector, active = share_vectors(share, part, SHARE, ROW_VECTORS, THREADS)
        words = words + load_vectors(address + vector * 16, active)
    return words


@triton.jit
def _squares(low: tl.tensor, high: tl.tensor, DTYPE: tl.constexpr) -> tl.tensor:
    total = low * low
    if tl.float32 != DTYPE:
        total += high * high
    return total


@triton.jit
def add_residual(sums: tl.tuple, old: tl.tuple, share: tl.tensor,
                 DTYPE: tl.constexpr, PARTS: tl.constexpr, SHARE: tl.constexpr,
                 ROW_VECTORS: tl.constexpr, THREADS: tl.constexpr,
                 HAS_RESIDUAL: tl.constexpr) -> Any:  # fmt: skip
    """A share of a row of sums with that of the residual, if there is one.

    Args:
        sums: the words of the share's sums, rounded to DTYPE.
        old: of the residual's.

    Returns:
        Of each word the element at the lower address in fp32, and the other one; and of each
        thread the sum of its elements' squares.
    """
    squares = tl.zeros((THREADS,), tl.float32)
    lows = ()
    highs = ()
    for part in tl.static_range(PARTS):
        _, active = share_vectors(share, part, SHARE, ROW_VECTORS, THREADS)
        for word in tl.static_range(4 * part, 4 * part + 4):
            low, high = unpack(sums[word], DTYPE)
            if HAS_RESIDUAL:
                more_low, more_high = unpack(old[word], DTYPE)
                low += more_low
                high += more_high
            squares += tl.where(active, _squares(low, high, DTYPE), 0.0)
            lows = lows + (low,)  # type: ignore[assignment]
            highs = highs + (high,)  # type: ignore[assignment]
    return lows, highs, squares


@triton.jit
def store_share(lows: tl.tuple, highs: tl.tuple, address: tl.tensor, share: tl.tensor,
                DTYPE: tl.constexpr, PARTS: tl.constexpr, SHARE: tl.constexpr,
                ROW_VECTORS: tl.constexpr, THREADS: tl.constexpr) -> None:  # fmt: skip
    """A share of the row at `address`, rounded."""
    for part in tl.static_range(PARTS):
        vector, active = share_vectors(share, part, SHARE, ROW_VECTORS, THREADS)
        words = ()
        for word in tl.static_range(4 * part, 4 * part + 4):
            words = words + (pack(lows[word], highs[word], DTYPE),)  # type: ignore[assignment]
        a, b, c, d = words  # type: ignore[misc]
        store_vectors(address + vector * 16, a, b, c, d, active)


@triton.jit
def _add_four(a, b, c, d, more_a, more_b, more_c, more_d):  # type: ignore[no-untyped-def]
    return a + more_a, b + more_b, c + more_c, d + more_d


@triton.jit
def sum_each(squares: tl.tuple, W: tl.constexpr, THREADS: tl.constexpr) -> Any:
    """The sums of W tensors, each as `tl.sum` adds it up.

    Four at a time, as a sum waits for all threads of the block.
    """
    totals = ()
    for first in tl.static_range(0, W, 4):
        four = ()
        for share in tl.static_range(first, first + 4):
            if share < W:
                four = four + (squares[share],)  # type: ignore[assignment]
            else:
                four = four + (tl.zeros((THREADS,), tl.float32),)  # type: ignore[assignment]
        totals = totals + tl.reduce(four, 0, _add_four)
    return totals


@triton.jit
def add_shares(totals: tl.tuple, W: tl.constexpr) -> tl.tensor:
    """Adds up the sums of W shares, at most 8, in the order in which `tl.sum` adds up the first
    threads of a warp."""
    s = ()
    for share in tl.static_range(8):
        s = s + ((totals[share],) if share < W else (0.0,))
    return ((s[0] + s[4]) + (s[2] + s[6])) + ((s[1] + s[5]) + (s[3] + s[7]))  # type: ignore[misc]


@triton.jit
def scale_of(total: tl.tensor, eps: tl.tensor, ROW_ELEMENTS: tl.constexpr) -> tl.tensor:
    """One over the root mean square of a row, of whose elements' squares this is the sum."""
    return 1.0 / tl.sqrt(total / ROW_ELEMENTS + eps)


@triton.jit
def _scaled(low: tl.tensor, high: tl.tensor, weight: tl.tensor, scale: tl.tensor,
            weight_bias: tl.tensor, DTYPE: tl.constexpr) -> tl.tensor:  # fmt: skip
    weight_low, weight_high = unpack(weight, DTYPE)
    low = low * scale * (weight_low + weight_bias)
    high = high * scale * (weight_high + weight_bias)
    return pack(low, high, DTYPE)


@triton.jit
def store_scaled(lows: tl.tuple, highs: tl.tuple, weights: tl.tuple, scale: tl.tensor,
                 weight_bias: tl.tensor, normed: tl.tensor, share: tl.tensor,
                 DTYPE: tl.constexpr, PARTS: tl.constexpr, SHARE: tl.constexpr,
                 ROW_VECTORS: tl.constexpr, THREADS: tl.constexpr) -> None:  # fmt: skip
    """Stores a share of the row at `normed`: what `add_residual` returned, scaled and weighted."""
    for part in tl.static_range(PARTS):
        vector, active = share_vectors(share, part, SHARE, ROW_VECTORS, THREADS)
        words = ()
        for word in tl.static_range(4 * part, 4 * part + 4):
            scaled = _scaled(lows[word], highs[word], weights[word], scale, weight_bias, DTYPE)
            words = words + (scaled,)  # type: ignore[assignment]
        a, b, c, d = words  # type: ignore[misc]
        store_vectors(normed + vector * 16, a, b, c, d, active)


@dataclass(frozen=True)
class Shares:
    """How a row is dealt out, one share for each rank: the same in all kernels, and for any number
    of rows, so that sums have the same bits.

    Attributes:
        vectors: of a share; the last one may have fewer, or none.
        threads: of a block.
        parts: vectors of a share that a thread has.
    """

    vectors: int
    threads: int
    parts: int

    @property
    def num_bytes(self) -> int:
        """Of a share."""
        return self.vectors * VECTOR_BYTES


@functools.cache
def shares_of(row_vectors: int, world_size: int) -> Shares:
    """The shares of a row."""
    vectors = -(-row_vectors // world_size)
    threads = max(32, min(_MOST_THREADS, int(triton.next_power_of_2(vectors))))
    return Shares(vectors, threads, parts=-(-vectors // threads))


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
