"""Collectives by push kernels: bits, order, graphs, and mailboxes that are empty in between."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from distcomm import ParallelState
from distcomm.backends import KernelCollectives
from distcomm.group import GroupCoordinator
from distcomm.kernels import (
    LEAST_CAPABILITY,
    NormedRows,
    all_gather_push,
    most_gathered,
    most_tokens,
    one_shot_push,
    one_shot_rms_norm,
    reduce_scatter_push,
    two_shot_push,
    two_shot_rms_norm,
)
from tests.gpu.job import start
from tests.worker_pool import WorkerPool, fresh_init_method

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Of a share or of the tensor, in vectors of 16 bytes.
SIZES = (1, 2, 3, 7, 8, 9, 63, 64, 65, 257, 1000, 4096, 4097, 20_001)
LARGE = (70_000, 300_001, 1_100_000)  # chunks by the dozen
SLEEP_100_MS = 200_000_000  # cycles


@contextmanager
def push_job(rank: int, world: int, url: str, **options: Any) -> Iterator[ParallelState]:
    options = {"symmetric_reserve": "512MiB", "timeout": 30, "tune": "shipped", **options}
    with start(rank, world, url, **options) as state:
        yield state
        for group in state.groups.values():
            if group.kernels is not None:
                assert_at_rest(group)


def push_of(group: GroupCoordinator) -> KernelCollectives:
    push = group.kernels
    assert push is not None
    return push


def assert_at_rest(group: GroupCoordinator) -> None:
    torch.cuda.synchronize()
    group.barrier()
    push = push_of(group)
    assert push.channel.signals_are_at_rest()
    turns = push.boxes.turns.tolist()
    assert turns == [turns[0]] * len(turns)
    assert group.all_gather_object(turns[0]) == [turns[0]] * group.world_size


def values(seed: int, size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Numbers, and some that are hard to carry; the same on every rank for a seed."""
    generator = torch.Generator(device).manual_seed(seed)
    x = torch.randn(size, generator=generator, device=device)
    for number, odd in enumerate((0.0, -0.0, float("inf"), float("-inf"), float("nan"))):
        x[torch.randint(size, (size // 97,), generator=generator, device=device)] = odd
        x[number::1009] = odd
    x = x.to(dtype)
    bits = x.view(torch.int32)
    bits[torch.randint(len(bits), (size // 89,), generator=generator, device=device)] = -1
    return x


def summed(xs: list[torch.Tensor]) -> torch.Tensor:
    """In fp32, in the order of ranks, rounded once."""
    total = xs[0].float()
    for x in xs[1:]:
        total = total + x.float()
    return total.to(xs[0].dtype)


def same(x: torch.Tensor, y: torch.Tensor) -> bool:
    """The same bits, but for NaNs."""
    bits = torch.int32 if x.dtype == torch.float32 else torch.int16
    return bool(((x.view(bits) == y.view(bits)) | (x.isnan() & y.isnan())).all())


# ---- bits ---------------------------------------------------------------------------------------


def sums(rank: int, world: int, url: str) -> None:
    with push_job(rank, world, url) as state:
        group, device = state.tp, state.device
        boxes = push_of(group).boxes
        for kernel in (one_shot_push, two_shot_push, reduce_scatter_push):
            for dtype in DTYPES:
                large = {two_shot_push: LARGE, reduce_scatter_push: LARGE[:2]}.get(kernel, ())
                for num_vectors in SIZES + large:
                    size = num_vectors * 16 // dtype.itemsize
                    shares = world if kernel is reduce_scatter_push else 1
                    xs = [values(r, size * shares, dtype, device) for r in range(world)]
                    wanted = summed(xs)[rank * size :][:size] if shares > 1 else summed(xs)
                    x, out = xs[rank].clone(), torch.full_like(wanted, 7)
                    kernel(x, out, boxes)
                    assert same(out, wanted), (kernel.__name__, dtype, num_vectors)
                    assert torch.equal(x.view(torch.uint8), xs[rank].view(torch.uint8))
                    own = x[rank * size :][:size] if shares > 1 else x
                    kernel(x, own, boxes)  # in place
                    assert same(own, wanted), (kernel.__name__, dtype, num_vectors, "in place")


def gathers(rank: int, world: int, url: str) -> None:
    with push_job(rank, world, url) as state:
        boxes, device = push_of(state.tp).boxes, state.device
        most = most_gathered(world) // 16
        for num_vectors in (*(size for size in SIZES if size < most), most):
            xs = []
            for r in range(world):
                generator = torch.Generator(device).manual_seed(r + num_vectors)
                bits = torch.randint(
                    0, 256, (num_vectors * 16,), generator=generator, device=device
                )
                xs.append(bits.to(torch.uint8))
                xs[-1].view(torch.int32)[::5] = -1
            out = torch.full((world * num_vectors * 16,), 7, dtype=torch.uint8, device=device)
            all_gather_push(xs[rank], out, boxes)
            assert torch.equal(out, torch.cat(xs)), num_vectors
            out.fill_(7)
            own = out[rank * num_vectors * 16 :][: num_vectors * 16].copy_(xs[rank])
            all_gather_push(own, out, boxes)
            assert torch.equal(out, torch.cat(xs)), (num_vectors, "in place")


def of_symmetric_tensors(rank: int, world: int, url: str) -> None:
    """Algorithms that write to other ranks' symmetric tensors."""
    with push_job(rank, world, url) as state:
        group, device = state.tp, state.device
        kernels = push_of(group)
        for num_vectors in (*SIZES, *LARGE[:2]):
            for dtype in DTYPES:
                size = num_vectors * 16 // dtype.itemsize
                xs = [values(r, size * world, dtype, device) for r in range(world)]
                total = summed(xs)
                with group.symmetric_memory():
                    x, out = torch.empty_like(total), torch.full_like(total, 7)
                x.copy_(xs[rank])
                for algorithm in ("two_shot_direct", "two_shot_copy"):
                    x.copy_(xs[rank])
                    kernels.run("all_reduce", algorithm, x, out)
                    assert same(out, total), (algorithm, dtype, num_vectors)
                    few = x[: size + 16 // dtype.itemsize]  # not whole vectors for each rank
                    wanted = total[: len(few)]
                    kernels.run("all_reduce", algorithm, few, few)
                    assert same(few, wanted), (algorithm, dtype, num_vectors, "in place")
                    assert same(x[len(few) :], xs[rank][len(few) :])
                    x.copy_(xs[rank])
                for algorithm in ("direct", "copy"):
                    share = total[rank * size :][:size].clone()
                    out.fill_(7)
                    kernels.run("all_gather", algorithm, share, out)
                    assert same(out, total), (algorithm, dtype, num_vectors)
                    x.fill_(7)
                    own = x[rank * size :][:size].copy_(share)
                    kernels.run("all_gather", algorithm, own, x)
                    assert same(x, total), (algorithm, dtype, num_vectors, "in place")


def norms(rank: int, world: int, url: str) -> None:
    with push_job(rank, world, url) as state:
        boxes, device = push_of(state.tp).boxes, state.device
        for dtype in DTYPES:
            few = ((1, 64), (33, 1032))
            more = ((1, 8192), (5, 4096), (16, 5120), (3000, 512))
            for num_tokens, hidden in few + (more if dtype == torch.bfloat16 else ()):
                shape = (num_tokens, hidden)
                generator = torch.Generator(device).manual_seed(num_tokens)
                xs = [
                    torch.randn(shape, generator=generator, device=device).to(dtype)
                    for _ in range(world)
                ]
                residual, weight = (
                    torch.randn(each, generator=generator, device=device).to(dtype)
                    for each in (shape, (hidden,))
                )
                for old in (residual, None):
                    h = summed(xs).float() + (0 if old is None else old.float())
                    mean = h.double().square().mean(1, keepdim=True)
                    wanted = h.double() / (mean + 1e-5).sqrt() * (weight.double() + 1)
                    results = []
                    fits = num_tokens <= most_tokens(hidden * dtype.itemsize // 16, world)
                    for function in (two_shot_rms_norm, *[one_shot_rms_norm] * fits):
                        normed = torch.full_like(xs[rank], float("nan"))
                        new = None if old is None else torch.full_like(old, float("nan"))
                        rows = NormedRows(xs[rank], weight, old, normed, new, 1e-5, 1.0)
                        function(rows, boxes)
                        assert new is None or torch.equal(new, h.to(dtype))
                        rtol = 1e-5 if dtype == torch.float32 else 2**-7
                        torch.testing.assert_close(normed.double(), wanted, rtol=rtol, atol=1e-5)
                        results.append(normed)
                    assert torch.equal(results[0], results[-1]), (dtype, shape, "they differ")


# ---- through the group --------------------------------------------------------------------------


def through_the_group(rank: int, world: int, url: str) -> None:
    with push_job(rank, world, url) as state:
        group, device = state.tp, state.device
        for size in (8, 512, 4096 + 8, 40_000):
            xs = [values(r, size * world, torch.bfloat16, device) for r in range(world)]
            total = summed(xs)
            x = xs[rank]
            assert same(group.all_reduce(x), total)
            out = torch.empty_like(x)
            assert group.all_reduce(x, out=out) is out
            assert same(out, total)
            assert same(group.all_reduce(x[4:-4]), total[4:-4])  # not aligned to vectors
            assert same(group.all_reduce(x.view(-1, 2).t()), total.view(-1, 2).t())
            assert same(group.reduce_scatter(x, dim=0), total[rank * size :][:size])
            gathered = group.all_gather(x, dim=0)
            assert torch.equal(gathered.view(torch.int16), torch.cat(xs).view(torch.int16))
        in_place = xs[rank].clone()
        group.all_reduce(in_place, out=in_place)
        assert same(in_place, total)
        assert (group.all_reduce(torch.full((64,), rank, device=device), "max") == world - 1).all()
        ops = group.stats()["ops"]
        assert ops["all_reduce"]["one_shot_push"]["calls"] >= 8
        assert ops["reduce_scatter"]["push"]["calls"] >= 2
        assert ops["all_gather"]["push"]["calls"] >= 2
        assert group.stats()["fallbacks"] == {}


def nccl_when_told(rank: int, world: int, url: str) -> None:
    with push_job(rank, world, url, tune="nccl") as state:
        x = torch.full((64,), float(rank), device=state.device)
        assert (state.tp.all_reduce(x) == sum(range(world))).all()
        stats = state.tp.stats()
        assert set(stats["ops"]["all_reduce"]) == {"pynccl"}
        assert stats["algorithms"] == "none: tune='nccl'"


def deterministic(rank: int, world: int, url: str, tune: str = "shipped") -> None:
    """A row's sum has the same bits for 1 to N rows, on all ranks, and in whatever call."""
    with push_job(rank, world, url, tune=tune, deterministic=True) as state:
        group, device = state.tp, state.device
        for dtype in DTYPES:
            for hidden in (4096, 1027):
                xs = [
                    values(r, 300 * hidden, dtype, device).view(300, hidden) for r in range(world)
                ]
                total = summed(xs)
                for num_rows in (1, 2, 3, 8, 37, 128, 300):
                    result = group.all_reduce(xs[rank][:num_rows].clone())
                    assert same(result, total[:num_rows]), (dtype, hidden, num_rows)
                    if num_rows % world == 0:
                        share = group.reduce_scatter(xs[rank][:num_rows].clone(), dim=0)
                        assert same(share, total[:num_rows].chunk(world)[rank])
        assert "pynccl" not in group.stats()["ops"]["all_reduce"]


def deterministic_without_kernels(rank: int, world: int, url: str) -> None:
    deterministic(rank, world, url, tune="nccl")


def calibrated(rank: int, world: int, url: str) -> None:
    """Tables that are measured when the job begins are the same on all ranks, and are used."""
    with push_job(rank, world, url, tune="startup", timeout=100) as state:
        group = state.tp
        assert group.stats()["algorithms"] == "measured at the job's beginning"
        table = push_of(group).table
        assert group.all_gather_object(table) == [table] * world
        assert table.ranges["captured", "ordinary", "all_reduce"].of(4096) != "nccl"
        x = torch.full((8192,), float(rank), device=state.device)
        assert (group.all_reduce(x) == sum(range(world))).all()
        assert "nccl" not in group.stats()["ops"]["all_reduce"]
        other = state.create_group("again", range(world))
        assert other.stats()["algorithms"] == group.stats()["algorithms"]


# ---- order --------------------------------------------------------------------------------------


class Counted:
    """Calls of random kernels and sizes, whose results the GPU checks without the host."""

    def __init__(self, group: GroupCoordinator, seed: int) -> None:
        self.group, self.boxes = group, push_of(group).boxes
        self.choose = random.Random(seed)
        self.wrong = torch.zeros((), dtype=torch.int64, device=group.device)
        self.ramp = torch.arange(1 << 20, device=group.device) % 13

    def call(self, number: int) -> None:
        world, rank = self.group.world_size, self.group.rank_in_group
        kernel = self.choose.choice(
            (one_shot_push, two_shot_push, reduce_scatter_push, all_gather_push)
        )
        size = self.choose.choice((8, 64, 1000, 4096, 9000)) * 8
        ramp = self.ramp[: size * world if kernel is reduce_scatter_push else size]
        x = (ramp + (rank + number) % 5).bfloat16()
        everyone = [(r + number) % 5 for r in range(world)]
        if kernel is all_gather_push:
            out = torch.full((size * world,), -1.0, dtype=x.dtype, device=x.device)
            wanted = torch.cat([ramp + each for each in everyone])
        else:
            out = torch.full((size,), -1.0, dtype=x.dtype, device=x.device)
            wanted = ramp * world + sum(everyone)
            if kernel is reduce_scatter_push:
                wanted = wanted[rank * size :][:size]
        push_of(self.group).channel.follow()
        kernel(x, out, self.boxes)
        self.wrong += (out != wanted).sum()


def many_calls(rank: int, world: int, url: str) -> None:
    """One rank is late now and then, another one each time, by some milliseconds."""
    with push_job(rank, world, url) as state:
        calls = Counted(state.tp, seed=world)
        for number in range(10_000):
            if number % 500 == 499 and rank == number // 500 % world:
                torch.cuda._sleep(SLEEP_100_MS // 10)
            calls.call(number)
        assert calls.wrong.item() == 0


def a_late_rank(rank: int, world: int, url: str) -> None:
    with push_job(rank, world, url) as state:
        calls = Counted(state.tp, seed=7)
        for number in range(6):
            if rank == number % world:
                torch.cuda._sleep(SLEEP_100_MS)
            for _ in range(5):
                calls.call(number)
        assert calls.wrong.item() == 0


def replayed(rank: int, world: int, url: str) -> None:
    """Graphs of several sizes, replayed in turns with eager calls."""
    with push_job(rank, world, url) as state:
        group, device = state.tp, state.device
        sizes = (8, 3000 * 8, 200_000 * 8)
        inputs = [torch.empty(size, dtype=torch.bfloat16, device=device) for size in sizes]
        graphs, outputs = [], []
        for several in ([inputs[0]] * 3, inputs, inputs[1:]):
            for x in several:
                group.all_reduce(x)
            graph = torch.cuda.CUDAGraph()
            with group.graph_capture() as c, torch.cuda.graph(graph, stream=c.stream):
                outputs.append([group.all_reduce(x) for x in several])
            graphs.append(graph)
        wrong = torch.zeros((), dtype=torch.int64, device=device)
        for number in range(600):
            for index, x in enumerate(inputs):
                x.fill_((rank + number + index) % 7)
            chosen = number * number % len(graphs)
            graphs[chosen].replay()
            several = ([inputs[0]] * 3, inputs, inputs[1:])[chosen]
            for x, out in zip(several, outputs[chosen], strict=True):
                index = next(i for i, each in enumerate(inputs) if each is x)
                wrong += (out != sum((r + number + index) % 7 for r in range(world))).sum()
            eager = group.all_reduce(inputs[number % 2])
            wrong += (eager != sum((r + number + number % 2) % 7 for r in range(world))).sum()
        assert wrong.item() == 0
        for graph in graphs:
            graph.reset()


def two_streams(rank: int, world: int, url: str) -> None:
    """Two groups of the same ranks share mailboxes: their calls come one after another."""
    with push_job(rank, world, url) as state:
        streams = torch.cuda.Stream(), torch.cuda.Stream()
        wrong = torch.zeros(2, dtype=torch.int64, device=state.device)
        torch.cuda.synchronize()
        for number in range(400):
            which = number * 7 % 3 % 2
            with torch.cuda.stream(streams[which]):
                if rank == number % world and number % 50 == 0:
                    torch.cuda._sleep(SLEEP_100_MS // 50)
                group = (state.tp, state.world)[which]
                x = torch.full((4096,), rank + number % 11, device=state.device).bfloat16()
                total = group.all_reduce(x)
                wanted = sum(range(world)) + world * (number % 11)
                wrong[which] += (total != wanted).sum()
        torch.cuda.synchronize()
        assert wrong.tolist() == [0, 0]


def two_groups(rank: int, world: int, url: str) -> None:
    """Groups that overlap, each with mailboxes of its own."""
    with push_job(rank, world, url, tp=2, cp=world // 2, cp_layout="beside_tp") as state:
        groups = [group for group in (state.tp, state.cp, state.world) if group.world_size > 1]
        calls = [Counted(group, seed=number) for number, group in enumerate(groups)]
        for number in range(600):
            calls[number * 5 % 7 % len(calls)].call(number)
        assert [each.wrong.item() for each in calls] == [0] * len(calls)


EVERY_WORLD = (sums, gathers, of_symmetric_tensors, norms, through_the_group, many_calls)
MOST_RANKS = (
    nccl_when_told,
    deterministic,
    deterministic_without_kernels,
    calibrated,
    a_late_rank,
    replayed,
    two_streams,
    two_groups,
)


pytestmark = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < LEAST_CAPABILITY,
    reason="the GPU is too old for Triton, or simulated",
)


@pytest.mark.parametrize("function", EVERY_WORLD, ids=lambda function: function.__name__)
def test_push_collectives(gpus: WorkerPool, world: int, function: Callable[..., None]) -> None:
    gpus.run(function, fresh_init_method(), ranks=world)


@pytest.mark.parametrize("function", MOST_RANKS, ids=lambda function: function.__name__)
def test_push_collectives_of_most_ranks(
    gpus: WorkerPool, most_ranks: int, function: Callable[..., None]
) -> None:
    ranks = most_ranks - most_ranks % 2 if function is two_groups else most_ranks
    gpus.run(function, fresh_init_method(), ranks=ranks)
