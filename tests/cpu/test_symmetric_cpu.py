"""Symmetric memory and graph captures in CPU jobs: blocks that do nothing, and count why."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

import pytest
import torch

import distcomm
from distcomm import (
    ArgumentError,
    GraphCapture,
    GroupCoordinator,
    InitializationError,
    NotInitializedError,
    ParallelState,
    symmetric,
)
from distcomm.agreement import JobWish
from distcomm.env import verifies_symmetric_memory
from distcomm.errors import DistcommError, LaunchError
from distcomm.memory import parse_num_bytes
from tests.cpu.job import Job, start
from tests.worker_pool import WorkerPool, fresh_init_method

ON_CPU = "the job runs on CPU"
DISABLED = "disabled by the caller"

# Blocks that do nothing on CPU.
Block = Callable[[ParallelState, GroupCoordinator], AbstractContextManager[Any]]
BLOCKS: dict[str, Block] = {
    "symmetric_memory": lambda _, group: group.symmetric_memory(),
    "symmetric_memory, disabled": lambda _, group: group.symmetric_memory(enabled=False),
    "use_symmetric_memory": lambda _, group: distcomm.use_symmetric_memory(group),
    "use_symmetric_memory, disabled": lambda _, group: distcomm.use_symmetric_memory(group, True),
    "suspend": lambda state, _: state.suspend_symmetric_memory(),
    "distcomm.suspend": lambda *_: distcomm.suspend_symmetric_memory(),
    "group's capture": lambda _, group: group.graph_capture(),
    "group's symmetric capture": lambda _, group: group.graph_capture(symmetric=True),
    "state's capture": lambda state, _: state.graph_capture(),
    "distcomm.capture": lambda *_: distcomm.graph_capture(symmetric=True),
}


def use_block(state: ParallelState, name: str) -> None:
    group, block = state.tp, BLOCKS[name]
    with block(state, group) as value:
        x = torch.ones(3)
        assert torch.equal(group.all_reduce(x), torch.full((3,), float(group.world_size)))
        assert not group.is_symmetric(x)
        with block(state, group):
            assert group.all_gather(torch.ones(1)).numel() == group.world_size
    assert value == (GraphCapture(None, None) if "capture" in name else None)
    with pytest.raises(LookupError, match="inside"), block(state, group):
        raise LookupError("inside")
    group.barrier()


@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_does_nothing(job: Job, name: str):
    job.run(use_block, name)


def count_reasons(state: ParallelState) -> dict[str, Any]:
    group = state.create_group("symmetric", range(state.world_size))
    assert group.stats()["symmetric_memory"] == {"contexts": 0, "inactive": {}, "windows": 0}
    group.symmetric_memory()  # not entered
    context = group.symmetric_memory()
    for _ in range(2):
        with context, context:
            pass
    with distcomm.use_symmetric_memory(group, disabled=True):
        pass
    with group.symmetric_memory(enabled=False), distcomm.use_symmetric_memory(group):
        pass
    with group.graph_capture(), state.suspend_symmetric_memory():
        pass
    stats: dict[str, Any] = group.stats()["symmetric_memory"]
    group.close()
    assert group.stats()["symmetric_memory"] == stats
    return stats


def test_reasons_are_counted(job: Job):
    inactive = {ON_CPU: 5, DISABLED: 2}
    for stats in job.run(count_reasons):
        assert stats == {"contexts": 0, "inactive": inactive, "windows": 0}


def ask_for_addresses(state: ParallelState) -> None:
    x = torch.ones(2, 3)
    assert state.symmetric_pool is None
    for group in state.groups.values():
        assert not group.is_symmetric(x)
        assert not symmetric.is_symmetric(x, group)
        for call in (group.peer_pointers, lambda x, group=group: symmetric.peer_pointers(x, group)):
            with pytest.raises(ArgumentError) as caught:
                call(x)
            text = "one of shape [2, 3] on cpu that is not"
            assert str(caught.value) == (
                f"peer_pointers: tensor must be symmetric for this group; got {text} "
                f"[{group.member}]"
            )
            assert caught.value.member == group.member


def test_nothing_is_symmetric(job: Job):
    job.run(ask_for_addresses)


def test_without_a_state():
    assert not distcomm.is_initialized()
    with distcomm.suspend_symmetric_memory() as value:
        assert value is None
    with pytest.raises(LookupError), distcomm.suspend_symmetric_memory():
        raise LookupError
    with pytest.raises(NotInitializedError), distcomm.graph_capture():
        raise AssertionError("entered")


# Arguments of init_distributed


def error_of(rank: int, world_size: int, url: str, options: list[dict[str, Any]]) -> Any:
    distcomm.destroy_distributed()
    try:
        start(rank, world_size, url, tp=world_size, **options[rank])
    except DistcommError as error:
        assert not distcomm.is_initialized()
        return type(error).__name__, str(error), getattr(error, "failures", None)
    finally:
        distcomm.destroy_distributed()
    return None


def errors(workers: WorkerPool, *options: dict[str, Any]) -> list[Any]:
    """Per rank the error's type, text and `failures`; None where there was none."""
    return workers.run(error_of, fresh_init_method(), list(options), ranks=len(options))


