"""Each collective as an input, a call and a plain reference, to be run eagerly or captured.

Values are small integers, so that every sum is exact and results can be compared bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from distcomm import GroupCoordinator

COLS = 6


@dataclass(frozen=True)
class Case:
    """`rows(rank, world)` rows of input; `expected(all inputs in group order, rank)`."""

    name: str
    rows: Callable[[int, int], int]
    call: Callable[[GroupCoordinator, torch.Tensor], torch.Tensor]
    expected: Callable[[list[torch.Tensor], int], torch.Tensor]
    reduces: bool = False

    def input(self, rank: int, world: int, seed: int, dtype: torch.dtype) -> torch.Tensor:
        """What `rank` puts in; every rank can compute every other's."""
        generator = torch.Generator().manual_seed(1000 * seed + rank)
        x = torch.randint(0, 5, (self.rows(rank, world), COLS), generator=generator)
        return x.to(dtype)


def equal_rows(rank: int, world: int) -> int:
    return 12  # divisible by 2, 3 and 4


def ragged_rows(rank: int, world: int) -> int:
    return 3 * rank  # rank 0 has none


def sizes_of(group: GroupCoordinator) -> list[int]:
    return [ragged_rows(r, group.world_size) for r in range(group.world_size)]


def total(inputs: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack([x.double() for x in inputs]).sum(0).to(inputs[0].dtype)


def share(x: torch.Tensor, world: int, rank: int, dim: int = 0) -> torch.Tensor:
    return x.chunk(world, dim)[rank]


def ragged_total(group: GroupCoordinator, x: torch.Tensor) -> torch.Tensor:
    sizes = sizes_of(group)
    return group.reduce_scatterv(x[:1].expand(sum(sizes), COLS), sizes)


def ragged_exchange(group: GroupCoordinator, x: torch.Tensor) -> torch.Tensor:
    """Rank r sends i rows to rank i, hence gets r rows from each."""
    world, me = group.world_size, group.rank_in_group
    send = x[: sum(range(world))]
    output = x.new_full((me * world, COLS), 99)
    return group.all_to_all_single(output, send, [me] * world, list(range(world)))


def ragged_exchange_expected(inputs: list[torch.Tensor], rank: int) -> torch.Tensor:
    start = sum(range(rank))
    return torch.cat([x[start : start + rank] for x in inputs])


def ring(group: GroupCoordinator, x: torch.Tensor) -> torch.Tensor:
    """To the next rank and from the previous one, in one step."""
    received = torch.full_like(x, 99)
    comm = group.pynccl_comm
    assert comm is not None
    with comm.group():
        comm.send(x, (group.rank_in_group + 1) % group.world_size)
        comm.recv(received, (group.rank_in_group - 1) % group.world_size)
    return received


def gathered_everywhere(group: GroupCoordinator, x: torch.Tensor) -> torch.Tensor:
    """`gather` to the last rank, and a broadcast of the result."""
    last = group.world_size - 1
    result = group.gather(x, dst=last, dim=0)
    if result is None:
        result = x.new_empty((group.world_size * len(x), COLS))
    return group.broadcast(result, src=last)


def async_gather(group: GroupCoordinator, x: torch.Tensor) -> torch.Tensor:
    output = x.new_full((group.world_size * len(x), COLS), 99)
    handle = group.cp_all_gather_into_tensor_async(output, x, torch.cuda.Stream())
    handle.wait()
    return output.clone()


CASES = [
    Case(
        "all_reduce",
        equal_rows,
        lambda group, x: group.all_reduce(x),
        lambda inputs, rank: total(inputs),
        reduces=True,
    ),
    Case(
        "all_reduce transposed, into out",
        equal_rows,
        lambda group, x: group.all_reduce(x.t(), out=x.new_empty(COLS, len(x))),
        lambda inputs, rank: total(inputs).t(),
        reduces=True,
    ),
    Case(
        "all_reduce max",
        equal_rows,
        lambda group, x: group.all_reduce(x, "max"),
        lambda inputs, rank: torch.stack(inputs).amax(0),
        reduces=True,
    ),
    Case(
        "reduce to rank 1, and broadcast",
        equal_rows,
        lambda group, x: group.broadcast(
            result if (result := group.reduce(x, dst=1)) is not None else x.clone(), src=1
        ),
        lambda inputs, rank: total(inputs),
        reduces=True,
    ),
    Case(
        "reduce_scatter dim 0",
        equal_rows,
        lambda group, x: group.reduce_scatter(x, dim=0),
        lambda inputs, rank: share(total(inputs), len(inputs), rank),
        reduces=True,
    ),
    Case(
        "reduce_scatter dim -1",
        equal_rows,
        lambda group, x: group.reduce_scatter(x.t(), dim=-1),
        lambda inputs, rank: share(total(inputs), len(inputs), rank).t(),
        reduces=True,
    ),
    Case("reduce_scatterv", equal_rows, ragged_total,
         lambda inputs, rank: total(inputs)[:1].expand(ragged_rows(rank, len(inputs)), COLS),
         reduces=True),
    Case(
        "all_gather dim 0",
        equal_rows,
        lambda group, x: group.all_gather(x, dim=0),
        lambda inputs, rank: torch.cat(inputs),
    ),
    Case(
        "all_gather dim -1",
        equal_rows,
        lambda group, x: group.all_gather(x),
        lambda inputs, rank: torch.cat(inputs, dim=-1),
    ),
    Case(
        "all_gather_into_tensor stacked",
        equal_rows,
        lambda group, x: group.all_gather_into_tensor(
            x.new_full((group.world_size, *x.shape), 99), x
        ),
        lambda inputs, rank: torch.stack(inputs),
    ),
    Case(
        "all_gatherv",
        ragged_rows,
        lambda group, x: group.all_gatherv(x, sizes_of(group)),
        lambda inputs, rank: torch.cat(inputs),
    ),
    Case(
        "all_to_all_single",
        equal_rows,
        lambda group, x: group.all_to_all_single(torch.full_like(x, 99), x),
        lambda inputs, rank: torch.cat([share(x, len(inputs), rank) for x in inputs]),
    ),
    Case("all_to_all_single ragged", equal_rows, ragged_exchange, ragged_exchange_expected),
    Case(
        "broadcast",
        equal_rows,
        lambda group, x: group.broadcast(x.clone(), src=group.world_size - 1),
        lambda inputs, rank: inputs[-1],
    ),
    Case(
        "broadcast into a transposed tensor",
        equal_rows,
        lambda group, x: group.broadcast(x.t().contiguous().t(), src=1),
        lambda inputs, rank: inputs[1],
    ),
    Case("gather", equal_rows, gathered_everywhere, lambda inputs, rank: torch.cat(inputs)),
    Case("send and recv", equal_rows, ring, lambda inputs, rank: inputs[rank - 1]),
    Case(
        "cp_all_gather_into_tensor_async",
        equal_rows,
        async_gather,
        lambda inputs, rank: torch.cat(inputs),
    ),
]  # fmt: skip
