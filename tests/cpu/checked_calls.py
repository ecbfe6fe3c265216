"""Each collective called once and compared with a reference that is computed locally.

A `Case` and a global rank determine that rank's input, so every rank evaluates the inputs of all
others and needs no communication to know what a call must return.

Shapes: W group size; `sizes` and splits count rows.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from distcomm import GroupCoordinator
from distcomm.nccl.dtypes import REDUCTION_CODES

__all__ = ["MOVED_DTYPES", "MOVEMENTS", "REDUCED", "REDUCTIONS", "SHAPES", "Case", "checked_call"]

SHAPES = [(), (0,), (1,), (7,), (3, 5), (2, 3, 4), (0, 3), (3, 0, 2), (4, 1)]
MOVED_DTYPES = [
    *(torch.bool, torch.int8, torch.uint8, torch.int16, torch.uint16, torch.int32, torch.int64),
    *(torch.float8_e4m3fn, torch.float8_e5m2, torch.float16, torch.bfloat16),
    *(torch.float32, torch.float64, torch.complex64, torch.complex128),
]
REDUCED = [
    (dtype, op)
    for dtype, op in REDUCTION_CODES
    if dtype not in (torch.float8_e4m3fn, torch.float8_e5m2)  # gloo can't
]
_MAX_ROWS = 3  # of one rank's uneven share


@dataclass(frozen=True)
class Case:
    """What determines a call: all ranks of the group have the same.

    Attributes:
        seed: of the values, and of the choices among a collective's arguments and variants.
        shape: that the tensors' shapes are derived from.
        op: of a reduction; its values are small integers, so that every dtype is exact. None:
            data is moved, and its values are random bits.
    """

    seed: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    op: str | None = None


def checked_call(name: str, group: GroupCoordinator, case: Case) -> None:
    """Makes one call of collective `name` on this rank, and asserts all that it promises."""
    try:
        _CALLS[name](group, case, random.Random(case.seed))
    except Exception as error:
        raise AssertionError(f"{name}, {case}, {group!r}: {error}") from error


# ---- inputs -----------------------------------------------------------------------------------


def _values(case: Case, rank: int, shape: Sequence[int]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(case.seed * 64 + rank)
    count = torch.Size(shape).numel()
    if case.op is None:
        high = 2 if case.dtype == torch.bool else 256
        num_bytes = count * case.dtype.itemsize
        bits = torch.randint(0, high, (num_bytes,), dtype=torch.uint8, generator=generator)
        return bits.view(case.dtype).reshape(shape)
    # With W <= 8 all sums and products are exact even in bfloat16; int8's products wrap around.
    small = [1, 2, -1] if case.op == "prod" else [-4, -2, -1, 0, 1, 3, 4]
    if case.dtype == torch.uint8:
        small = [abs(value) for value in small]
    chosen = torch.randint(0, len(small), (count,), generator=generator)
    return torch.tensor(small)[chosen].to(case.dtype).reshape(shape)


def _transposed(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(0, -1).contiguous().transpose(0, -1) if x.dim() > 1 else x


def _sliced(x: torch.Tensor) -> torch.Tensor:
    if x.dim() == 0:
        return x
    wide = _poison((*x.shape[:-1], 2 * x.shape[-1] + 1), x.dtype)
    return wide[..., 1::2].copy_(x)


def _expanded(x: torch.Tensor) -> torch.Tensor:
    return x[:1].expand(x.shape) if x.dim() and len(x) else x


_ARRANGEMENTS = [torch.clone, _transposed, _sliced, _expanded]


def _input(case: Case, rank: int, shape: Sequence[int]) -> torch.Tensor:
    """Rank `rank`'s input; how it lies in memory differs from rank to rank."""
    arrange = _ARRANGEMENTS[(case.seed + rank) % len(_ARRANGEMENTS)]
    return arrange(_values(case, rank, shape))


def _inputs(group: GroupCoordinator, case: Case, shape: Sequence[int]) -> list[torch.Tensor]:
    """The inputs of all ranks of the group, of the same shape."""
    return [_input(case, rank, shape) for rank in group.ranks]


