"""Arithmetic on vectors: 16 bytes as four int32 words, each of which holds one element or two."""

# ruff: noqa: N803
# mypy: disallow-untyped-decorators=False

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from .ptx import EMPTY

__all__ = ["VECTOR_BYTES", "filled", "pack", "sum_vectors", "unpack"]

VECTOR_BYTES = 16
# `EMPTY` is a NaN in each dtype, or two; so is this, 0xfffefffe.
_OTHER_NAN = tl.constexpr(-65538)


@triton.jit
def filled(word: tl.tensor) -> tl.tensor:
    """The word, but where it is `EMPTY` another NaN."""
    return tl.where(word == EMPTY, _OTHER_NAN, word)


@triton.jit
def unpack(word: tl.tensor, DTYPE: tl.constexpr) -> Any:
    """A word's elements in fp32, the one at the lower address first; of fp32, its one twice."""
    if tl.float32 == DTYPE:
        low = word.to(tl.float32, bitcast=True)
        high = low
    else:
        low = word.to(tl.int16).to(DTYPE, bitcast=True).to(tl.float32)
        high = (word >> 16).to(tl.int16).to(DTYPE, bitcast=True).to(tl.float32)
    return low, high


@triton.jit
def pack(low: tl.tensor, high: tl.tensor, DTYPE: tl.constexpr) -> tl.tensor:
    """The word of two elements, rounded to DTYPE; of fp32, of `low` alone."""
    if tl.float32 == DTYPE:
        word = low.to(tl.int32, bitcast=True)
    else:
        low_bits = low.to(DTYPE).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
        word = low_bits | (high.to(DTYPE).to(tl.int16, bitcast=True).to(tl.int32) << 16)
    return word


@triton.jit
def _sum_words(words: tl.tuple, WORD: tl.constexpr, NUM_VECTORS: tl.constexpr,
               DTYPE: tl.constexpr) -> tl.tensor:  # fmt: skip
    low, high = unpack(words[WORD], DTYPE)
    for vector in tl.static_range(1, NUM_VECTORS):
        next_low, next_high = unpack(words[4 * vector + WORD], DTYPE)
        low += next_low
        high += next_high
    return pack(low, high, DTYPE)


@triton.jit
def sum_vectors(words: tl.tuple, NUM_VECTORS: tl.constexpr, DTYPE: tl.constexpr) -> Any:
    """The four words of the sum of NUM_VECTORS vectors: in fp32, first to last, rounded once."""
    word_0 = _sum_words(words, 0, NUM_VECTORS, DTYPE)
    word_1 = _sum_words(words, 1, NUM_VECTORS, DTYPE)
    word_2 = _sum_words(words, 2, NUM_VECTORS, DTYPE)
    word_3 = _sum_words(words, 3, NUM_VECTORS, DTYPE)
    return word_0, word_1, word_2, word_3
