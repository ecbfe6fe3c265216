"""Windows of the symmetric heap: registered by all ranks of a communicator or by none."""

from __future__ import annotations

import ctypes
import gc
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from distcomm.errors import SymmetricMemoryError, SymmetricMismatchError
from distcomm.memory import ASLEEP, GroupWindows
from distcomm.nccl import NcclLibrary, PyNcclCommunicator
from tests.cpu.heap_ranks import CHUNK, HeapRank, run
from tests.nccl_on_cpu import (
    becomes_true,
    num_calls,
    num_live_bytes,
    num_live_windows,
    with_environment,
)
from tests.worker_pool import WorkerPool

TIMEOUT_S = 0.8
SOON_S = 3.0  # more than a meeting takes on a busy machine

REGISTER, DEREGISTER = "ncclCommWindowRegister", "ncclCommWindowDeregister"


def described(*segments: tuple[int, int]) -> str:
    return "new segments " + ", ".join(f"#{ordinal}: {size} bytes" for ordinal, size in segments)


def window_of(rank: HeapRank, address: int, windows: GroupWindows | None = None) -> int:
    found = (windows or rank.windows).find(address)
    assert found is not None
    return found.window


def expect_working(rank: HeapRank, *, num_windows: int) -> None:
    """The next growth, equal on all ranks, is registered; their segments have equal numbers."""
    address = rank.alloc(2 * CHUNK)
    rank.windows.register_new()
    assert window_of(rank, address)
    assert (rank.windows.num_new, rank.windows.num_windows) == (0, num_windows)
    assert num_live_windows() == num_windows
    ordinal = torch.tensor(rank.heap.next_ordinal())
    assert rank.comm.all_reduce(ordinal, "max") == rank.comm.all_reduce(ordinal, "min")
    assert rank.sum_of_ones() == rank.comm.world_size


# All ranks have the same


def check_equal(rank: HeapRank) -> None:
    windows, before = rank.windows, num_calls(REGISTER)
    windows.register_new()
    first, second = rank.tensor(8), rank.tensor(2 * CHUNK)
    assert (windows.num_new, windows.num_windows) == (2, 0)
    assert not windows.is_symmetric(first)
    windows.register_new()
    assert (windows.num_new, windows.num_windows, num_live_windows()) == (0, 2, 2)
    assert num_calls(REGISTER) == before + 2
    assert windows.unsupported is None
    assert all(windows.is_symmetric(each) for each in (first, first[3:], second))
    assert window_of(rank, first.data_ptr()) != window_of(rank, second.data_ptr())
    for other in (torch.ones(8), first[:0], torch.ones(8, device="meta")):
        assert not windows.is_symmetric(other)
    assert windows.peer_addresses(first.data_ptr()) == [None] * rank.comm.world_size
    rank.alloc()
    assert windows.num_new == 0, "a segment has room"
    assert rank.given_up == (0, 0)


@pytest.mark.parametrize("world_size", [2, 4])
def test_equal_segments_are_registered(workers: WorkerPool, world_size: int):
    run(workers, world_size, check_equal)


def check_silence(rank: HeapRank) -> None:
    rank.alloc()
    rank.windows.register_new()
    before = num_calls(REGISTER)
    rank.alloc()
    if rank.rank == 0:  # alone: if it met the others, it would miss them
        rank.windows.register_new()
    assert num_calls(REGISTER) == before
    dist.barrier()
    expect_working(rank, num_windows=2)


def test_without_new_segments_nothing_is_communicated(workers: WorkerPool):
    run(workers, 2, check_silence, timeout_s=TIMEOUT_S * 5)


# The ranks differ


