"""Seeded random sequences of what a program does with symmetric memory, on the real allocator.

All ranks draw the same sequence, and each one draws disturbances of its own: delays on its
streams, collections, emptied caches, ordinary memory. Whatever comes, every tensor must lie at the
same place on all ranks, hold what was written, and give the right sums.
"""

from __future__ import annotations

import contextlib
import gc
import random
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest
import torch

import distcomm
from distcomm import (
    ParallelState,
    SymmetricMismatchError,
    SymmetricOutOfMemoryError,
    suspend_symmetric_memory,
)
from tests.gpu.test_symmetric_memory import MIB, symmetric_job
from tests.worker_pool import WorkerPool, fresh_init_method

NUM_STEPS, FROZEN_AT = 120, 90
SEEDS = range(4)
MOST_KEPT, MOST_GRAPHS = 30, 6


@dataclass
class Program:
    """What a rank has made so far, and where it draws what comes next.

    Attributes:
        choose: drawn alike on all ranks.
        disturb: this rank's own.
        kept: tensors that are to be symmetric, with the value that fills them.
        graphs: captured graphs, with their input, their result and the value that is summed.
    """

    state: ParallelState
    choose: random.Random
    disturb: random.Random
    streams: list[torch.cuda.Stream]
    kept: list[tuple[torch.Tensor, int]] = field(default_factory=list)
    graphs: list[tuple[torch.cuda.CUDAGraph, torch.Tensor, torch.Tensor]] = field(
        default_factory=list
    )
    ordinary: list[torch.Tensor] = field(default_factory=list)

    @property
    def device(self) -> torch.device:
        return self.state.device

    def is_symmetric(self, x: torch.Tensor) -> bool:
        """Whether it lies in a segment; a frozen pool also gives out ordinary memory."""
        found = self.state.tp.is_symmetric(x)
        assert found or self.state.symmetric_pool.overflowed
        return found

    @property
    def total(self) -> int:
        """The sum of what each rank adds to a value."""
        return sum(range(self.state.world_size))

    def size(self) -> int:
        """Of a tensor, in elements; small ones are the most."""
        return int(2 ** self.choose.uniform(0, 22))

    def value(self) -> int:
        return self.choose.randrange(100)

    @contextlib.contextmanager
    def stream(self) -> Iterator[None]:
        """One of the streams is current; it follows what was current, and that follows it."""
        stream = self.choose.choice([*self.streams, None])
        if stream is None:
            yield
            return
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            yield
        torch.cuda.current_stream().wait_stream(stream)

    def filled(self) -> None:
        """A tensor more."""
        value = self.value()
        x = torch.full((self.size(),), float(value + self.state.rank), device=self.device)
        self.kept.append((x, value))


def in_a_context(program: Program) -> None:
    group = program.choose.choice([program.state.tp, program.state.world])
    with group.symmetric_memory(), program.stream():
        for _ in range(program.choose.randrange(4)):
            program.filled()
            if program.choose.random() < 0.3:
                torch.empty(program.size(), device=program.device)


def nested(program: Program) -> None:
    with program.state.tp.symmetric_memory():
        program.filled()
        with suspend_symmetric_memory():
            program.ordinary.append(torch.empty(program.size(), device=program.device))
            with program.state.world.symmetric_memory(), program.stream():
                program.filled()
        program.filled()


def in_a_thread(program: Program) -> None:
    def body() -> None:
        torch.cuda.set_device(program.device)
        with program.state.tp.symmetric_memory():
            program.filled()
        torch.cuda.current_stream().synchronize()

    thread = threading.Thread(target=body)
    thread.start()
    thread.join(30)
    assert not thread.is_alive()


def drop(program: Program) -> None:
    for _ in range(program.choose.randrange(1, 6)):
        if program.kept:
            program.kept.pop(program.choose.randrange(len(program.kept)))


def reduce(program: Program) -> None:
    """In place, on whatever stream."""
    if program.kept:
        index = program.choose.randrange(len(program.kept))
        x, value = program.kept[index]
        with program.stream():
            y = program.state.tp.all_reduce(x.clone(), out=x)
            y.sub_(y - (value + program.state.rank))


def gather(program: Program) -> None:
    """Asynchronous, and everything dropped at once, or waited for."""
    world, size, value = program.state.world_size, program.size() // 8 + 1, program.value()
    with program.state.world.symmetric_memory():
        x = torch.full((size,), float(value + program.state.rank), device=program.device)
        output = torch.empty(world, size, device=program.device)
    handle = program.state.cp.cp_all_gather_into_tensor_async(
        output, x, program.choose.choice(program.streams)
    )
    if program.choose.random() < 0.5:
        handle.wait()
        expected = [float(value + rank) for rank in range(world)]
        assert output[:, 0].tolist() == output[:, -1].tolist() == expected


def capture(program: Program) -> None:
    """A capture without room for all can be repeated, once there is more."""
    try:
        captured(program)
    except SymmetricOutOfMemoryError:
        assert not program.state.symmetric_pool.frozen
        program.state.symmetric_pool.reserve("64MiB")


