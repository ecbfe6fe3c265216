"""With ``deterministic=True`` an element's bits depend on the ranks' elements alone."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from distcomm import ParallelState
from tests.cpu.job import Job
from tests.worker_pool import WorkerPool

WORLD = 5
H = 48
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@pytest.fixture(scope="module")
def job(workers: WorkerPool) -> Iterator[Job]:
    job = Job(workers, WORLD, tp=WORLD, deterministic=True)
    yield job
    job.close()


def inputs(num_rows: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Of all ranks: the first rows of the same numbers, whose sums depend on the order."""
    generator = torch.Generator().manual_seed(1)
    xs = torch.randn(WORLD, 64, H, generator=generator, dtype=torch.float64)
    return list((xs * 10 ** torch.linspace(-3, 3, WORLD).view(-1, 1, 1))[:, :num_rows].to(dtype))


def in_order(xs: list[torch.Tensor], op: str) -> torch.Tensor:
    total = xs[0].to(torch.promote_types(xs[0].dtype, torch.float32))
    for x in xs[1:]:
        total = total * x.to(total.dtype) if op == "prod" else total + x.to(total.dtype)
    return (total / WORLD if op == "avg" else total).to(xs[0].dtype)


def reductions(state: ParallelState, dtype: torch.dtype, op: str) -> None:
    group, rank = state.tp, state.tp.rank_in_group
    for num_rows in (1, 2, 7, WORLD, 60):
        xs = inputs(num_rows, dtype)
        x, wanted = xs[rank], in_order(xs, op)
        before = x.clone()
        assert torch.equal(group.all_reduce(x, op), wanted)
        assert torch.equal(group.all_reduce(x.t(), op), wanted.t())
        assert torch.equal(x, before)
        assert group.all_reduce(x, op, out=x) is x
        assert torch.equal(x, wanted)
        x.copy_(before)
        reduced = group.reduce(x, dst=2, op=op)
        assert (reduced is None) == (rank != 2)
        assert reduced is None or torch.equal(reduced, wanted)
        sizes = [num_rows - num_rows // 2, 0, num_rows // 2, 0, 0]
        share = group.reduce_scatterv(x, sizes, op=op)
        assert torch.equal(share, wanted.split(sizes)[rank])
        if num_rows % WORLD == 0:
            shares = wanted.chunk(WORLD)
            assert torch.equal(group.reduce_scatter(x, dim=0, op=op), shares[rank])
            output = torch.empty_like(shares[rank])
            assert group.reduce_scatter_tensor(output, x, op) is output
            assert torch.equal(output, shares[rank])
    assert set(group.stats()["ops"]["all_reduce"]) == {"ordered"}


@pytest.mark.parametrize("op", ["sum", "avg", "prod"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_do_not_depend_on_the_number_of_rows(job: Job, dtype: torch.dtype, op: str) -> None:
    job.run(reductions, dtype, op)


def exact(state: ParallelState) -> None:
    group, rank = state.tp, state.tp.rank_in_group
    xs = inputs(3, torch.float32)
    assert torch.equal(group.all_reduce(xs[rank], "max"), torch.stack(xs).amax(dim=0))
    whole = torch.full((3,), rank + 1)
    assert group.all_reduce(whole).tolist() == [15] * 3
    assert group.all_reduce(whole, "prod").tolist() == [120] * 3


def test_what_is_exact_in_any_order_is_as_ever(job: Job) -> None:
    job.run(exact)
