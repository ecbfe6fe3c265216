"""Which ranks form which group: sizes in, rank lists out.

Pure integers: nothing here starts a process, touches a device or imports torch. Every axis is a
``(size, stride)`` pair over the global ranks, so each question about one rank is answered from
that rank alone, whatever the size of the world.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeGuard

from .errors import LayoutError

__all__ = ["AXES", "ParallelLayout", "format_ranks"]

AXES = ("tp", "cp", "attn_tp", "pp", "dp", "ep", "moe_tp")
"""Every axis that has groups. tp, cp, pp, dp and ep are given; attn_tp and moe_tp follow."""

_SIZES = ("tp", "cp", "pp", "dp", "ep")
_DIMENSIONS = {
    "inside_tp": ("tp", "pp", "dp"),
    "beside_tp": ("tp", "cp", "pp", "dp"),
    "adjacent_in_tp": ("tp", "pp", "dp"),
}
_AUTOMATIC = ("inside_tp", "beside_tp")
_MAX_RANKS_PER_NODE = 8  # of the launches that errors suggest
_MAX_RANKS_SHOWN = 4  # of one group in the table
_MAX_GROUPS_SHOWN = 4  # of one axis in the table


class _Axis(NamedTuple):
    """Groups of `size` ranks, `stride` apart; the groups of one axis partition the world."""

    size: int
    stride: int

    def index_of(self, rank: int) -> int:
        return rank // self.stride % self.size

    def group_of(self, rank: int) -> range:
        return self._group_from(rank - self.index_of(rank) * self.stride)

    def group_at(self, number: int) -> range:
        """The group that is `number`-th when groups are sorted by their first rank."""
        block, offset = divmod(number, self.stride)
        return self._group_from(block * self.size * self.stride + offset)

    def split(self, inner_size: int) -> tuple[_Axis, _Axis]:
        """Neighbours within a group, `inner_size` at a time, and those that cross them."""
        outer_size = self.size // inner_size
        return _Axis(inner_size, self.stride), _Axis(outer_size, self.stride * inner_size)

    def _group_from(self, first: int) -> range:
        return range(first, first + self.size * self.stride, self.stride)


@dataclass(frozen=True)
class ParallelLayout:
    """The groups of every axis, from the sizes of a launch.

    Eight ranks, with the context-parallel ranks inside the tensor-parallel group:

    >>> layout = ParallelLayout(world_size=8, tp=8, cp=2)
    >>> layout.cp_layout
    'inside_tp'
    >>> list(layout.groups("cp"))
    [(0, 4), (1, 5), (2, 6), (3, 7)]
    >>> layout.group_of("attn_tp", 6)
    (4, 5, 6, 7)
    >>> layout.coordinates(6)
    {'tp': 6, 'cp': 1, 'attn_tp': 2, 'pp': 0, 'dp': 0, 'ep': 0, 'moe_tp': 6}

    The same sizes on 16 ranks put cp beside tp:

    >>> print(ParallelLayout(world_size=16, tp=8, cp=2))
    16 ranks, cp beside_tp, order tp-cp-pp-dp
    axis     size  groups  ranks
    tp          8       2  [0..7] [8..15]
    cp          2       8  [0,8] [1,9] [2,10] ... [7,15]
    attn_tp     8       2  [0..7] [8..15]
    pp          1      16  [0] [1] [2] ... [15]
    dp          1      16  [0] [1] [2] ... [15]
    ep          1      16  [0] [1] [2] ... [15]
    moe_tp      8       2  [0..7] [8..15]

    Args:
        world_size: number of ranks.
        tp: tensor-parallel size.
        cp: context-parallel size; divides `tp` for ``"inside_tp"``.
        pp: pipeline-parallel size.
        dp: data-parallel size.
        ep: expert-parallel size, a divisor of `tp`. A group of moe_tp = tp / ep ranks is
            contiguous in the tp group, and ep groups are strided by moe_tp.
        order: tp, cp, pp and dp, fastest-varying first. cp has to be named but has no effect
            for ``"inside_tp"``, where it is no dimension of its own.
        cp_layout: ``"inside_tp"``: world_size = tp·pp·dp; attn_tp = tp / cp ranks are contiguous
            in the tp group, and cp groups are strided by attn_tp. ``"beside_tp"``:
            world_size = tp·cp·pp·dp, and attn_tp groups are the tp groups. ``"auto"`` becomes
            the one of these two whose product is the world size, ``"inside_tp"`` if cp is 1. The
            attribute is never ``"auto"``. ``"adjacent_in_tp"``: as ``"inside_tp"``, the other way
            round: cp groups are contiguous, and attn_tp groups are strided by cp.

    Raises:
        LayoutError: the sizes don't fit together or don't fit the world size. The message has
            both products and launches that work.
    """

    world_size: int
    tp: int = 1
    cp: int = 1
    pp: int = 1
    dp: int = 1
    ep: int = 1
    order: str = "tp-cp-pp-dp"
    cp_layout: str = "auto"
    _axes: dict[str, _Axis] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        self._check_arguments()
        object.__setattr__(self, "cp_layout", self._resolved_cp_layout())
        object.__setattr__(self, "_axes", self._strided_axes())

    def size(self, axis: str) -> int:
        """Number of ranks in each group of `axis`."""
        return self._axis(axis).size

    def groups(self, axis: str) -> Iterator[tuple[int, ...]]:
        """All groups of `axis`, sorted by first rank; every rank is in exactly one.

        Lazy: taking the first few costs nothing of the rest.
        """
        found = self._axis(axis)
        return (tuple(found.group_at(i)) for i in range(self.world_size // found.size))

    def group_of(self, axis: str, rank: int) -> tuple[int, ...]:
        """The ranks of `rank`'s group of `axis`, ascending, in time proportional to its size."""
        return tuple(self._axis(axis).group_of(self._checked_rank(rank)))

    def groups_of(self, rank: int) -> dict[str, tuple[int, ...]]:
        """For every axis, the ranks of `rank`'s group, in time proportional to their number."""
        rank = self._checked_rank(rank)
        # Listed once where axes coincide: attn_tp and moe_tp are often tp itself.
        listed = {axis: tuple(axis.group_of(rank)) for axis in set(self._axes.values())}
        return {name: listed[axis] for name, axis in self._axes.items()}

    def coordinates(self, rank: int) -> dict[str, int]:
        """For every axis, the index of `rank` inside its group."""
        rank = self._checked_rank(rank)
        return {name: axis.index_of(rank) for name, axis in self._axes.items()}

    def table(self) -> str:
        """Axes, sizes and groups as plain text; a few lines even for a huge world."""
        rows = [("axis", "size", "groups", "ranks")]
        for name, axis in self._axes.items():
            count = self.world_size // axis.size
            rows.append((name, str(axis.size), str(count), _format_groups(axis, count)))
        w = [max(len(row[i]) for row in rows) for i in range(3)]
        lines = [f"{n:<{w[0]}}  {s:>{w[1]}}  {c:>{w[2]}}  {ranks}" for n, s, c, ranks in rows]
        title = f"{self.world_size} ranks, cp {self.cp_layout}, order {self.order}"
        return "\n".join([title, *lines])

    def __str__(self) -> str:
        return self.table()

    def _axis(self, axis: str) -> _Axis:
        if axis not in AXES:
            raise LayoutError(f"axis must be one of {', '.join(AXES)}; got {axis!r} [{self!r}]")
        return self._axes[axis]

    def _checked_rank(self, rank: int) -> int:
        if not _is_int(rank) or not 0 <= rank < self.world_size:
            raise LayoutError(
                f"rank must be an int from 0 to {self.world_size - 1}; got {rank!r} [{self!r}]"
            )
        return rank

    def _sizes(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in _SIZES}

    def _check_arguments(self) -> None:
        for name, value in {"world_size": self.world_size, **self._sizes()}.items():
            if not _is_size(value):
                raise self._misfit(f"{name} must be a positive int; got {value!r}")
        names = self.order.split("-") if isinstance(self.order, str) else []
        if sorted(names) != sorted(_DIMENSIONS["beside_tp"]):
            raise self._misfit(
                "order must name each of tp, cp, pp and dp once, fastest-varying first, "
                f"like 'tp-cp-pp-dp'; got {self.order!r}",
                "order=tp-cp-pp-dp",
            )
        if self.cp_layout not in ("auto", *_DIMENSIONS):
            choices = ", ".join(map(repr, ("auto", *_DIMENSIONS)))
            raise self._misfit(f"cp_layout must be one of {choices}; got {self.cp_layout!r}")
        if self.tp % self.ep:
            raise self._misfit(f"ep must divide tp = {self.tp}; got {self.ep}")

    def _resolved_cp_layout(self) -> str:
        allowed = _AUTOMATIC if self.cp_layout == "auto" else (self.cp_layout,)
        num_ranks = {name: _num_ranks(name, self._sizes()) for name in allowed}
        fitting = [name for name in allowed if num_ranks[name] == self.world_size]
        if not fitting:
            wanted = " or ".join(f"{_formula(n)} = {num_ranks[n]} ({n})" for n in allowed)
            raise self._misfit(f"world_size must be {wanted}; got {self.world_size}")
        if fitting[0] != "beside_tp" and self.tp % self.cp:
            raise self._misfit(f"cp must divide tp = {self.tp} for {fitting[0]}; got {self.cp}")
        return fitting[0]

    def _strided_axes(self) -> dict[str, _Axis]:
        axes, stride = {}, 1
        for name in self.order.split("-"):
            if name in _DIMENSIONS[self.cp_layout]:
                axes[name] = _Axis(getattr(self, name), stride)
                stride *= axes[name].size
        if self.cp_layout == "inside_tp":
            axes["attn_tp"], axes["cp"] = axes["tp"].split(self.tp // self.cp)
        elif self.cp_layout == "adjacent_in_tp":
            axes["cp"], axes["attn_tp"] = axes["tp"].split(self.cp)
        else:
            axes["attn_tp"] = axes["tp"]
        axes["moe_tp"], axes["ep"] = axes["tp"].split(self.tp // self.ep)
        return {name: axes[name] for name in AXES}

    def _misfit(self, problem: str, *changes: str) -> LayoutError:
        """The error for arguments that make no layout; `changes` are part of every remedy."""
        sizes = ", ".join(f"{name}={size!r}" for name, size in self._sizes().items())
        launches = "".join(f"\n  {launch}" for launch in self._working_launches(changes))
        return LayoutError(f"{problem} [{sizes}]\nLaunches that work, nearest first:{launches}")

    def _working_launches(self, changes: tuple[str, ...]) -> list[str]:
        """For each cp_layout, what the sizes need and what a dp near the world size needs."""
        given, found = self._sizes(), set()
        for cp_layout in self._distinct_cp_layouts():
            sizes = _nearest_valid_sizes(cp_layout, given)
            needed = _num_ranks(cp_layout, sizes)
            wanted = self.world_size if _is_size(self.world_size) else needed
            for dp in (sizes["dp"], max(1, wanted * sizes["dp"] // needed)):
                sizes["dp"] = dp
                changed = [f"{n}={sizes[n]}" for n in _SIZES if repr(sizes[n]) != repr(given[n])]
                if self.cp_layout not in ("auto", cp_layout):
                    changed.append(f"cp_layout={cp_layout}")
                num_ranks = _num_ranks(cp_layout, sizes)
                text = _format_launch(cp_layout, num_ranks, [*changed, *changes])
                found.add((abs(num_ranks - wanted), len(changed), text))
        return [text for *_, text in sorted(found)]

    def _distinct_cp_layouts(self) -> Iterable[str]:
        """For cp = 1 both are the same."""
        given = self.cp_layout if self.cp_layout in (*_DIMENSIONS,) else "inside_tp"
        if self.cp == 1:
            return [given]
        return _AUTOMATIC if given in _AUTOMATIC else [given, "beside_tp"]


def _is_int(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_size(value: object) -> TypeGuard[int]:
    return _is_int(value) and value > 0


def _num_ranks(cp_layout: str, sizes: Mapping[str, int]) -> int:
    return math.prod(sizes[name] for name in _DIMENSIONS[cp_layout])


def _nearest_valid_sizes(cp_layout: str, given: Mapping[str, int]) -> dict[str, int]:
    sizes = {name: size if _is_size(size) else 1 for name, size in given.items()}
    divisors_needed = ("ep",) if cp_layout == "beside_tp" else ("ep", "cp")
    for name in divisors_needed:
        sizes[name] = _nearest_divisor(sizes["tp"], sizes[name])
    return sizes


def _nearest_divisor(number: int, wanted: int) -> int:
    if number % wanted == 0:
        return wanted
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return min({*small, *(number // d for d in small)}, key=lambda d: (abs(d - wanted), d))


def _formula(cp_layout: str) -> str:
    return "·".join(_DIMENSIONS[cp_layout])


def _format_launch(cp_layout: str, num_ranks: int, changes: list[str]) -> str:
    per_node = max(n for n in range(1, _MAX_RANKS_PER_NODE + 1) if num_ranks % n == 0)
    num_nodes = num_ranks // per_node
    nodes = f"--nnodes {num_nodes} " if num_nodes > 1 else ""
    using = f" with {', '.join(changes)}" if changes else ""
    return (
        f"{cp_layout}, {_formula(cp_layout)} = {num_ranks} ranks: "
        f"torchrun {nodes}--nproc-per-node {per_node} ...{using}"
    )


def _format_groups(axis: _Axis, count: int) -> str:
    if count <= _MAX_GROUPS_SHOWN:
        return " ".join(format_ranks(axis.group_at(i)) for i in range(count))
    head = [format_ranks(axis.group_at(i)) for i in range(_MAX_GROUPS_SHOWN - 1)]
    return " ".join([*head, "...", format_ranks(axis.group_at(count - 1))])


def format_ranks(ranks: Sequence[int]) -> str:
    """The ranks of a group, shortened: ``[0..7]``, ``[0,4]`` or ``[0,4,..,28]``."""
    neighbours = range(ranks[0], ranks[0] + len(ranks))
    if isinstance(ranks, range):  # compared without listing it
        are_neighbours = ranks == neighbours
    else:
        are_neighbours = tuple(ranks) == tuple(neighbours)
    if len(ranks) > 2 and are_neighbours:
        return f"[{ranks[0]}..{ranks[-1]}]"
    if len(ranks) <= _MAX_RANKS_SHOWN:
        return f"[{','.join(map(str, ranks))}]"
    return f"[{ranks[0]},{ranks[1]},..,{ranks[-1]}]"