def check_other_order(rank: HeapRank, odd: int, *, common: bool) -> None:
    """A rank's second segment lies below its first one, that of the others above theirs."""
    first = rank.alloc()
    rank.windows.register_new()
    before = num_calls(REGISTER)
    descends = {"FAKE_NCCL_MEMORY_DESCENDS": "1"} if rank.rank == odd else {}
    with with_environment(**descends):
        second = rank.alloc(2 * CHUNK)
    assert (second < first) == (rank.rank == odd)
    error, _ = rank.mismatch(call=rank.register_common if common else None)
    assert error.odd_ranks == [odd]
    assert "lie in different orders (reserve enough at the start)" in str(error)
    assert error.reports == {
        each: f"segments by address: {'#1, #0' if each == odd else '#0, #1'}"
        for each in range(rank.comm.world_size)
    }
    assert num_calls(REGISTER) == before
    assert window_of(rank, first)
    assert not window_of(rank, second)
    assert rank.given_up == (1, 1)
    expect_working(rank, num_windows=2)


@pytest.mark.parametrize("common", [False, True])
@pytest.mark.parametrize("odd", [1, 2])
def test_segments_in_another_order_are_not_used(workers: WorkerPool, odd: int, common: bool):
    run(workers, 3, partial(check_other_order, odd=odd, common=common))


def check_order_of_the_living(rank: HeapRank) -> None:
    """A segment that is gone is in nobody's way."""
    descends = {"FAKE_NCCL_MEMORY_DESCENDS": "1"}
    with with_environment(**(descends if rank.rank == 1 else {})):
        first = rank.heap.alloc(CHUNK)
    rank.windows.register_new()
    assert rank.heap.free(first)
    assert num_live_windows() == 0
    with with_environment(**(descends if rank.rank == 0 else {})):
        rank.alloc(CHUNK)
    rank.windows.register_new()
    assert rank.windows.num_windows == 1
    expect_working(rank, num_windows=2)


def test_the_order_is_that_of_the_segments_there_are(workers: WorkerPool):
    run(workers, 2, check_order_of_the_living)


def check_other_size(rank: HeapRank, odd: int) -> None:
    before = num_calls(REGISTER)
    sizes = [CHUNK + (2 << 20 if each == odd else 0) for each in range(rank.comm.world_size)]
    address = rank.alloc(sizes[rank.rank])
    error, _ = rank.mismatch()
    assert error.odd_ranks == [odd]
    assert f"look at rank {odd} [" in str(error)
    assert error.reports == {each: described((0, size)) for each, size in enumerate(sizes)}
    assert num_calls(REGISTER) == before
    assert (num_live_windows(), rank.windows.num_new) == (0, 0)
    assert rank.given_up == (1, 1)
    assert not window_of(rank, address)
    expect_working(rank, num_windows=1)


@pytest.mark.parametrize(("world_size", "odd"), [(2, 1), (3, 0), (4, 2)])
def test_a_segment_of_another_size(workers: WorkerPool, world_size: int, odd: int):
    run(workers, world_size, check_other_size, odd)


def check_one_more(rank: HeapRank) -> None:
    """Rank 1 has made a second segment. The first, which all have, is registered later."""
    address = rank.alloc(CHUNK)
    if rank.rank == 1:
        rank.alloc(CHUNK)
    error, _ = rank.mismatch()
    assert error.odd_ranks == [1]
    assert error.reports[0] == error.reports[2] == described((0, CHUNK))
    assert error.reports[1] == described((0, CHUNK), (1, CHUNK))
    assert rank.given_up == ((1, 1) if rank.rank == 1 else (0, 1))
    assert (rank.windows.num_new, rank.heap.next_ordinal()) == (1, 2)
    expect_working(rank, num_windows=2)
    assert window_of(rank, address)


def test_a_segment_that_one_rank_has_more(workers: WorkerPool):
    run(workers, 3, check_one_more)


def check_out_of_memory(rank: HeapRank, odd: int) -> None:
    before = num_calls(REGISTER)
    failure = None
    if rank.rank == odd:
        with with_environment(FAKE_NCCL_MEMORY_BYTES=str(num_live_bytes())):
            assert rank.heap.alloc(1) == 0
        problem = rank.heap.take_failure()
        assert problem is not None
        failure = problem.text
    else:
        rank.alloc()
    error, _ = rank.mismatch(failure)
    assert error.odd_ranks == [odd]
    assert f"look at rank {odd} [" in str(error)
    for each, report in error.reports.items():
        if each == odd:
            assert "ncclMemAlloc: out of memory" in report
        else:
            assert report == described((0, CHUNK))
    assert num_calls(REGISTER) == before
    assert rank.given_up == ((0, 1) if rank.rank == odd else (1, 1))
    expect_working(rank, num_windows=1)


