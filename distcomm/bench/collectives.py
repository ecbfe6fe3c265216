"""One collective at many sizes: our algorithms, NCCL on two kinds of buffers, torch's own.

Rows as nccl-tests prints them: bytes are those of the whole (of `all_gather` what is gathered, of
`reduce_scatter` what is scattered), algbw is bytes over time, busbw is algbw times the share of
the bytes that has to cross a link (github.com/NVIDIA/nccl-tests, doc/PERFORMANCE.md).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from ..algorithms import OF_SYMMETRIC
from ..calibration import algorithm_calls
from ..group import GroupCoordinator
from ..state import ParallelState
from ..timing import timed
from .conditions import conditions
from .torch_symmetric import torch_symmetric_ways

__all__ = ["BUS_FACTORS", "format_collective", "run_collective"]

REFERENCE = "torch.distributed"
_SIZES = tuple(1 << power for power in range(10, 29))


# busbw over algbw, by W.
BUS_FACTORS: dict[str, Callable[[int], float]] = {
    "all_reduce": lambda w: 2 * (w - 1) / w,
    "all_gather": lambda w: (w - 1) / w,
    "reduce_scatter": lambda w: (w - 1) / w,
}


@dataclass(frozen=True)
class Way:
    """One way to run a collective: a call on tensors that it holds."""

    call: Callable[[], object]
    x: torch.Tensor
    output: torch.Tensor


def run_collective(
    op: str,
    state: ParallelState,
    *,
    sizes: Sequence[int] = _SIZES,
    dtype: torch.dtype = torch.bfloat16,
    in_place: bool = False,
    num_rounds: int = 20,
) -> dict[str, Any]:
    """Times all ways at all sizes, in CUDA graphs and eager. Collective.

    Every way's result is checked before it is timed; a wrong one ends the benchmark.

    Args:
        sizes: bytes of the whole; rounded down to whole vectors of 16 bytes for each rank.
        dtype: of the tensors.
        in_place: a rank's share of the whole, or the whole, lies where its result does.

    Returns:
        Per size and way, microseconds a call in a graph and eager: medians of the slowest rank.
    """
    group = state.world
    if group.pynccl_comm is None:
        raise SystemExit(f"the {op} benchmark needs a CUDA job with at least two ranks")
    rows = []
    grain = 16 * group.world_size
    for size in sizes:
        num_bytes = max(grain, size // grain * grain)
        ways = _ways(op, group, num_bytes, dtype, in_place)
        for name, way in ways.items():
            _check(op, group, name, way)
        row: dict[str, Any] = {"bytes": num_bytes}
        for kind in ("graph", "eager"):
            calls = {name: way.call for name, way in ways.items()}
            row[kind] = timed(group, calls, num_bytes, num_rounds, kind=kind)
        rows.append(row)
        if group.rank_in_group == 0:
            print(_row_text(op, group.world_size, row), flush=True)
    return {
        "conditions": {
            **conditions(state),
            "dtype": str(dtype).removeprefix("torch."),
            "in_place": in_place,
        },
        "op": op,
        "rows": rows,
    }


def format_collective(result: dict[str, Any]) -> str:
    """The rows, which have been printed on the way, once more as one table."""
    op, world_size = result["op"], result["conditions"]["world_size"]
    return "\n".join(_row_text(op, world_size, row) for row in result["rows"])


def _ways(
    op: str, group: GroupCoordinator, num_bytes: int, dtype: torch.dtype, in_place: bool
) -> dict[str, Way]:
    x, output = _tensors(op, group, num_bytes, dtype, in_place)
    with group.symmetric_memory():
        symmetric_x, symmetric_output = _tensors(op, group, num_bytes, dtype, in_place)
    ways = {REFERENCE: Way(_torch_call(op, group, x, output), x, output)}
    for name, call in algorithm_calls(op, group, x, output, symmetric=False).items():
        ways["NCCL" if name == "nccl" else name] = Way(call, x, output)
    on_symmetric = algorithm_calls(op, group, symmetric_x, symmetric_output, symmetric=True)
    for name, call in on_symmetric.items():
        if name in OF_SYMMETRIC or name == "nccl":
            title = "NCCL symmetric" if name == "nccl" else name
            ways[title] = Way(call, symmetric_x, symmetric_output)
    for name, way in torch_symmetric_ways(op, group, num_bytes, dtype).items():
        ways[name] = Way(*way)
    ways["distcomm"] = Way(_group_call(op, group, x, output), x, output)
    symmetric = _group_call(op, group, symmetric_x, symmetric_output)
    ways["distcomm, symmetric buffers"] = Way(symmetric, symmetric_x, symmetric_output)
    return ways


def _tensors(
    op: str, group: GroupCoordinator, num_bytes: int, dtype: torch.dtype, in_place: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    whole = torch.zeros(num_bytes // dtype.itemsize, dtype=dtype, device=group.device)
    part = whole if op == "all_reduce" else whole.chunk(group.world_size)[group.rank_in_group]
    if not in_place:
        part = torch.zeros_like(part)
    return (whole, part) if op == "reduce_scatter" else (part, whole)


def _torch_call(
    op: str, group: GroupCoordinator, x: torch.Tensor, output: torch.Tensor
) -> Callable[[], object]:
    device_group = group.device_group
    calls: dict[str, Callable[[], object]] = {
        "all_reduce": partial(dist.all_reduce, output, group=device_group),
        "all_gather": partial(dist.all_gather_into_tensor, output, x, group=device_group),
        "reduce_scatter": partial(dist.reduce_scatter_tensor, output, x, group=device_group),
    }
    return calls[op]


def _group_call(
    op: str, group: GroupCoordinator, x: torch.Tensor, output: torch.Tensor
) -> Callable[[], object]:
    calls: dict[str, Callable[[], object]] = {
        "all_reduce": lambda: group.all_reduce(x, out=output),
        "all_gather": lambda: group.all_gather_into_tensor(output, x),
        "reduce_scatter": lambda: group.reduce_scatter_tensor(output, x),
    }
    return calls[op]


def _check(op: str, group: GroupCoordinator, name: str, way: Way) -> None:
    """A wrong result isn't worth timing. Whole numbers, so that every order gives the same."""
    ramp = torch.arange(way.x.numel(), device=group.device) % 31
    inputs = [(ramp * (rank + 1) % 29).to(way.x.dtype) for rank in range(group.world_size)]
    way.output.fill_(-1)
    way.x.copy_(inputs[group.rank_in_group])
    if name == REFERENCE and op == "all_reduce":
        way.output.copy_(way.x)  # it is made in place
    way.call()
    if op == "all_gather":
        wanted = torch.cat(inputs)
    else:
        wanted = torch.stack(inputs).sum(dim=0)
        if op == "reduce_scatter":
            share = way.output.numel()
            wanted = wanted[group.rank_in_group * share :][:share]
    if not torch.equal(way.output, wanted):
        raise SystemExit(f"{name}: {op} of {way.x.nbytes} bytes is wrong on rank {group.rank}")
    way.x.zero_()
    way.output.zero_()


def _row_text(op: str, world_size: int, row: dict[str, Any]) -> str:
    num_bytes = row["bytes"]
    lines = [
        f"{num_bytes:>12,} bytes {'graph µs':>20} {'algbw':>7} {'busbw':>7} {'ratio':>6} "
        f"{'eager µs':>9} {'ratio':>6} {'correct':>8}"
    ]
    for name, micros in row["graph"].items():
        algbw = num_bytes / micros / 1e3
        busbw = algbw * BUS_FACTORS[op](world_size)
        eager = row["eager"][name]
        lines.append(
            f"  {name:<28} {micros:>8.2f} {algbw:>7.1f} {busbw:>7.1f} "
            f"{row['graph'][REFERENCE] / micros:>6.2f} {eager:>9.2f} "
            f"{row['eager'][REFERENCE] / eager:>6.2f} {'yes':>8}"  # or there were no row
        )
    return "\n".join(lines)
