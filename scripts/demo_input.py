"""The demo's text: read by one rank, and what it is taken for."""

from __future__ import annotations

import re

from demo_options import MIN_TOKENS, Options

from distcomm import ParallelState

__all__ = ["InputError", "read_input", "shared_input", "split_prompts"]


class InputError(Exception):
    """The text can't be read, or is too short."""


def read_input(options: Options) -> bytes:
    """The first `max_tokens` bytes of the input file.

    Raises:
        InputError: it can't be read, or has less than what is asked of it.
    """
    try:
        with options.input.open("rb") as file:
            text = file.read(options.max_tokens)
    except OSError as error:
        raise InputError(f"--input: can't read '{options.input}': {error.strerror}") from error
    if len(text) < MIN_TOKENS:
        raise InputError(
            f"--input: '{options.input}' must have at least {MIN_TOKENS} bytes, one to read and "
            f"one to predict; got {len(text)}"
        )
    if options.generate is not None:
        split_prompts(text, options)
    return text


def split_prompts(text: bytes, options: Options) -> list[bytes]:
    """The text's first paragraphs, one a prompt; they differ in length.

    Raises:
        InputError: there aren't as many.
    """
    paragraphs = [each for each in re.split(rb"\n\s*\n", text.strip()) if each]
    if len(paragraphs) < options.prompts:
        raise InputError(
            f"--prompts: '{options.input}' must have {options.prompts} paragraphs in its first "
            f"{options.max_tokens} bytes; got {len(paragraphs)}"
        )
    return paragraphs[: options.prompts]


def shared_input(options: Options, state: ParallelState) -> bytes:
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