@pytest.mark.parametrize(("world_size", "odd"), [(3, 1), (3, 0), (2, 0), (2, 1)])
def test_a_rank_without_memory(workers: WorkerPool, world_size: int, odd: int):
    run(workers, world_size, check_out_of_memory, odd)


def check_failure_after_allocating(rank: HeapRank, odd: int) -> None:
    """Its segment is one that all have, and yet it can't register."""
    rank.alloc()
    error, _ = rank.mismatch("a reason" if rank.rank == odd else None)
    assert error.odd_ranks == [odd]
    assert error.reports[odd] == "a reason"
    assert rank.given_up == (0, 1)
    assert rank.windows.num_new == 1
    expect_working(rank, num_windows=2)


@pytest.mark.parametrize(("world_size", "odd"), [(2, 0), (3, 1)])
def test_a_rank_that_failed_with_segments_that_all_have(
    workers: WorkerPool, world_size: int, odd: int
):
    run(workers, world_size, check_failure_after_allocating, odd)


# A rank is late


def absence(timeout_s: float = TIMEOUT_S) -> str:
    return f"did not come within {timeout_s:g} s"


def check_late(rank: HeapRank, late: int) -> tuple[dict[int, str], list[int]]:
    before = num_calls(REGISTER)
    address = rank.alloc()
    if rank.rank == late:
        dist.barrier()
        error, seconds = rank.mismatch()
        assert seconds < SOON_S / 2
        assert seconds < TIMEOUT_S * 0.9
    else:
        error, seconds = rank.mismatch()
        assert TIMEOUT_S * 0.9 < seconds < 2 * TIMEOUT_S + SOON_S
        dist.barrier()
    dist.barrier()
    assert rank.given_up == (1, 1)
    assert (rank.windows.num_new, num_calls(REGISTER)) == (0, before)
    assert not window_of(rank, address)
    expect_working(rank, num_windows=1)
    return error.reports, error.odd_ranks


@pytest.mark.parametrize(("world_size", "late"), [(2, 0), (2, 1), (3, 0), (3, 2)])
def test_a_late_rank_is_named_and_the_segments_given_up_on_all(
    workers: WorkerPool, world_size: int, late: int
):
    reports = dict.fromkeys(range(world_size), described((0, CHUNK)))
    reports[late] = absence()
    results = run(workers, world_size, check_late, late, timeout_s=TIMEOUT_S)
    assert results == [(reports, [late])] * world_size


def check_nothing_new_is_put_where_ranks_differ(rank: HeapRank) -> None:
    """An absent rank's peers don't carve anything out of what they have given up."""
    if rank.rank == 0:
        kept = rank.alloc()
        rank.mismatch()
        later = rank.alloc()
        found = [rank.windows.find(address) for address in (kept, later)]
        assert [each and each.ordinal for each in found] == [0, 1]


def test_nothing_is_carved_out_of_what_was_given_up(workers: WorkerPool):
    run(workers, 2, check_nothing_new_is_put_where_ranks_differ, timeout_s=TIMEOUT_S)


def grows(rank: HeapRank) -> bool:
    """Whether a segment of its own is registered; else all of it was given up."""
    address = rank.alloc(CHUNK)
    try:
        rank.windows.register_new()
    except SymmetricMismatchError:
        assert not window_of(rank, address)
        assert rank.windows.num_new == 0
        return False
    assert window_of(rank, address)
    return True


def check_drift(
    rank: HeapRank, alone: Sequence[int], times: int, last_to_come: Sequence[int]
) -> list[bool]:
    for _ in range(times):
        if rank.rank in alone:
            assert not grows(rank)
    results = []
    for _ in range(5):
        dist.barrier()
        if rank.rank in last_to_come:
            time.sleep(TIMEOUT_S / 4)
        results.append(grows(rank))
    return results


