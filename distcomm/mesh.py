"""torch's `DeviceMesh`, in and out: a layout from a mesh, and a mesh of our groups.

The dims of a mesh lie side by side: each rank has one place in it. Our axes can do so in a few ways
only, because cp and attn_tp may be parts of tp, and ep and moe_tp always are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from .errors import ArgumentError
from .layout import AXES, ParallelLayout

if TYPE_CHECKING:
    from .group import GroupCoordinator

__all__ = ["describe_mesh", "device_of_mesh", "layout_of_mesh", "make_device_mesh"]

_CALL = "init_distributed"
_DEFAULT_ORDER = "tp-cp-pp-dp"
_SAYS_TP = (("tp",), ("attn_tp",), ("ep", "moe_tp"))  # dims of a mesh that tell the size of tp
_TP_SPLITS = (("cp", "attn_tp"), ("ep", "moe_tp"))  # outer part first
_CP_IN_TP = ("inside_tp", "adjacent_in_tp")
_MAX_RANKS_SHOWN = 16

# ---- a mesh in ------------------------------------------------------------------------------


def describe_mesh(mesh: object) -> str:
    """A mesh as a text, which is the same on all ranks that have the same one. Never raises."""
    if not isinstance(mesh, DeviceMesh):
        return "None" if mesh is None else f"a {type(mesh).__name__}"
    names = mesh.mesh_dim_names or [f"dim {i}" for i in range(mesh.ndim)]
    dims = ", ".join(f"{name}={size}" for name, size in zip(names, mesh.shape, strict=True))
    if not dist.is_initialized():
        return f"DeviceMesh({dims}) of a job that has ended"
    return f"DeviceMesh({dims}) of {mesh.device_type} ranks {_shown(mesh.mesh)}"


def device_of_mesh(mesh: DeviceMesh | None, device: str) -> str:
    """The `device` that `init_distributed` was given; the mesh's, if it was left to others."""
    return mesh.device_type if device == "auto" and isinstance(mesh, DeviceMesh) else device


def layout_of_mesh(
    mesh: DeviceMesh,
    world_size: int,
    sizes: Mapping[str, int],
    order: str = _DEFAULT_ORDER,
    cp_layout: str = "auto",
) -> ParallelLayout:
    """The layout whose groups are those of a mesh of all ranks. Not collective.

    Dims have the names of axes and come in any order. ``"cp"`` beside ``"tp"`` is cp_layout
    ``"beside_tp"``, and beside ``"attn_tp"`` it is ``"inside_tp"``. ``"ep"`` and ``"moe_tp"``
    stand in the place of ``"tp"``, which is their product.

    Args:
        mesh: its ranks are those of torch's default process group.
        world_size: number of ranks in the job.
        sizes, order, cp_layout: as `ParallelLayout` takes them. Sizes are 1 or the mesh's, and
            `order` is the default or fits the mesh; cp or ep inside tp can be given where the
            mesh doesn't name them.

    Raises:
        ArgumentError: no layout has such a mesh, or another argument contradicts it.
        LayoutError: the sizes don't fit together.
    """
    ranks, names = _checked_ranks(mesh, world_size), list(mesh.mesh_dim_names or ())
    dims = dict(zip(names, mesh.shape, strict=True))
    cp_layout = _cp_layout_of(dims, cp_layout)
    told = _sizes_of(dims, cp_layout)
    for name, size in told.items():
        if sizes.get(name, 1) not in (1, size):
            requirement = f"left out, or {size} as in {describe_mesh(mesh)}"
            raise ArgumentError(name, requirement, repr(sizes[name]), call=_CALL)
    order = _order_of(_strides(ranks, names, cp_layout), order, describe_mesh(mesh))
    layout = ParallelLayout(world_size, **{**sizes, **told}, order=order, cp_layout=cp_layout)
    expected = _ranks_along(layout, names)
    if not torch.equal(ranks, expected):
        requirement = f"one that a layout has; {layout!r} has ranks {_shown(expected)}"
        raise ArgumentError("mesh", requirement, describe_mesh(mesh), call=_CALL)
    return layout


