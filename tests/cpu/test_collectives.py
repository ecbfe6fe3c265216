"""Every collective of `GroupCoordinator` on gloo, against a reference that is computed locally."""

from __future__ import annotations

import itertools
import time
from pathlib import Path

import pytest
import torch

from distcomm import ArgumentError, GroupCoordinator, ParallelState
from tests.cpu.checked_calls import (
    MOVED_DTYPES,
    MOVEMENTS,
    REDUCED,
    REDUCTIONS,
    SHAPES,
    Case,
    checked_call,
)
from tests.cpu.job import Job

# Of init_distributed(tp=8, cp=2, ep=4): tp 0..7; attn_tp 0..3; cp 0, 4; ep 0, 2, 4, 6; pp alone.
# Of create_group: all ranks are in one group of each partition.
CREATED = {
    "mixed": [(5, 2, 7), (6, 0, 1), (4, 3)],
    "backwards": [(7, 6, 5, 4, 3, 2, 1, 0)],
}
GROUPS = ["tp", "attn_tp", "cp", "ep", "pp", *CREATED]
THOROUGH = ["cp", "mixed"]  # small groups, whose calls are cheap


def group_named(state: ParallelState, name: str) -> GroupCoordinator:
    """This rank's group of an axis or of one of the `CREATED` partitions."""
    if name not in state.groups:
        ranks = next(ranks for ranks in CREATED[name] if state.rank in ranks)
        return state.create_group(name, ranks)
    return state.groups[name]


def make_calls(state: ParallelState, name: str, collective: str, cases: list[Case]) -> None:
    group = group_named(state, name)
    for case in cases:
        checked_call(collective, group, case)


def make_cases(name: str, kinds: list[tuple[torch.dtype, str | None]]) -> list[Case]:
    """In small groups each dtype and op with each shape; else each of both at least once."""
    first = GROUPS.index(name)
    if name in THOROUGH:
        pairs = list(itertools.product(kinds, SHAPES))
    else:
        count = max(len(kinds), len(SHAPES))
        pairs = [(kinds[i % len(kinds)], SHAPES[(first + i) % len(SHAPES)]) for i in range(count)]
    return [
        Case(1000 * first + i, dtype, shape, op) for i, ((dtype, op), shape) in enumerate(pairs)
    ]


@pytest.mark.parametrize("name", GROUPS)
@pytest.mark.parametrize("collective", REDUCTIONS)
def test_a_reduction_equals_the_reference(job: Job, collective: str, name: str):
    job.run(make_calls, name, collective, make_cases(name, REDUCED))


@pytest.mark.parametrize("name", GROUPS)
@pytest.mark.parametrize("collective", MOVEMENTS)
def test_data_arrives_bit_for_bit(job: Job, collective: str, name: str):
    job.run(make_calls, name, collective, make_cases(name, [(d, None) for d in MOVED_DTYPES]))


def make_calls_without_autograd(state: ParallelState) -> None:
    with torch.inference_mode():
        for collective in REDUCTIONS:
            checked_call(collective, state.cp, Case(1, torch.float32, (3, 5), "sum"))
        for collective in MOVEMENTS:
            checked_call(collective, state.cp, Case(1, torch.float32, (3, 5)))


def test_collectives_take_tensors_of_inference_mode(job: Job):
    job.run(make_calls_without_autograd)


def gather_a_column(state: ParallelState) -> tuple[list[int], tuple[int, ...]]:
    gathered = state.attn_tp.all_gather(torch.full((3, 1), float(state.rank)), dim=-1)
    return gathered[0].tolist(), gathered.stride()


def test_a_gathered_column_is_a_contiguous_matrix(job: Job):
    results = job.run(gather_a_column)
    assert results == [([0, 1, 2, 3], (4, 1))] * 4 + [([4, 5, 6, 7], (4, 1))] * 4


def defaults(state: ParallelState) -> list[object]:
    """Calls that leave out all that can be left out, as plain numbers."""
    group = state.cp  # ranks 0, 4 and 1, 5 and so on
    row = torch.tensor([[state.rank, 10 + state.rank]])
    gathered = group.gather(row)
    return [
        group.all_reduce(row).tolist(),
        group.all_gather(row).tolist(),
        group.reduce_scatter(row).tolist(),
        group.broadcast(row.clone()).tolist(),
        None if gathered is None else gathered.tolist(),
    ]


def test_defaults_are_the_sum_the_last_dim_and_the_first_rank(job: Job):
    results = job.run(defaults)
    both = [[0, 10, 4, 14]]
    assert results[0] == [[[4, 24]], both, [[4]], [[0, 10]], both]
    assert results[4] == [[[4, 24]], both, [[24]], [[0, 10]], None]


def exchange_halves_beside_work(state: ParallelState) -> None:
    """Two gathers of different groups under way at once, waited for in the wrong order."""
    for _ in range(20):
        outputs, handles = [], []
        for group in (state.cp, state.tp):
            x = torch.full((2,), group.rank)
            outputs.append(torch.full((2 * group.world_size,), -1))
            handles.append(group.cp_all_gather_into_tensor_async(outputs[-1], x))
            del x  # the handle keeps it alive
        total = state.attn_tp.all_reduce(torch.tensor([1]))
        for handle in reversed(handles):
            handle.wait()
        assert total.item() == 4
        for output, group in zip(outputs, (state.cp, state.tp), strict=True):
            assert output.tolist() == [rank for rank in group.ranks for _ in range(2)]


def test_async_gathers_of_two_groups_run_beside_other_calls(job: Job):
    job.run(exchange_halves_beside_work)


def pass_a_barrier(state: ParallelState, folder: Path) -> None:
    for number in range(3):
        late = state.world.ranks[number]
        if state.rank == late:
            time.sleep(0.1)
        (folder / f"{number}-{state.rank}").touch()
        state.tp.barrier()
        missing = [r for r in state.tp.ranks if not (folder / f"{number}-{r}").exists()]
        assert not missing, f"rank {state.rank} passed barrier {number} before ranks {missing}"
    state.pp.barrier()


def test_nobody_passes_a_barrier_before_all_have_come(job: Job, tmp_path: Path):
    job.run(pass_a_barrier, tmp_path)


def gather_lazy_views(state: ParallelState) -> None:
    """Views that torch conjugates or negates only when they are read arrive as what they read."""
    group, rank = state.cp, state.cp.rank_in_group
    inputs = [torch.complex(torch.arange(3.0) + r, torch.ones(3)) for r in range(group.world_size)]
    lazy = inputs[rank].conj()
    assert lazy.is_conj()
    assert lazy.imag.is_neg()
    conjugated = [x.conj().resolve_conj() for x in inputs]
    assert torch.equal(group.all_gather(lazy, dim=0), torch.cat(conjugated))
    assert torch.equal(group.all_reduce(lazy.imag), sum(x.imag for x in conjugated))
    received = group.broadcast(inputs[rank].clone().conj(), src=1)
    assert torch.equal(received.resolve_conj(), conjugated[1])
    with pytest.raises(ArgumentError, match="no lazily conjugated"):
        group.all_gather_into_tensor(torch.empty(6, dtype=lazy.dtype).conj(), lazy)


def test_lazily_conjugated_views(job: Job) -> None:
    job.run(gather_lazy_views)