# Who has met alone, how often, and who comes last from then on. Who is one meeting behind never
# comes together with those ahead: who finds what would be by chance.
DRIFTS: list[tuple[int, tuple[int, ...], int, tuple[int, ...]]] = [
    (2, (0,), 1, (1,)),
    (2, (1,), 1, (0,)),
    (2, (0,), 2, (1,)),
    (2, (0,), 2, (0,)),
    (2, (1,), 3, (0,)),
    (2, (1,), 3, (1,)),
    (3, (0,), 1, (1, 2)),
    (3, (2,), 1, (0, 1)),
    (3, (0, 2), 1, (1,)),
    # Those that are behind come first: they find their meeting over, and the next not yet begun.
    (2, (0,), 1, (0,)),
    (2, (1,), 1, (1,)),
    (3, (0,), 1, (0,)),
    (3, (2,), 1, (2,)),
    (3, (0, 2), 1, (0, 2)),
]


@pytest.mark.parametrize(
    ("world_size", "alone", "times", "last_to_come"),
    DRIFTS,
)
def test_ranks_meet_again_after_some_met_without_the_others(
    workers: WorkerPool,
    world_size: int,
    alone: tuple[int, ...],
    times: int,
    last_to_come: tuple[int, ...],
):
    """At the latest the third growth that is equal on all ranks is registered, on all of them."""
    results = run(workers, world_size, check_drift, alone, times, last_to_come, timeout_s=TIMEOUT_S)
    assert [each[2:] for each in results] == [[True] * 3] * world_size, results


# What all ranks have


def payload_of(rank: int) -> Any:
    return {"rank": rank, "list": [rank, None]}


def check_common(rank: HeapRank) -> None:
    windows, before = rank.windows, num_calls(REGISTER)
    payloads = [payload_of(each) for each in range(rank.comm.world_size)]
    assert rank.register_common(payloads[rank.rank]) == payloads
    assert num_calls(REGISTER) == before, "there is nothing yet"
    first, second = rank.alloc(CHUNK), rank.alloc(2 * CHUNK)
    assert windows.num_new == 2
    assert rank.register_common(payloads[rank.rank]) == payloads
    assert (windows.num_new, windows.num_windows, num_live_windows()) == (0, 2, 2)
    assert window_of(rank, first)
    assert window_of(rank, second)
    assert rank.register_common() == [None] * rank.comm.world_size
    assert num_calls(REGISTER) == before + 2
    assert rank.given_up == (0, 0)
    expect_working(rank, num_windows=3)


@pytest.mark.parametrize("world_size", [2, 3])
def test_common_segments_are_registered(workers: WorkerPool, world_size: int):
    run(workers, world_size, check_common)


def check_not_common(rank: HeapRank, having: Sequence[int]) -> None:
    """The first segment is on all ranks, the second on some, or with another size on the rest."""
    common = rank.alloc(CHUNK)
    own = rank.alloc(CHUNK if rank.rank in having else 2 * CHUNK)
    before = num_calls(REGISTER)
    payloads = [payload_of(each) for each in range(rank.comm.world_size)]
    assert rank.register_common(payloads[rank.rank]) == payloads
    assert num_calls(REGISTER) == before + 1
    assert (rank.windows.num_new, rank.windows.num_windows, num_live_windows()) == (0, 1, 1)
    assert window_of(rank, common)
    assert not window_of(rank, own)
    assert rank.given_up == (0, 0)
    rank.windows.register_new()
    expect_working(rank, num_windows=2)
    assert not window_of(rank, own)


@pytest.mark.parametrize(("world_size", "having"), [(2, (0,)), (2, (1,)), (3, (0, 1))])
def test_segments_that_differ_are_passed_over(
    workers: WorkerPool, world_size: int, having: tuple[int, ...]
):
    run(workers, world_size, check_not_common, having)


