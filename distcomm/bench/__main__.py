"""Command line of the benchmarks.

Under torchrun, one process a GPU:

  all_reduce, all_gather, reduce_scatter  by all our algorithms, NCCL and torch, at all sizes
  all_reduce_rms_norm                     fused, and one after another
  compiled_step  layers of a decoder by torch.compile, in CUDA graphs
  decode_step a decoder's step, all its matrix products and all that it communicates
  host        CPU cost of a call
  kv_gather   KV gathers of context parallelism
  symmetric   contexts, and NCCL's all-reduces on their tensors
  tune        makes a table of algorithms, as init_distributed(tune=) takes it

In one process:

  layout      time to find a rank's groups
  register    cost of finding nothing to register; needs a GPU
  sleep       give memory back and take it again; needs a GPU
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .. import env
from ..current import init_distributed
from ..errors import ArgumentError
from ..memory import parse_num_bytes
from .collectives import BUS_FACTORS, format_collective, run_collective
from .compiled_step import format_compiled_step, run_compiled_step
from .conditions import write_result
from .decode_step import format_decode_step, run_decode_step
from .host import format_host, run_host
from .kv_gather import format_kv_gather, run_kv_gather
from .layout import format_layout, run_layout
from .plot import plot_collective
from .register import format_register, run_register
from .rms_norm import format_rms_norm, run_rms_norm
from .sleep import format_sleep, run_sleep
from .symmetric import format_symmetric, run_symmetric
from .tune import format_tune, run_tune


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m distcomm.bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "benchmark",
        choices=sorted(["layout", *_ON_GPUS]),
        help="see above",
    )
    parser.add_argument("--json", type=Path, help="write the result to this file")
    of_collectives = parser.add_argument_group(", ".join(BUS_FACTORS))
    of_collectives.add_argument(
        "--sizes",
        type=_sizes,
        help="bytes of the whole, such as 1KiB,64KiB,1MiB (default: 1KiB to 256MiB)",
    )
    of_collectives.add_argument("--dtype", choices=sorted(_DTYPES), help="(default: bfloat16)")
    of_collectives.add_argument(
        "--in-place", action="store_true", help="inputs lie in their results' place"
    )
    of_collectives.add_argument("--plot", type=Path, help="draw a figure, .png or .svg")
    options = parser.parse_args()
    given = options.sizes or options.dtype or options.in_place or options.plot
    if options.benchmark not in BUS_FACTORS and given:
        parser.error(f"--sizes, --dtype, --in-place and --plot are of {', '.join(BUS_FACTORS)}")
    if options.benchmark == "layout":
        result = run_layout()
        _report(options, result, format_layout(result))
        return
    run, table = _ON_GPUS[options.benchmark]
    if options.sizes:
        run = partial(run, sizes=options.sizes)
    if options.dtype:
        run = partial(run, dtype=_DTYPES[options.dtype])
    if options.in_place:
        run = partial(run, in_place=True)
    # A process that torchrun hasn't started is a job of its own.
    with tempfile.TemporaryDirectory() as folder:
        alone = {"init_method": f"file://{folder}/store", "rank": 0, "world_size": 1}
        world_size = env.read_int("WORLD_SIZE")
        place: dict[str, Any] = {} if world_size else alone
        reserve = _RESERVES.get(options.benchmark, "auto")
        with init_distributed(
            tp=world_size or 1,
            device="cuda",
            symmetric_reserve=reserve,
            tune="nccl" if options.benchmark in _OF_NCCL else "shipped",
            timeout=60,
            **place,
        ) as state:
            result = run(state)
            if state.rank == 0:
                _report(options, result, table(result))
                if options.plot is not None:
                    plot_collective(result, options.plot)


_ON_GPUS: dict[str, tuple[Callable[..., dict[str, Any]], Callable[[dict[str, Any]], str]]] = {
    "host": (run_host, format_host),
    "kv_gather": (run_kv_gather, format_kv_gather),
    "register": (run_register, format_register),
    "sleep": (run_sleep, format_sleep),
    "symmetric": (run_symmetric, format_symmetric),
    "all_reduce_rms_norm": (run_rms_norm, format_rms_norm),
    "compiled_step": (run_compiled_step, format_compiled_step),
    "decode_step": (run_decode_step, format_decode_step),
    "tune": (run_tune, format_tune),
    **{op: (partial(run_collective, op), format_collective) for op in BUS_FACTORS},
}
_OF_NCCL = ("host", "symmetric")


# Captured calls can't make room for their outputs.
_RESERVES = {"kv_gather": "8GiB", **dict.fromkeys((*BUS_FACTORS, "tune"), "2GiB")}


_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def _sizes(text: str) -> tuple[int, ...]:
    try:
        return tuple(parse_num_bytes("--sizes", size.strip(), "bench") for size in text.split(","))
    except ArgumentError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _report(options: argparse.Namespace, result: dict[str, Any], table: str) -> None:
    print(table)
    if options.json is not None:
        write_result(options.json, options.benchmark, result)


if __name__ == "__main__":
    main()
