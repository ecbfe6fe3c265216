"""`place_rows` on the CPU: bit for bit, for any dtype, table and pitch."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from distcomm.errors import ArgumentError
from distcomm.kernels import place_rows

DTYPES = [
    torch.bool,
    torch.uint8,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.complex64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
]


def noise(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Random bits, among them those of NaNs."""
    if dtype == torch.bool:
        return torch.randint(0, 2, shape).bool()
    num_bytes = (*shape[:-1], shape[-1] * dtype.itemsize)
    return torch.randint(0, 256, num_bytes, dtype=torch.uint8).view(dtype)


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(torch.uint8)


def test_example() -> None:
    source, rows_to = torch.tensor([10, 11, 12, 13]), torch.tensor([3, 0, -1, 1])
    output = torch.zeros(5, dtype=torch.int64)
    place_rows(source, output, rows_to)
    assert output.tolist() == [11, 13, 0, 10, 0]
    output = torch.zeros(5, dtype=torch.int64)
    place_rows(source, output, rows_to, slots=torch.tensor([4, -1, 2, 0]))
    assert output.tolist() == [10, 0, 0, 0, 11]


@pytest.mark.parametrize("table_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("row_shape", [(8,), (3, 5), (2, 1, 4)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_keep_their_bits(
    dtype: torch.dtype, row_shape: tuple[int, ...], table_dtype: torch.dtype
) -> None:
    source, before = noise((20, *row_shape), dtype), noise((30, *row_shape), dtype)
    rows_to = torch.randperm(25)[:20].to(table_dtype)
    rows_to[[3, 7]] = -1
    slots = (torch.randperm(34)[:25] - 4).to(table_dtype)
    for table in (None, slots):
        output, expected = before.clone(), bits(before)
        place_rows(source, output, rows_to, table)
        for i, row in enumerate(rows_to.tolist()):
            to = row if table is None or row < 0 else int(table[row])
            if to >= 0:
                expected[to] = bits(source)[i]
        assert torch.equal(bits(output), expected)


@pytest.mark.parametrize(
    "view",
    [
        lambda cache: cache[:, 0],
        lambda cache: cache[:, 1, :3],
        lambda cache: cache[2:, 1],
        lambda cache: cache[::2, 0],
    ],
)
def test_output_may_be_pitched(view: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """As one of K and V in a cache [S, 2, H, D]: nothing else in the cache changes."""
    cache = noise((12, 2, 4, 8), torch.bfloat16)
    expected = cache.clone()
    source = noise(tuple(view(cache)[:3].shape), torch.bfloat16)
    place_rows(source, view(cache), torch.tensor([4, 0, 2]))
    view(expected)[[4, 0, 2]] = source
    assert torch.equal(bits(cache), bits(expected))


@pytest.mark.parametrize(
    "source",
    [
        torch.arange(24.0).view(4, 6)[:, 1:4],
        torch.arange(12.0).view(3, 4).t(),
        torch.arange(24.0).view(8, 3)[::2],
        torch.arange(3.0).expand(4, 3),
        torch.arange(12.0).view(4, 3).requires_grad_(),
    ],
)
def test_source_may_be_any_view(source: torch.Tensor) -> None:
    output = torch.zeros(4, 3)
    place_rows(source, output, torch.tensor([1, 0, 3, 2]))
    assert torch.equal(output, source.detach()[[1, 0, 3, 2]])


def test_lazy_conjugate_is_placed_as_its_values() -> None:
    source = torch.tensor([[1 + 2j], [3 - 1j]]).conj()
    output = torch.zeros(2, 1, dtype=source.dtype)
    place_rows(source, output, torch.tensor([1, 0]))
    assert output.tolist() == [[3 + 1j], [1 - 2j]]


def test_nothing_to_place() -> None:
    output = torch.ones(3, 2)
    place_rows(torch.empty(0, 2), output, torch.empty(0, dtype=torch.int32))
    place_rows(torch.zeros(2, 2), output, torch.tensor([-1, -1]))
    place_rows(torch.zeros(2, 0), torch.zeros(3, 0), torch.tensor([0, 1]))
    assert torch.equal(output, torch.ones(3, 2))


@pytest.mark.parametrize("slots", [None, torch.tensor([0, 9])])
def test_row_beyond_the_output(slots: torch.Tensor | None) -> None:
    with pytest.raises(IndexError):
        place_rows(torch.zeros(2, 2), torch.zeros(3, 2), torch.tensor([0, 3]), slots)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"output": torch.zeros(3, 3)}, "output must be of rows like those of shape [2, 2]"),
        ({"output": torch.zeros(3, 2).half()}, "output must be of dtype torch.float32"),
        ({"output": torch.zeros(2, 3).t()}, "in one piece each"),
        ({"output": torch.zeros(2).expand(3, 2)}, "share no memory"),
        ({"output": torch.zeros(3, 2, device="meta")}, "output must be on cpu; got meta"),
        ({"rows_to": torch.tensor([1])}, "rows_to must be of shape [2]"),
        ({"rows_to": torch.tensor([1.0, 0.0])}, "rows_to must be int32 or int64"),
        ({"slots": torch.tensor([[1]])}, "slots must be int32 or int64 of one dim"),
    ],
)
def test_wrong_arguments_are_named(changes: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "source": torch.zeros(2, 2),
        "output": torch.zeros(3, 2),
        "rows_to": torch.tensor([0, 1]),
    }
    with pytest.raises(ArgumentError, match=re.escape(message)):
        place_rows(**arguments | changes)