def check_one_has_more(rank: HeapRank, having: Sequence[int]) -> HeapRank:
    common = rank.alloc(CHUNK)
    own = rank.alloc(CHUNK) if rank.rank in having else 0
    rank.register_common()
    assert (rank.windows.num_new, rank.windows.num_windows, num_live_windows()) == (0, 1, 1)
    assert window_of(rank, common)
    assert not own or not window_of(rank, own)
    assert rank.given_up == (0, 0)
    return rank


def check_one_has_more_only(rank: HeapRank, having: Sequence[int]) -> None:
    check_one_has_more(rank, having)
    if rank.rank in having:
        address = rank.alloc(2 << 20)  # in no segment yet: those that there are are full
        assert window_of(rank, address) == 0


def check_growth_after_one_has_more(rank: HeapRank, having: Sequence[int]) -> None:
    check_one_has_more(rank, having)
    expect_working(rank, num_windows=2)


HAVING = pytest.mark.parametrize(("world_size", "having"), [(2, (0,)), (2, (1,)), (3, (0, 1))])


@HAVING
def test_a_segment_that_some_ranks_have_is_passed_over(
    workers: WorkerPool, world_size: int, having: tuple[int, ...]
):
    run(workers, world_size, check_one_has_more_only, having)


@HAVING
def test_growth_after_a_segment_was_passed_over(
    workers: WorkerPool, world_size: int, having: tuple[int, ...]
):
    run(workers, world_size, check_growth_after_one_has_more, having)


def check_late_for_common(rank: HeapRank, late: int) -> tuple[dict[int, str], list[int]]:
    before = num_calls(REGISTER)
    address = rank.alloc()
    call = rank.register_common
    if rank.rank == late:
        dist.barrier()
        error, seconds = rank.mismatch(call=call)
        assert seconds < TIMEOUT_S * 0.9
    else:
        error, seconds = rank.mismatch(call=call)
        assert TIMEOUT_S * 0.9 < seconds < 2 * TIMEOUT_S + SOON_S
        dist.barrier()
    assert f"not all ranks came; look at rank {late} [" in str(error)
    dist.barrier()
    assert num_calls(REGISTER) == before
    assert rank.given_up == (0, 0)
    rank.register_common()
    assert window_of(rank, address)
    expect_working(rank, num_windows=2)
    return error.reports, error.odd_ranks


@pytest.mark.parametrize(("world_size", "late"), [(2, 0), (2, 1), (3, 2)])
def test_a_rank_that_is_late_for_the_common_ones(workers: WorkerPool, world_size: int, late: int):
    reports = dict.fromkeys(range(world_size), described((0, CHUNK)))
    reports[late] = absence()
    results = run(workers, world_size, check_late_for_common, late, timeout_s=TIMEOUT_S)
    assert results == [(reports, [late])] * world_size


# Threads


def check_threads(rank: HeapRank) -> None:
    """Of each rank two threads come at once, as two contexts that end."""
    windows = rank.windows
    for round_ in range(1, 4):
        rank.alloc(CHUNK)
        before, ready = num_calls(REGISTER), threading.Barrier(2)

        def leave(ready: threading.Barrier = ready) -> None:
            assert windows.num_new == 1
            ready.wait(SOON_S)
            windows.register_new()

        with ThreadPoolExecutor(2) as threads:
            for each in [threads.submit(leave) for _ in range(2)]:
                each.result()
        assert num_calls(REGISTER) == before + 1
        assert (windows.num_new, windows.num_windows) == (0, round_)
    assert rank.given_up == (0, 0)
    expect_working(rank, num_windows=4)


@pytest.mark.parametrize("world_size", [2, 3])
def test_two_threads_of_a_rank_register_once(workers: WorkerPool, world_size: int):
    run(workers, world_size, check_threads)


# NCCL fails


