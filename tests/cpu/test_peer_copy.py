"""Pushes of rows by copy engines, on a stand-in for the CUDA driver (see push_ranks.py).

distcomm looks for the driver once per process, so all of this runs in a worker of its own.

W ranks; a signal area is 32-bit words: ready[W], arrived[W], and a 1.
"""

from __future__ import annotations

import ctypes
import functools
import random
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from distcomm.errors import ArgumentError, PeerCopyError
from distcomm.memory.peer_copy import PeerCopies, PushedRows, RowRun, RowRuns
from tests.cpu.push_ranks import (
    GUARD_BYTES,
    LONG_S,
    Gather,
    Memory,
    Plan,
    Ranks,
    Shape,
    in_place_plan,
    initial_words,
    native_library,
    random_plan,
    stream_of,
)
from tests.fake_cuda import INJECTED, TIMED_OUT, FakeCuda, Operation, driver_with
from tests.worker_pool import WorkerPool

NOT_SUPPORTED = 801  # CUDA_ERROR_NOT_SUPPORTED
DRIVER_FUNCTIONS = [
    "cuStreamIsCapturing",
    "cuStreamGetCaptureInfo_v2",
    "cuUserObjectCreate",
    "cuGraphRetainUserObject",
    "cuUserObjectRelease",
    "cuThreadExchangeStreamCaptureMode",
    "cuDevicePrimaryCtxRetain",
    "cuCtxPushCurrent_v2",
    "cuCtxPopCurrent_v2",
    "cuCtxSynchronize",
    "cuMemcpyDtoH_v2",
    "cuMemcpyAsync",
    "cuMemcpy2DAsync_v2",
    "cuStreamBatchMemOp_v2",
]


# The process of the tests


@functools.cache
def fake_cuda() -> FakeCuda:
    return FakeCuda()


def in_worker(_rank: int, _world_size: int, check: Callable[..., None], args: Any) -> None:
    """Calls a check below with the driver stand-in in its first state."""
    fake = fake_cuda()
    assert PeerCopies(native_library(), 0, [0]).available
    fake.fail_after(-1)
    fake.set_timeout(10.0)
    fake.set_delay(0.0)
    check(fake, *args)


class Process:
    """Runs checks in a process that has the stand-in for the driver."""

    def __init__(self, pool: WorkerPool) -> None:
        self._pool = pool

    def run(self, check: Callable[..., None], *args: object) -> None:
        self._pool.run(in_worker, check, args)


@pytest.fixture(scope="module")
def process() -> Iterator[Process]:
    with WorkerPool(1) as pool:
        yield Process(pool)


# What is pushed


def check_worked_example(_fake: FakeCuda) -> None:
    run = RowRun(source_row=2, output_row=10, num_rows=3, output_stride=4)
    gather = Gather(Plan(20, (Shape(1, 1, 1),), ((run,),)))
    gather.sources[0][0].bytes[GUARD_BYTES:-GUARD_BYTES] = b"--abc"
    Ranks(1).push(0, gather)
    written = gather.outputs[0][0].payload()
    assert written.replace(b"\0", b".") == b"..........a...b...c."


def test_the_worked_example(process: Process) -> None:
    process.run(check_worked_example)


