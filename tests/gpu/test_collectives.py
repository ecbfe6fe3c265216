"""Every collective, by NCCL alone and by whatever is the fastest, eagerly and captured in a CUDA
graph, on 2, 3 and 4 GPUs."""

from __future__ import annotations

import pytest
import torch

from distcomm import GroupCoordinator, ParallelState
from tests.gpu.cases import CASES, Case
from tests.gpu.job import start
from tests.worker_pool import WorkerPool, fresh_init_method

REDUCED = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int32, torch.int64]
MOVED = [torch.float32, torch.bfloat16, torch.uint8, torch.int16, torch.bool, torch.complex64]
MOVED += [torch.float8_e4m3fn]
REPLAYS = 5
TUNES = pytest.mark.parametrize("tune", ["nccl", "shipped"])


def groups_of(state: ParallelState) -> list[GroupCoordinator]:
    """Groups that overlap, one of them in an order of its own."""
    groups = [state.tp, state.create_group("reversed", list(reversed(state.tp.ranks)))]
    if state.world_size > 2:
        pair = [state.world_size - 1, 0]
        if state.rank in pair:
            groups.append(state.create_group("pair", pair))
    return groups


def check(case: Case, group: GroupCoordinator, result: torch.Tensor, seed: int) -> None:
    world, dtype = group.world_size, result.dtype
    inputs = [case.input(r, world, seed, dtype) for r in range(world)]
    expected = case.expected(inputs, group.rank_in_group)
    same = result.cpu().contiguous().view(torch.uint8) if result.numel() else result.cpu()
    wanted = expected.contiguous().view(torch.uint8) if result.numel() else expected
    assert result.shape == expected.shape, f"{case.name}: shape {result.shape}"
    assert torch.equal(same, wanted), f"{case.name} {dtype} seed {seed} [{group.member}]"


def eager(rank: int, world: int, method: str, tune: str) -> None:
    with start(rank, world, method, tune=tune) as state:
        for group in groups_of(state):
            for seed, case in enumerate(CASES):
                for dtype in REDUCED if case.reduces else MOVED:
                    x = case.input(group.rank_in_group, group.world_size, seed, dtype)
                    x = x.to(state.device)
                    before = x.clone()
                    check(case, group, case.call(group, x), seed)
                    assert torch.equal(x.view(torch.uint8), before.view(torch.uint8)), case.name
            backends = {name for by_op in group.stats()["ops"].values() for name in by_op}
            assert not backends & {"gloo", "torch_nccl"}
            assert tune == "shipped" or backends == {"pynccl"}


def lazy_views(rank: int, world: int, method: str, tune: str) -> None:
    """Conjugated and negated views arrive as what they read, not as the bytes behind them."""
    with start(rank, world, method, tune=tune) as state:
        z = torch.arange(8, device=state.device) * (1 + 2j) * (rank + 1)
        gathered = state.tp.all_gather(z.conj(), dim=0)
        wanted = [torch.arange(8) * (1 - 2j) * (r + 1) for r in range(world)]
        assert torch.equal(gathered.cpu(), torch.cat(wanted).to(gathered.dtype))
        total = sum(range(1, world + 1))
        for lazy in (z.conj().imag, z.conj().imag[3:4]):  # negated: the second is contiguous
            assert lazy.is_neg()
            summed = state.tp.all_reduce(lazy)
            assert torch.equal(summed.cpu(), lazy.cpu() / (rank + 1) * total)


def captured(rank: int, world: int, method: str, tune: str) -> None:
    """One graph of all collectives on all groups; each replay has new inputs."""
    with start(rank, world, method, tune=tune) as state:
        dtype = torch.bfloat16
        jobs = [(group, case) for group in groups_of(state) for case in CASES]
        inputs = [
            case.input(group.rank_in_group, group.world_size, 0, dtype).to(state.device)
            for group, case in jobs
        ]
        for (group, case), x in zip(jobs, inputs, strict=True):  # torch warms up before capture
            check(case, group, case.call(group, x), 0)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = [case.call(group, x) for (group, case), x in zip(jobs, inputs, strict=True)]
        for seed in range(1, REPLAYS + 1):
            for (group, case), x in zip(jobs, inputs, strict=True):
                x.copy_(case.input(group.rank_in_group, group.world_size, seed, dtype))
            graph.replay()
            torch.cuda.synchronize()
            for (group, case), result in zip(jobs, results, strict=True):
                check(case, group, result, seed)
        del graph


def random_sequences(rank: int, world: int, method: str, tune: str, num_calls: int) -> None:
    """The same random calls on all members, over groups that overlap, with nothing between."""
    with start(rank, world, method, tune=tune) as state:
        groups = groups_of(state)[:2]  # those that all ranks are in
        generator = torch.Generator().manual_seed(7)
        pending = []
        for seed in range(num_calls):
            pick = torch.randint(0, len(groups) * len(CASES), (1,), generator=generator).item()
            group, case = groups[pick % len(groups)], CASES[pick // len(groups)]
            x = case.input(group.rank_in_group, world, seed, torch.float32).to(state.device)
            pending.append((case, group, case.call(group, x), seed))
        for case, group, result, seed in pending:
            check(case, group, result, seed)


@TUNES
def test_eager(gpus: WorkerPool, world: int, tune: str) -> None:
    gpus.run(eager, fresh_init_method(), tune, ranks=world)


@TUNES
def test_lazy_views(gpus: WorkerPool, world: int, tune: str) -> None:
    gpus.run(lazy_views, fresh_init_method(), tune, ranks=world)


@TUNES
def test_captured_and_replayed(gpus: WorkerPool, world: int, tune: str) -> None:
    gpus.run(captured, fresh_init_method(), tune, ranks=world)


@TUNES
def test_random_sequences(gpus: WorkerPool, world: int, tune: str) -> None:
    gpus.run(random_sequences, fresh_init_method(), tune, 300, ranks=world)