def check_nccl_failure(rank: HeapRank, rule: str, odd: int | None) -> None:
    """Of two segments the second can't be registered; the first one's window ends again."""
    nth = num_calls(REGISTER) + 2
    rank.alloc(CHUNK)
    rank.alloc(CHUNK)
    rule = f"{REGISTER}:nth={nth}{rule}"
    with with_environment(FAKE_NCCL_FAIL=rule, FAKE_NCCL_TIMEOUT_S="0.3"):
        error, _ = rank.mismatch()
    # Where only one rank fails by itself, the others have waited for it in vain.
    assert error.odd_ranks == [0, 1, 2]
    for each in range(3) if odd is None else [odd]:
        assert error.reports[each].startswith(f"{REGISTER} returned 3 (internal error): ")
        assert f"rank {each} failed because of FAKE_NCCL_FAIL" in error.reports[each]
    assert (num_live_windows(), rank.windows.num_windows, rank.windows.num_new) == (0, 0, 0)
    assert rank.given_up == (2, 1)
    if odd is None:
        expect_working(rank, num_windows=1)


@pytest.mark.parametrize(("rule", "odd"), [(":code=3", None), (":code=3:rank=1", 1)])
def test_an_error_of_nccl(workers: WorkerPool, rule: str, odd: int | None):
    run(workers, 3, check_nccl_failure, rule, odd)


ABORT, DESTROY = "ncclCommAbort", "ncclCommDestroy"
STUCK_S = 4.0  # longer than everything else here takes


def stuck(rank: HeapRank, stuck_s: float) -> tuple[int, dict[int, str]]:
    """A registration in which rank 1 stays behind so long; the address, and what was reported."""
    address = rank.alloc()
    variables = {"FAKE_NCCL_HANG": f"{REGISTER}:rank=1", "FAKE_NCCL_TIMEOUT_S": str(stuck_s)}
    with with_environment(**variables):
        error, seconds = rank.mismatch()
    assert TIMEOUT_S * 0.9 < seconds < 2 * TIMEOUT_S + SOON_S
    assert error.odd_ranks == list(range(rank.comm.world_size))
    assert "NCCL didn't register on all ranks; look at ranks 0, 1" in str(error)
    assert not window_of(rank, address)
    assert rank.given_up == (1, 1)
    assert rank.windows.num_new == 0
    return address, error.reports


def expect_abort(rank: HeapRank) -> None:
    before = num_calls(ABORT), num_calls(DESTROY)
    start = time.monotonic()
    rank.comm.close()
    assert time.monotonic() - start < SOON_S
    assert (num_calls(ABORT), num_calls(DESTROY)) == (before[0] + 1, before[1])


def registrations_end() -> bool:
    names = [thread.name for thread in threading.enumerate()]
    return not any(REGISTER in name for name in names)


def check_hang(rank: HeapRank) -> dict[int, str]:
    _, reports = stuck(rank, STUCK_S)
    assert not registrations_end(), "the call has returned before the communicator was aborted"
    dist.barrier()  # another rank's abort ends this rank's call, too
    expect_abort(rank)
    assert becomes_true(registrations_end, SOON_S), "aborting ends the call"
    assert num_live_windows() == 0
    rank.windows.register_new()  # of a closed group: nothing
    assert rank.windows.num_new == 0
    return reports


@pytest.mark.parametrize("world_size", [2, 3])
def test_a_registration_that_hangs(workers: WorkerPool, world_size: int):
    text = f"{REGISTER} did not return within {TIMEOUT_S:g} s"
    results = run(workers, world_size, check_hang, timeout_s=TIMEOUT_S)
    assert results == [dict.fromkeys(range(world_size), text)] * world_size


def check_growth_after_stuck(rank: HeapRank, hang_s: float) -> None:
    """Whether the call has returned by then or not, the group has no windows from then on."""
    stuck(rank, hang_s)
    if hang_s < STUCK_S:
        assert becomes_true(registrations_end, STUCK_S)
    dist.barrier()
    address = rank.alloc(2 * CHUNK)
    start = time.monotonic()
    rank.windows.register_new()
    rank.windows.register_new("out of memory")
    assert rank.register_common(7) == [7]
    assert time.monotonic() - start < SOON_S
    assert rank.windows.unsupported == "a registration got stuck"
    assert rank.windows.num_new == 0
    assert not window_of(rank, address)
    expect_abort(rank)
    assert becomes_true(registrations_end, SOON_S)
    assert num_live_windows() == 0


