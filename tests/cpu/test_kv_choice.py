"""Which method gathers: the rules, as a table."""

from __future__ import annotations

from dataclasses import replace

import pytest

from distcomm.context_parallel.choice import Choice, GatherFacts, choose_method

GPUS = GatherFacts(
    on_cuda=True, not_direct=None, no_copies=None, beside_compute=True, bytes_per_run=1 << 20
)
CPU = replace(GPUS, on_cuda=False, not_direct="no GPU")
APART = replace(GPUS, not_direct="out of reach")
OLD_DRIVER = replace(GPUS, no_copies="too old")


@pytest.mark.parametrize(
    ("wanted", "facts", "expected"),
    [
        ("auto", GPUS, Choice("copy_engine")),
        ("auto", replace(GPUS, beside_compute=False), Choice("kernel")),
        ("auto", replace(GPUS, bytes_per_run=(1 << 20) - 1), Choice("kernel")),
        ("auto", OLD_DRIVER, Choice("kernel")),
        ("auto", APART, Choice("collective", "out of reach")),
        ("auto", CPU, Choice("collective")),  # what is to be expected there, and no fallback
        ("collective", GPUS, Choice("collective")),
        ("collective", CPU, Choice("collective")),
        ("kernel", GPUS, Choice("kernel")),
        ("kernel", OLD_DRIVER, Choice("kernel")),
        ("kernel", APART, "out of reach"),
        ("kernel", CPU, "the tensors are on CPU"),
        (
            "copy_engine",
            replace(GPUS, beside_compute=False, bytes_per_run=2),
            Choice("copy_engine"),
        ),
        ("copy_engine", OLD_DRIVER, "too old"),
        ("copy_engine", APART, "out of reach"),
        ("copy_engine", CPU, "the tensors are on CPU"),
    ],
)
def test_the_method(wanted: str, facts: GatherFacts, expected: Choice | str) -> None:
    assert choose_method(wanted, facts) == expected
