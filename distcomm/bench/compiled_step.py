"""A decoder's step by torch.compile, beside the same step without it: all in CUDA graphs.

The layers are those of `decode_step`. Graphs are captured by hand (`graph_capture`) or by torch
(``mode="reduce-overhead"``). What is captured is what a call of the step makes; its results are
compared with those of a step without compiler and graph.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.nn.functional import rms_norm

from ..state import ParallelState
from ..timing import CapturedCalls, Timed, elapsed_us, slowest_medians
from .conditions import conditions
from .decode_step import EPS, HIDDEN, Layer, Reduce, decoder_step, make_layer

__all__ = ["format_compiled_step", "run_compiled_step"]

_BATCHES = (1, 16, 64)
_LAYERS = 8  # all different; more take long to compile
# Rounds where torch rounds without a compiler, so that results can be compared.
_OPTIONS: dict[str, Any] = {"emulate_precision_casts": True}
HAND_CAPTURED = "graph"
_BY_TORCH = "compiled, mode=reduce-overhead"

Step = Callable[[torch.Tensor], torch.Tensor]


def run_compiled_step(state: ParallelState, *, num_rounds: int = 20) -> dict[str, Any]:
    """Times a step by batch size, collective, and way to run it. Collective.

    Returns:
        Microseconds a step: medians of the slowest rank. How far results are from those of the
        plain step, relative to their norm. Compilations and graph breaks for all batches up to the
        largest, and CUDA graphs that torch did not make.
    """
    group = state.world
    if group.pynccl_comm is None:
        raise SystemExit("the compiled_step benchmark needs a CUDA job with at least two ranks")
    layers = [make_layer(group, number) for number in range(_LAYERS)]
    for layer in layers:
        for weight in vars(layer).values():
            torch._dynamo.mark_static_address(weight)  # else torch's graphs begin with copies
    rows, graphs = [], {}
    for name, reduce in _reductions(state).items():
        compiled, by_torch = _compiled(layers, reduce)
        graphs[name] = _counted(state, layers, reduce, compiled)
        if group.rank_in_group == 0:
            print(f"{name}: {graphs[name]}", flush=True)
        for batch in _BATCHES:
            x = torch.randn(batch, HIDDEN, device=group.device).bfloat16()
            times = _timed(state, x, layers, reduce, compiled, by_torch, num_rounds)
            rows.append({"collective": name, "batch": batch, **times})
            if group.rank_in_group == 0:
                print(_row_text(rows[-1]), flush=True)
    return {
        "conditions": {**conditions(state), "dtype": "bfloat16", "layers": _LAYERS},
        "graphs": graphs,
        "rows": rows,
    }


def format_compiled_step(result: dict[str, Any]) -> str:
    return "\n".join(_row_text(row) for row in result["rows"])


def _row_text(row: dict[str, Any]) -> str:
    lines = [f"{row['collective']}, batch {row['batch']}"]
    for name, micros in row["us"].items():
        ratio = row["us"][HAND_CAPTURED] / micros
        off = row["off"].get(name)
        text = "" if off is None else f", results {off:.1e} off"
        lines.append(f"  {name:<32} {micros:>8.1f} µs {ratio:>6.3f} x{text}")
    return "\n".join(lines)


def _reductions(state: ParallelState) -> dict[str, Reduce]:
    group = state.world

    def by_all_reduce(
        x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        residual = residual + group.all_reduce(x)
        return rms_norm(residual, weight.shape, weight, EPS), residual

    def by_fused(
        x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return group.all_reduce_rms_norm(x, weight, residual, eps=EPS)

    return {"all_reduce": by_all_reduce, "all_reduce_rms_norm": by_fused}


def _compiled(layers: list[Layer], reduce: Reduce) -> tuple[Step, Step]:
    """The step compiled for graphs that are captured by hand, and by torch."""

    def step(x: torch.Tensor) -> torch.Tensor:
        return decoder_step(layers, x, reduce, len(layers))

    torch._dynamo.reset()
    by_hand = torch.compile(step, fullgraph=True, dynamic=True, options=_OPTIONS)
    options = {**torch._inductor.list_mode_options("reduce-overhead"), **_OPTIONS}
    return by_hand, torch.compile(step, fullgraph=True, options=options)


def _counted(
    state: ParallelState, layers: list[Layer], reduce: Reduce, compiled: Step
) -> dict[str, Any]:
    """Calls with batches of all sizes up to the largest: what was compiled, how far results are
    off."""
    counters = torch._dynamo.utils.counters
    counters.clear()
    off = 0.0
    for batch in range(1, _BATCHES[-1] + 1):
        x = torch.randn(batch, HIDDEN, device=state.device).bfloat16()
        off = max(off, _off(compiled(x), decoder_step(layers, x, reduce, len(layers))))
    return {
        "batches": _BATCHES[-1],
        "compilations": counters["stats"]["unique_graphs"],
        "graph_breaks": sum(counters["graph_break"].values()),
        "off": off,
    }


def _off(result: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((result.float() - wanted.float()).norm() / wanted.float().norm())


def _timed(
    state: ParallelState,
    x: torch.Tensor,
    layers: list[Layer],
    reduce: Reduce,
    compiled: Step,
    by_torch: Step,
    num_rounds: int,
) -> dict[str, Any]:
    def plain() -> torch.Tensor:
        return decoder_step(layers, x, reduce, len(layers))

    wanted = plain()
    results: dict[str, torch.Tensor] = {}
    runs: dict[str, Timed] = {"plain": partial(elapsed_us, plain)}
    for name, step in ((HAND_CAPTURED, plain), ("compiled, graph", partial(compiled, x))):
        runs[name], results[name] = _captured(state, step)

    def torch_replays() -> None:
        for _ in range(4):
            torch.compiler.cudagraph_mark_step_begin()
            by_torch(x)

    skipped = torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]
    for _ in range(3):  # torch runs it, captures it, and replays it
        torch_replays()
    skipped = torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] - skipped
    torch.compiler.cudagraph_mark_step_begin()
    results[_BY_TORCH] = by_torch(x).clone()
    runs[_BY_TORCH] = lambda: elapsed_us(torch_replays) / 4
    medians = slowest_medians(state.world, runs, num_rounds, num_warm_up=3)
    return {
        "us": {name: round(us, 1) for name, us in medians.items()},
        "off": {name: _off(result, wanted) for name, result in results.items()},
        "cudagraph_skips": skipped,
    }


def _captured(state: ParallelState, step: Callable[[], torch.Tensor]) -> tuple[Timed, torch.Tensor]:
    """How to time a step's graph, and what one replay gives."""
    step()  # libraries warm up, and the compiler works, before a capture
    torch.cuda.synchronize()
    results: list[torch.Tensor] = []
    captured = CapturedCalls(state.world, lambda: results.append(step()), 1, num_replays=4)
    captured.replay()
    return captured.time, results[0].clone()
