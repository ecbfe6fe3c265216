"""What is compared between ranks: captured calls, and where the buffers of calls lie."""

from __future__ import annotations

import time
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from distcomm.errors import CaptureMismatchError, SymmetricMemoryError, SymmetricMismatchError
from distcomm.memory import CaptureLog, placement_check
from distcomm.objects import ObjectChannel
from tests.cpu.heap_ranks import CHUNK, LONG_S, HeapRank, run
from tests.worker_pool import WorkerPool

TIMEOUT_S = 0.5
SOON_S = 3.0

# A call: its name, dtype and number of elements of a buffer in the heap; None for no buffer.
Call = tuple[str, torch.dtype, int | None]
REDUCE: Call = ("all_reduce sum", torch.float32, 8)
GATHER: Call = ("all_gather_into_tensor", torch.int8, 5)
BARE: Call = ("broadcast from 0", torch.float32, None)


def log_of(rank: HeapRank, name: str = "log", timeout_s: float = LONG_S) -> CaptureLog:
    return CaptureLog(rank.windows, "tp", dist.PrefixStore(name, rank.store), timeout_s)


def observe(
    log: CaptureLog,
    op: str,
    *tensors: torch.Tensor,
    capturing: bool = True,
    placed: bool = True,
) -> None:
    """As if the current stream were being captured, or not."""
    with mock.patch.object(torch.cuda, "is_current_stream_capturing", return_value=capturing):
        log.observe(op, tensors, placed)


def record(rank: HeapRank, log: CaptureLog, calls: list[Call]) -> None:
    """All ranks have the same heap, and each call's buffer begins with its first byte."""
    heap = rank.tensor(CHUNK, torch.int8)
    rank.windows.register_new()
    for op, dtype, num_elements in calls:
        if num_elements is None:
            observe(log, op)
        else:
            observe(log, op, heap[: num_elements * dtype.itemsize].view(dtype))


def failed(log: CaptureLog) -> CaptureMismatchError:
    with pytest.raises(CaptureMismatchError) as caught:
        log.compare()
    assert str(caught.value).startswith("graph_capture: ")
    return caught.value


# Captures


def check_equal(rank: HeapRank) -> None:
    empty = log_of(rank, "empty")
    observe(empty, f"call of rank {rank.rank}", capturing=False)
    empty.compare()
    log = log_of(rank)
    record(rank, log, [REDUCE, BARE, REDUCE, GATHER])
    observe(log, "in ordinary memory", torch.ones(3))
    observe(log, "empty", torch.empty(0), torch.empty(0))
    log.compare()


def test_equal_captures_pass(workers: WorkerPool):
    run(workers, 3, check_equal)


def check_different(rank: HeapRank, usual: list[Call], odd: list[Call]) -> tuple[str, list[str]]:
    log = log_of(rank)
    record(rank, log, odd if rank.rank == 1 else usual)
    error = failed(log)
    assert error.odd_ranks == [1]
    assert (error.call, error.member) == ("graph_capture", rank.comm.member)
    return str(error).partition(" [")[0], list(error.reports.values())


REDUCE_TEXT = "all_reduce sum in 'tp', float32 32 bytes at segment #0 offset 0"


@pytest.mark.parametrize(
    ("usual", "odd", "index", "usual_text", "odd_text"),
    [
        (
            [BARE, REDUCE, BARE],
            [BARE, ("all_reduce max", *REDUCE[1:]), BARE],
            1,
            REDUCE_TEXT,
            "all_reduce max in 'tp', float32 32 bytes at segment #0 offset 0",
        ),
        (
            [REDUCE],
            [(REDUCE[0], torch.int32, 8)],
            0,
            REDUCE_TEXT,
            "all_reduce sum in 'tp', int32 32 bytes at segment #0 offset 0",
        ),
        (
            [REDUCE, REDUCE],
            [REDUCE, (*REDUCE[:2], 9)],
            1,
            REDUCE_TEXT,
            "all_reduce sum in 'tp', float32 36 bytes at segment #0 offset 0",
        ),
        ([GATHER, REDUCE], [GATHER], 1, REDUCE_TEXT, "nothing"),
        ([BARE], [BARE, BARE, GATHER], 1, "nothing", "broadcast from 0 in 'tp'"),
        # Of several differences the first.
        ([REDUCE, GATHER], [BARE, REDUCE], 0, REDUCE_TEXT, "broadcast from 0 in 'tp'"),
    ],
    ids=["op", "dtype", "bytes", "one less", "two more", "two differences"],
)
def test_the_first_call_that_differs_is_named(
    workers: WorkerPool,
    usual: list[Call],
    odd: list[Call],
    index: int,
    usual_text: str,
    odd_text: str,
):
    header = f"graph_capture: captured call {index} differs; look at rank 1"
    expected = (header, [usual_text, odd_text, usual_text])
    assert run(workers, 3, check_different, usual, odd) == [expected] * 3


