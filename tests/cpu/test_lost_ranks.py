"""Ranks that don't come to a call, or die: the others get an error in time, and can close."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from distcomm import CollectiveError, GroupCoordinator, destroy_distributed, is_initialized
from tests.cpu.job import start
from tests.worker_pool import WorkerError, WorkerPool, fresh_init_method

TIMEOUT_S = 1.0
LOST = 1

# Calls that need rank 1 of the group on every other rank.
CALLS: dict[str, Callable[[GroupCoordinator], object]] = {
    "all_reduce": lambda g: g.all_reduce(torch.ones(2)),
    "recv": lambda g: g.recv((2,), torch.float32, LOST),
    "barrier": lambda g: g.barrier(),
    "all_gather_object": lambda g: g.all_gather_object(1),
}


def error_of(group: GroupCoordinator, call: str) -> str:
    with pytest.raises(CollectiveError) as caught:
        CALLS[call](group)
    assert caught.value.call == call
    assert caught.value.member == group.member
    return str(caught.value)


def call_without(rank: int, world_size: int, url: str, call: str, absent: list[int]) -> str | None:
    try:
        state = start(rank, world_size, url, tp=world_size, timeout=TIMEOUT_S)
        if rank not in absent:
            return error_of(state.tp, call)
        time.sleep(2 * TIMEOUT_S)  # there, but busy: the others aren't told by a closed connection
        return None
    finally:
        destroy_distributed()


@pytest.mark.parametrize("call", CALLS)
def test_a_rank_that_stays_away_is_an_error_within_the_timeout(workers: WorkerPool, call: str):
    texts = workers.run(call_without, fresh_init_method(), call, [LOST], ranks=3)
    for rank in (0, 2):
        place = f"[group 'tp', rank {rank} ({rank} of 3)]"
        assert str(texts[rank]).startswith(f"{call} failed: ")
        assert str(texts[rank]).endswith(place)


def test_rank_0_of_a_barrier_names_all_that_are_missing(workers: WorkerPool):
    texts = workers.run(call_without, fresh_init_method(), "barrier", [1, 3], ranks=4)
    assert "1, 3" in str(texts[0])


def survive_a_death(rank: int, world_size: int, url: str, folder: Path) -> None:
    """Rank 1 dies before a collective. The others write down what they got, go on and close."""
    state = start(rank, world_size, url, tp=world_size, timeout=2 * TIMEOUT_S)
    survivors = [r for r in range(world_size) if r != LOST]
    state.tp.barrier()  # all are connected
    if rank == LOST:
        os.kill(os.getpid(), signal.SIGKILL)
    group = state.create_group("survivors", survivors)
    text = error_of(state.tp, "all_reduce")
    (folder / str(rank)).write_text(text)
    while not all((folder / str(r)).exists() for r in survivors):
        time.sleep(0.01)  # neighbours of the dead learn of it at once, the others in time
    assert group.all_gather_object(rank) == survivors
    destroy_distributed()
    assert not is_initialized()
    (folder / f"{rank} closed").touch()


def test_survivors_of_a_killed_rank_raise_go_on_and_close(workers: WorkerPool, tmp_path: Path):
    with pytest.raises(WorkerError) as caught:
        workers.run(survive_a_death, fresh_init_method(), tmp_path, ranks=4)
    assert caught.value.exceptions.keys() == {LOST}, str(caught.value)
    assert "was killed by SIGKILL" in str(caught.value)
    for rank in (0, 2, 3):
        assert (tmp_path / str(rank)).read_text().startswith("all_reduce failed: ")
        assert (tmp_path / f"{rank} closed").exists()