def _checked_ranks(mesh: Any, world_size: int) -> torch.Tensor:
    """The mesh's ranks, [size of each dim]; it has all ranks, and its dims are named after axes."""
    if not isinstance(mesh, DeviceMesh):
        raise ArgumentError("mesh", "a torch DeviceMesh", describe_mesh(mesh), call=_CALL)
    names = mesh.mesh_dim_names
    if names is None or len(set(names)) < len(names) or not set(names) <= set(AXES):
        requirement = f"a DeviceMesh whose mesh_dim_names are distinct ones of {', '.join(AXES)}"
        raise ArgumentError("mesh", requirement, f"mesh_dim_names {names}", call=_CALL)
    is_alive = dist.is_initialized()
    ranks = mesh.mesh.long() if is_alive else torch.empty(0, dtype=torch.long, device="cpu")
    if not torch.equal(ranks.flatten().sort().values, torch.arange(world_size, device="cpu")):
        requirement = f"one that has each of the job's {world_size} ranks once"
        raise ArgumentError("mesh", requirement, describe_mesh(mesh), call=_CALL)
    return ranks


def _cp_layout_of(dims: Mapping[str, int], given: str) -> str:
    """The `cp_layout` that the mesh says, or the given one if it says none."""
    saying = [names for names in _SAYS_TP if any(dims.get(name, 1) > 1 for name in names)]
    if len(saying) > 1:
        requirement = "one that names tp, or its parts attn_tp and cp, or its parts ep and moe_tp"
        raise ArgumentError("mesh", requirement, f"dims {', '.join(dims)}", call=_CALL)
    if dims.get("cp", 1) == 1:
        return given
    if given == "auto":
        return "inside_tp" if "attn_tp" in dims and "tp" not in dims else "beside_tp"
    if given in _CP_IN_TP and saying not in ([], [("attn_tp",)]):
        requirement = "'beside_tp' or left out, as the mesh has cp beside tp and not beside attn_tp"
        raise ArgumentError("cp_layout", requirement, repr(given), call=_CALL)
    return given


def _sizes_of(dims: Mapping[str, int], cp_layout: str) -> dict[str, int]:
    """The sizes that the mesh says: those of cp and ep only if it names them."""
    cp, ep = dims.get("cp", 1), dims.get("ep", 1)
    tp = dims.get("tp", 1) * dims.get("attn_tp", 1) * ep * dims.get("moe_tp", 1)
    told = {
        "tp": tp * cp if cp_layout in _CP_IN_TP else tp,
        "pp": dims.get("pp", 1),
        "dp": dims.get("dp", 1),
    }
    if "cp" in dims:
        told["cp"] = cp
    if "ep" in dims or "moe_tp" in dims:
        told["ep"] = ep
    return told


def _strides(ranks: torch.Tensor, names: Sequence[str], cp_layout: str) -> dict[str, int]:
    """How far apart neighbours are, of each axis of an `order` that has more than one rank."""
    beside = {"pp", "dp"} if cp_layout in _CP_IN_TP else {"cp", "pp", "dp"}
    strides: dict[str, int] = {}
    for dim, name in enumerate(names):
        if ranks.shape[dim] > 1:
            first = ranks.movedim(dim, 0).reshape(ranks.shape[dim], -1)[:, 0]
            # One part of tp is as good as another: no other axis lies between them.
            strides[name if name in beside else "tp"] = abs(int(first[1] - first[0]))
    return strides


def _order_of(strides: Mapping[str, int], given: str, mesh: str) -> str:
    """The axes by their strides: as given or by default, if that differs in axes of one rank."""
    sorted_axes = sorted(strides, key=lambda axis: strides[axis])

    def fits(order: str) -> bool:
        return [axis for axis in order.split("-") if axis in strides] == sorted_axes

    axes = _DEFAULT_ORDER.split("-")
    own = "-".join([*sorted_axes, *(axis for axis in axes if axis not in strides)])
    own = _DEFAULT_ORDER if fits(_DEFAULT_ORDER) else own
    if given == _DEFAULT_ORDER:
        return own
    is_order = isinstance(given, str) and sorted(given.split("-")) == sorted(axes)
    if is_order and not fits(given):
        requirement = f"left out, or like {own!r} as in {mesh}"
        raise ArgumentError("order", requirement, repr(given), call=_CALL)
    return given  # `ParallelLayout` refuses what is none


# ---- a mesh out -----------------------------------------------------------------------------