def check_places(rank: HeapRank) -> list[str]:
    """Rank 1's input is one range further on, its output is in ordinary memory."""
    log, heap = log_of(rank), rank.tensor(CHUNK, torch.int8)
    rank.windows.register_new()
    x = heap[rank.rank * 64 :][:4]
    observe(log, "all_reduce sum", x, torch.ones(1) if rank.rank == 1 else heap[:4])
    return list(failed(log).reports.values())


def test_buffers_at_different_places(workers: WorkerPool):
    reports = [
        "all_reduce sum in 'tp', int8 4 bytes at segment #0 offset 0, "
        "int8 4 bytes at segment #0 offset 0",
        "all_reduce sum in 'tp', int8 4 bytes at segment #0 offset 64, "
        "float32 4 bytes in no window",
    ]
    assert run(workers, 2, check_places) == [reports] * 2


def check_places_that_do_not_matter(rank: HeapRank) -> list[str]:
    """Calls without symmetric kernels: of their tensors only the dtype and the bytes count."""
    log, heap = log_of(rank), rank.tensor(CHUNK, torch.int8)
    rank.windows.register_new()
    x = torch.ones(4, dtype=torch.int8) if rank.rank == 1 else heap[:4]
    observe(log, "broadcast from 0", x, placed=False)
    log.compare()
    other = log_of(rank, "other")
    observe(other, "broadcast from 0", heap[: 4 + rank.rank], placed=False)
    return list(failed(other).reports.values())


def test_where_tensors_without_symmetric_kernels_lie_is_no_difference(workers: WorkerPool):
    reports = [f"broadcast from 0 in 'tp', int8 {4 + rank} bytes in no window" for rank in range(2)]
    assert run(workers, 2, check_places_that_do_not_matter) == [reports] * 2


def check_in_place(rank: HeapRank) -> list[str]:
    """A rank's part of the gathered, or scattered, tensor lies at another offset on each."""
    log, heap = log_of(rank), rank.tensor(CHUNK, torch.int8)
    rank.windows.register_new()
    whole = heap[64:][:24]
    own = whole[rank.rank * 8 :][:8]
    observe(log, "all_gather_into_tensor", own, whole)
    observe(log, "reduce_scatter_tensor sum", whole, own)
    log.compare()
    other = log_of(rank, "other")
    observe(other, "all_gather_into_tensor", whole[:8] if rank.rank == 1 else own, whole)
    return list(failed(other).reports.values())


def test_what_lies_in_place_is_no_difference(workers: WorkerPool):
    own, whole = "int8 8 bytes", "int8 24 bytes at segment #0 offset 64"
    in_place = f"{own} in place, this rank's part of buffer 1, {whole}"
    reports = [in_place, f"{own} at segment #0 offset 64, {whole}", in_place]
    assert (
        run(workers, 3, check_in_place)
        == [[f"all_gather_into_tensor in 'tp', {report}" for report in reports]] * 3
    )


FAILURE = "its capture failed: ValueError: 7"


def check_failed_rank(rank: HeapRank, odd: int) -> dict[int, str] | None:
    """The others come only after it has left; it hasn't waited for them."""
    log = log_of(rank)
    record(rank, log, [REDUCE] * rank.rank)
    if rank.rank == odd:
        start = time.monotonic()
        log.tell(FAILURE)
        assert time.monotonic() - start < SOON_S
        dist.barrier()
        return None
    dist.barrier()
    start = time.monotonic()
    error = failed(log)
    assert time.monotonic() - start < SOON_S
    assert error.odd_ranks == [odd]
    assert f"a rank's capture failed; look at rank {odd} [" in str(error)
    return error.reports


@pytest.mark.parametrize("odd", [1, 2])
def test_a_failed_capture_is_told_to_the_others(workers: WorkerPool, odd: int):
    """The rank itself raises what has failed."""
    reports = {rank: FAILURE if rank == odd else f"captured {rank} calls" for rank in range(3)}
    expected = [None if rank == odd else reports for rank in range(3)]
    assert run(workers, 3, check_failed_rank, odd) == expected


def check_failed_rank_0(rank: HeapRank) -> dict[int, str] | None:
    log = log_of(rank, timeout_s=TIMEOUT_S)
    if rank.rank == 0:
        log.tell(FAILURE)
        dist.barrier()
        return None
    start = time.monotonic()
    error = failed(log)
    assert time.monotonic() - start < 2 * TIMEOUT_S + SOON_S
    dist.barrier()
    assert error.odd_ranks == [0]
    return error.reports


