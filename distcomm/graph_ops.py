"""The operators ``torch.ops.distcomm.*``: collectives as `torch.compile` sees them.

Each names its group by `GroupCoordinator.unique_name`, finds it when it runs, and does what the
group's method of that name does, so that backends are chosen at run time. They write to `out`,
`output` and broadcast's `x`, as declared, or else return a new tensor; and they claim to write to
`order`, which keeps them in their order (`call_order.py`). No gradients flow through them.

Shapes: W group size, r rank_in_group, T rows of a rank; `sizes` and splits count rows (dim 0).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import library as torch_library

from .checks import (
    check_dim,
    check_output_kind,
    check_peer,
    gathered_shapes,
    scattered_shapes,
)
from .current import get_parallel_state, is_initialized
from .errors import ArgumentError, GroupClosedError
from .group import GroupCoordinator

__all__ = ["OPERATORS"]

_library = torch_library.Library("distcomm", "DEF")

OPERATORS: list[str] = []
"""Names of all operators."""

Shape = Sequence[int]


def _operator(schema: str, fake: Callable[..., Any]) -> Callable[..., Any]:
    """Registers the decorated function, which takes the group and then the other arguments.

    Args:
        schema: as torch takes it, without `order`, which comes first, and the group's name, which
            comes last.
        fake: like the function, but gives tensors of the right shapes without values, and refuses
            arguments without sending anything.
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        name = function.__name__.removeprefix("_")
        arguments, result = schema.split(" -> ")

        def run(_: torch.Tensor, *args: Any) -> Any:
            return function(_find_group(name, args[-1]), *args[:-1])

        def run_fake(_: torch.Tensor, *args: Any) -> Any:
            return fake(_find_group(name, args[-1]), *args[:-1])

        _library.define(
            f"{name}(Tensor(order!) order, {arguments}, str group) -> {result}",
            tags=(torch.Tag.pt2_compliant_tag,),
        )
        _library.impl(name, run, "CompositeExplicitAutograd")
        _library.impl(name, torch_library.fallthrough_kernel, "Autograd")
        torch_library.register_fake(f"distcomm::{name}", run_fake, lib=_library)
        OPERATORS.append(name)
        return function

    return register


def _find_group(call: str, unique_name: str) -> GroupCoordinator:
    """The group of that name; if it is closed, it refuses calls itself."""
    name = unique_name.rpartition("#")[0]
    group = get_parallel_state().find_group(name) if is_initialized() else None
    if group is None or group.unique_name != unique_name:
        raise GroupClosedError(f"{call}: the group '{name}' that this was compiled for is closed")
    return group


# ---- reductions -------------------------------------------------------------------------------


def _like(_: GroupCoordinator, x: torch.Tensor, *__: Any) -> torch.Tensor:
    return x.new_empty(x.shape)


@_operator("Tensor x, str op -> Tensor", _like)
def _all_reduce(group: GroupCoordinator, x: torch.Tensor, op: str) -> torch.Tensor:
    return _made(group.all_reduce(x, op), x)


def _check_all_reduce(group: GroupCoordinator, out: torch.Tensor, x: torch.Tensor, _: str) -> None:
    check_output_kind("all_reduce", "out", out, [tuple(x.shape)], x, group.member)


@_operator("Tensor(out!) out, Tensor x, str op -> ()", _check_all_reduce)
def _all_reduce_into(group: GroupCoordinator, out: torch.Tensor, x: torch.Tensor, op: str) -> None:
    """`out` may be `x`."""
    group.all_reduce(x, op, out)


