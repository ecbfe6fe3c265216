"""Which method gathers: a pure function of what all ranks know alike."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["METHODS", "Choice", "GatherFacts", "choose_method"]

METHODS = ("auto", "collective", "kernel", "copy_engine")

# A copy engine takes some microseconds to start a copy: worth it for copies that take longer, and
# only where something else wants the SMs. From 1 MiB on a copy at 381 GB/s takes 2.7 µs.
_LEAST_COPY_BYTES = 1 << 20


@dataclass(frozen=True)
class GatherFacts:
    """What the choice depends on; the same on all ranks.

    Attributes:
        on_cuda: whether the tensors are on a GPU.
        not_direct: why ranks can't write into each other's outputs; None if they can.
        no_copies: why copy engines can't do it; None if they can.
        beside_compute: whether the caller goes on beside the gather.
        bytes_per_run: of the plan's runs of tokens, on average, and all tensors.
    """

    on_cuda: bool
    not_direct: str | None
    no_copies: str | None
    beside_compute: bool
    bytes_per_run: int


@dataclass(frozen=True)
class Choice:
    """A method, and why it is not the one that could be expected."""

    method: str
    fallback_reason: str | None = None


def choose_method(wanted: str, facts: GatherFacts) -> Choice | str:
    """The method to use, or why `wanted`, one of `METHODS`, can't be."""
    if wanted == "collective" or (wanted == "auto" and not facts.on_cuda):
        return Choice("collective")
    if not facts.on_cuda:
        return "the tensors are on CPU"
    if facts.not_direct is not None:
        return Choice("collective", facts.not_direct) if wanted == "auto" else facts.not_direct
    if wanted == "copy_engine" and facts.no_copies is not None:
        return facts.no_copies
    if wanted != "auto":
        return Choice(wanted)
    long_copies = facts.bytes_per_run >= _LEAST_COPY_BYTES and facts.no_copies is None
    return Choice("copy_engine" if facts.beside_compute and long_copies else "kernel")