@pytest.mark.parametrize("hang_s", [STUCK_S, TIMEOUT_S * 1.5])
def test_growth_after_a_registration_has_hung(workers: WorkerPool, hang_s: float):
    run(workers, 2, check_growth_after_stuck, hang_s, timeout_s=TIMEOUT_S)


def register_by_hand(rank: HeapRank, address: int, num_bytes: int) -> Callable[[], int]:
    """Past the heap; returns what undoes it."""
    library, window = ctypes.CDLL(NcclLibrary().path), ctypes.c_void_p()
    comm = ctypes.c_void_p(rank.comm.handle)
    code = library.ncclCommWindowRegister(
        comm, ctypes.c_void_p(address), ctypes.c_size_t(num_bytes), ctypes.byref(window), 1
    )
    assert code == 0
    return lambda: library.ncclCommWindowDeregister(comm, window)


def check_late_success(rank: HeapRank) -> None:
    """Rank 1 comes to NCCL too late, and by hand; rank 0's call, given up, then succeeds."""
    address = rank.alloc()
    if rank.rank == 1:
        proceed = threading.Event()

        def late(*_: object) -> tuple[int, int]:
            proceed.wait(STUCK_S * 2)
            return 0, 0

        with mock.patch.object(rank.heap, "register_new", late):
            rank.mismatch()
        dist.barrier()
        undo = register_by_hand(rank, address, CHUNK)
        proceed.set()
        assert undo() == 0
    else:
        before = num_calls(DEREGISTER)
        rank.mismatch()
        assert not registrations_end()
        dist.barrier()
        assert becomes_true(registrations_end, SOON_S)
        assert num_calls(DEREGISTER) == before + 1
    assert num_live_windows() == 0
    assert (rank.windows.num_windows, window_of(rank, address)) == (0, 0)
    assert rank.given_up == (1, 1)
    expect_abort(rank)


def test_a_window_that_comes_too_late_is_ended(workers: WorkerPool):
    run(workers, 2, check_late_success, timeout_s=TIMEOUT_S)


# Windows are not supported


def check_null_windows(rank: HeapRank) -> str | None:
    tensor = rank.tensor(4)
    windows = rank.windows
    with with_environment(FAKE_NCCL_NULL_WINDOW=f"{REGISTER}:rank=1"):
        windows.register_new()
    assert (num_live_windows(), windows.num_windows, windows.num_new) == (0, 0, 0)
    assert not windows.is_symmetric(tensor)
    before = num_calls(REGISTER)
    rank.alloc(2 * CHUNK)
    assert windows.num_new == 0
    if rank.rank == 0:  # alone
        windows.register_new()
    assert num_calls(REGISTER) == before
    assert rank.sum_of_ones() == 3
    return windows.unsupported


def test_null_windows_on_one_rank_switch_them_off_on_all(workers: WorkerPool):
    reasons = run(workers, 3, check_null_windows)
    assert reasons == ["NCCL 2.28.9 gives no windows here"] * 3


# Communicators


def check_close(rank: HeapRank) -> None:
    address = rank.alloc()
    rank.windows.register_new()
    before = num_calls(DEREGISTER)
    live_at_close: list[int] = []
    rank.comm.on_close(lambda _comm, _orderly: live_at_close.append(num_live_windows()))
    rank.comm.close()
    assert live_at_close == [0], "a window outlived its communicator"
    assert num_calls(DEREGISTER) == before + 1
    assert not window_of(rank, address)


def test_closing_a_communicator_ends_its_windows_first(workers: WorkerPool):
    run(workers, 2, check_close)


def check_two_communicators(rank: HeapRank) -> None:
    address = rank.alloc()
    first, before = rank.windows, num_calls(REGISTER)
    group = dist.group.WORLD
    assert group is not None
    comm = PyNcclCommunicator(group, "cpu", name="second")
    own = dist.PrefixStore("second", rank.store)
    second = GroupWindows(rank.heap, comm, own, TIMEOUT_S * 5, mock.Mock())
    first.register_new()
    assert (first.num_new, second.num_new) == (0, 1)
    assert not window_of(rank, address, second)
    for windows in (second, first, second):
        windows.register_new()
    assert num_calls(REGISTER) == before + 2
    assert (first.num_windows, second.num_windows, num_live_windows()) == (1, 1, 2)
    assert window_of(rank, address) != window_of(rank, address, second) != 0
    comm.close()
    assert (first.num_windows, num_live_windows()) == (1, 1)
    assert window_of(rank, address)