def _like_norm(
    group: GroupCoordinator,
    x: torch.Tensor,
    weight: torch.Tensor,
    residual: torch.Tensor | None,
    *_: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    group.check_norm(x, weight, residual)
    return x.new_empty(x.shape), x.new_empty(0 if residual is None else x.shape)


@_operator(
    "Tensor x, Tensor weight, Tensor? residual, float eps, float weight_bias -> (Tensor, Tensor)",
    _like_norm,
)
def _all_reduce_rms_norm(
    group: GroupCoordinator,
    x: torch.Tensor,
    weight: torch.Tensor,
    residual: torch.Tensor | None,
    eps: float,
    weight_bias: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The second tensor is empty without a residual, as an operator always has its results."""
    if residual is None:
        normed = group.all_reduce_rms_norm(x, weight, eps=eps, weight_bias=weight_bias)
        return normed, x.new_empty(0)
    return group.all_reduce_rms_norm(x, weight, residual, eps=eps, weight_bias=weight_bias)


def _like_share(group: GroupCoordinator, x: torch.Tensor, dim: int, _: str) -> torch.Tensor:
    return x.new_empty(group.share_shape("reduce_scatter", x, dim))


@_operator("Tensor x, int dim, str op -> Tensor", _like_share)
def _reduce_scatter(group: GroupCoordinator, x: torch.Tensor, dim: int, op: str) -> torch.Tensor:
    return group.reduce_scatter(x, dim, op)


def _check_reduce_scatter(
    group: GroupCoordinator, output: torch.Tensor, input: torch.Tensor, _: str
) -> None:
    call = "reduce_scatter_tensor"
    shapes = scattered_shapes(call, input, group.member)
    check_output_kind(call, "output", output, shapes, input, group.member)


@_operator("Tensor(out!) output, Tensor input, str op -> ()", _check_reduce_scatter)
def _reduce_scatter_tensor(
    group: GroupCoordinator, output: torch.Tensor, input: torch.Tensor, op: str
) -> None:
    group.reduce_scatter_tensor(output, input, op)


def _share_of_sizes(group: GroupCoordinator, x: torch.Tensor, sizes: Shape) -> tuple[int, ...]:
    _check_length("reduce_scatterv", sizes, group)
    return (sizes[group.rank_in_group], *x.shape[1:])


def _like_sized_share(
    group: GroupCoordinator, x: torch.Tensor, sizes: Shape, _: str
) -> torch.Tensor:
    return x.new_empty(_share_of_sizes(group, x, sizes))


@_operator("Tensor x, SymInt[] sizes, str op -> Tensor", _like_sized_share)
def _reduce_scatterv(
    group: GroupCoordinator, x: torch.Tensor, sizes: Shape, op: str
) -> torch.Tensor:
    return _made(group.reduce_scatterv(x, sizes, op=op), x)


def _check_reduce_scatterv(
    group: GroupCoordinator, out: torch.Tensor, x: torch.Tensor, sizes: Shape, _: str
) -> None:
    shape = _share_of_sizes(group, x, sizes)
    check_output_kind("reduce_scatterv", "out", out, [shape], x, group.member)


@_operator("Tensor(out!) out, Tensor x, SymInt[] sizes, str op -> ()", _check_reduce_scatterv)
def _reduce_scatterv_into(
    group: GroupCoordinator, out: torch.Tensor, x: torch.Tensor, sizes: Shape, op: str
) -> None:
    group.reduce_scatterv(x, sizes, out, op)


# ---- data movement ----------------------------------------------------------------------------


def _like_gathered(group: GroupCoordinator, x: torch.Tensor, dim: int) -> torch.Tensor:
    shape = list(x.shape)
    shape[check_dim("all_gather", dim, x.dim(), group.member)] *= group.world_size
    return x.new_empty(shape)


@_operator("Tensor x, int dim -> Tensor", _like_gathered)
def _all_gather(group: GroupCoordinator, x: torch.Tensor, dim: int) -> torch.Tensor:
    return _made(group.all_gather(x, dim), x)


def _check_all_gather(group: GroupCoordinator, output: torch.Tensor, input: torch.Tensor) -> None:
    shapes = gathered_shapes(input, group.world_size)
    check_output_kind("all_gather_into_tensor", "output", output, shapes, input, group.member)


@_operator("Tensor(out!) output, Tensor input -> ()", _check_all_gather)
def _all_gather_into_tensor(
    group: GroupCoordinator, output: torch.Tensor, input: torch.Tensor
) -> None:
    """`input` may be this rank's share of `output`."""
    group.all_gather_into_tensor(output, input)


def _rows_of_all(group: GroupCoordinator, x: torch.Tensor, sizes: Shape) -> tuple[int, ...]:
    _check_length("all_gatherv", sizes, group)
    return (sum(sizes), *x.shape[1:])


def _like_all_rows(group: GroupCoordinator, x: torch.Tensor, sizes: Shape) -> torch.Tensor:
    return x.new_empty(_rows_of_all(group, x, sizes))


@_operator("Tensor x, SymInt[] sizes -> Tensor", _like_all_rows)
def _all_gatherv(group: GroupCoordinator, x: torch.Tensor, sizes: Shape) -> torch.Tensor:
    return _made(group.all_gatherv(x, sizes), x)


def _check_all_gatherv(
    group: GroupCoordinator, out: torch.Tensor, x: torch.Tensor, sizes: Shape
) -> None:
    shape = _rows_of_all(group, x, sizes)
    check_output_kind("all_gatherv", "out", out, [shape], x, group.member)


@_operator("Tensor(out!) out, Tensor x, SymInt[] sizes -> ()", _check_all_gatherv)
def _all_gatherv_into(
    group: GroupCoordinator, out: torch.Tensor, x: torch.Tensor, sizes: Shape
) -> None:
    group.all_gatherv(x, sizes, out)


def _check_all_to_all(
    group: GroupCoordinator, output: torch.Tensor, input: torch.Tensor, *_: Shape | None
) -> None:
    shapes = [(output.shape[0], *input.shape[1:])] if output.dim() and input.dim() else []
    check_output_kind("all_to_all_single", "output", output, shapes, input, group.member)


@_operator(
    "Tensor(out!) output, Tensor input, SymInt[]? output_splits, SymInt[]? input_splits -> ()",
    _check_all_to_all,
)
def _all_to_all_single(
    group: GroupCoordinator,
    output: torch.Tensor,
    input: torch.Tensor,
    output_splits: Shape | None,
    input_splits: Shape | None,
) -> None:
    group.all_to_all_single(output, input, output_splits, input_splits)


def _check_broadcast(group: GroupCoordinator, _: torch.Tensor, src: int) -> None:
    check_peer("broadcast", "src", src, group.member)


@_operator("Tensor(out!) x, int src -> ()", _check_broadcast)
def _broadcast(group: GroupCoordinator, x: torch.Tensor, src: int) -> None:
    group.broadcast(x, src)


# ---- inside -----------------------------------------------------------------------------------


def _made(result: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """`result`, or a copy where it is the argument itself, as in a group of one."""
    return result.clone(memory_format=torch.contiguous_format) if result is x else result


def _check_length(call: str, sizes: Shape, group: GroupCoordinator) -> None:
    if len(sizes) != group.world_size:
        raise ArgumentError(
            "sizes",
            f"{group.world_size} row counts, one per rank",
            f"{len(sizes)} of them",
            call=call,
            member=group.member,
        )
