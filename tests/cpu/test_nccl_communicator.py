"""`PyNcclCommunicator` on the NCCL stand-in: every collective against a plain reference.

Shapes: W group size, r rank_in_group, T rows of a rank.
"""

from __future__ import annotations

import inspect
import random
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch

from distcomm.errors import (
    ArgumentError,
    CommunicatorDisabledError,
    DistcommError,
    GroupClosedError,
    NcclError,
)
from distcomm.nccl import PyNcclCommunicator
from tests.nccl_on_cpu import (
    GROUP_NAME,
    communicator,
    fake_nccl_environment,
    num_calls,
    num_live_comms,
    with_environment,
)
from tests.worker_pool import WorkerPool, fresh_init_method

Comm = PyNcclCommunicator
Check = Callable[..., None]

FLOATING = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
INTEGER = [torch.int8, torch.uint8, torch.int32, torch.int64]
FP8 = [torch.float8_e4m3fn, torch.float8_e5m2]
MOVABLE = [
    *FLOATING,
    *INTEGER,
    *FP8,
    torch.bool,
    torch.int16,
    torch.uint16,
    torch.uint32,
    torch.uint64,
    torch.complex64,
    torch.complex128,
]
# Odd ones, empty ones, none at all, and one that is larger than the stand-in's mailboxes.
SHAPES = [(1,), (7,), (3, 5), (2, 3, 4), (), (0,), (3, 0, 2), (1031,), (65, 129)]
ROW_SHAPES = [(), (3,), (2, 5), (4, 0)]


def run(workers: WorkerPool, world_size: int, check: Check, *args: object) -> None:
    """Calls ``check(communicator, *args)`` on `world_size` ranks."""
    environment = fake_nccl_environment()
    url = fresh_init_method()
    workers.run(on_communicator, url, check, *args, ranks=world_size, env=environment)


def on_communicator(rank: int, world_size: int, url: str, check: Check, *args: object) -> None:
    with communicator(rank, world_size, url) as comm:
        assert (comm.world_size, comm.member.rank_in_group) == (world_size, rank)
        check(comm, *args)
    assert num_live_comms() == 0


# Inputs, and what is expected of them


