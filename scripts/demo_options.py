"""The demo's options: what they are, which fit together, and what is chosen where none is given."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from distcomm import LayoutError, ParallelLayout

__all__ = ["MIN_TOKENS", "VOCABULARY_SIZE", "Options", "complain", "parse_options"]

VOCABULARY_SIZE = 256  # bytes
MIN_TOKENS = 2  # one to read, one to predict

_DEFAULT_INPUT = Path(__file__).resolve().parents[1] / "README.md"
_DEFAULT_NUM_PROCESSES = 8  # on a machine without a GPU
_DEFAULT_NUM_PROMPTS = 4
_DESCRIPTION = """\
Runs a small causal transformer over several processes, with its heads and MLPs split over
tensor-parallel ranks and its text over context-parallel ranks; then runs it in one process and
compares. With --generate it continues several prompts instead, token by token from a KV cache that
lies spread over the context-parallel ranks. Started by hand it launches itself with torchrun; it
can also be started by torchrun.
"""
_EPILOG = """\
exit codes: 0 when the results are equal, logits within the tolerance and generated tokens all; 1
when they aren't; 2 when the options or the input can't be used.
"""
_GRACE_S = 1.0


@dataclass(frozen=True)
class Options:
    """What to run, complete and checked; `nproc` is the world size under torchrun.

    `generate` is None for one forward pass of the text; `prompts` and `compile` are for `generate`.
    """

    nproc: int
    tp: int
    cp: int
    cp_layout: str
    device: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    mlp: int
    max_tokens: int
    input: Path
    seed: int
    tolerance: float
    generate: int | None
    prompts: int
    compile: bool

    @property
    def num_new(self) -> int:
        """Tokens to generate for each prompt."""
        return self.generate or 0

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads


def parse_options(argv: Sequence[str] | None, *, world_size: int | None, num_gpus: int) -> Options:
    """The options on the command line; exits with code 2 and a message if they can't be used.

    Args:
        argv: the arguments; None for those of this process.
        world_size: number of ranks under torchrun; None when nothing has been launched yet.
        num_gpus: number of GPUs of this machine.
    """
    parser = _make_parser()
    args = parser.parse_args(argv)
    default_nproc = num_gpus if num_gpus and args.device != "cpu" else _DEFAULT_NUM_PROCESSES
    args.nproc = world_size or args.nproc or default_nproc
    if world_size is None and args.device == "cuda" and args.nproc > num_gpus:
        parser.error(f"--device cuda needs a GPU for each of {args.nproc} ranks; got {num_gpus}")
    _fill_in_parallel_sizes(args)
    if args.generate is None and (args.prompts is not None or args.compile):
        parser.error(f"--{'compile' if args.prompts is None else 'prompts'} needs --generate")
    args.prompts = args.prompts or _DEFAULT_NUM_PROMPTS
    options = Options(**vars(args))
    try:
        layout = ParallelLayout(
            options.nproc, tp=options.tp, cp=options.cp, cp_layout=options.cp_layout
        )
    except LayoutError as error:
        problem = str(error).splitlines()[0]
        parser.error(f"{problem}\n--nproc, --tp, --cp and --cp-layout must fit together")
    for fits, problem in _requirements(options, layout):
        if not fits:
            parser.error(problem)
    return options


def complain(message: str) -> None:
    """Says what is wrong, if this is rank 0 or no rank, for something all ranks know.

    The others wait a moment: torchrun ends all ranks when the first one has ended.
    """
    if os.environ.get("RANK", "0") == "0":
        print(message, file=sys.stderr, flush=True)
    else:
        time.sleep(_GRACE_S)


class _Parser(argparse.ArgumentParser):
    """Says what is wrong once, and not once per rank."""

    def error(self, message: str) -> NoReturn:
        complain(f"{self.format_usage()}{self.prog}: error: {message}")
        self.exit(2)


def _make_parser() -> argparse.ArgumentParser:
    parser = _Parser(description=_DESCRIPTION, epilog=_EPILOG)
    _add_process_options(parser.add_argument_group("processes"))
    _add_model_options(parser.add_argument_group("model and text"))
    _add_generation_options(parser.add_argument_group("generation"))
    return parser


def _add_process_options(group: argparse._ArgumentGroup) -> None:
    for name, what in (
        ("nproc", "number of processes; ignored under torchrun (default: one per GPU, or 8)"),
        ("tp", "tensor-parallel size (default: nproc, or nproc / cp for beside_tp)"),
        (
            "cp",
            "context-parallel size (default: what --tp leaves of nproc; else 2 if nproc is even)",
        ),
    ):
        group.add_argument(f"--{name}", type=_int_of_at_least(1), metavar="N", help=what)
    group.add_argument(
        "--cp-layout",
        choices=("auto", "inside_tp", "beside_tp"),
        default="auto",
        help="inside_tp: nproc = tp; beside_tp: nproc = tp * cp (default: auto, whichever fits)",
    )
    group.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="auto: cuda if there is a GPU for every process (default: %(default)s)",
    )


def _add_model_options(group: argparse._ArgumentGroup) -> None:
    for name, minimum, default, what in (
        ("layers", 1, 4, "layers"),
        ("hidden", 1, 256, "hidden size"),
        ("heads", 1, 8, "query heads"),
        ("kv-heads", 1, 4, "key and value heads"),
        ("mlp", 1, 1024, "columns of the MLP"),
        ("seed", 0, 0, "of the weights"),
        ("max-tokens", MIN_TOKENS, 4096, "bytes of the text to read at most"),
    ):
        convert, text = _int_of_at_least(minimum), f"{what} (default: {default})"
        group.add_argument(f"--{name}", type=convert, default=default, metavar="N", help=text)
    group.add_argument(
        "--input",
        type=Path,
        default=_DEFAULT_INPUT,
        metavar="FILE",
        help="the text, any bytes (default: this repository's README.md)",
    )
    group.add_argument(
        "--tolerance",
        type=_tolerance,
        default=1e-4,
        metavar="X",
        help="how far logits may differ (default: %(default)s)",
    )


def _add_generation_options(group: argparse._ArgumentGroup) -> None:
    for name, what in (
        ("generate", "bytes to generate for each prompt; the likeliest one each time"),
        ("prompts", f"paragraphs of the text to continue (default: {_DEFAULT_NUM_PROMPTS})"),
    ):
        group.add_argument(f"--{name}", type=_int_of_at_least(1), metavar="N", help=what)
    group.add_argument(
        "--compile", action="store_true", help="torch.compile the step that makes a token"
    )


def _int_of_at_least(minimum: int) -> Callable[[str], int]:
    def convert(text: str) -> int:
        if not text.isdecimal() or int(text) < minimum:
            raise argparse.ArgumentTypeError(f"must be an integer >= {minimum}; got {text!r}")
        return int(text)

    return convert


def _tolerance(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not value >= 0:
        raise argparse.ArgumentTypeError(f"must be a number >= 0; got {text!r}")
    return value


def _fill_in_parallel_sizes(args: argparse.Namespace) -> None:
    if args.cp is None and args.tp in (None, args.nproc):
        args.cp = 2 if args.nproc % 2 == 0 else 1
    elif args.cp is None:  # what tp leaves is for cp
        args.cp = max(1, args.nproc // args.tp)
    if args.tp is None:
        beside = args.cp_layout == "beside_tp"
        args.tp = max(1, args.nproc // args.cp) if beside else args.nproc


def _requirements(options: Options, layout: ParallelLayout) -> list[tuple[bool, str]]:
    """Which sizes must fit which: whether they do, and what to say if not."""
    o, attn_tp = options, layout.size("attn_tp")
    sharing = f"attn_tp = {attn_tp} (the ranks that share the attention heads)"
    return [
        (
            o.hidden % o.heads == 0,
            f"--hidden must be divisible by --heads = {o.heads}; got {o.hidden}",
        ),
        (
            o.head_dim % 2 == 0,
            f"--hidden / --heads must be even, for rotary embeddings; got {o.head_dim}",
        ),
        (
            o.heads % o.kv_heads == 0,
            f"--heads must be divisible by --kv-heads = {o.kv_heads}; got {o.heads}",
        ),
        (o.heads % attn_tp == 0, f"--heads must be divisible by {sharing}; got {o.heads}"),
        (
            o.kv_heads % attn_tp == 0 or attn_tp % o.kv_heads == 0,
            f"--kv-heads must divide, or be divisible by, {sharing}; got {o.kv_heads}",
        ),
        (o.mlp % o.tp == 0, f"--mlp must be divisible by --tp = {o.tp}; got {o.mlp}"),
        (
            VOCABULARY_SIZE % o.tp == 0,
            f"--tp must divide the vocabulary of {VOCABULARY_SIZE} bytes; got {o.tp}",
        ),
    ]
