"""The step of a decoder in tensor parallelism: all matrix products of a 70B model, and what it
communicates, in one CUDA graph.

Shapes of Llama 70B: hidden 8192, intermediate 28672, 80 layers, 8 heads of keys and values of 128.
Attention itself is left out, as it communicates nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.functional import rms_norm, silu

from ..group import GroupCoordinator
from ..state import ParallelState
from ..timing import CapturedCalls, slowest_medians
from .conditions import conditions

__all__ = [
    "EPS",
    "HIDDEN",
    "Layer",
    "Reduce",
    "decoder_step",
    "format_decode_step",
    "make_layer",
    "run_decode_step",
]

HIDDEN, _INTERMEDIATE, _KV, _LAYERS = 8192, 28672, 1024, 80
_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
# Different weights, so that no cache holds them: some hundred MB each.
_DISTINCT_LAYERS = 4
EPS = 1e-5
_MOST_ERROR = 0.03  # of two layers' result, relative; bf16 has 0.004
REFERENCE = "torch.distributed"
WITHOUT = "no communication"


@dataclass(frozen=True)
class Layer:
    qkv: torch.Tensor
    o: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor
    norm: torch.Tensor


Reduce = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""From partial sums, residual and weight to what goes on, normalized, and the next residual."""


def run_decode_step(state: ParallelState, *, num_rounds: int = 10) -> dict[str, Any]:
    """Times a step by batch size and way to communicate. Collective.

    What two layers give is compared between the ways first.

    Returns:
        Microseconds a step: medians of the slowest rank.
    """
    group = state.world
    if group.pynccl_comm is None:
        raise SystemExit("the decode_step benchmark needs a CUDA job with at least two ranks")
    layers = [make_layer(group, number) for number in range(_DISTINCT_LAYERS)]
    rows = []
    for batch in _BATCHES:
        x = torch.randn(batch, HIDDEN, device=group.device).bfloat16()
        steps = {}
        wanted = None  # what the reference gives, which comes first
        for name, reduce in _ways(group).items():
            result = decoder_step(
                layers, x, reduce, num_layers=2
            )  # libraries warm up before a capture
            torch.cuda.synchronize()
            wanted = result if wanted is None else wanted
            if name != WITHOUT:
                _check(name, result, wanted)
            in_windows = name == "NCCL symmetric"
            steps[name] = _captured(group, layers, x, reduce, symmetric=in_windows).time
        medians = slowest_medians(group, steps, num_rounds, num_warm_up=3)
        rows.append({"batch": batch, "us": {name: round(us, 1) for name, us in medians.items()}})
        if group.rank_in_group == 0:
            print(_row_text(rows[-1]), flush=True)
    return {"conditions": {**conditions(state), "dtype": "bfloat16"}, "rows": rows}


def format_decode_step(result: dict[str, Any]) -> str:
    """Tokens per second, and the share of communication."""
    return "\n".join(_row_text(row) for row in result["rows"])


def _row_text(row: dict[str, Any]) -> str:
    lines = [f"batch {row['batch']}"]
    for name, micros in row["us"].items():
        tokens = row["batch"] / micros * 1e6
        share = 1 - row["us"][WITHOUT] / micros
        lines.append(
            f"  {name:<28} {micros:>9.1f} µs {tokens:>10.1f} tokens/s "
            f"{row['us'][REFERENCE] / micros:>6.3f} x, {share:>5.1%} communication"
        )
    return "\n".join(lines)


def _check(name: str, result: torch.Tensor, wanted: torch.Tensor) -> None:
    """A wrong result isn't worth timing. Sums are rounded at other places, in bf16."""
    error = (result.float() - wanted.float()).norm() / wanted.float().norm()
    if not error < _MOST_ERROR:
        raise SystemExit(f"{name}: the step's result is {float(error):.3f} off")


def make_layer(group: GroupCoordinator, seed: int) -> Layer:
    generator = torch.Generator(group.device).manual_seed(seed)
    world = group.world_size

    def weight(rows: int, columns: int) -> torch.Tensor:
        x = torch.randn(rows, columns, generator=generator, device=group.device)
        return torch.mul(x, rows**-0.5).bfloat16()

    return Layer(
        qkv=weight(HIDDEN, (HIDDEN + 2 * _KV) // world),
        o=weight(HIDDEN // world, HIDDEN),
        gate_up=weight(HIDDEN, 2 * _INTERMEDIATE // world),
        down=weight(_INTERMEDIATE // world, HIDDEN),
        norm=torch.ones(HIDDEN, dtype=torch.bfloat16, device=group.device),
    )


def decoder_step(
    layers: list[Layer], x: torch.Tensor, reduce: Reduce, num_layers: int = _LAYERS
) -> torch.Tensor:
    residual = x
    for number in range(num_layers):
        layer = layers[number % len(layers)]
        attended = (x @ layer.qkv)[:, : layer.o.shape[0]]
        x, residual = reduce(attended @ layer.o, residual, layer.norm)
        gate, up = (x @ layer.gate_up).chunk(2, dim=-1)
        x, residual = reduce((silu(gate) * up) @ layer.down, residual, layer.norm)
    result: torch.Tensor = x
    return result


def _captured(
    group: GroupCoordinator,
    layers: list[Layer],
    x: torch.Tensor,
    reduce: Reduce,
    *,
    symmetric: bool,
) -> CapturedCalls:
    return CapturedCalls(
        group,
        lambda: decoder_step(layers, x, reduce),
        num_calls=1,
        num_replays=2,
        symmetric=symmetric,
    )


def _ways(group: GroupCoordinator) -> dict[str, Reduce]:
    nccl = group.pynccl_comm
    if nccl is None:
        raise SystemExit("no NCCL")
    device_group = group.device_group

    def normed(
        total: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        residual = residual + total
        return rms_norm(residual, weight.shape, weight, EPS), residual

    def by_torch(
        x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        dist.all_reduce(x, group=device_group)
        return normed(x, residual, weight)

    return {
        REFERENCE: by_torch,
        "NCCL symmetric": lambda x, r, w: normed(nccl.all_reduce(x, out=x), r, w),
        "distcomm all_reduce": lambda x, r, w: normed(group.all_reduce(x), r, w),
        "distcomm all_reduce_rms_norm": lambda x, r, w: group.all_reduce_rms_norm(x, w, r, eps=EPS),
        WITHOUT: normed,
    }