def numbers(rank: int, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Small integers, so that sums and products of four ranks are exact in every dtype."""
    generator = torch.Generator().manual_seed(1000 + rank)
    low, high = (0, 256) if dtype is torch.uint8 else (-3, 4)
    return torch.randint(low, high, tuple(shape), generator=generator).to(dtype)


def bits(rank: int, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Any bits, among them NaNs; for calls that only move data."""
    generator = torch.Generator().manual_seed(2000 + rank)
    if dtype is torch.bool:
        return torch.randint(0, 2, tuple(shape), generator=generator).bool()
    num_bytes = torch.Size(shape).numel() * dtype.itemsize
    return torch.randint(0, 256, (num_bytes,), generator=generator).byte().view(dtype).view(shape)


def blank(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """An output that is still to be written."""
    return (
        torch.full((torch.Size(shape).numel() * dtype.itemsize,), 0x5A)
        .byte()
        .view(dtype)
        .view(shape)
    )


def spread(x: torch.Tensor) -> torch.Tensor:
    """The same values, not contiguous (if there are several)."""
    return torch.stack((x, x), dim=-1)[..., 0]


def raw(x: torch.Tensor) -> torch.Tensor:
    """The bytes of `x`."""
    return x.clone(memory_format=torch.contiguous_format).view(-1).view(torch.uint8)


def expect_bits(
    actual: torch.Tensor, shape: Sequence[int], expected: Sequence[torch.Tensor]
) -> None:
    """`actual` has this shape, and the bytes of the expected tensors one after another."""
    assert actual.shape == tuple(shape), f"{list(actual.shape)}, expected {list(shape)}"
    wanted = torch.cat([raw(each) for each in expected])
    assert torch.equal(raw(actual), wanted), f"{actual}, expected the bytes {wanted}"


def reduced(inputs: Sequence[torch.Tensor], op: str) -> torch.Tensor:
    """The reduction, in float64 or int64."""
    exact = torch.float64 if inputs[0].is_floating_point() else torch.int64
    stacked = torch.stack([x.to(exact) for x in inputs])
    if op == "avg":
        return stacked.mean(0)
    if op in ("max", "min"):
        return stacked.amax(0) if op == "max" else stacked.amin(0)
    return stacked.sum(0) if op == "sum" else stacked.prod(0)


def expect_reduced(actual: torch.Tensor, inputs: Sequence[torch.Tensor], op: str) -> None:
    expected = reduced(inputs, op).to(inputs[0].dtype)
    tolerance = {} if op == "avg" else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(actual, expected, **tolerance)
    assert actual.is_contiguous()


def all_numbers(comm: Comm, shape: Sequence[int], dtype: torch.dtype) -> list[torch.Tensor]:
    """Every rank's `numbers`."""
    return [numbers(rank, shape, dtype) for rank in range(comm.world_size)]


def rank_of(comm: Comm) -> int:
    return comm.member.rank_in_group


def neighbours(comm: Comm) -> tuple[int, int]:
    """The next and the previous rank."""
    return (rank_of(comm) + 1) % comm.world_size, (rank_of(comm) - 1) % comm.world_size


def reductions() -> Iterator[tuple[torch.dtype, str, Sequence[int]]]:
    """Every dtype with every op in one shape, and every shape with one dtype and op."""
    for dtype in (*FLOATING, *INTEGER):
        for op in ("sum", "prod", "max", "min", "avg"):
            if op != "avg" or dtype in FLOATING:
                yield dtype, op, (3, 5)
    for shape in SHAPES:
        yield torch.float32, "sum", shape


def movements() -> Iterator[tuple[torch.dtype, Sequence[int]]]:
    """Every dtype in one shape, and every shape with one dtype."""
    yield from ((dtype, (3, 5)) for dtype in MOVABLE)
    yield from ((torch.bfloat16, shape) for shape in SHAPES)


def ragged_sizes(world_size: int) -> list[list[int]]:
    """Row counts per rank: equal, with zeros at either end, all zero, and seeded ones."""
    generator = random.Random(world_size)
    return [
        [2] * world_size,
        [0, *[3] * (world_size - 1)],
        [*[1] * (world_size - 1), 0],
        [0] * world_size,
        [0] * (world_size - 1) + [5],
        *([generator.randrange(9) for _ in range(world_size)] for _ in range(6)),
        [generator.randrange(2000, 9000) for _ in range(world_size)],
    ]


# Every collective


def check_all_reduce(comm: Comm) -> None:
    for dtype, op, shape in reductions():
        inputs = all_numbers(comm, shape, dtype)
        x = inputs[rank_of(comm)].clone()
        for given in (x, spread(x)):
            result = comm.all_reduce(given, op)
            expect_reduced(result, inputs, op)
            expect_bits(given, shape, [inputs[rank_of(comm)]])
            out = blank(shape, dtype)
            assert comm.all_reduce(given, op, out=out) is out
            expect_reduced(out, inputs, op)
            expect_bits(given, shape, [inputs[rank_of(comm)]])
        assert comm.all_reduce(x, op, out=x) is x
        expect_reduced(x, inputs, op)


def check_reduce(comm: Comm) -> None:
    for dst in range(comm.world_size):
        root = rank_of(comm) == dst
        for dtype, op, shape in reductions():
            inputs = all_numbers(comm, shape, dtype)
            x = inputs[rank_of(comm)].clone()
            for given, out in ((spread(x), None), (x, blank(shape, dtype)), (x, x)):
                result = comm.reduce(given, dst, op, out=out)
                if root:
                    assert result is not None
                    assert result is out or out is None
                    expect_reduced(result, inputs, op)
                else:
                    assert result is None
                if not (root and out is x):
                    expect_bits(given, shape, [inputs[rank_of(comm)]])


def check_reduce_scatter_tensor(comm: Comm) -> None:
    world, me = comm.world_size, rank_of(comm)
    for dtype, op, shape in reductions():
        if not shape:
            continue
        rows, *row = shape
        inputs = all_numbers(comm, (world * rows, *row), dtype)
        shares = [list(each.chunk(world)) if rows else [each] * world for each in inputs]
        mine = [each[me] for each in shares]
        flat = inputs[me].clone()
        stacked = flat.view(world, *shape)
        for given in (flat, stacked, spread(flat), spread(stacked)):
            output = blank(shape, dtype)
            assert comm.reduce_scatter_tensor(output, given, op) is output
            expect_reduced(output, mine, op)
            expect_bits(given, given.shape, [inputs[me]])
        output = stacked[me]
        assert comm.reduce_scatter_tensor(output, flat, op) is output
        expect_reduced(output, mine, op)
    share = comm.reduce_scatter_tensor(torch.zeros(()), torch.arange(float(world)))
    assert share.item() == world * me


def check_reduce_scatterv(comm: Comm) -> None:
    world, me = comm.world_size, rank_of(comm)
    cases = [
        (torch.float32, "sum", row, sizes) for row in ROW_SHAPES for sizes in ragged_sizes(world)
    ]
    cases += [(dtype, op, (3,), [3, 0, 2, 1][:world]) for dtype, op, _ in reductions()]
    for dtype, op, row, sizes in cases:
        inputs = all_numbers(comm, (sum(sizes), *row), dtype)
        mine = [each.split(sizes)[me] for each in inputs]
        x = inputs[me].clone()
        out = blank((sizes[me], *row), dtype)
        expect_reduced(comm.reduce_scatterv(x, sizes, op=op), mine, op)
        assert comm.reduce_scatterv(spread(x), tuple(sizes), out=out, op=op) is out
        expect_reduced(out, mine, op)
        expect_bits(x, x.shape, [inputs[me]])
        out = x.split(sizes)[me]
        assert comm.reduce_scatterv(x, sizes, out, op) is out
        expect_reduced(out, mine, op)


def check_all_gather_into_tensor(comm: Comm) -> None:
    world, me = comm.world_size, rank_of(comm)
    for dtype, shape in movements():
        inputs = [bits(rank, shape, dtype) for rank in range(world)]
        x = inputs[me].clone()
        shapes = [(world, *shape)] + ([(world * shape[0], *shape[1:])] if shape else [])
        for out_shape in shapes:
            for given in (x, spread(x)):
                output = blank(out_shape, dtype)
                assert comm.all_gather_into_tensor(output, given) is output
                expect_bits(output, out_shape, inputs)
            expect_bits(x, shape, [inputs[me]])
        output = blank(shapes[0], dtype)
        output[me] = x
        comm.all_gather_into_tensor(output, output[me])
        expect_bits(output, shapes[0], inputs)


def check_all_gatherv(comm: Comm) -> None:
    world, me = comm.world_size, rank_of(comm)
    cases = [(torch.float32, row, sizes) for row in ROW_SHAPES for sizes in ragged_sizes(world)]
    cases += [(dtype, (3,), [3, 0, 2, 1][:world]) for dtype in MOVABLE]
    for dtype, row, sizes in cases:
        shape = (sum(sizes), *row)
        inputs = [bits(rank, (size, *row), dtype) for rank, size in enumerate(sizes)]
        x = inputs[me].clone()
        result = comm.all_gatherv(x, sizes)
        assert result.dtype == dtype
        expect_bits(result, shape, inputs)
        out = blank(shape, dtype)
        assert comm.all_gatherv(spread(x), tuple(sizes), out=out) is out
        expect_bits(out, shape, inputs)
        expect_bits(x, x.shape, [inputs[me]])
        out = blank(shape, dtype)
        out.split(sizes)[me].copy_(x)
        comm.all_gatherv(out.split(sizes)[me], sizes, out)
        expect_bits(out, shape, inputs)


def check_all_to_all_single(comm: Comm) -> None:
    world, me = comm.world_size, rank_of(comm)
    equal = [(dtype, (3,), [[2] * world] * world) for dtype in MOVABLE]
    equal += [(torch.int32, row, [[5] * world] * world) for row in ROW_SHAPES]
    generator = random.Random(world)
    ragged = [
        (
            dtype,
            row,
            [[generator.choice([0, 0, 1, 4, 7]) for _ in range(world)] for _ in range(world)],
        )
        for dtype in (torch.bfloat16, torch.float64, torch.bool)
        for row in ROW_SHAPES
    ]
    silent = [[0] * world] * (world - 1) + [[3000] * world]  # only the last rank sends
    ragged += [(torch.float32, (2,), silent), (torch.float32, (), [[0] * world] * world)]
    for dtype, row, rows in equal + ragged:
        sends, receives = rows[me], [rows[src][me] for src in range(world)]
        inputs = [bits(src, (sum(rows[src]), *row), dtype) for src in range(world)]
        expected = [inputs[src].split(rows[src])[me] for src in range(world)]
        shape = (sum(receives), *row)
        x = inputs[me].clone()
        for given in (x, spread(x)):
            output = blank(shape, dtype)
            assert comm.all_to_all_single(output, given, receives, tuple(sends)) is output
            expect_bits(output, shape, expected)
            expect_bits(given, given.shape, [inputs[me]])
        if (dtype, row, rows) in equal:
            output = blank(shape, dtype)
            comm.all_to_all_single(output, x)
            expect_bits(output, shape, expected)


def check_broadcast(comm: Comm) -> None:
    for src in range(comm.world_size):
        for dtype, shape in movements():
            expected = bits(src, shape, dtype)
            x = bits(rank_of(comm), shape, dtype)
            assert comm.broadcast(x, src) is x
            expect_bits(x, shape, [expected])
        both = torch.full((3, 5, 2), float(rank_of(comm)))
        x = both[..., 1]
        assert comm.broadcast(x, src) is x
        assert (x == src).all()
        assert (both[..., 0] == rank_of(comm)).all(), "what lies between the elements is untouched"


def check_gather(comm: Comm) -> None:
    world, me = comm.world_size, rank_of(comm)
    for dst in range(world):
        for dtype, shape in movements():
            inputs = [bits(rank, shape, dtype) for rank in range(world)]
            given = [
                (inputs[me].clone(), None),
                (spread(inputs[me]), blank((world, *shape), dtype)),
            ]
            for x, out in given:
                num_groups = num_calls("ncclGroupStart")
                result = comm.gather(x, dst, out=out)
                assert num_calls("ncclGroupStart") - num_groups == (me == dst), "one launch"
                expect_bits(x, shape, [inputs[me]])
                if me != dst:
                    assert result is None
                    continue
                assert result is not None
                assert result is out or out is None
                expect_bits(result, (world, *shape), inputs)


def check_send_and_recv(comm: Comm) -> None:
    me = rank_of(comm)
    following, previous = neighbours(comm)
    for dtype, shape in movements():
        x, out = bits(me, shape, dtype), blank(shape, dtype)
        with comm.group():
            assert comm.send(spread(x), following) is None
            assert comm.recv(out, previous) is out
        expect_bits(out, shape, [bits(previous, shape, dtype)])
    for src in range(comm.world_size):  # one after another, without a group
        for dst in range(comm.world_size):
            if me == src != dst:
                comm.send(bits(src, (3, 5), torch.int64), dst)
            if me == dst != src:
                out = comm.recv(blank((3, 5), torch.int64), src)
                expect_bits(out, (3, 5), [bits(src, (3, 5), torch.int64)])


COLLECTIVE_CHECKS = [
    check_all_reduce,
    check_reduce,
    check_reduce_scatter_tensor,
    check_reduce_scatterv,
    check_all_gather_into_tensor,
    check_all_gatherv,
    check_all_to_all_single,
    check_broadcast,
    check_gather,
    check_send_and_recv,
]


@pytest.mark.parametrize("world_size", [2, 3, 4])
@pytest.mark.parametrize("check", COLLECTIVE_CHECKS, ids=lambda check: check.__name__[6:])
def test_collective(workers: WorkerPool, check: Check, world_size: int) -> None:
    run(workers, world_size, check)


def check_alone(comm: Comm) -> None:
    x = torch.arange(3.0)
    for result in (
        comm.all_reduce(x, "avg"),
        comm.reduce(x),
        comm.all_gatherv(x, [3]),
        comm.reduce_scatterv(x, [3]),
        comm.all_to_all_single(torch.zeros(3), x),
        comm.broadcast(x),
        comm.gather(x),
    ):
        assert result is not None
        assert result.flatten().tolist() == [0, 1, 2]


def test_a_group_of_one(workers: WorkerPool) -> None:
    run(workers, 1, check_alone)


# One valid call of every collective

CALLS: dict[str, Callable[[Comm], object]] = {
    "all_reduce": lambda c: c.all_reduce(torch.ones(4)),
    "reduce": lambda c: c.reduce(torch.ones(4)),
    "reduce_scatter_tensor": lambda c: c.reduce_scatter_tensor(
        torch.zeros(2), torch.ones(2 * c.world_size)
    ),
    "reduce_scatterv": lambda c: c.reduce_scatterv(
        torch.ones(2 * c.world_size), [2] * c.world_size
    ),
    "all_gather_into_tensor": lambda c: c.all_gather_into_tensor(
        torch.zeros(2 * c.world_size), torch.ones(2)
    ),
    "all_gatherv": lambda c: c.all_gatherv(torch.ones(2), [2] * c.world_size),
    "all_to_all_single": lambda c: c.all_to_all_single(
        torch.zeros(c.world_size), torch.ones(c.world_size)
    ),
    "broadcast": lambda c: c.broadcast(torch.ones(4)),
    "gather": lambda c: c.gather(torch.ones(4)),
    "send": lambda c: c.send(torch.ones(4), neighbours(c)[0]),
    "recv": lambda c: c.recv(torch.ones(4), neighbours(c)[1]),
}
# The same in place or with an output, where the code takes another way.
VARIANTS: dict[str, Callable[[Comm], object]] = {
    "all_reduce in place": lambda c: c.all_reduce(x := torch.ones(4), out=x),
    "all_reduce with out": lambda c: c.all_reduce(torch.ones(4), out=torch.ones(4)),
    "all_reduce of nothing": lambda c: c.all_reduce(torch.ones(0)),
    "all_gatherv of nothing": lambda c: c.all_gatherv(torch.ones(0), [0] * c.world_size),
    "broadcast of nothing": lambda c: c.broadcast(torch.ones(0)),
    "all_reduce of a strided tensor": lambda c: c.all_reduce(torch.ones(4, 2).t()),
}
# The function of NCCL that each of them calls (gather: one per rank, see its test).
FUNCTIONS = {
    "all_reduce": "ncclAllReduce",
    "reduce": "ncclReduce",
    "reduce_scatter_tensor": "ncclReduceScatter",
    "reduce_scatterv": "ncclReduce",
    "all_gather_into_tensor": "ncclAllGather",
    "all_gatherv": "ncclBroadcast",
    "all_to_all_single": "ncclSend",
    "broadcast": "ncclBroadcast",
    "send": "ncclSend",
    "recv": "ncclRecv",
}
NO_COLLECTIVES = {
    "break_off",
    "change_state",
    "close",
    "fence_captures",
    "give_up",
    "group",
    "on_close",
    "resume",
    "run_bounded",
    "suspend",
}


def public_methods() -> dict[str, Callable[..., Any]]:
    members = inspect.getmembers(Comm, inspect.isfunction)
    return {name: function for name, function in members if not name.startswith("_")}


def raised_by(call: Callable[[Comm], object], comm: Comm) -> DistcommError:
    """The error of a call that fails; it names group and rank."""
    with pytest.raises(DistcommError) as caught:
        call(comm)
    place = f"group '{GROUP_NAME}', rank {rank_of(comm)} ({rank_of(comm)} of {comm.world_size})"
    error = caught.value
    assert place in str(error), f"{place} isn't in: {error}"
    if isinstance(error, ArgumentError):
        method = getattr(Comm, str(error).partition(":")[0])
        assert error.argument in inspect.signature(method).parameters, f"{error}: no such argument"
    return error


def expect_working(comm: Comm) -> None:
    assert comm.all_reduce(torch.ones(5)).tolist() == [comm.world_size] * 5


def num_nccl_calls() -> int:
    """Calls of any function that sends or receives."""
    return sum(num_calls(name) for name in {"ncclGroupStart", *FUNCTIONS.values()})


def test_the_table_of_calls_has_every_collective() -> None:
    assert CALLS.keys() == public_methods().keys() - NO_COLLECTIVES


# change_state and close


def check_disabled(comm: Comm) -> None:
    assert comm.enabled
    with comm.change_state(enable=False):
        assert not comm.enabled
        before = num_nccl_calls()
        for name, call in {**CALLS, **VARIANTS}.items():
            error = raised_by(call, comm)
            assert type(error) is CommunicatorDisabledError, f"{name} raised {error!r}"
            assert "change_state(enable=True)" in str(error)
        with pytest.raises(CommunicatorDisabledError), comm.group():
            raise AssertionError("the block of a disabled group() was entered")
        assert num_nccl_calls() == before, "something was sent"
    assert comm.enabled
    expect_working(comm)


def test_every_call_on_a_disabled_communicator_raises(workers: WorkerPool) -> None:
    run(workers, 2, check_disabled)


def check_change_state_nests(comm: Comm) -> None:
    for enable in (None, True):
        with comm.change_state(False):
            with comm.change_state(enable):
                assert comm.enabled
                expect_working(comm)
                with comm.change_state(False), comm.change_state(False):
                    assert not comm.enabled
                assert comm.enabled
            assert not comm.enabled
        with comm.change_state(enable), comm.change_state():
            expect_working(comm)
        assert comm.enabled
    for enable in (False, None):
        with pytest.raises(LookupError, match="of the body"), comm.change_state(enable):
            raise LookupError("of the body")
        assert comm.enabled
    with comm.change_state(False):
        with pytest.raises(LookupError), comm.change_state(True):
            raise LookupError
        assert not comm.enabled
    expect_working(comm)
    with comm.change_state(False):
        comm.close()
        with comm.change_state(True):
            assert not comm.enabled
    assert not comm.enabled
    assert type(raised_by(CALLS["all_reduce"], comm)) is GroupClosedError


def test_change_state_nests_and_survives_exceptions(workers: WorkerPool) -> None:
    run(workers, 2, check_change_state_nests)


def check_closed(comm: Comm) -> None:
    assert num_live_comms() == 1
    comm.close()
    assert num_live_comms() == 0
    assert not comm.enabled
    before = num_nccl_calls()
    for name, call in {**CALLS, **VARIANTS}.items():
        error = raised_by(call, comm)
        assert type(error) is GroupClosedError, f"{name} raised {error!r}"
    with pytest.raises(GroupClosedError), comm.group():
        raise AssertionError("the block of a closed group() was entered")
    assert num_nccl_calls() == before, "something was sent"
    num_frees = num_calls("ncclCommDestroy"), num_calls("ncclCommAbort")
    comm.close()
    assert (num_calls("ncclCommDestroy"), num_calls("ncclCommAbort")) == num_frees


def test_every_call_on_a_closed_communicator_raises(workers: WorkerPool) -> None:
    run(workers, 2, check_closed)


# Streams


def test_no_signature_has_a_stream() -> None:
    for name, function in {"__init__": Comm.__init__, **public_methods()}.items():
        for parameter in inspect.signature(function).parameters.values():
            assert "stream" not in f"{parameter.name} {parameter.annotation}".lower(), name


def check_current_stream(comm: Comm) -> None:
    assert not [name for name, value in vars(comm).items() if isinstance(value, torch.Stream)]
    asked: list[int] = []

    def current_stream(device_index: int) -> int:
        asked.append(device_index)
        return 0

    comm._raw_stream = current_stream
    comm._refresh()
    for name, call in CALLS.items():
        if name not in ("send", "recv"):
            asked.clear()
            call(comm)
            assert asked, f"{name} doesn't ask for the current stream"
            assert set(asked) == {comm._device_index}
    asked.clear()
    check_send_and_recv(comm)
    assert asked


def test_each_call_asks_for_the_current_stream(workers: WorkerPool) -> None:
    run(workers, 3, check_current_stream)


# group()


def check_group(comm: Comm) -> None:
    world, me = comm.world_size, rank_of(comm)
    following, previous = neighbours(comm)
    sums, source = torch.zeros(3), torch.full((2,), float(me))
    received = torch.full((4,), -1.0)
    with comm.group():
        with comm.group():
            comm.all_reduce(torch.full((3,), float(me)), out=sums)
            comm.recv(received, previous)
            comm.send(torch.full((4,), float(me)), following)
        assert sums.tolist() == [0] * 3, "the inner block has launched the calls"
        assert received.tolist() == [-1] * 4
        gathered = comm.all_gatherv(torch.full((me,), float(me)), list(range(world)))
        scattered = comm.reduce_scatterv(torch.ones(2 * world), [2] * world)
        swapped = comm.all_to_all_single(torch.zeros(world), torch.arange(float(world)))
        comm.broadcast(source, 1)
        assert comm.all_reduce(torch.ones(0)).numel() == 0
    assert sums.tolist() == [sum(range(world))] * 3
    assert received.tolist() == [previous] * 4
    assert gathered.tolist() == [rank for rank in range(world) for _ in range(rank)]
    assert scattered.tolist() == [world] * 2
    assert swapped.tolist() == [me] * world
    assert source.tolist() == [1, 1]
    with comm.group():
        pass
    with comm.group():
        root = comm.gather(torch.full((2,), float(me)), dst=1)
    if me == 1:
        assert root is not None
        assert root.tolist() == [[rank] * 2 for rank in range(world)]
    expect_working(comm)


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_group_fuses_calls_and_nests(workers: WorkerPool, world_size: int) -> None:
    run(workers, world_size, check_group)


class Tracker:
    """Hands out tensors, and tells which of them are still alive."""

    def __init__(self) -> None:
        self.tensors: list[weakref.ref[torch.Tensor]] = []

    def __call__(self, *shape: int) -> torch.Tensor:
        x = torch.ones(*shape)
        self.tensors.append(weakref.ref(x))
        return x

    def num_alive(self) -> int:
        return sum(x() is not None for x in self.tensors)


GROUPED_CALLS: dict[str, Callable[[Comm, Tracker], object]] = {
    "all_reduce": lambda c, new: c.all_reduce(new(4), out=new(4)),
    "all_reduce in place": lambda c, new: c.all_reduce(x := new(4), out=x),
    "reduce": lambda c, new: c.reduce(new(4)),
    "reduce_scatter_tensor": lambda c, new: c.reduce_scatter_tensor(new(2), new(2 * c.world_size)),
    "reduce_scatterv": lambda c, new: c.reduce_scatterv(
        new(c.world_size), [1] * c.world_size, out=new(1)
    ),
    "all_gather_into_tensor": lambda c, new: c.all_gather_into_tensor(
        new(2 * c.world_size), new(2)
    ),
    "all_gatherv": lambda c, new: c.all_gatherv(new(1), [1] * c.world_size, out=new(c.world_size)),
    "all_to_all_single": lambda c, new: c.all_to_all_single(new(c.world_size), new(c.world_size)),
    "broadcast": lambda c, new: c.broadcast(new(4)),
    "send and recv": lambda c, new: [
        c.send(new(4), neighbours(c)[0]),
        c.recv(new(4), neighbours(c)[1]),
    ],
}


def check_tensors_are_kept(comm: Comm) -> None:
    for name, call in GROUPED_CALLS.items():
        new = Tracker()
        with comm.group():
            call(comm, new)
            alive, made = new.num_alive(), len(new.tensors)
            assert alive == made, f"{name}: {alive} of {made} tensors are kept"
        assert new.num_alive() == 0, f"{name}: tensors are kept after the group"
    world = comm.world_size
    with comm.group():  # copies of inputs, and outputs that nobody holds
        total, mine, swapped = torch.zeros(40, 30), torch.zeros(40, 30), torch.zeros(40 * world, 30)
        comm.all_reduce(spread(torch.ones(40, 30)), out=total)
        comm.reduce_scatterv(spread(torch.ones(40 * world, 30)), [40] * world, out=mine)
        comm.all_to_all_single(swapped, spread(torch.ones(40 * world, 30)))
        for _ in range(9):
            comm.all_reduce(torch.full((40, 30), 7.0))
    assert (total == world).all()
    assert (mine == world).all()
    assert (swapped == 1).all()


def test_group_keeps_tensors_until_it_ends(workers: WorkerPool) -> None:
    run(workers, 2, check_tensors_are_kept)


def check_group_whose_body_raises(comm: Comm) -> None:
    world = comm.world_size
    out = torch.zeros(3)

    def raise_at_depth(depth: int) -> None:
        with comm.group():
            if depth:
                raise_at_depth(depth - 1)
            comm.all_reduce(torch.ones(3), out=out)
            raise LookupError("of the body")

    for depth in range(3):
        out.zero_()
        with pytest.raises(LookupError, match="of the body"):
            raise_at_depth(depth)
        assert out.tolist() == [world] * 3, "calls made before the exception are launched"
        expect_working(comm)
    with pytest.raises(ArgumentError), comm.group():
        comm.broadcast(torch.ones(2), src=world)
    expect_working(comm)
    with pytest.raises(CommunicatorDisabledError), comm.group(), comm.change_state(False):
        comm.broadcast(torch.ones(2))
    expect_working(comm)


def test_group_ends_when_its_body_raises(workers: WorkerPool) -> None:
    run(workers, 3, check_group_whose_body_raises)


# Errors of NCCL


def expect_nccl_error(comm: Comm, call: Callable[[Comm], object], function: str, code: int) -> None:
    """The error of a call in which NCCL's `function` is made to fail; nothing stays open."""
    with with_environment(FAKE_NCCL_FAIL=f"{function}:code={code}"):
        error = raised_by(call, comm)
    assert isinstance(error, NcclError), repr(error)
    meaning = {1: "unhandled cuda error", 3: "internal error", 5: "invalid usage"}[code]
    text = f"{function}: rank {rank_of(comm)} failed because of FAKE_NCCL_FAIL"
    assert function in error.call, error.call
    assert error.code == code
    assert error.last_error == text
    assert error.member == comm.member
    for part in (error.call, f"returned {code} ({meaning})", text):
        assert part in str(error), f"{part} isn't in: {error}"
    expect_working(comm)


def check_nccl_errors(comm: Comm) -> None:
    for name, function in FUNCTIONS.items():
        expect_nccl_error(comm, CALLS[name], function, 5)
    gather_function = "ncclRecv" if rank_of(comm) == 0 else "ncclSend"
    expect_nccl_error(comm, CALLS["gather"], gather_function, 3)
    expect_nccl_error(comm, CALLS["all_to_all_single"], "ncclRecv", 1)
    for function in ("ncclGroupStart", "ncclGroupEnd"):
        for name in ("all_gatherv", "reduce_scatterv", "all_to_all_single"):
            with with_environment(FAKE_NCCL_FAIL=f"{function}:code=3"):
                error = raised_by(CALLS[name], comm)
            assert isinstance(error, NcclError)
            assert (error.code, error.last_error.partition(":")[0]) == (3, function)
            expect_working(comm)


@pytest.mark.parametrize("world_size", [2, 4])
def test_an_error_of_nccl_is_typed_and_leaves_no_group_open(
    workers: WorkerPool, world_size: int
) -> None:
    run(workers, world_size, check_nccl_errors)


def in_group(call: Callable[[Comm], object]) -> Callable[[Comm], None]:
    def grouped(comm: Comm) -> None:
        with comm.group():
            comm.all_reduce(torch.ones(2))
            call(comm)

    return grouped


def check_nccl_errors_in_a_group(comm: Comm) -> None:
    for name, function in FUNCTIONS.items():
        if name != "all_reduce":
            expect_nccl_error(comm, in_group(CALLS[name]), function, 5)
    for function in ("ncclGroupStart", "ncclGroupEnd"):
        expect_nccl_error(comm, in_group(CALLS["broadcast"]), function, 3)

    def raise_in_group(comm: Comm) -> None:
        with comm.group():
            raise LookupError("of the body")

    # What the body raised isn't hidden by what ncclGroupEnd returns.
    with (
        with_environment(FAKE_NCCL_FAIL="ncclGroupEnd"),
        pytest.raises(LookupError, match="of the body"),
    ):
        raise_in_group(comm)
    expect_working(comm)


def test_an_error_of_nccl_inside_group_names_the_call_that_failed(workers: WorkerPool) -> None:
    run(workers, 2, check_nccl_errors_in_a_group)


def check_ranks_that_disagree(comm: Comm) -> None:
    error = raised_by(lambda c: c.all_reduce(torch.ones(3 + rank_of(comm))), comm)
    assert isinstance(error, NcclError)
    assert error.call == "ncclAllReduce"
    assert error.last_error


def test_a_failure_at_run_time_is_an_nccl_error(workers: WorkerPool) -> None:
    run(workers, 2, check_ranks_that_disagree)


# Bad input: (call, argument, requirement, what came)

BAD_INPUT: dict[str, tuple[Callable[[Comm], object], str, str, str]] = {
    "unknown op": (
        lambda c: c.all_reduce(torch.ones(2), "median"),
        "op",
        "one of sum, prod, max, min, avg",
        "'median'",
    ),
    "dtype that NCCL can't reduce": (
        lambda c: c.all_reduce(torch.ones(2, dtype=torch.bool)),
        "x",
        "of a dtype that 'sum' can reduce",
        "torch.bool",
    ),
    "average of integers": (
        lambda c: c.all_reduce(torch.ones(2, dtype=torch.int32), "avg"),
        "x",
        "of a dtype that 'avg' can reduce",
        "torch.int32",
    ),
    "all_reduce out shape": (
        lambda c: c.all_reduce(torch.ones(2, 3), out=torch.ones(3, 2)),
        "out",
        "of shape [2, 3]",
        "[3, 2]",
    ),
    "all_reduce out dtype": (
        lambda c: c.all_reduce(torch.ones(2), out=torch.ones(2, dtype=torch.int32)),
        "out",
        "of dtype torch.float32",
        "torch.int32",
    ),
    "all_reduce out device": (
        lambda c: c.all_reduce(torch.ones(2), out=torch.ones(2, device="meta")),
        "out",
        "on cpu",
        "meta",
    ),
    "all_reduce out strides": (
        lambda c: c.all_reduce(torch.ones(2, 3), out=torch.ones(3, 2).t()),
        "out",
        "contiguous",
        "strides (1, 2)",
    ),
    "all_reduce in place strides": (
        lambda c: c.all_reduce(x := torch.ones(3, 2).t(), out=x),
        "out",
        "contiguous",
        "strides (1, 2)",
    ),
    "reduce dst": (
        lambda c: c.reduce(torch.ones(2), dst=c.world_size),
        "dst",
        "a rank in the group, 0 to 2",
        "3",
    ),
    "reduce op": (lambda c: c.reduce(torch.ones(2), op=""), "op", "one of sum", "''"),
    "reduce out shape": (
        lambda c: c.reduce(torch.ones(2), dst=rank_of(c), out=torch.ones(3)),
        "out",
        "of shape [2]",
        "[3]",
    ),
    "reduce in place strides": (
        lambda c: c.reduce(x := torch.ones(3, 2).t(), dst=rank_of(c), out=x),
        "out",
        "contiguous",
        "strides (1, 2)",
    ),
    "reduce_scatter_tensor dtype": (
        lambda c: c.reduce_scatter_tensor(torch.ones(1).bool(), torch.ones(3).bool()),
        "input",
        "of a dtype that 'sum' can reduce",
        "torch.bool",
    ),
    "reduce_scatter_tensor rows": (
        lambda c: c.reduce_scatter_tensor(torch.ones(1), torch.ones(4)),
        "input",
        "divisible by the group size 3",
        "shape [4]",
    ),
    "reduce_scatter_tensor of a scalar": (
        lambda c: c.reduce_scatter_tensor(torch.ones(1), torch.tensor(1.0)),
        "input",
        "divisible by the group size 3",
        "shape []",
    ),
    "reduce_scatter_tensor output shape": (
        lambda c: c.reduce_scatter_tensor(torch.ones(2), torch.ones(3, 5)),
        "output",
        "of shape [1, 5] or [5]",
        "[2]",
    ),
    "reduce_scatter_tensor output strides": (
        lambda c: c.reduce_scatter_tensor(torch.ones(4)[::2], torch.ones(6)),
        "output",
        "contiguous",
        "strides (2,)",
    ),
    "reduce_scatterv number of sizes": (
        lambda c: c.reduce_scatterv(torch.ones(4), [2, 2]),
        "sizes",
        "3 non-negative row counts",
        "[2, 2]",
    ),
    "reduce_scatterv sum of sizes": (
        lambda c: c.reduce_scatterv(torch.ones(4), [2, 2, 2]),
        "x",
        "of 6 rows, the sum of sizes [2, 2, 2]",
        "shape [4]",
    ),
    "reduce_scatterv out shape": (
        lambda c: c.reduce_scatterv(torch.ones(6, 5), [2, 2, 2], out=torch.ones(2)),
        "out",
        "of shape [2, 5]",
        "[2]",
    ),
    "reduce_scatterv op": (
        lambda c: c.reduce_scatterv(torch.ones(6), [2, 2, 2], op="mean"),
        "op",
        "one of sum",
        "'mean'",
    ),
    "all_gather_into_tensor output shape": (
        lambda c: c.all_gather_into_tensor(torch.ones(5), torch.ones(2)),
        "output",
        "of shape [6] or [3, 2]",
        "[5]",
    ),
    "all_gather_into_tensor output dtype": (
        lambda c: c.all_gather_into_tensor(torch.ones(6), torch.ones(2).half()),
        "output",
        "of dtype torch.float16",
        "torch.float32",
    ),
    "all_gatherv negative size": (
        lambda c: c.all_gatherv(torch.ones(2), [2, -1, 2]),
        "sizes",
        "3 non-negative row counts",
        "[2, -1, 2]",
    ),
    "all_gatherv size that is no int": (
        lambda c: c.all_gatherv(torch.ones(2), [2, True, 2.0]),  # type: ignore[list-item]
        "sizes",
        "3 non-negative row counts",
        "[2, True, 2.0]",
    ),
    "all_gatherv own size": (
        lambda c: c.all_gatherv(torch.ones(3), [2, 2, 2]),
        "x",
        "of 2 rows, the own entry of sizes [2, 2, 2]",
        "shape [3]",
    ),
    "all_gatherv of a scalar": (
        lambda c: c.all_gatherv(torch.tensor(1.0), [1, 1, 1]),
        "x",
        "of at least one dim",
        "a scalar",
    ),
    "all_gatherv out shape": (
        lambda c: c.all_gatherv(torch.ones(2), [2, 2, 2], out=torch.ones(5)),
        "out",
        "of shape [6]",
        "[5]",
    ),
    "all_to_all_single unequal input": (
        lambda c: c.all_to_all_single(torch.ones(3), torch.ones(4)),
        "input_splits",
        "given, because 4 rows don't divide by the group size 3",
        "None",
    ),
    "all_to_all_single unequal output": (
        lambda c: c.all_to_all_single(torch.ones(4), torch.ones(3)),
        "output_splits",
        "given, because 4 rows",
        "None",
    ),
    "all_to_all_single input splits": (
        lambda c: c.all_to_all_single(torch.ones(3), torch.ones(3), None, [1, 1, 2]),
        "input_splits",
        "3 non-negative row counts with the sum 3",
        "[1, 1, 2]",
    ),
    "all_to_all_single negative split": (
        lambda c: c.all_to_all_single(torch.ones(3), torch.ones(3), [4, -1, 0]),
        "output_splits",
        "3 non-negative row counts with the sum 3",
        "[4, -1, 0]",
    ),
    "all_to_all_single number of splits": (
        lambda c: c.all_to_all_single(torch.ones(3), torch.ones(3), [1, 2]),
        "output_splits",
        "3 non-negative row counts",
        "[1, 2]",
    ),
    "all_to_all_single own split": (
        lambda c: c.all_to_all_single(
            torch.ones(3), torch.ones(3), [3 * (r == rank_of(c)) for r in range(3)]
        ),
        "output_splits",
        "the rows that the caller sends to itself",
        "3",
    ),
    "all_to_all_single in place": (
        lambda c: c.all_to_all_single(x := torch.ones(3), x),
        "output",
        "in other memory than input",
        "overlapping tensors",
    ),
    "all_to_all_single row shape": (
        lambda c: c.all_to_all_single(torch.ones(3, 2), torch.ones(3, 4)),
        "output",
        "of shape [3, 4]",
        "[3, 2]",
    ),
    "all_to_all_single of a scalar": (
        lambda c: c.all_to_all_single(torch.ones(3), torch.tensor(1.0)),
        "input",
        "of at least one dim",
        "a scalar",
    ),
    "all_to_all_single into a scalar": (
        lambda c: c.all_to_all_single(torch.tensor(1.0), torch.ones(3)),
        "output",
        "of at least one dim",
        "a scalar",
    ),
    "broadcast src": (
        lambda c: c.broadcast(torch.ones(2), src=-1),
        "src",
        "a rank in the group, 0 to 2",
        "-1",
    ),
    "broadcast src that is no int": (
        lambda c: c.broadcast(torch.ones(2), src=True),
        "src",
        "a rank in the group",
        "True",
    ),
    "gather dst": (
        lambda c: c.gather(torch.ones(2), dst=3),
        "dst",
        "a rank in the group, 0 to 2",
        "3",
    ),
    "gather out shape": (
        lambda c: c.gather(torch.ones(2), dst=rank_of(c), out=torch.ones(6)),
        "out",
        "of shape [3, 2]",
        "[6]",
    ),
    "send dst": (lambda c: c.send(torch.ones(2), 3), "dst", "a rank in the group", "3"),
    "send to oneself": (
        lambda c: c.send(torch.ones(2), rank_of(c)),
        "dst",
        "another rank than the caller's own",
        "",
    ),
    "recv src": (lambda c: c.recv(torch.ones(2), -1), "src", "a rank in the group", "-1"),
    "recv from oneself": (
        lambda c: c.recv(torch.ones(2), rank_of(c)),
        "src",
        "another rank than the caller's own",
        "",
    ),
    "recv out strides": (
        lambda c: c.recv(torch.ones(3, 2).t(), neighbours(c)[0]),
        "out",
        "contiguous",
        "strides (1, 2)",
    ),
}


def check_bad_input(comm: Comm) -> None:
    before = num_nccl_calls()
    for name, (call, argument, requirement, actual) in BAD_INPUT.items():
        error = raised_by(call, comm)
        assert isinstance(error, ArgumentError), f"{name}: {error!r}"
        assert isinstance(error, ValueError)
        assert error.member == comm.member
        assert error.argument == argument, f"{name}: {error}"
        assert requirement in error.requirement, f"{name}: {error}"
        assert actual in str(error.actual), f"{name}: {error}"
        method = call.__code__.co_names
        assert str(error).partition(":")[0] in method, (
            f"{name}: {error} doesn't begin with the call"
        )
        assert f"{argument} must be {error.requirement}; got {error.actual}" in str(error)
    assert num_nccl_calls() == before, "something was sent"
    expect_working(comm)


def test_bad_input_is_refused_before_anything_is_sent(workers: WorkerPool) -> None:
    run(workers, 3, check_bad_input)


def check_lazy_views(comm: Comm) -> None:
    """Views that torch conjugates or negates only when they are read."""
    ranks = range(comm.world_size)
    inputs = [torch.complex(torch.arange(3.0) + rank, torch.ones(3)) for rank in ranks]
    lazy = inputs[rank_of(comm)].conj()
    gathered = comm.all_gather_into_tensor(torch.empty(len(ranks) * 3, dtype=lazy.dtype), lazy)
    assert torch.equal(gathered, torch.cat(inputs).conj().resolve_conj())
    assert torch.equal(comm.all_reduce(lazy.imag), torch.full((3,), -float(len(ranks))))
    assert torch.equal(comm.all_reduce(lazy.imag[:1]), torch.full((1,), -float(len(ranks))))


def test_lazily_conjugated_views(workers: WorkerPool) -> None:
    run(workers, 2, check_lazy_views)


def check_wrong_device(comm: Comm) -> None:
    comm._device_index, comm.device = 1, torch.device("cuda", 1)
    comm._refresh()
    for name, call in {**CALLS, **VARIANTS}.items():
        error = raised_by(call, comm)
        assert isinstance(error, ArgumentError), f"{name}: {error!r}"
        assert error.argument in ("x", "input", "out")
        assert (error.requirement, str(error.actual)) == ("on cuda:1", "cpu")
    comm._device_index, comm.device = -1, torch.device("cpu")
    comm._refresh()
    expect_working(comm)


def test_a_tensor_on_another_device_is_refused(workers: WorkerPool) -> None:
    run(workers, 2, check_wrong_device)


def check_strided_broadcast_in_a_group(comm: Comm) -> None:
    def call(comm: Comm) -> None:
        with comm.group():
            comm.broadcast(torch.ones(3, 2).t())

    error = raised_by(call, comm)
    assert isinstance(error, ArgumentError)
    assert (error.argument, error.requirement) == ("x", "contiguous inside group()")
    expect_working(comm)


def test_a_strided_broadcast_in_a_group_is_refused(workers: WorkerPool) -> None:
    run(workers, 2, check_strided_broadcast_in_a_group)


# Any order of calls


def check_random_sequence(comm: Comm, seed: int) -> None:
    """The same seeded calls on all ranks."""
    world, me = comm.world_size, rank_of(comm)
    following, previous = neighbours(comm)
    generator = random.Random(seed)
    for _ in range(60):
        rows, root = generator.randrange(6), generator.randrange(world)
        dtype = generator.choice([torch.float32, torch.int64, torch.float16])
        sizes = [generator.randrange(4) for _ in range(world)]
        inputs = all_numbers(comm, (rows, 3), dtype)
        ragged = [numbers(rank, (size, 3), dtype) for rank, size in enumerate(sizes)]
        whole = all_numbers(comm, (sum(sizes), 3), dtype)
        kind = generator.choice(sorted(CALLS))
        x = inputs[me].clone()
        if kind == "all_reduce":
            expect_reduced(comm.all_reduce(x), inputs, "sum")
        elif kind == "reduce":
            result = comm.reduce(x, root, "max")
            if result is not None:
                expect_reduced(result, inputs, "max")
        elif kind == "reduce_scatter_tensor":
            stacked = [torch.stack([each] * world) for each in inputs]
            out = comm.reduce_scatter_tensor(blank((rows, 3), dtype), stacked[me], "min")
            expect_reduced(out, inputs, "min")
        elif kind == "reduce_scatterv":
            out = comm.reduce_scatterv(whole[me], sizes)
            expect_reduced(out, [each.split(sizes)[me] for each in whole], "sum")
        elif kind == "all_gather_into_tensor":
            out = comm.all_gather_into_tensor(blank((world * rows, 3), dtype), x)
            expect_bits(out, (world * rows, 3), inputs)
        elif kind == "all_gatherv":
            expect_bits(comm.all_gatherv(ragged[me], sizes), (sum(sizes), 3), ragged)
        elif kind == "broadcast":
            expect_bits(comm.broadcast(x, root), (rows, 3), [inputs[root]])
        elif kind == "gather":
            result = comm.gather(x, root)
            if result is not None:
                expect_bits(result, (world, rows, 3), inputs)
        elif kind == "all_to_all_single":
            out = blank((world * rows, 3), dtype)
            comm.all_to_all_single(out, torch.cat([x] * world))
            expect_bits(out, out.shape, inputs)
        else:
            assert kind in ("send", "recv")
            out = blank((rows, 3), dtype)
            with comm.group():
                comm.send(x, following)
                comm.recv(out, previous)
            expect_bits(out, out.shape, [inputs[previous]])


@pytest.mark.parametrize("seed", range(4))
def test_seeded_sequences_of_calls(workers: WorkerPool, seed: int) -> None:
    run(workers, 2 + seed % 3, check_random_sequence, seed)