def captured(program: Program) -> None:
    symmetric = program.choose.random() < 0.5
    sizes = [program.size() // 8 + 1 for _ in range(program.choose.randrange(1, 3))]
    x = torch.zeros(max(sizes), device=program.device)
    tp = program.state.tp
    with distcomm.graph_capture(symmetric=symmetric) as c:
        for size in sizes:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=c.pool, stream=c.stream):
                with tp.symmetric_memory(enabled=not symmetric):
                    doubled = x[:size] * 2
                    result = torch.empty_like(doubled)
                    torch.empty(size, device=program.device)
                tp.all_reduce(doubled, out=result)
                del doubled
            program.graphs.append((graph, x[:size], result))


def replay(program: Program) -> None:
    if program.graphs:
        graph, x, result = program.choose.choice(program.graphs)
        value = program.value()
        x.fill_(value + program.state.rank)
        graph.replay()
        expected = 2 * (program.state.world_size * value + program.total)
        assert (result == expected).all(), (result, expected)


def drop_graph(program: Program) -> None:
    if program.graphs:
        program.graphs.pop(program.choose.randrange(len(program.graphs)))


def body_fails(program: Program) -> None:
    with contextlib.suppress(ZeroDivisionError), program.state.tp.symmetric_memory():
        program.filled()
        raise ZeroDivisionError


def ranks_differ(program: Program) -> None:
    """One rank asks for more than the others, so that new segments differ."""
    if program.state.symmetric_pool.frozen:
        return
    odd = program.choose.randrange(program.state.world_size)
    size = (70 if program.state.rank == odd else 50) * MIB
    with pytest.raises(SymmetricMismatchError), program.state.tp.symmetric_memory():
        torch.empty(size, device=program.device)


def reserve(program: Program) -> None:
    if not program.state.symmetric_pool.frozen:
        program.state.symmetric_pool.reserve("16MiB")


def make_a_group(program: Program) -> None:
    """Of some ranks, which the others know nothing of."""
    ranks = program.choose.sample(range(program.state.world_size), 2)
    name = f"pair {program.choose.random()}"
    if program.state.rank in ranks:
        pair = program.state.create_group(name, ranks)
        x = torch.full((8,), float(program.state.rank), device=program.device)
        assert (pair.all_reduce(x) == sum(ranks)).all()
        with pair.symmetric_memory():  # another pair of these ranks may share its communicator
            pass
        found = [pair.is_symmetric(x) for x, _ in program.kept if program.is_symmetric(x)]
        assert program.state.symmetric_pool.frozen or all(found)


def freeze(program: Program) -> None:
    program.state.symmetric_pool.freeze()


def settle(program: Program) -> None:
    with distcomm.graph_capture():
        pass


STEPS: list[tuple[int, Callable[[Program], None]]] = [
    (20, in_a_context),
    (6, nested),
    (3, in_a_thread),
    (14, drop),
    (6, reduce),
    (8, gather),
    (6, capture),
    (8, replay),
    (4, drop_graph),
    (3, body_fails),
    (1, ranks_differ),
    (2, reserve),
    (1, make_a_group),
    (3, settle),
]


def disturbed(program: Program) -> None:
    """What one rank alone does, and no other may notice."""
    choose = program.disturb
    for _ in range(choose.randrange(3)):
        kind = choose.randrange(6)
        if kind == 0:
            with torch.cuda.stream(choose.choice(program.streams)):
                torch.cuda._sleep(choose.randrange(20_000_000))
        elif kind == 1:
            torch.cuda._sleep(choose.randrange(20_000_000))
        elif kind == 2:
            gc.collect()
        elif kind == 3:
            torch.cuda.empty_cache()
        elif kind == 4:
            program.ordinary.append(
                torch.empty(int(2 ** choose.uniform(0, 24)), device=program.device)
            )
        elif program.ordinary:
            program.ordinary.pop(choose.randrange(len(program.ordinary)))


def checked(program: Program, trail: list[str]) -> None:
    """Every tensor is symmetric, at one place on all ranks, and holds what was written."""
    tp = program.state.tp
    windows = program.state.symmetric_pool._groups[0]
    places = []
    for x, value in program.kept:
        place = windows.find(x.data_ptr())
        places.append(None if place is None else (place.ordinal, place.offset))
        assert program.is_symmetric(x) == (place is not None), (x.shape, trail)
        assert (x == value + program.state.rank).all(), (x, value, trail)
    assert tp.all_gather_object(places) == [places] * tp.world_size, trail


def random_program(rank: int, world: int, method: str, seed: int) -> None:
    with symmetric_job(rank, world, method, cp=world) as state:
        program = Program(
            state,
            random.Random(seed),
            random.Random(1000 * seed + rank),
            [torch.cuda.Stream() for _ in range(2)],
        )
        weights, steps = zip(*STEPS, strict=True)
        trail: list[str] = []
        for number in range(NUM_STEPS):
            [step] = [freeze] if number == FROZEN_AT else program.choose.choices(steps, weights)
            trail.append(step.__name__)
            disturbed(program)
            step(program)
            del program.kept[:-MOST_KEPT], program.graphs[:-MOST_GRAPHS]
            if number % 10 == 9:
                checked(program, trail)
        checked(program, trail)


@pytest.mark.parametrize("seed", SEEDS)
def test_random_programs(gpus: WorkerPool, most_ranks: int, seed: int) -> None:
    gpus.run(random_program, fresh_init_method(), seed, ranks=most_ranks)