def make_device_mesh(
    layout: ParallelLayout, groups: Mapping[str, GroupCoordinator], axes: Sequence[str]
) -> DeviceMesh:
    """A mesh with a dim for each of `axes`, whose process groups are the groups' `device_group`s.

    Collective as these are when first asked for. A mesh of some axes only is a slice of one of all
    ranks, as torch needs for making groups of several dims: the other dims have the `cpu_group` of
    their axes, which is there already.

    Args:
        groups: by name, those of the layout's axes and ``"world"``.
        axes: of `groups`, in the order of the mesh's dims.

    Raises:
        ArgumentError: these axes don't lie side by side. The message says what does.
    """
    _check_axes(layout, axes)
    wanted = {_ranks_of(layout, axis): axis for axis in axes if _size(layout, axis) > 1}
    dims = next((t for t in _tilings(layout) if {*wanted} <= {_ranks_of(layout, a) for a in t}), ())
    if wanted and not dims:
        raise _not_side_by_side(layout, axes)
    others = [axis for axis in dims if _ranks_of(layout, axis) not in wanted]
    names = (*others, *axes)
    mesh = DeviceMesh.from_group(
        [*(groups[axis].cpu_group for axis in others), *(groups[a].device_group for a in axes)],
        groups["world"].device.type,
        _ranks_along(layout, names),
        mesh_dim_names=names,
    )
    return mesh[tuple(axes)]


def _check_axes(layout: ParallelLayout, axes: Sequence[str]) -> None:
    known = ("world", *AXES)
    if not axes or not all(isinstance(axis, str) and axis in known for axis in axes):
        requirement = f"at least one of {', '.join(known)}"
        raise ArgumentError("axes", requirement, _listed(axes) or "none", call="device_mesh")
    for one, other in combinations(axes, 2):
        same = _size(layout, one) > 1 and _ranks_of(layout, one) == _ranks_of(layout, other)
        if one == other or same:
            actual = f"{_listed(axes)}; {one} and {other} are the same"
            raise ArgumentError("axes", "of different ranks", actual, call="device_mesh")


def _tilings(layout: ParallelLayout) -> Iterator[tuple[str, ...]]:
    """The ways to lay axes of more than one rank side by side, so that together they are all."""
    inside = layout.cp_layout in _CP_IN_TP
    outermost_first = list(reversed(layout.order.split("-")))
    for parts in (("tp",), *_TP_SPLITS[not inside :]):
        named = (
            part
            for axis in outermost_first
            if not (inside and axis == "cp")
            for part in (parts if axis == "tp" else (axis,))
        )
        yield tuple(axis for axis in named if layout.size(axis) > 1)
    yield ("world",)


def _not_side_by_side(layout: ParallelLayout, axes: Sequence[str]) -> ArgumentError:
    several = [axis for axis in axes if _size(layout, axis) > 1]
    splits = [split for split in _TP_SPLITS if {*split} & {*several}]
    if "world" in several:
        requirement = "'world' alone, which has all ranks, or other axes without it"
    elif "tp" in several:
        parts = [part for part in splits[0] if part not in several]
        instead = [new for axis in axes for new in (parts if axis == "tp" else [axis])]
        part = next(part for part in splits[0] if part in several)
        requirement = f"side by side, and {part} lies inside tp: ask for {_listed(instead)}"
    else:
        requirement = "of one way to split tp: into cp and attn_tp, or into ep and moe_tp"
    return ArgumentError("axes", requirement, _listed(axes), call="device_mesh")


# ---- ranks along axes -----------------------------------------------------------------------


def _size(layout: ParallelLayout, axis: str) -> int:
    return layout.world_size if axis == "world" else layout.size(axis)


def _ranks_of(layout: ParallelLayout, axis: str) -> tuple[int, ...]:
    """Of the first group, which tells one axis from another."""
    return tuple(range(layout.world_size)) if axis == "world" else layout.group_of(axis, 0)


def _ranks_along(layout: ParallelLayout, axes: Sequence[str]) -> torch.Tensor:
    """All ranks, [size of each axis]: an axis has the ranks of its group in their order."""
    ranks = torch.zeros([1] * len(axes), dtype=torch.long, device="cpu")
    for dim, axis in enumerate(axes):
        first = torch.tensor(_ranks_of(layout, axis), device="cpu")
        ranks = ranks + first.reshape([-1 if i == dim else 1 for i in range(len(axes))])
    return ranks


def _shown(ranks: torch.Tensor) -> str:
    """Few ranks as they are, many as the first ones and a digest of all."""
    if ranks.numel() <= _MAX_RANKS_SHOWN:
        return str(ranks.tolist())
    flat: list[int] = ranks.flatten().tolist()
    digest = hashlib.sha256(repr((ranks.shape, flat)).encode()).hexdigest()[:16]
    return f"{flat[:_MAX_RANKS_SHOWN]}... (sha256 {digest})"


def _listed(names: Sequence[object]) -> str:
    return ", ".join(map(repr, names))