def test_two_communicators_register_a_segment_once_each(workers: WorkerPool):
    run(workers, 2, check_two_communicators)


def check_lost_store(rank: HeapRank) -> None:
    wait = timedelta(seconds=SOON_S)
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=wait, wait_for_workers=False)
    store = dist.TCPStore("127.0.0.1", server.port, timeout=wait, wait_for_workers=False)
    windows = GroupWindows(rank.heap, rank.comm, store, SOON_S, mock.Mock())
    rank.alloc()
    del server
    gc.collect()
    with pytest.raises(SymmetricMemoryError, match="the job's store can't be reached: ") as caught:
        windows.register_new()
    assert f"[{rank.comm.member}]" in str(caught.value)


def test_a_store_that_is_gone(workers: WorkerPool):
    run(workers, 2, check_lost_store)


# Asleep


def check_asleep(rank: HeapRank) -> None:
    windows = rank.windows
    address = rank.alloc()
    windows.register_new()
    rank.alloc(2 * CHUNK)
    windows.register_new()
    for _ in range(2):
        before = num_calls(DEREGISTER)
        assert windows.fall_asleep() is None
        assert num_calls(DEREGISTER) == before + 2
        assert (windows.num_windows, num_live_windows(), windows.num_new) == (0, 0, 0)
        assert windows.unsupported == ASLEEP
        assert windows.fall_asleep() is None  # once more does nothing
        windows.register_new()
        assert num_live_windows() == 0
        windows.wake_up()
        assert windows.unsupported is None
        assert (windows.num_windows, num_live_windows(), windows.num_new) == (2, 2, 0)
        assert window_of(rank, address)
        windows.wake_up()
        assert num_live_windows() == 2
    expect_working(rank, num_windows=3)


def test_windows_end_and_come_back(workers: WorkerPool):
    run(workers, 3, check_asleep)


def check_segment_of_one_rank(rank: HeapRank) -> None:
    """It was made with a group that the others aren't in."""
    rank.alloc()
    rank.windows.register_new()
    own = rank.alloc(2 * CHUNK) if rank.rank == 1 else 0
    rank.windows.count_common()
    rank.windows.register_common()
    assert rank.windows.fall_asleep() is None
    rank.windows.wake_up()
    assert rank.windows.num_windows == 1
    if own:
        assert not window_of(rank, own)


def test_what_was_passed_over_is_passed_over_again(workers: WorkerPool):
    run(workers, 2, check_segment_of_one_rank)


def check_failing_end(rank: HeapRank) -> None:
    rank.alloc()
    rank.windows.register_new()
    with with_environment(FAKE_NCCL_FAIL=f"{DEREGISTER}:code=3"):
        problem = rank.windows.fall_asleep()
    assert problem is not None
    assert f"{DEREGISTER} returned 3 [group 'trial', rank {rank.rank}" in problem


def test_a_window_that_does_not_end_is_told(workers: WorkerPool):
    run(workers, 2, check_failing_end)


def check_stuck_end(rank: HeapRank) -> None:
    rank.alloc()
    rank.windows.register_new()
    with with_environment(FAKE_NCCL_HANG=DEREGISTER, FAKE_NCCL_TIMEOUT_S="3"):
        problem = rank.windows.fall_asleep()
        assert problem is not None
        assert f"{DEREGISTER} did not return within" in problem
        assert rank.alloc(2 * CHUNK), "the heap goes on"


def test_an_end_that_gets_stuck_is_bounded_and_locks_nobody_out(workers: WorkerPool):
    run(workers, 2, check_stuck_end, timeout_s=TIMEOUT_S)