@pytest.mark.parametrize("value", ["nonsense", "", "4 GiB more", -1, 1.5, True, None])
def test_a_reserve_that_is_no_size_is_refused_on_cpu_too(workers: WorkerPool, value: object):
    for name, text, _ in errors(workers, *[{"symmetric_reserve": value}] * 2):
        assert name == "ArgumentError"
        assert text == (
            "init_distributed: symmetric_reserve must be a number of bytes >= 0, or a text such "
            f"as '512MiB' or '4GiB'; got {value!r}"
        )


@pytest.mark.parametrize("value", ["auto", 0, "0", 1 << 50, "4 GiB"])
def test_a_reserve_does_nothing_on_cpu(workers: WorkerPool, value: object):
    assert errors(workers, *[{"symmetric_reserve": value}] * 2) == [None, None]


def test_ranks_that_reserve_differently(workers: WorkerPool):
    sizes = ["1GiB", "1GiB", 0]
    failures = {2: "symmetric_reserve is 0, on rank 0 '1GiB'"}
    for name, text, found in errors(workers, *[{"symmetric_reserve": size} for size in sizes]):
        assert (name, found) == (InitializationError.__name__, failures)
        assert f"rank 2: {failures[2]}" in text


def test_ranks_that_verify_differently(workers: WorkerPool):
    for name, _, found in errors(workers, {"verify_symmetric": True}, {}):
        assert name == InitializationError.__name__
        assert found == {1: "verify_symmetric is False, on rank 0 True"}


def start_with_settings(rank: int, world_size: int, url: str) -> str:
    torch._C._accelerator_setAllocatorSettings("max_split_size_mb:32" if rank == 1 else "")
    try:
        start(rank, world_size, url, tp=world_size)
    except InitializationError as error:
        return str(error)
    finally:
        torch._C._accelerator_setAllocatorSettings("")
    return "none"


def test_ranks_that_cut_memory_differently(workers: WorkerPool):
    for text in workers.run(start_with_settings, fresh_init_method(), ranks=2):
        assert "rank 1: torch's allocator settings is max_split_size_mb:32, on rank 0" in text


def test_an_unknown_issue_to_ignore(workers: WorkerPool):
    """The rank that names it raises its own error, the others are told."""
    results = errors(workers, {}, {"ignore_known_issues": ["captured-symmetric-race", "nothing"]})
    assert results[0][0] == InitializationError.__name__
    assert results[1][0] == "ArgumentError"
    for _, text, _ in results:
        assert "ignore_known_issues must be a collection of names out of " in text
        assert "got 'nothing'" in text
    assert results[0][2].keys() == {1}


def test_the_order_of_ignored_issues_is_no_difference(workers: WorkerPool):
    """As `repr` writes a set of texts, whose order follows the process's hash seed."""
    names = ["captured-symmetric-race", "copy-engine-pair-hang"]
    wishes = [
        JobWish("cpu", ignore_known_issues=dict.fromkeys(order)) for order in (names, names[::-1])
    ]
    assert wishes[0].as_json() == wishes[1].as_json()


# Sizes, and the variable


@pytest.mark.parametrize(
    ("value", "num_bytes"),
    [
        (0, 0),
        (7, 7),
        (1 << 40, 1 << 40),
        ("0", 0),
        ("7", 7),
        (" 12 ", 12),
        ("7b", 7),
        ("1k", 1024),
        ("1K", 1024),
        ("3KiB", 3 * 1024),
        ("512 MiB", 512 << 20),
        ("512MB", 512 << 20),
        ("512m", 512 << 20),
        ("4GiB", 4 << 30),
        ("4g", 4 << 30),
        ("2 TiB", 2 << 40),
    ],
)
def test_sizes(value: int | str, num_bytes: int):
    assert parse_num_bytes("size", value, "call") == num_bytes


@pytest.mark.parametrize(
    "value",
    [
        *("", " ", "b", "GiB", "-1", "1.5G", "1e9", "4 X", "4P", "0x10", "1_000", "4GiB4", "k1"),
        *(-1, 1.0, True, None, b"4", [4]),
        *("4ib", "4bb", "4bib", "4kibb", "4kk", "4kbi", "4 k b", "4\n5", "+4"),
        "\u0664",
    ],
)
def test_what_is_no_size(value: Any):
    with pytest.raises(ArgumentError) as caught:
        parse_num_bytes("size", value, "call")
    assert str(caught.value) == (
        "call: size must be a number of bytes >= 0, or a text such as '512MiB' or '4GiB'; "
        f"got {value!r}"
    )


@pytest.mark.parametrize(
    ("text", "verifies"), [(None, False), ("", False), ("0", False), ("1", True), ("2", True)]
)
def test_the_variable(text: str | None, verifies: bool):
    with mock.patch.dict(os.environ):
        os.environ.pop("DISTCOMM_VERIFY_SYMMETRIC", None)
        if text is not None:
            os.environ["DISTCOMM_VERIFY_SYMMETRIC"] = text
        assert verifies_symmetric_memory() == verifies


@pytest.mark.parametrize("text", ["yes", "-1", "1.0"])
def test_a_bad_variable(monkeypatch: pytest.MonkeyPatch, text: str):
    monkeypatch.setenv("DISTCOMM_VERIFY_SYMMETRIC", text)
    with pytest.raises(LaunchError) as caught:
        start(0, 1, fresh_init_method())
    assert str(caught.value) == (
        f"environment variable DISTCOMM_VERIFY_SYMMETRIC must be an integer >= 0; got {text!r}"
    )
    assert not distcomm.is_initialized()
