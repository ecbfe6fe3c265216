"""The kernel that pushes rows, on one GPU: each rank is a stream, with buffers that pose as peers'.

The ranks' blocks wait for each other, so all of them have to fit on the GPU at once. And so the
host mustn't wait for the GPU while only some have been launched, as CUDA may when it loads a
kernel or makes memory: each rank has done all of it alone before.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch

from distcomm.kernels import PushedTensor, push_rows, signal_bytes
from tests.worker_pool import WorkerPool, fresh_init_method

MOST_BLOCKS = 16
ROW = 48  # int32 in a row of both tensors


class Ranks:
    """W ranks on one GPU, each with shares of two tensors, outputs for all rows, and a stream."""

    def __init__(self, counts: list[int], seed: int) -> None:
        choose = random.Random(seed)
        self.counts = counts
        self.world = len(counts)
        total = sum(counts)
        self.order = torch.tensor(choose.sample(range(total), total), device="cuda")
        self.rows_to = self.order.split(counts)
        self.whole = [torch.zeros((total, ROW), dtype=torch.int32, device="cuda") for _ in "kv"]
        self.sources = [[whole[rows] for rows in self.rows_to] for whole in self.whole]
        self.outputs = [[torch.zeros_like(whole) for _ in counts] for whole in self.whole]
        size = signal_bytes(self.world, MOST_BLOCKS)
        self.signals = [torch.zeros(size, dtype=torch.uint8, device="cuda") for _ in counts]
        self.addresses = torch.tensor([area.data_ptr() for area in self.signals], device="cuda")
        self.trials = [torch.zeros((), dtype=torch.int64, device="cuda") for _ in counts]
        self.wrong = [torch.zeros((), dtype=torch.int64, device="cuda") for _ in counts]
        self.streams = [torch.cuda.Stream() for _ in counts]
        self.deltas = [
            [self._deltas(outputs, rank) for rank in range(self.world)] for outputs in self.outputs
        ]
        torch.cuda.synchronize()
        for rank, stream in enumerate(self.streams):
            with torch.cuda.stream(stream):
                torch.cuda._sleep(1)
                for num_blocks in range(1, MOST_BLOCKS + 1):
                    self.step(rank, num_blocks, alone=True)
        torch.cuda.synchronize()
        for counter in [*self.trials, *self.wrong]:
            counter.zero_()
        torch.cuda.synchronize()

    def _deltas(self, outputs: list[torch.Tensor], rank: int) -> torch.Tensor:
        own = outputs[rank].data_ptr()
        return torch.tensor([output.data_ptr() - own for output in outputs], device="cuda")

    def push(self, rank: int, num_blocks: int, *, alone: bool = False) -> None:
        """On the current stream; alone, as a group of one."""
        tensors = [
            PushedTensor(
                source=sources[rank].data_ptr(),
                output=outputs[rank].data_ptr(),
                deltas=deltas[rank][:1] if alone else deltas[rank],
                row_bytes=ROW * 4,
                source_pitch=ROW * 4,
                output_pitch=ROW * 4,
            )
            for sources, outputs, deltas in zip(
                self.sources, self.outputs, self.deltas, strict=True
            )
        ]
        push_rows(
            tensors,
            self.rows_to[rank],
            slots=None,
            rank=0 if alone else rank,
            world_size=1 if alone else self.world,
            signals=self.addresses[rank : rank + 1] if alone else self.addresses,
            num_blocks=num_blocks,
        )

    def step(self, rank: int, num_blocks: int, *, alone: bool = False) -> None:
        """New rows, pushed, and all ranks' rows compared; a missing wait shows as wrong rows."""
        trial, wrong = self.trials[rank], self.wrong[rank]
        trial.add_(1)
        for number, sources in enumerate(self.sources):
            sources[rank].copy_(self._rows(self.rows_to[rank], trial, number))
        self.push(rank, num_blocks, alone=alone)
        every = torch.arange(len(self.order), device="cuda")
        for number, outputs in enumerate(self.outputs):
            wrong.add_((outputs[rank] != self._rows(every, trial, number)).sum())

    def check(self) -> None:
        """No row was wrong, and all flags are back at 0."""
        torch.cuda.synchronize()
        assert [int(wrong) for wrong in self.wrong] == [0] * self.world
        assert not any(area.any() for area in self.signals)

    @staticmethod
    def _rows(rows: torch.Tensor, trial: torch.Tensor, number: int) -> torch.Tensor:
        first = rows[:, None] * 7 + number
        return (first + torch.arange(ROW, device="cuda") + trial * 1001).int()


def eager(rank: int, world: int, method: str) -> None:
    """Thousands of pushes by ranks that run ahead of each other and fall behind."""
    for seed, counts in enumerate([[70, 0, 33, 8], [5, 200], [1, 2, 3]]):
        ranks, choose = Ranks(counts, seed), random.Random(seed)
        for _ in range(1000):
            num_blocks = choose.randrange(1, MOST_BLOCKS + 1)
            for each in choose.sample(range(ranks.world), ranks.world):
                with torch.cuda.stream(ranks.streams[each]):
                    if choose.random() < 0.02:
                        torch.cuda._sleep(1_000_000)
                    ranks.step(each, num_blocks)
        ranks.check()


def captured(rank: int, world: int, method: str) -> None:
    """Each rank replays a graph of its own, mixed with eager pushes."""
    ranks = Ranks([40, 0, 33, 8], 0)

    def everyone(run: Callable[[int], None]) -> None:
        for each, stream in enumerate(ranks.streams):
            with torch.cuda.stream(stream):
                run(each)

    graphs = [torch.cuda.CUDAGraph() for _ in ranks.counts]
    for each, graph in enumerate(graphs):
        with torch.cuda.graph(graph, stream=ranks.streams[each]):
            ranks.step(each, MOST_BLOCKS)
            ranks.step(each, 3)
    for number in range(500):
        everyone(lambda each: graphs[each].replay())
        if number % 50 == 0:
            everyone(lambda each: ranks.step(each, 5))
    ranks.check()


@pytest.mark.parametrize("function", [eager, captured], ids=lambda function: function.__name__)
def test_push_rows(gpus: WorkerPool, function: Callable[..., None]) -> None:
    gpus.run(function, fresh_init_method(), ranks=1)
