"""Which algorithm runs a collective on GPUs: tables of sizes, made by measuring.

A table is for one kind of GPU and one group size. Sizes are those of the call's tensor argument.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from pathlib import Path
from typing import Any

from .errors import ArgumentError

__all__ = ["ALGORITHMS", "OF_SYMMETRIC", "AlgorithmTable", "SizeRanges", "load_tables", "table_for"]

ALGORITHMS: dict[str, tuple[str, ...]] = {
    "all_reduce": ("one_shot_push", "two_shot_push", "two_shot_direct", "two_shot_copy", "nccl"),
    "reduce_scatter": ("push", "nccl"),
    "all_gather": ("push", "direct", "copy", "nccl"),
    "all_reduce_rms_norm": ("one_shot_push", "two_shot_push", "nccl"),
}
"""What there is for each op; the last can do anything."""

OF_SYMMETRIC = ("two_shot_direct", "two_shot_copy", "direct", "copy")
"""Algorithms that write to the other ranks' outputs, so that these have to be symmetric."""

_KEYS = tuple(product(("eager", "captured"), ("ordinary", "symmetric"), ALGORITHMS))
_SHIPPED = Path(__file__).with_name("tables")
_TUNES = "'shipped', 'startup', 'nccl', or the path of a table"


@dataclass(frozen=True)
class SizeRanges:
    """Algorithms by size.

    Attributes:
        limits: bytes, ascending: the last size of each range but of the last one.
        algorithms: of each range, one more than limits.
    """

    limits: tuple[int, ...]
    algorithms: tuple[str, ...]

    def of(self, num_bytes: int) -> str:
        """The algorithm for a size."""
        return self.algorithms[bisect_left(self.limits, num_bytes)]

    @classmethod
    def parse(cls, op: str, rows: Any, *, symmetric: bool) -> SizeRanges:
        """From JSON: ``[[limit, algorithm], ..., [null, algorithm]]``.

        Raises:
            ArgumentError: it isn't that.
        """
        try:
            limits = tuple(limit for limit, _ in rows[:-1])
            algorithms = tuple(algorithm for _, algorithm in rows)
            valid = (
                rows[-1][0] is None
                and all(type(limit) is int and limit >= 0 for limit in limits)
                and all(before < after for before, after in pairwise(limits))
                and all(
                    algorithm in ALGORITHMS[op] and (symmetric or algorithm not in OF_SYMMETRIC)
                    for algorithm in algorithms
                )
            )
        except (TypeError, ValueError, KeyError, IndexError):
            valid = False
        if not valid:
            raise ArgumentError(
                "tune",
                f"a table whose ranges for {op} are [bytes, algorithm] in ascending order, the "
                f"last without a limit, of {', '.join(ALGORITHMS.get(op, ()))}",
                repr(rows),
                call="init_distributed",
            )
        return cls(limits, algorithms)


@dataclass(frozen=True)
class AlgorithmTable:
    """The algorithms of all ops, for calls that are eager or captured into CUDA graphs, on ordinary
    or symmetric tensors.

    Attributes:
        source: where it comes from, for people.
        ranges: by call, tensors and op: ``ranges["captured", "symmetric", "all_reduce"]``.
    """

    source: str
    ranges: Mapping[tuple[str, str, str], SizeRanges]

    @classmethod
    def parse(cls, source: str, table: Any) -> AlgorithmTable:
        """From JSON: ``{"eager": {"ordinary": {op: ranges}, "symmetric": ...}, "captured": ...}``.

        Raises:
            ArgumentError: it isn't that.
        """
        parsed = {}
        for call, tensors, op in _KEYS:
            try:
                rows = table[call][tensors][op]
            except (TypeError, KeyError) as error:
                raise ArgumentError(
                    "tune",
                    f"a table with ranges for {call} calls of {op} on {tensors} tensors",
                    f"one without {error}",
                    call="init_distributed",
                ) from error
            parsed[call, tensors, op] = SizeRanges.parse(op, rows, symmetric=tensors == "symmetric")
        return cls(source, parsed)

    @classmethod
    def of(cls, source: str, ranges: Mapping[str, SizeRanges]) -> AlgorithmTable:
        """The same for all calls and tensors."""
        return cls(source, {key: ranges[key[2]] for key in _KEYS})


def load_tables(tune: str) -> list[dict[str, Any]]:
    """The tables that `tune` names, as JSON, for `table_for`.

    Args:
        tune: ``"shipped"`` for those that come with this package, the path of a file as `python -m
            distcomm.bench tune` writes it, or ``"nccl"`` or ``"startup"``, which name none.

    Raises:
        ArgumentError: it is none of these, or a file can't be read, or has no tables.
    """
    if not isinstance(tune, str) or not tune:
        raise ArgumentError("tune", _TUNES, repr(tune), call="init_distributed")
    if tune in ("nccl", "startup"):
        return []
    paths = sorted(_SHIPPED.glob("*.json")) if tune == "shipped" else [Path(tune)]
    return [table for path in paths for table in _tables_of(path)]


def table_for(
    tune: str, tables: Sequence[Mapping[str, Any]], gpu: str, world_size: int
) -> AlgorithmTable:
    """The table to use: a measured one, or else a careful one.

    Args:
        tune, tables: as for `load_tables`, and what that gave.
        gpu: as CUDA names it.
        world_size: of the group.
    """
    if tune == "nccl":
        return _NCCL
    for table in tables:
        if (table.get("gpu"), table.get("world_size")) == (gpu, world_size):
            return AlgorithmTable.parse(f"{tune}: {gpu} x {world_size}", table)
    return _CAREFUL


def _tables_of(path: Path) -> list[dict[str, Any]]:
    try:
        tables = json.loads(path.read_text())["tables"]
        valid = all(isinstance(table, dict) for table in tables)
        problem = "its tables are no objects"
    except (OSError, ValueError, KeyError, TypeError) as error:
        valid, problem = False, repr(error)
    if not valid:
        raise ArgumentError("tune", _TUNES, f"{path}: {problem}", call="init_distributed")
    for table in tables:
        AlgorithmTable.parse(str(path), table)
    return list(tables)


_CAREFUL_RANGES = {
    "all_reduce": SizeRanges((64 << 10, 1 << 20), ("one_shot_push", "two_shot_push", "nccl")),
    "reduce_scatter": SizeRanges((1 << 20,), ("push", "nccl")),
    "all_gather": SizeRanges((64 << 10,), ("push", "nccl")),
    "all_reduce_rms_norm": SizeRanges(
        (64 << 10, 1 << 20), ("one_shot_push", "two_shot_push", "nccl")
    ),
}
_CAREFUL = AlgorithmTable.of("no measurements for this GPU", _CAREFUL_RANGES)
_NCCL_RANGES = {op: SizeRanges((), ("nccl",)) for op in ALGORITHMS}
_NCCL = AlgorithmTable.of("NCCL alone", _NCCL_RANGES)
