"""Meetings in a store: all leave with the same list, also when a rank is late or stays away."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from distcomm.meeting import absent_ranks, bring, meet

Connect = Callable[[], dist.Store]

LONG_S = 20.0  # never waited for
TIMEOUT_S = 0.3
SOON_S = 2.0  # more than a store needs on a busy machine
NUM_RANKS = 3


def tcp_store(port: int = 0, *, serves: bool = False) -> dist.TCPStore:
    wait = timedelta(seconds=LONG_S)
    return dist.TCPStore("127.0.0.1", port, is_master=serves, timeout=wait, wait_for_workers=False)


@pytest.fixture(params=["FileStore", "TCPStore"])
def connect(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Connect]:
    """What gives a rank its own access to one store."""

    def file_store() -> dist.Store:
        store = dist.FileStore(str(tmp_path / "store"), NUM_RANKS)
        store.set_timeout(timedelta(seconds=LONG_S))
        return store

    if request.param == "FileStore":
        yield file_store
        return
    server = tcp_store(serves=True)
    yield lambda: tcp_store(server.port)


def hold(
    connect: Connect, reports: Mapping[int, Any], timeout_s: float, key: str = "key"
) -> tuple[list[list[Any]], list[float]]:
    """The lists that these ranks leave with, and how many seconds each took."""

    def attend(rank: int, report: Any) -> tuple[list[Any], float]:
        store = connect()
        start = time.monotonic()
        return meet(store, key, rank, NUM_RANKS, report, timeout_s), time.monotonic() - start

    with ThreadPoolExecutor(NUM_RANKS) as ranks:
        results = list(ranks.map(attend, reports.keys(), reports.values()))
    return [found for found, _ in results], [seconds for _, seconds in results]


def test_all_come(connect: Connect):
    reports = {0: {"a": [1, None]}, 1: "text", 2: 0}
    lists, seconds = hold(connect, reports, LONG_S)
    assert lists == [list(reports.values())] * NUM_RANKS
    assert max(seconds) < LONG_S / 2
    assert absent_ranks(lists[0]) == []


def test_a_report_that_is_false_is_a_report(connect: Connect):
    lists, _ = hold(connect, {0: 0, 1: [], 2: ""}, LONG_S)
    assert lists == [[0, [], ""]] * NUM_RANKS
    assert absent_ranks(lists[0]) == []


def test_meetings_of_other_names_are_others(connect: Connect):
    for key in ("first", "second"):
        lists, _ = hold(connect, dict.fromkeys(range(NUM_RANKS), key), LONG_S, key)
        assert lists == [[key] * NUM_RANKS] * NUM_RANKS


def test_a_rank_that_is_not_the_first_to_come_is_awaited(connect: Connect):
    with ThreadPoolExecutor(1) as late:
        start = time.monotonic()
        others = late.submit(hold, connect, {0: 10, 1: 11}, LONG_S)
        time.sleep(TIMEOUT_S)
        lists, _ = hold(connect, {2: 12}, LONG_S)
        assert [*others.result()[0], *lists] == [[10, 11, 12]] * NUM_RANKS
    assert time.monotonic() - start < LONG_S / 2


@pytest.mark.parametrize("absent", [1, 2])
def test_an_absent_rank_is_none_on_all_that_come(connect: Connect, absent: int):
    reports = {rank: rank for rank in range(NUM_RANKS) if rank != absent}
    lists, seconds = hold(connect, reports, TIMEOUT_S)
    assert lists == [[reports.get(rank) for rank in range(NUM_RANKS)]] * 2
    assert absent_ranks(lists[0]) == [absent]
    assert 0.9 * TIMEOUT_S < min(seconds) <= max(seconds) < TIMEOUT_S + SOON_S


def test_without_rank_0_the_others_make_the_list(connect: Connect):
    lists, seconds = hold(connect, {1: 11, 2: 12}, TIMEOUT_S)
    assert lists == [[None, 11, 12]] * 2
    # Whoever makes it has waited for rank 0's; the other one may find it made.
    assert 1.9 * TIMEOUT_S < max(seconds) < 2 * TIMEOUT_S + SOON_S


@pytest.mark.parametrize("late", range(NUM_RANKS))
def test_a_late_rank_gets_the_same_list_at_once(connect: Connect, late: int):
    reports = {rank: rank + 10 for rank in range(NUM_RANKS) if rank != late}
    lists, _ = hold(connect, reports, TIMEOUT_S)
    late_lists, late_seconds = hold(connect, {late: late + 10}, LONG_S)
    assert [*lists, *late_lists] == [[reports.get(rank) for rank in range(NUM_RANKS)]] * NUM_RANKS
    assert late_seconds[0] < SOON_S


def test_the_only_rank_to_come_makes_the_list(connect: Connect):
    lists, _ = hold(connect, {2: 12}, TIMEOUT_S)
    assert lists == [[None, None, 12]]
    assert absent_ranks(lists[0]) == [0, 1]


def test_a_late_rank_0_does_not_wait_for_ranks_that_the_list_is_without(connect: Connect):
    assert hold(connect, {1: 11}, TIMEOUT_S)[0] == [[None, 11, None]]
    lists, seconds = hold(connect, {0: 10}, SOON_S)
    assert lists == [[None, 11, None]]
    assert seconds[0] < SOON_S / 2


@pytest.mark.parametrize("brought", range(NUM_RANKS))
def test_a_report_that_was_brought_counts_as_a_rank_that_came(connect: Connect, brought: int):
    store = connect()
    start = time.monotonic()
    bring(store, "key", brought, brought + 10)
    assert time.monotonic() - start < SOON_S
    reports = {rank: rank + 10 for rank in range(NUM_RANKS) if rank != brought}
    lists, seconds = hold(connect, reports, TIMEOUT_S * 4)
    assert lists == [[10, 11, 12]] * 2
    # Those that came make the list without rank 0 if it is the one that doesn't wait for it.
    assert max(seconds) < (2 if brought == 0 else 1) * TIMEOUT_S * 4 + SOON_S


@pytest.mark.parametrize("rank", [0, 1])
def test_a_store_that_is_gone_is_an_error(rank: int):
    server = tcp_store(serves=True)
    store = tcp_store(server.port)
    store.set("key", "there")
    with ThreadPoolExecutor(1) as ranks:
        start = time.monotonic()
        waiting = ranks.submit(meet, store, "key", rank, NUM_RANKS, "report", LONG_S)
        while not waiting.running():
            time.sleep(0.01)
        time.sleep(TIMEOUT_S)
        del server
        with pytest.raises(RuntimeError):
            waiting.result(LONG_S)
        assert time.monotonic() - start < LONG_S / 2
    with pytest.raises(RuntimeError):
        meet(store, "next", rank, NUM_RANKS, "report", TIMEOUT_S)
