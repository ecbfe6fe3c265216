"""Argument checks that all backends share: each raises `ArgumentError` or returns what it found.

None of them communicates: a wrong argument is reported before anything has been sent.

Shapes: W group size, r rank_in_group. `sizes` and `splits` count rows, that is, dim 0.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NoReturn

import torch

from .errors import ArgumentError, GroupMember

__all__ = [
    "check_dim",
    "check_distinct",
    "check_exchange",
    "check_output",
    "check_output_kind",
    "check_peer",
    "check_shape",
    "check_sizes",
    "check_splits",
    "gathered_shapes",
    "materialized",
    "raise_bad_reduction",
    "scattered_shapes",
    "share_memory",
]


def check_peer(
    call: str, argument: str, value: int, member: GroupMember, *, other: bool = False
) -> None:
    """`value` is a rank_in_group of the group; with `other`, not this rank's own."""
    if type(value) is not int or not 0 <= value < member.world_size:
        raise ArgumentError(
            argument,
            f"a rank in the group, 0 to {member.world_size - 1}",
            repr(value),
            call=call,
            member=member,
        )
    if other and value == member.rank_in_group:
        raise ArgumentError(
            argument, "another rank than the caller's own", value, call=call, member=member
        )


def check_dim(call: str, dim: int, ndim: int, member: GroupMember) -> int:
    """`dim` as a non-negative index into `ndim` dimensions."""
    if type(dim) is not int or not -ndim <= dim < ndim:
        requirement = f"between {-ndim} and {ndim - 1}" if ndim else "given a tensor with dims"
        raise ArgumentError("dim", requirement, repr(dim), call=call, member=member)
    return dim % ndim


def check_output(
    call: str,
    argument: str,
    output: torch.Tensor,
    shapes: Collection[tuple[int, ...]],
    like: torch.Tensor,
    member: GroupMember,
) -> None:
    """`output` is contiguous, of one of `shapes`, with dtype and device of `like`."""
    check_output_kind(call, argument, output, shapes, like, member)
    if not output.is_contiguous():
        raise ArgumentError(
            argument,
            "contiguous, because it is written in place",
            f"strides {output.stride()} for shape {list(output.shape)}",
            call=call,
            member=member,
        )
    if output.is_conj() or output.is_neg():
        raise ArgumentError(
            argument,
            "no lazily conjugated or negated view, because it is written in place",
            "a view by conj() or imag",
            call=call,
            member=member,
        )


def check_output_kind(
    call: str,
    argument: str,
    output: torch.Tensor,
    shapes: Collection[tuple[int, ...]],
    like: torch.Tensor,
    member: GroupMember,
) -> None:
    """`output` is of one of `shapes`, with dtype and device of `like`."""
    if output.shape not in shapes:
        wanted = " or ".join(str(list(shape)) for shape in shapes)
        raise ArgumentError(
            argument, f"of shape {wanted}", list(output.shape), call=call, member=member
        )
    if output.dtype != like.dtype:
        raise ArgumentError(
            argument, f"of dtype {like.dtype}", output.dtype, call=call, member=member
        )
    if output.device != like.device:
        raise ArgumentError(argument, f"on {like.device}", output.device, call=call, member=member)


def check_distinct(call: str, argument: str, x: torch.Tensor, member: GroupMember) -> None:
    """No two elements of `x`, which is written in place, share memory as after `expand`."""
    if any(size > 1 and stride == 0 for size, stride in zip(x.shape, x.stride(), strict=True)):
        raise ArgumentError(
            argument,
            "a tensor whose elements don't share memory, because it is written in place",
            f"strides {x.stride()} for shape {list(x.shape)}",
            call=call,
            member=member,
        )


def check_shape(
    call: str, argument: str, shape: Sequence[int], member: GroupMember
) -> tuple[int, ...]:
    """`shape` as a tuple of non-negative sizes."""
    if any(type(size) is not int or size < 0 for size in shape):
        raise ArgumentError(
            argument, "of non-negative sizes", list(shape), call=call, member=member
        )
    return tuple(shape)


def materialized(x: torch.Tensor) -> torch.Tensor:
    """`x`, or a copy of it whose memory holds its values in order.

    Not so are strided views, and those that torch conjugates or negates only when they are read.
    """
    return x.resolve_conj().resolve_neg().contiguous()


def gathered_shapes(x: torch.Tensor, world_size: int) -> list[tuple[int, ...]]:
    """Shapes that W equal inputs like `x` may be gathered into: concatenated or stacked."""
    stacked = (world_size, *x.shape)
    return [stacked] if x.dim() == 0 else [(world_size * x.shape[0], *x.shape[1:]), stacked]