def check_calls(fake: FakeCuda, world_size: int, most_delay_s: float) -> None:
    """Plans take turns on one set of signal areas. No barrier keeps the ranks together."""
    num_plans, num_calls = 10, 220
    plans = random.Random(world_size)
    gathers = [Gather(random_plan(world_size, plans)) for _ in range(num_plans)]
    gathers += [Gather(in_place_plan(world_size, 1)), Gather(in_place_plan(world_size, world_size))]
    ranks = Ranks(world_size)
    fake.set_delay(most_delay_s)

    def body(rank: int) -> None:
        delays = random.Random(rank)
        for call in range(num_calls):
            gather = gathers[call // 4 % len(gathers)]
            gather.fill(rank, call)
            if delays.random() < 0.3:
                time.sleep(delays.random() * 2e-3)
            ranks.push(rank, gather)
            # A peer may be in the next call, but none can have written to this rank yet.
            words = ranks.areas[rank].words()
            assert words[world_size:] == [0] * world_size + [1], (rank, call)
            if delays.random() < 0.3:
                time.sleep(delays.random() * 2e-3)
            gather.check(rank, call)

    ranks.run(body)
    ranks.check_signals()


@pytest.mark.parametrize("world_size", range(1, 9))
def test_many_calls_on_the_same_signal_areas(process: Process, world_size: int) -> None:
    process.run(check_calls, world_size, 0.0)


@pytest.mark.parametrize("world_size", [2, 3])
def test_many_calls_with_slow_operations(process: Process, world_size: int) -> None:
    process.run(check_calls, world_size, 1e-4)


def check_signals_after_each(_fake: FakeCuda, world_size: int) -> None:
    ranks, rng = Ranks(world_size), random.Random(world_size)
    barrier = threading.Barrier(world_size, timeout=LONG_S)
    for call in range(30):
        gather = Gather(random_plan(world_size, rng))

        def body(rank: int, gather: Gather = gather, call: int = call) -> None:
            gather.fill(rank, call)
            barrier.wait()
            ranks.push(rank, gather)

        ranks.run(body)
        ranks.check_signals()
        for rank in range(world_size):
            gather.check(rank, call)


@pytest.mark.parametrize("world_size", [1, 2, 5, 8])
def test_the_signal_areas_are_as_at_first_after_each_call(
    process: Process, world_size: int
) -> None:
    process.run(check_signals_after_each, world_size)


def check_no_rows(fake: FakeCuda) -> None:
    """The ranks meet although there is nothing to copy."""
    ranks = Ranks(3)
    gather = Gather(Plan(4, (Shape(0, 4, 4), Shape(4, 4, 4)), ((RowRun(0, 0, 0, 1),), (), ())))
    with fake.logged() as operations:
        ranks.run(lambda rank: ranks.push(rank, gather))
    assert {each.num_bytes for each in operations if each.kind == "copy"} == {4}
    assert not any(each.kind == "copy_2d" for each in operations)
    no_tensors = Gather(Plan(4, (), ((RowRun(0, 0, 2, 1),), (), ())))
    ranks.run(lambda rank: ranks.push(rank, no_tensors))
    ranks.check_signals()


def test_nothing_to_copy(process: Process) -> None:
    process.run(check_no_rows)


# How it is done

ORDER_RUNS = (
    RowRun(0, 0, 3, 1),  # contiguous where the pitches are
    RowRun(3, 3, 2, 2),  # strided
    RowRun(5, 4, 1, 0),  # one row
    RowRun(6, 0, 0, 1),  # empty
)


def simple(operation: Operation) -> tuple[object, ...]:
    """Without the numbers of call and stream."""
    return operation[2:]


def flag_copy(to: int, constant: int) -> tuple[object, ...]:
    return ("copy", to, constant, 4, 1, 0, 0, 0)


def meeting(ranks: Ranks, rank: int, first_word: int) -> list[tuple[object, ...]]:
    """The operations of one of the two meetings, whose flags begin at this word of an area."""
    W = ranks.world_size
    peers = [(rank + step) % W for step in range(1, W)]
    own = ranks.areas[rank].address
    told = [
        flag_copy(ranks.areas[peer].address + 4 * (first_word + rank), own + 8 * W)
        for peer in peers
    ]
    awaited = [
        (kind, own + 4 * (first_word + peer), 0, 0, 0, 0, 0, value)
        for peer in peers
        for kind, value in (("wait", 1), ("write", 0))
    ]
    return told + awaited


def check_order(fake: FakeCuda, world_size: int) -> None:
    plan = Plan(
        12,
        (Shape(5, 5, 5), Shape(0, 1, 1), Shape(3, 4, 6)),
        tuple(
            tuple(
                RowRun(run.source_row, run.output_row + rank, run.num_rows, run.output_stride)
                for run in ORDER_RUNS
            )
            for rank in range(world_size)
        ),
    )
    gather, ranks = Gather(plan), Ranks(world_size)
    with fake.logged() as operations:
        ranks.run(lambda rank: ranks.push(rank, gather))
    for rank in range(world_size):
        own = [each for each in operations if each.stream == stream_of(rank)]
        expected = meeting(ranks, rank, 0)
        dense, pitched = (gather.sources[rank][tensor].address for tensor in (0, 2))
        for step in range(world_size):
            outputs = gather.outputs[(rank + step) % world_size]
            to, pitched_to = outputs[0].address + 5 * rank, outputs[2].address + 6 * rank
            expected += [
                ("copy", to, dense, 15, 1, 0, 0, 0),
                ("copy_2d", to + 15, dense + 15, 5, 2, 10, 5, 0),
                ("copy", to + 20, dense + 25, 5, 1, 0, 0, 0),
                ("copy_2d", pitched_to, pitched, 3, 3, 6, 4, 0),
                ("copy_2d", pitched_to + 18, pitched + 12, 3, 2, 12, 4, 0),
                ("copy", pitched_to + 24, pitched + 20, 3, 1, 0, 0, 0),
            ]
        expected += meeting(ranks, rank, world_size)
        assert [simple(each) for each in own] == expected, f"rank {rank}"
        batches = {each.call for each in own if each.kind in ("wait", "write")}
        assert len(batches) == (2 if world_size > 1 else 0)
    check_permission(ranks, gather, operations)


def check_permission(ranks: Ranks, gather: Gather, operations: list[Operation]) -> None:
    """Rows go to a rank only after that rank has said ready to the one that sends them."""
    for sender in range(ranks.world_size):
        for receiver in set(range(ranks.world_size)) - {sender}:
            ready = ranks.areas[sender].address + 4 * receiver
            said = next(i for i, each in enumerate(operations) if each.to == ready)
            assert operations[said].stream == stream_of(receiver)
            for output in gather.outputs[receiver]:
                within = range(output.start, output.start + len(output.bytes))
                for i, each in enumerate(operations):
                    if each.stream == stream_of(sender) and each.to in within:
                        assert i > said, (sender, receiver)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_the_operations_and_their_order(process: Process, world_size: int) -> None:
    process.run(check_order, world_size)


def check_in_place(fake: FakeCuda, world_size: int, stride: int) -> None:
    gather, ranks = Gather(in_place_plan(world_size, stride)), Ranks(world_size)
    for rank in range(world_size):
        gather.fill(rank, 0)
    with fake.logged() as operations:
        ranks.run(lambda rank: ranks.push(rank, gather))
    for rank in range(world_size):
        gather.check(rank, 0)
        copies = [
            each
            for each in operations
            if each.stream == stream_of(rank) and each.kind in ("copy", "copy_2d")
        ]
        assert len(copies) == (world_size - 1) * (2 + 2), "two flags and two tensors to each peer"


@pytest.mark.parametrize("stride", [1, 3])
def test_rows_that_are_in_place_are_not_copied(process: Process, stride: int) -> None:
    process.run(check_in_place, 3, stride)


def check_same_start(fake: FakeCuda) -> None:
    """One row is in place whatever the pitches; several rows are not where these differ."""
    ranks = Ranks(1)
    memory = Memory(64)
    tensor = PushedRows(memory.address, 4, 4, 8, [memory.address])
    with fake.logged() as operations:
        ranks.copies[0].push([tensor], RowRuns([RowRun(2, 1, 1, 5)]), stream_of(0))
    assert operations == []
    with fake.logged() as operations:
        ranks.copies[0].push([tensor], RowRuns([RowRun(0, 0, 2, 1)]), stream_of(0))
    assert [each.kind for each in operations] == ["copy_2d"]


def check_own_stream(fake: FakeCuda, world_size: int) -> None:
    ranks, gather = Ranks(world_size), Gather(in_place_plan(world_size, 1))
    tensor = gather.tensors[0][0]
    moved = replace(tensor, source=tensor.outputs[0] + tensor.output_pitch)
    with fake.logged() as operations:
        pretend_peers_came(ranks, 0)
        ranks.copies[0].push([moved], RowRuns([RowRun(0, 0, 1, 1)]), stream_of(0), 77)
    rows = [each for each in operations if each.kind == "copy" and each.num_bytes != 4]
    expected = [(77, tensor.outputs[0])] + [(stream_of(0), to) for to in tensor.outputs[1:]]
    assert [(each.stream, each.to) for each in rows] == expected
    assert {each.stream for each in operations if each not in rows} == {stream_of(0)}


def test_own_rows_go_on_their_own_stream(process: Process) -> None:
    process.run(check_own_stream, 3)


def test_the_same_start_with_other_pitches(process: Process) -> None:
    process.run(check_same_start)


def pretend_peers_came(ranks: Ranks, rank: int) -> None:
    """All flags of the other ranks are with `rank` already."""
    set_flags = [int(each != rank) for each in range(ranks.world_size)]
    ranks.areas[rank].set_words([*set_flags, *set_flags, 1])


def check_many_ranks(fake: FakeCuda, world_size: int) -> None:
    ranks = Ranks(world_size)
    pretend_peers_came(ranks, rank := 7)
    gather = Gather(Plan(2, (Shape(4, 4, 4),), ((RowRun(0, 0, 2, 1),),) * world_size))
    gather.fill(rank, 0)
    with fake.logged() as operations:
        ranks.push(rank, gather)
    assert ranks.areas[rank].words() == initial_words(world_size)
    calls = [each.call for each in operations if each.kind in ("wait", "write")]
    sizes = [calls.count(call) for call in sorted(set(calls))]
    assert len(calls) == 2 * 2 * (world_size - 1)
    assert max(sizes) < 256
    assert len(sizes) == 2 * -(-2 * (world_size - 1) // 254), "as few batches as can be"
    source = gather.sources[rank][0].payload()
    assert all(outputs[0].payload() == source for outputs in gather.outputs)


@pytest.mark.parametrize("world_size", [128, 129, 300])
def test_batches_stay_below_the_drivers_limit(process: Process, world_size: int) -> None:
    process.run(check_many_ranks, world_size)


# Failures


def failure(push: Callable[[], object]) -> PeerCopyError:
    with pytest.raises(PeerCopyError) as caught:
        push()
    return caught.value


def check_each_error(fake: FakeCuda) -> None:
    rank, world_size = 1, 3
    plan = Plan(20, (Shape(5, 5, 5), Shape(3, 4, 6)), (ORDER_RUNS,) * world_size)
    gather, num_calls = Gather(plan), 0
    while True:
        ranks = Ranks(world_size)
        pretend_peers_came(ranks, rank)
        fake.fail_after(num_calls)
        with fake.logged() as operations:
            try:
                ranks.push(rank, gather)
            except PeerCopyError as caught:
                error = caught
            else:
                break
        assert (error.code, error.rank_in_group) == (INJECTED, rank)
        assert str(error) == "pushing rows failed with driver error 719 [rank 1 of 3]"
        assert len({each.call for each in operations}) == num_calls, "stops at the error"
        num_calls += 1
    assert num_calls == 2 * (2 + 1) + 3 * 2 * 3, "the loop has been to every call"
    assert ranks.areas[rank].words() == initial_words(world_size)


def test_an_error_of_each_operation(process: Process) -> None:
    process.run(check_each_error)


def check_absent_peer(fake: FakeCuda) -> None:
    ranks = Ranks(3)
    gather = Gather(Plan(3, (Shape(4, 4, 4),), tuple((RowRun(0, r, 1, 1),) for r in range(3))))
    fake.set_timeout(0.3)
    for rank in range(3):
        gather.fill(rank, 0)
    untouched = [bytes(outputs[0].bytes) for outputs in gather.outputs]
    start = time.monotonic()
    codes = {}

    def body(rank: int) -> None:
        codes[rank] = failure(lambda: ranks.push(rank, gather)).code

    ranks.run(body, ranks=[0, 1])
    assert codes == {0: TIMED_OUT, 1: TIMED_OUT}
    assert time.monotonic() - start < 5
    assert [bytes(outputs[0].bytes) for outputs in gather.outputs] == untouched


def test_a_peer_that_does_not_come(process: Process) -> None:
    process.run(check_absent_peer)


def check_lost_peer(fake: FakeCuda) -> None:
    """Rank 1 says that its outputs are ready, and then nothing any more."""
    ranks = Ranks(2)
    gather = Gather(Plan(1, (Shape(4, 4, 4),), ((RowRun(0, 0, 1, 1),), ())))
    gather.fill(0, 0)
    ranks.areas[0].set_words([0, 1, 0, 0, 1])
    fake.set_timeout(0.2)
    assert failure(lambda: ranks.push(0, gather)).code == TIMED_OUT
    assert ranks.areas[0].words() == initial_words(2)
    assert ranks.areas[1].words() == [1, 0, 1, 0, 1]
    assert gather.outputs[1][0].payload() == gather.sources[0][0].payload(), "its copies were made"


def test_a_peer_that_is_lost_on_the_way(process: Process) -> None:
    process.run(check_lost_peer)


def check_lacking_driver(_rank: int, _world_size: int, driver: str | None) -> None:
    if driver is not None:
        ctypes.CDLL(driver)
    native = native_library()
    if driver is None and native.functions.distcomm_has_cuda_driver():
        return  # a machine with a GPU
    copies, memory = PeerCopies(native, 0, [0]), Memory(8)
    assert not copies.available
    tensor = PushedRows(memory.address, 4, 4, 4, [memory.address + 4])
    error = failure(lambda: copies.push([tensor], RowRuns([RowRun(0, 0, 1, 1)]), 0))
    assert error.code == NOT_SUPPORTED


@pytest.mark.parametrize(
    "missing", ["cuStreamBatchMemOp_v2", "cuMemcpy2DAsync_v2", "cuMemcpyAsync"]
)
def test_a_driver_without_a_function(tmp_path: Path, missing: str) -> None:
    present = [name for name in DRIVER_FUNCTIONS if name != missing]
    with WorkerPool(1) as pool:
        pool.run(check_lacking_driver, str(driver_with(tmp_path, present)))


def test_no_driver() -> None:
    with WorkerPool(1) as pool:
        pool.run(check_lacking_driver, None)


# Arguments, which need no driver


def test_a_signal_area() -> None:
    assert PeerCopies.signal_bytes(3) == 28
    assert PeerCopies.initial_signals(3) == bytes(24) + b"\1\0\0\0"


def test_the_runs_for_c() -> None:
    runs = [RowRun(2, 10, 3, 4), RowRun(0, 0, 0, 0)]
    prepared = RowRuns(iter(runs))
    assert prepared.runs == tuple(runs)
    fields = ["source_row", "output_row", "num_rows", "output_stride"]
    assert [[getattr(run, name) for name in fields] for run in prepared.array] == [
        [2, 10, 3, 4],
        [0, 0, 0, 0],
    ]
    assert len(RowRuns([]).array) == 0


@pytest.mark.parametrize("numbers", [(-1, 0, 1, 1), (0, -1, 1, 1), (0, 0, -1, 1), (0, 0, 2, 0)])
def test_runs_that_go_nowhere(numbers: tuple[int, int, int, int]) -> None:
    with pytest.raises(ArgumentError, match="run must be of numbers >= 0"):
        RowRun(*numbers)


@pytest.mark.parametrize("rank", [-1, 2])
def test_a_rank_without_signals(rank: int) -> None:
    with pytest.raises(ArgumentError, match=f"one of the 2 ranks with signals; got {rank}"):
        PeerCopies(native_library(), rank, [0, 0])


@pytest.mark.parametrize("num_outputs", [1, 3])
def test_a_tensor_without_an_output_of_each_rank(num_outputs: int) -> None:
    copies = PeerCopies(native_library(), 0, [0, 0])
    tensor = PushedRows(0, 4, 4, 4, [0] * num_outputs)
    with pytest.raises(ArgumentError, match=f"push: outputs must be of 2 ranks; got {num_outputs}"):
        copies.push([tensor], RowRuns([]), 0)