def test_a_failed_capture_of_rank_0(workers: WorkerPool):
    """It isn't there to make the list; the others do so when it doesn't."""
    reports = {0: FAILURE, 1: "captured 0 calls", 2: "captured 0 calls"}
    assert run(workers, 3, check_failed_rank_0) == [None, reports, reports]


def check_telling_a_lost_store(rank: HeapRank) -> None:
    store = mock.Mock()
    store.set.side_effect = RuntimeError("Broken pipe")
    with mock.patch("distcomm.memory.placement.logger.warning") as warning:
        CaptureLog(rank.windows, "tp", store, TIMEOUT_S).tell(FAILURE)
    (call,) = warning.call_args_list
    assert call.args[0] % call.args[1:] == f"graph_capture: Broken pipe [{rank.comm.member}]"
    assert [name for name, *_ in store.mock_calls] == ["set"], "nothing was waited for"


def test_a_failure_that_can_not_be_told_is_logged(workers: WorkerPool):
    run(workers, 2, check_telling_a_lost_store)


def check_absent_rank(rank: HeapRank, late: int) -> tuple[dict[int, str], list[int]]:
    log = log_of(rank, timeout_s=TIMEOUT_S)
    if rank.rank == late:
        dist.barrier()
    start = time.monotonic()
    error = failed(log)
    assert time.monotonic() - start < 2 * TIMEOUT_S + SOON_S
    if rank.rank != late:
        dist.barrier()
    return error.reports, error.odd_ranks


@pytest.mark.parametrize("late", [0, 1])
def test_a_rank_that_does_not_come_in_time(workers: WorkerPool, late: int):
    reports = dict.fromkeys(range(3), "captured 0 calls")
    reports[late] = f"did not come within {TIMEOUT_S:g} s"
    assert run(workers, 3, check_absent_rank, late) == [(reports, [late])] * 3


def check_lost_store(rank: HeapRank) -> None:
    store = mock.Mock()
    store.set.side_effect = RuntimeError("Broken pipe")  # as a TCPStore's without its server
    log = CaptureLog(rank.windows, "tp", store, TIMEOUT_S)
    with pytest.raises(SymmetricMemoryError, match="store can't be reached: Broken pipe") as caught:
        log.compare()
    assert f"[{rank.comm.member}]" in str(caught.value)


def test_a_store_that_is_gone(workers: WorkerPool):
    run(workers, 2, check_lost_store)


# Every call


def check_placement(rank: HeapRank, differences: list[dict[str, Any]]) -> list[list[str]]:
    group = dist.group.WORLD
    assert group is not None
    check = placement_check(rank.windows, "tp", ObjectChannel(rank.comm.member, group))
    heap = rank.tensor(CHUNK, torch.int8)
    rank.windows.register_new()
    check("all_reduce sum", (heap[:4], heap[4:8]), True)
    check("broadcast from 0", (), False)
    check("all_reduce sum", (torch.ones(rank.comm.world_size), torch.empty(0)), True)
    check("broadcast from 0", (heap[rank.rank * 4 :][:4],), False)
    reports = []
    for difference in differences:
        usual = {"op": "all_reduce sum", "begin": 0, "end": 4, "dtype": torch.int8}
        mine = {**usual, **difference} if rank.rank == 1 else usual
        x = heap[mine["begin"] : mine["end"]].view(mine["dtype"])
        with pytest.raises(SymmetricMismatchError, match="the ranks' buffers differ") as caught:
            check(mine["op"], (x, heap[8:12]), True)
        assert type(caught.value) is SymmetricMismatchError
        assert (caught.value.odd_ranks, caught.value.call) == ([1], mine["op"])
        reports.append(list(caught.value.reports.values()))
    check("all_reduce sum", (heap[:4], heap[:4]), True)
    return reports


def test_buffers_that_differ_are_an_error_on_all_ranks(workers: WorkerPool):
    output = "int8 4 bytes at segment #0 offset 8"
    usual = f"all_reduce sum in 'tp', int8 4 bytes at segment #0 offset 0, {output}"
    odd = {
        f"all_reduce sum in 'tp', int8 4 bytes at segment #0 offset 2, {output}": {
            "begin": 2,
            "end": 6,
        },
        f"all_reduce sum in 'tp', int8 3 bytes at segment #0 offset 0, {output}": {"end": 3},
        f"all_reduce sum in 'tp', float16 4 bytes at segment #0 offset 0, {output}": {
            "dtype": torch.float16
        },
        usual.replace("sum", "max"): {"op": "all_reduce max"},
    }
    expected = [[usual, text, usual] for text in odd]
    assert run(workers, 3, check_placement, [*odd.values()]) == [expected] * 3