def scattered_shapes(call: str, x: torch.Tensor, member: GroupMember) -> list[tuple[int, ...]]:
    """Shapes of one rank's share of `x`, which is [W * T, ...] or [W, T, ...] of W shares."""
    world_size = member.world_size
    if x.dim() == 0 or x.shape[0] % world_size:
        raise ArgumentError(
            "input",
            f"divisible by the group size {world_size} in dim 0",
            f"shape {list(x.shape)}",
            call=call,
            member=member,
        )
    shapes = [(x.shape[0] // world_size, *x.shape[1:])]
    if x.shape[0] == world_size:
        shapes.append(tuple(x.shape[1:]))
    return shapes


def check_sizes(
    call: str, sizes: Sequence[int], x: torch.Tensor, member: GroupMember, of: str
) -> None:
    """`sizes` has W row counts, of which the ``"sum"`` or the ``"own entry"`` is x's rows."""
    world_size = member.world_size
    if len(sizes) != world_size or any(type(size) is not int or size < 0 for size in sizes):
        raise ArgumentError(
            "sizes",
            f"{world_size} non-negative row counts, one per rank",
            list(sizes),
            call=call,
            member=member,
        )
    rows = sum(sizes) if of == "sum" else sizes[member.rank_in_group]
    if _rows(call, "x", x, member) != rows:
        raise ArgumentError(
            "x",
            f"of {rows} rows, the {of} of sizes {list(sizes)}",
            f"shape {list(x.shape)}",
            call=call,
            member=member,
        )


def check_splits(
    call: str, argument: str, splits: Sequence[int] | None, x: torch.Tensor, member: GroupMember
) -> Sequence[int]:
    """Rows of `x` per rank: `splits`, checked, or equal shares for None."""
    world_size = member.world_size
    rows = _rows(call, argument.removesuffix("_splits"), x, member)
    if splits is None:
        if rows % world_size:
            raise ArgumentError(
                argument,
                f"given, because {rows} rows don't divide by the group size {world_size}",
                None,
                call=call,
                member=member,
            )
        return [rows // world_size] * world_size
    valid = len(splits) == world_size and all(type(s) is int and s >= 0 for s in splits)
    if not valid or sum(splits) != rows:
        raise ArgumentError(
            argument,
            f"{world_size} non-negative row counts with the sum {rows}",
            list(splits),
            call=call,
            member=member,
        )
    return splits


def check_exchange(
    call: str,
    output: torch.Tensor,
    input: torch.Tensor,
    receive: Sequence[int],
    send: Sequence[int],
    member: GroupMember,
) -> None:
    """What a rank sends to itself is what it gets, and `output` shares no memory with `input`.

    Args:
        receive, send: rows of `output` and of `input` per rank; checked already.
    """
    own = member.rank_in_group
    if receive[own] != send[own]:
        raise ArgumentError(
            "output_splits",
            f"{send[own]} at index {own}, the rows that the caller sends to itself",
            list(receive),
            call=call,
            member=member,
        )
    if share_memory(output, input):
        raise ArgumentError(
            "output",
            "in other memory than input, which is still read while output is written",
            "overlapping tensors",
            call=call,
            member=member,
        )


def share_memory(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether the address ranges of two tensors meet; gaps between strided elements count."""
    if not a.numel() or not b.numel():
        return False
    (a_start, a_end), (b_start, b_end) = _address_range(a), _address_range(b)
    return a_start < b_end and b_start < a_end


def _address_range(x: torch.Tensor) -> tuple[int, int]:
    start = x.data_ptr()
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return start, start + (last + 1) * x.element_size()


def _rows(call: str, argument: str, x: torch.Tensor, member: GroupMember) -> int:
    if x.dim() == 0:
        raise ArgumentError(argument, "of at least one dim", "a scalar", call=call, member=member)
    return len(x)


def raise_bad_reduction(
    call: str,
    dtype: torch.dtype,
    op: str,
    supported: Collection[tuple[torch.dtype, str]],
    member: GroupMember,
    argument: str = "x",
) -> NoReturn:
    """Says whether `op` or the dtype is what the backend can't reduce, and what it can."""
    ops = dict.fromkeys(name for _, name in supported)
    if op not in ops:
        raise ArgumentError("op", f"one of {', '.join(ops)}", repr(op), call=call, member=member)
    dtypes = ", ".join(str(each) for each, name in supported if name == op)
    requirement = f"of a dtype that '{op}' can reduce here: {dtypes}"
    raise ArgumentError(argument, requirement, dtype, call=call, member=member)