def _poison(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """A tensor of values that no result has but by chance."""
    count = torch.Size(shape).numel()
    byte = 1 if dtype == torch.bool else 0xA5
    return torch.full((count * dtype.itemsize,), byte, dtype=torch.uint8).view(dtype).reshape(shape)


def _with_a_dim(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape or (1,)


def _any_dim(shape: Sequence[int], choose: random.Random) -> int:
    return choose.randrange(-len(shape), len(shape))


def _any_sizes(group: GroupCoordinator, choose: random.Random) -> list[int]:
    return [choose.randrange(_MAX_ROWS + 1) for _ in group.ranks]


# ---- expectations -----------------------------------------------------------------------------


def _reduced(inputs: list[torch.Tensor], op: str | None) -> torch.Tensor:
    dtype = inputs[0].dtype
    exact = torch.stack(
        [x.to(torch.float64 if dtype.is_floating_point else x.dtype) for x in inputs]
    )
    if op == "avg":
        return exact.sum(0).to(dtype) / len(inputs)
    if op in ("max", "min"):
        return getattr(exact, f"a{op}")(0).to(dtype)
    assert op is not None
    return getattr(exact, op)(0).to(dtype)


def _bytes(x: torch.Tensor) -> torch.Tensor:
    return x.clone(memory_format=torch.contiguous_format).reshape(x.numel()).view(torch.uint8)


def _storage(x: torch.Tensor) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8).set_(x.untyped_storage())


def _assert_equal(actual: torch.Tensor | None, expected: torch.Tensor) -> None:
    assert actual is not None, "returned None"
    assert actual.shape == expected.shape, f"shape {actual.shape}, not {expected.shape}"
    assert actual.dtype == expected.dtype, f"dtype {actual.dtype}, not {expected.dtype}"
    same = torch.equal(_bytes(actual), _bytes(expected))
    assert same, f"returned\n{actual}\nnot\n{expected}"


def _assert_new(
    actual: torch.Tensor | None, expected: torch.Tensor, x: torch.Tensor, group: GroupCoordinator
) -> None:
    _assert_equal(actual, expected)
    if actual is not None and group.world_size > 1 and actual.numel():
        assert actual.is_contiguous(), f"strides {actual.stride()} of shape {actual.shape}"
        shared = actual.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
        assert not shared, "the result shares memory with the input"


def _assert_written(actual: object, out: torch.Tensor, expected: torch.Tensor) -> None:
    assert actual is out, "did not return its output"
    _assert_equal(out, expected)


@contextmanager
def _unchanged(*tensors: torch.Tensor) -> Iterator[None]:
    """The tensors, and the memory between their elements, stay as they are."""
    before = [_storage(x).clone() for x in tensors]
    yield
    for x, then in zip(tensors, before, strict=True):
        assert torch.equal(_storage(x), then), f"changed an input of strides {x.stride()}"


# ---- reductions -------------------------------------------------------------------------------


def _all_reduce(group: GroupCoordinator, case: Case, choose: random.Random) -> None:
    inputs = _inputs(group, case, case.shape)
    x, expected = inputs[group.rank_in_group], _reduced(inputs, case.op)
    variant = choose.choice(["new", "out", "in place"])
    if variant == "in place":
        x = x.contiguous().clone(memory_format=torch.contiguous_format)
        _assert_written(group.all_reduce(x, case.op, out=x), x, expected)
        return
    with _unchanged(x):
        if variant == "out":
            out = _poison(case.shape, case.dtype)
            _assert_written(group.all_reduce(x, case.op, out), out, expected)
        else:
            _assert_new(group.all_reduce(x, case.op), expected, x, group)


def _reduce(group: GroupCoordinator, case: Case, choose: random.Random) -> None:
    inputs = _inputs(group, case, case.shape)
    x, expected = inputs[group.rank_in_group], _reduced(inputs, case.op)
    dst = choose.randrange(group.world_size)
    is_dst = group.rank_in_group == dst
    with _unchanged(x):
        if choose.random() < 0.5:
            result = group.reduce(x, dst, case.op)
            if is_dst:
                _assert_new(result, expected, x, group)
        else:
            out = _poison(case.shape, case.dtype)
            result = group.reduce(x, dst, case.op, out)
            wanted = expected if is_dst else _poison(case.shape, case.dtype)
            _assert_written(result if is_dst else out, out, wanted)
    assert is_dst or result is None, "returned a tensor on another rank than dst"


def _reduce_scatter(group: GroupCoordinator, case: Case, choose: random.Random) -> None:
    shape = list(_with_a_dim(case.shape))
    dim = _any_dim(shape, choose)
    share = shape[dim]
    shape[dim] *= group.world_size
    inputs = _inputs(group, case, shape)
    x = inputs[group.rank_in_group]
    expected = _reduced(inputs, case.op).narrow(dim, group.rank_in_group * share, share)
    with _unchanged(x):
        _assert_new(group.reduce_scatter(x, dim, case.op), expected, x, group)


def _reduce_scatter_tensor(group: GroupCoordinator, case: Case, choose: random.Random) -> None:
    share = case.shape
    if choose.random() < 0.5:
        shape = (group.world_size, *share)
    else:
        share = _with_a_dim(share)
        shape = (group.world_size * share[0], *share[1:])
    inputs = _inputs(group, case, shape)
    x = inputs[group.rank_in_group]
    pieces = _reduced(inputs, case.op).reshape(group.world_size, *share)
    output = _poison(share, case.dtype)
    with _unchanged(x):
        result = group.reduce_scatter_tensor(output, x, case.op)
    _assert_written(result, output, pieces[group.rank_in_group])


def _reduce_scatterv(group: GroupCoordinator, case: Case, choose: random.Random) -> None:
    sizes = _any_sizes(group, choose)
    inputs = _inputs(group, case, (sum(sizes), *case.shape[1:]))
    x = inputs[group.rank_in_group]
    expected = _reduced(inputs, case.op).split(sizes)[group.rank_in_group]
    with _unchanged(x):
        if choose.random() < 0.5:
            _assert_new(group.reduce_scatterv(x, sizes, op=case.op), expected, x, group)
        else:
            out = _poison(expected.shape, case.dtype)
            _assert_written(group.reduce_scatterv(x, sizes, out, case.op), out, expected)


# ---- data movement ----------------------------------------------------------------------------


def _all_gather(group: GroupCoordinator, case: Case, choose: random.Random) -> None:
    shape = _with_a_dim(case.shape)
    dim = _any_dim(shape, choose)
    inputs = _inputs(group, case, shape)
    x = inputs[group.rank_in_group]
    with _unchanged(x):
        _assert_new(group.all_gather(x, dim), torch.cat(inputs, dim), x, group)


def _gathering(
    group: GroupCoordinator, case: Case, choose: random.Random
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Output, input and expected output of an `all_gather_into_tensor`, in one of its forms."""
    inputs = _inputs(group, case, case.shape)
    x = inputs[group.rank_in_group]
    expected = torch.stack(inputs)
    if case.shape and choose.random() < 0.5:
        expected = torch.cat(inputs)
    output = _poison(expected.shape, case.dtype)
    if choose.random() < 0.3:  # the input is this rank's share of the output
        x = output.view(group.world_size, *case.shape)[group.rank_in_group].copy_(x)
    return output, x, expected


def _all_gather_into_tensor(group: GroupCoordinator, case: Case, choose: random.Random) -> None:
    output, x, expected = _gathering(group, case, choose)
    before = x.clone()
    _assert_written(group.all_gather_into_tensor(output, x), output, expected)
    _assert_equal(x, before)


def _cp_all_gather_async(group: GroupCoordinator, case: Case, choose: random.Random) -> None:
    output, x, expected = _gathering(group, case, choose)
    before = x.clone()
    handle = group.cp_all_gather_into_tensor_async(output, x, None)
    for _ in range(choose.choice([1, 2])):
        handle.wait()
    assert handle.is_completed()
    _assert_equal(output, expected)
    _assert_equal(x, before)


def _all_gatherv(group: GroupCoordinator, case: Case, choose: random.Random) -> None:
    sizes = _any_sizes(group, choose)
    inputs = [
        _input(case, rank, (size, *case.shape[1:]))
        for rank, size in zip(group.ranks, sizes, strict=True)
    ]
    x, expected = inputs[group.rank_in_group], torch.cat(inputs)
    with _unchanged(x):
        if choose.random() < 0.5:
            _assert_new(group.all_gatherv(x, sizes), expected, x, group)
        else:
            out = _poison(expected.shape, case.dtype)
            _assert_written(group.all_gatherv(x, sizes, out), out, expected)


def _all_to_all_single(group: GroupCoordinator, case: Case, choose: random.Random) -> None:
    world_size, own = group.world_size, group.rank_in_group
    even = choose.random() < 0.5
    if even:
        rows = [[_with_a_dim(case.shape)[0]] * world_size] * world_size
    else:
        rows = [_any_sizes(group, choose) for _ in group.ranks]  # rows[i][j]: from i to j
    inputs = [
        _input(case, rank, (sum(rows[i]), *case.shape[1:])) for i, rank in enumerate(group.ranks)
    ]
    x = inputs[own]
    expected = torch.cat([inputs[i].split(rows[i])[own] for i in range(world_size)])
    output = _poison(expected.shape, case.dtype)
    input_splits, output_splits = rows[own], [rows[i][own] for i in range(world_size)]
    with _unchanged(x):
        result = group.all_to_all_single(
            output,
            x,
            None if even and choose.random() < 0.5 else output_splits,
            None if even and choose.random() < 0.5 else input_splits,
        )
    _assert_written(result, output, expected)


def _broadcast(group: GroupCoordinator, case: Case, choose: random.Random) -> None:
    src = choose.randrange(group.world_size)
    inputs = _inputs(group, case, case.shape)
    expected = inputs[src].clone()
    x = inputs[group.rank_in_group]
    if 0 in x.stride():
        x = x.contiguous()
    before, storage_before = x.clone(), _storage(x).clone()
    _assert_written(group.broadcast(x, src), x, expected)
    x.copy_(before)
    assert torch.equal(_storage(x), storage_before), "changed memory between the elements"


def _gather(group: GroupCoordinator, case: Case, choose: random.Random) -> None:
    shape = _with_a_dim(case.shape)
    dim, dst = _any_dim(shape, choose), choose.randrange(group.world_size)
    inputs = _inputs(group, case, shape)
    x = inputs[group.rank_in_group]
    with _unchanged(x):
        result = group.gather(x, dst, dim)
    if group.rank_in_group == dst:
        _assert_new(result, torch.cat(inputs, dim), x, group)
    else:
        assert result is None, "returned a tensor on another rank than dst"


def _send_recv(group: GroupCoordinator, case: Case, choose: random.Random) -> None:
    if group.world_size == 1:
        return
    src, dst = choose.sample(range(group.world_size), 2)
    neighbours = (src + 1) % group.world_size == dst
    form = choose.choice(["shape", "out", "out and dtype"])
    expected = _input(case, group.ranks[src], case.shape)
    if group.rank_in_group == src:
        with _unchanged(expected):
            group.send(expected, None if neighbours else dst)
    elif group.rank_in_group == dst:
        source = None if neighbours else src
        if form == "shape":
            _assert_equal(group.recv(case.shape, case.dtype, source), expected)
            return
        out = _poison(case.shape, case.dtype)
        dtype = case.dtype if form == "out and dtype" else None
        _assert_written(group.recv(out, dtype, source), out, expected)


_Call = Callable[[GroupCoordinator, Case, random.Random], None]

_REDUCTION_CALLS: dict[str, _Call] = {
    "all_reduce": _all_reduce,
    "reduce": _reduce,
    "reduce_scatter": _reduce_scatter,
    "reduce_scatter_tensor": _reduce_scatter_tensor,
    "reduce_scatterv": _reduce_scatterv,
}
_MOVEMENT_CALLS: dict[str, _Call] = {
    "all_gather": _all_gather,
    "all_gather_into_tensor": _all_gather_into_tensor,
    "all_gatherv": _all_gatherv,
    "all_to_all_single": _all_to_all_single,
    "broadcast": _broadcast,
    "cp_all_gather_into_tensor_async": _cp_all_gather_async,
    "gather": _gather,
    "send and recv": _send_recv,
}
_CALLS = {**_REDUCTION_CALLS, **_MOVEMENT_CALLS}

REDUCTIONS = list(_REDUCTION_CALLS)
"""Names of the collectives that take an op."""
MOVEMENTS = list(_MOVEMENT_CALLS)
"""Names of the collectives that move data unchanged."""
