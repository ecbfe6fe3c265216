"""A small transformer over the ranks of a job, compared with the same model in one process.

python scripts/demo.py --help
"""

# ruff: noqa: E402 - two things come before the imports

from __future__ import annotations

import logging
import os
import signal
import sys
import uuid
import warnings
from collections.abc import Sequence
from pathlib import Path

# distcomm need not be installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
# Nothing here needs NumPy, and torch would warn of its absence once per rank.
warnings.filterwarnings("ignore", message="Failed to initialize NumPy")
# A compiler's advice to multiply less exactly.
warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores")
warnings.filterwarnings("ignore", message=r"\s*Online softmax is disabled")

import torch
from demo_collectives import CallCounts, CallTimer, collectives_table
from demo_generate import generate, token_ids_of
from demo_input import InputError, read_input, shared_input, split_prompts
from demo_model import ModelWeights, make_weights, reference_generation, reference_logits
from demo_options import Options, complain, parse_options
from demo_parallel import ParallelTransformer, share_of_model
from demo_report import (
    compare_logits,
    compare_tokens,
    continuations,
    prompts_table,
    rates_text,
    say,
    say_what_runs,
    step_counter,
)
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
    say(f"starting {options.nproc} processes")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # No pool of processes for each rank that compiles.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
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
        text = shared_input(options, state)
        weights = make_weights(options, state.device)
        run = _read if options.generate is None else _generate
        passed = state.world.broadcast_object(run(options, weights, state, text))
    return 0 if passed else _EXIT_DIFFERENT


def _read(options: Options, weights: ModelWeights, state: ParallelState, text: bytes) -> bool:
    """One pass over the text, and on rank 0 the same in one process: whether they are equal."""
    token_ids = token_ids_of(text, state.device)
    timed = CallTimer(state.device)
    share = share_of_model(weights, options, state)
    model = ParallelTransformer(options, share, state, [len(text)], timed)
    if state.rank == 0:
        shares = " + ".join(map(str, model.plan.tokens_per_rank))
        what = f"{len(text)} tokens (bytes), in zigzag {shares} over the ranks of a cp group"
        say_what_runs(options, state, f"text   {options.input.name}: {what}")
    logits = model.logits(token_ids, step_counter("layer", options.layers, state.rank))
    if logits is None:
        return False  # rank 0 knows
    say("\nin one process")
    expected = reference_logits(options, weights, token_ids, step_counter("layer", options.layers))
    say(f"\n{collectives_table(state.rank, CallCounts.of(state), timed)}\n")
    return compare_logits(logits, expected, token_ids, options.tolerance)


def _generate(options: Options, weights: ModelWeights, state: ParallelState, text: bytes) -> bool:
    """Continues prompts, on rank 0 also in one process: whether all tokens are the same."""
    prompts = split_prompts(text, options)
    timed = CallTimer(state.device)
    if state.rank == 0:
        say_what_runs(options, state, prompts_table(options, prompts))
    made = generate(options, weights, state, prompts, timed)
    if state.rank != 0:
        return False  # rank 0 knows
    say(rates_text(options, state, prompts, made))
    expected = []
    say("\nin one process")
    count = step_counter("prompt", len(prompts))
    for number, prompt in enumerate(prompts, start=1):
        ids = token_ids_of(prompt, state.device)
        expected.append(reference_generation(options, weights, ids, options.num_new))
        count(number)
    say(f"\n{continuations(made.tokens)}\n")
    say(f"{collectives_table(state.rank, made.counts, timed)}\n")
    return compare_tokens(made, expected, options)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
