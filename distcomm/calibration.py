"""Which algorithm is the fastest, by size: measured on the GPUs at hand.

What is measured are sums of bf16, and all-gathers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from .algorithms import ALGORITHMS, OF_SYMMETRIC, AlgorithmTable
from .errors import DistcommError
from .group import GroupCoordinator
from .timing import timed

__all__ = ["CALLS", "MEASURED", "TENSORS", "algorithm_calls", "calibrate", "measure", "ranges",
           "table_of"]  # fmt: skip

MEASURED = ("all_reduce", "reduce_scatter", "all_gather")
TENSORS = ("ordinary", "symmetric")
# How calls are timed. Eager ones without what the host takes for them, which is about the same for
# all algorithms, and of which more would be noise.
CALLS = {"eager": "queued", "captured": "graph"}
# What an algorithm must win by to make a range of its own.
_MARGIN = 1.02
# When a job begins: fewest where nothing changes.
_FEW_SIZES = tuple(
    1 << power for power in (12, 14, 16, 17, 18, 19, 20, 21, 22, 24, 26)
)  # fmt: skip
_FEW_ROUNDS = 3

# By op, kind of tensors and size: bytes of the call's tensor, and microseconds by algorithm for
# each of `CALLS`.
Measured = dict[str, dict[str, list[dict[str, Any]]]]


@dataclass(frozen=True)
class _Pair:
    """Tensors of which calls take the first part."""

    whole: torch.Tensor
    other: torch.Tensor
    symmetric: bool


def calibrate(group: GroupCoordinator) -> AlgorithmTable:
    """A table made in a few seconds. Collective.

    Raises:
        DistcommError: the group has no kernels to choose among.
    """
    # Graphs take longer to make than to time, and don't change the order.
    measured = measure(group, _FEW_SIZES, _FEW_ROUNDS, calls=("eager",))
    for by_tensors in measured.values():
        for rows in by_tensors.values():
            for row in rows:
                row["captured"] = row["eager"]
    table = table_of(measured, group)
    return AlgorithmTable.parse("measured at the job's beginning", table)


def measure(
    group: GroupCoordinator,
    sizes: Sequence[int],
    num_rounds: int,
    *,
    calls: Sequence[str] = tuple(CALLS),
) -> Measured:
    """Times every algorithm of every op. Collective.

    Args:
        sizes: bytes of what is reduced, scattered, or gathered in all.
        calls: of `CALLS`.

    Raises:
        DistcommError: the group has no kernels to choose among, or a rank has no memory for the
            tensors; then on all ranks.
    """
    if group.kernels is None:
        raise DistcommError(f"calibration: no kernels can run collectives [{group.member}]")
    pairs = {tensors: _allocated(group, max(sizes), tensors) for tensors in TENSORS}
    return {
        op: {
            tensors: [_row(op, group, size, pair, num_rounds, calls) for size in sizes]
            for tensors, pair in pairs.items()
        }
        for op in MEASURED
    }


def table_of(measured: Measured, group: GroupCoordinator) -> dict[str, Any]:
    """The table that follows from what was measured, as `AlgorithmTable.parse` takes it."""
    table: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name(group.device),
        "world_size": group.world_size,
        **{call: {tensors: {} for tensors in TENSORS} for call in CALLS},
    }
    for op, by_tensors in measured.items():
        for tensors, rows in by_tensors.items():
            for call in CALLS:
                found = ranges([(row["bytes"], row[call]) for row in rows])
                table[call][tensors][op] = found
    # The fused kernels move the same bytes in the same ways, and take any tensors.
    for call in CALLS:
        for tensors in TENSORS:
            table[call][tensors]["all_reduce_rms_norm"] = table[call]["ordinary"]["all_reduce"]
    return table


def algorithm_calls(
    op: str, group: GroupCoordinator, x: torch.Tensor, output: torch.Tensor, *, symmetric: bool
) -> dict[str, Callable[[], object]]:
    """Each of `ALGORITHMS` that takes such tensors, ordinary or symmetric ones, on these."""
    kernels, nccl = group.kernels, group.pynccl_comm
    calls: dict[str, Callable[[], object]] = {}
    for algorithm in ALGORITHMS[op]:
        if algorithm == "nccl":
            if nccl is not None:
                calls[algorithm] = {
                    "all_reduce": partial(nccl.all_reduce, x, out=output),
                    "all_gather": partial(nccl.all_gather_into_tensor, output, x),
                    "reduce_scatter": partial(nccl.reduce_scatter_tensor, output, x),
                }[op]
        elif (
            kernels is not None
            and x.nbytes <= kernels.most_bytes(op, algorithm)
            and (symmetric or algorithm not in OF_SYMMETRIC)
        ):
            calls[algorithm] = partial(kernels.run, op, algorithm, x, output)
    return calls


def ranges(rows: Sequence[tuple[int, dict[str, float]]]) -> list[list[Any]]:
    """Sizes and microseconds by algorithm -> ``[[limit, algorithm], ..., [None, algorithm]]``."""
    chosen: list[list[Any]] = []
    for num_bytes, micros in rows:
        best = min(micros, key=micros.__getitem__)
        if chosen:
            before = chosen[-1][1]
            if before in micros and micros[before] <= micros[best] * _MARGIN:
                best = before
        if chosen and chosen[-1][1] == best:
            chosen[-1][0] = num_bytes
        else:
            chosen.append([num_bytes, best])
    chosen[-1][0] = None
    return chosen


def _allocated(group: GroupCoordinator, num_bytes: int, tensors: str) -> _Pair:
    """What is timed, on all ranks or on none: the others' kernels would wait for a rank without.
    Collective.

    Raises:
        DistcommError: there is no memory on some rank; on all.
    """
    problem = None
    try:
        with group.symmetric_memory(enabled=tensors == "symmetric"):
            whole = torch.zeros(num_bytes // 2, dtype=torch.bfloat16, device=group.device)
            other = torch.zeros_like(whole)
    except RuntimeError as error:  # torch's, too
        problem = str(error)
    problems = group.all_gather_object(problem)
    failures = {rank: text for rank, text in zip(group.ranks, problems, strict=True) if text}
    if failures:
        raise DistcommError(f"calibration: no {tensors} tensors: {failures} [{group.member}]")
    return _Pair(whole, other, tensors == "symmetric")


def _row(
    op: str,
    group: GroupCoordinator,
    size: int,
    pair: _Pair,
    num_rounds: int,
    calls: Sequence[str],
) -> dict[str, Any]:
    grain = 16 * group.world_size
    size = size // grain * grain
    whole, other = pair.whole[: size // 2], pair.other[: size // 2]
    share = other[: len(other) // group.world_size]
    x, output = {
        "all_reduce": (whole, other),
        "all_gather": (share, whole),
        "reduce_scatter": (whole, share),
    }[op]
    ways = algorithm_calls(op, group, x, output, symmetric=pair.symmetric)
    row: dict[str, Any] = {"bytes": x.nbytes}
    for call in calls:
        row[call] = timed(group, ways, size, num_rounds, kind=CALLS[call])
    return row
