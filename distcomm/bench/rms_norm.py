"""All-reduce, residual and RMSNorm: in one kernel, and one after another."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.functional import rms_norm

from ..group import GroupCoordinator
from ..kernels import NormedRows
from ..state import ParallelState
from ..timing import timed
from .conditions import conditions

__all__ = ["format_rms_norm", "run_rms_norm"]

REFERENCE = "torch.distributed, then add and norm"
ALONE = "all_reduce alone"
_HIDDEN = (4096, 8192)
_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128)
_EPS = 1e-5


def run_rms_norm(state: ParallelState, *, num_rounds: int = 20) -> dict[str, Any]:
    """Times all ways in CUDA graphs, in bf16. Collective.

    Returns:
        Microseconds by hidden size, tokens and way: medians of the slowest rank.
    """
    group = state.world
    if group.kernels is None:
        raise SystemExit("this benchmark needs a CUDA job of ranks that reach each other's memory")
    rows = []
    for hidden in _HIDDEN:
        for num_tokens in _TOKENS:
            calls = _calls(group, num_tokens, hidden)
            num_bytes = num_tokens * hidden * 2
            micros = timed(group, calls, num_bytes, num_rounds, kind="graph")
            rows.append({"hidden": hidden, "tokens": num_tokens, "us": micros})
    return {"conditions": {**conditions(state), "dtype": "bfloat16"}, "rows": rows}


def format_rms_norm(result: dict[str, Any]) -> str:
    """The rows, with what comes on top of an all-reduce."""
    lines = []
    for row in result["rows"]:
        lines.append(f"hidden {row['hidden']}, {row['tokens']} tokens")
        for name, micros in row["us"].items():
            more = micros - row["us"][ALONE]
            lines.append(f"  {name:<40} {micros:>7.2f} µs, all_reduce and {more:>6.2f}")
    return "\n".join(lines)


def _calls(
    group: GroupCoordinator, num_tokens: int, hidden: int
) -> dict[str, Callable[[], object]]:
    device, kernels = group.device, group.kernels
    generator = torch.Generator(device).manual_seed(0)

    def values(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device).bfloat16()

    x, residual, weight = values(num_tokens, hidden), values(num_tokens, hidden), values(hidden)
    normed, new_residual, total = (torch.empty_like(x) for _ in range(3))
    rows = NormedRows(x, weight, residual, normed, new_residual, _EPS, 0.0)

    def one_after_another() -> None:
        total.copy_(x)
        dist.all_reduce(total, group=group.device_group)
        torch.add(total, residual, out=new_residual)
        normed.copy_(rms_norm(new_residual, (hidden,), weight, _EPS))

    def dispatched() -> None:
        result, after = group.all_reduce_rms_norm(x, weight, residual, eps=_EPS)
        normed.copy_(result) if checking else None
        new_residual.copy_(after) if checking else None

    calls: dict[str, Callable[[], object]] = {
        REFERENCE: one_after_another,
        ALONE: lambda: group.all_reduce(x, out=total),
        "group.all_reduce_rms_norm": dispatched,
    }
    for algorithm in ("one_shot_push", "two_shot_push"):
        if kernels is not None and kernels.norm_fits(algorithm, rows):
            calls[algorithm] = partial(kernels.norm, algorithm, rows)
    checking = True
    one_after_another()
    wanted = normed.clone(), new_residual.clone()
    for name, call in calls.items():
        call()
        if name != ALONE:
            for got, want in zip((normed, new_residual), wanted, strict=True):
                torch.testing.assert_close(got, want, atol=0.06, rtol=0.03)
    checking = False
    return calls
