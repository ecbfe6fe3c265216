"""A small transformer over the ranks of a job, compared with the same model in one process.

python scripts/demo.py --help
"""

# ruff: noqa: E402 - two things come before the imports

from __future__ import annotations

import logging
import math
import os
import signal
import sys
import time
import uuid
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

# distcomm need not be installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
# Nothing here needs NumPy, and torch would warn of its absence once per rank.
warnings.filterwarnings("ignore", message="Failed to initialize NumPy")

import torch
from demo_model import make_weights, reference_logits
from demo_options import InputError, Options, complain, parse_options, read_input
from demo_parallel import CallTimer, ParallelTransformer
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from distcomm import (
    InitializationError,
    LaunchError,
    LayoutError,
    ParallelState,
    init_distributed,
)

_EXIT_DIFFERENT = 1
_EXIT_UNUSABLE = 2
_EXIT_SIGNAL = 128  # plus the signal's number, as a shell has it
_TIMEOUT_S = 1800.0  # while rank 0 computes alone, the others wait in a collective


def main(argv: Sequence[str]) -> int:
    """Launches the ranks or, in one of them, does its part; returns the exit code."""
    launched = "RANK" in os.environ
    world_size = int(os.environ.get("WORLD_SIZE", "1")) if launched else None
    options = parse_options(argv, world_size=world_size, num_gpus=torch.cuda.device_count())
    try:
        if launched:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C needs no traceback per rank
            return _run_rank(options)
        read_input(options)  # only to complain before anything is started
        return _launch(options, argv)
    except (InputError, InitializationError, LaunchError, LayoutError) as error:
        complain(f"demo: error: {error}")  # raised on every rank
        return _EXIT_UNUSABLE


def _launch(options: Options, argv: Sequence[str]) -> int:
    """Runs the ranks under torchrun's agent, in this process; returns their exit code.

    torchrun's command would do the same, but parse `argv` as its own options too, and end in a
    traceback whenever a rank's exit code isn't 0.
    """
    _say(f"starting {options.nproc} processes")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    logging.disable(logging.ERROR)  # the agent's: a rank has said why it failed
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=options.nproc,
        run_id=str(uuid.uuid4()),
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
    )
    try:
        elastic_launch(config, sys.executable)(str(Path(__file__).resolve()), *argv)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode >= 0:
            return failure.exitcode
        complain(f"demo: rank {rank} died of {failure.signal_name()}")
        return _EXIT_SIGNAL - failure.exitcode
    except SignalException as stop:
        return _EXIT_SIGNAL + stop.sigval
    return 0


@torch.inference_mode()
def _run_rank(options: Options) -> int:
    """This rank's part of the job; the same exit code on all ranks."""
    with init_distributed(
        options.tp,
        options.cp,
        cp_layout=options.cp_layout,
        device=options.device,
        timeout=_TIMEOUT_S,
    ) as state:
        text = _shared_input(options, state)
        token_ids = torch.frombuffer(bytearray(text), dtype=torch.uint8).long().to(state.device)
        weights = make_weights(options, state.device)
        timed = CallTimer(state.device)
        model = ParallelTransformer(options, weights, state, len(text), timed)
        passed = None
        if state.rank == 0:
            _say_what_runs(options, state, model)
        logits = model.logits(token_ids, _layer_counter(options, state.rank))
        if logits is not None:
            _say("\nin one process")
            expected = reference_logits(options, weights, token_ids, _layer_counter(options))
            _say(f"\n{_collectives_table(state, timed)}\n")
            passed = _compare(logits, expected, token_ids, options.tolerance)
        passed = state.world.broadcast_object(passed)
    return 0 if passed else _EXIT_DIFFERENT


def _shared_input(options: Options, state: ParallelState) -> bytes:
    """Rank 0's text, on every rank; `InputError` on every rank if there is none. Collective."""
    found: tuple[bytes, str] = (b"", "")
    if state.rank == 0:
        try:
            found = (read_input(options), "")
        except InputError as error:
            found = (b"", str(error))
    found = state.world.broadcast_object(found)
    text, problem = found
    if problem:
        raise InputError(problem)
    return text


def _say_what_runs(options: Options, state: ParallelState, model: ParallelTransformer) -> None:
    shares = " + ".join(map(str, model.plan.tokens_per_rank))
    _say(
        f"{state.describe()}\n\n"
        f"text   {options.input.name}: {model.plan.num_tokens} tokens (bytes), in zigzag {shares} "
        "over the ranks of a cp group\n"
        f"model  {options.layers} layers, hidden {options.hidden}, {options.heads} heads, "
        f"{options.kv_heads} KV heads, MLP {options.mlp}, fp32, seed {options.seed}\n\n"
        f"over {state.world_size} processes"
    )


def _layer_counter(options: Options, rank: int = 0) -> Callable[[int], None]:
    """A function to call after each layer, which says so on rank 0."""
    start = time.perf_counter()

    def on_layer(num_done: int) -> None:
        if rank == 0:
            elapsed_s = time.perf_counter() - start
            _say(f"  layer {num_done} of {options.layers}  {elapsed_s:7.2f} s")

    return on_layer


def _collectives_table(state: ParallelState, timed: CallTimer) -> str:
    """This rank's collectives on tensors, by op, group and backend."""
    rows = [("op", "group", "backend", "calls", "bytes", "time (ms)")]
    total_calls, total_bytes, total_ms = 0, 0, 0.0
    for group in state.groups.values():
        for op, backends in group.stats()["ops"].items():
            elapsed_ms = timed.milliseconds(group.name, op)
            total_ms += elapsed_ms
            for backend, count in backends.items():
                calls, num_bytes = count["calls"], count["bytes"]
                total_calls += calls
                total_bytes += num_bytes
                rows.append(
                    (op, group.name, backend, str(calls), f"{num_bytes:,}", f"{elapsed_ms:.1f}")
                )
    rows.append(("total", "", "", str(total_calls), f"{total_bytes:,}", f"{total_ms:.1f}"))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        names = [cell.ljust(width) for cell, width in zip(row[:3], widths[:3], strict=True)]
        numbers = [cell.rjust(width) for cell, width in zip(row[3:], widths[3:], strict=True)]
        lines.append("  ".join(names + numbers))
    return "\n".join(
        [
            f"collectives of rank {state.rank} alone; bytes: of the tensors it passed in; "
            "time: in the calls,\nwaiting for slower ranks included",
            *lines,
        ]
    )


def _compare(
    logits: torch.Tensor, expected: torch.Tensor, token_ids: torch.Tensor, tolerance: float
) -> bool:
    """Says how far the logits [T, V] are from the expected ones; whether that is tolerable."""
    difference = (logits - expected).abs().max().item()
    num_equal = int((logits.argmax(-1) == expected.argmax(-1)).sum())
    passed = difference <= tolerance  # false for NaN
    _say(
        f"equal predictions   {num_equal} of {len(expected)}\n"
        f"loss                {_bits_per_byte(logits, token_ids):.4f} bits per byte, in one "
        f"process {_bits_per_byte(expected, token_ids):.4f} (the weights are random)\n"
        f"largest difference  {difference:.3g} between logits, tolerance {tolerance:g}\n"
        f"{'OK' if passed else 'FAILED'}"
    )
    return passed


def _bits_per_byte(logits: torch.Tensor, token_ids: torch.Tensor) -> float:
    nats = torch.nn.functional.cross_entropy(logits[:-1], token_ids[1:]).item()
    return nats / math.log(2)


def _say(text: str) -> None:
    try:
        print(text, flush=True)
    except BrokenPipeError:  # nobody reads on, as with `| head`; the job still ends in order
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
