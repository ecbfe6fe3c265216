"""PyNCCL has no stream of its own: work is ordered by the stream that is current at the call.

Every test delays a producer on the GPU; a missing order shows as wrong data, not as a slow test.
"""

from __future__ import annotations

import torch

from tests.gpu.job import start
from tests.worker_pool import WorkerPool, fresh_init_method

DELAY_CYCLES = 20_000_000  # about 10 ms
N = 4096


def late(value: float, device: torch.device) -> torch.Tensor:
    """A tensor that holds `value` only after a delay on the current stream."""
    x = torch.full((N,), -1.0, device=device)
    torch.cuda._sleep(DELAY_CYCLES)
    return x.fill_(value)


def follow_the_current_stream(rank: int, world: int, method: str) -> None:
    total = world * (world + 1) / 2
    with start(rank, world, method, cp=world) as state:
        side = torch.cuda.Stream()
        # Other work on the default stream must neither delay nor disturb the side stream.
        torch.cuda._sleep(DELAY_CYCLES)
        with torch.cuda.stream(side):
            y = state.tp.all_reduce(late(rank + 1.0, state.device))
            gathered = state.tp.all_gather(late(rank + 1.0, state.device), dim=0)
        side.synchronize()
        assert (y == total).all()
        assert gathered.view(world, N)[:, 0].tolist() == [r + 1.0 for r in range(world)]


def run_beside_the_caller(rank: int, world: int, method: str) -> None:
    with start(rank, world, method, cp=world) as state:
        side = torch.cuda.Stream()
        for trial in range(20):
            output = torch.full((world, N), -7.0, device=state.device)
            x = late(rank + trial, state.device)  # the gather must wait for this
            handle = state.cp.cp_all_gather_into_tensor_async(output, x, side)
            unrelated = torch.ones(64, 64, device=state.device) @ torch.ones(
                64, 64, device=state.device
            )
            handle.wait()
            handle.wait()
            copy = output.clone()  # and this for the gather
            x.fill_(-1.0)
            assert copy[:, 0].tolist() == [r + trial for r in range(world)]
            assert (copy == copy[:, :1]).all()
            assert (unrelated == 64).all()
            assert handle.is_completed()


def keep_tensors_alive(rank: int, world: int, method: str) -> None:
    """Input and output are dropped at once; their memory must not be reused too early."""
    with start(rank, world, method, cp=world) as state:
        side = torch.cuda.Stream()
        torch.cuda.synchronize()
        with torch.cuda.stream(side):
            torch.cuda._sleep(DELAY_CYCLES)
        x = torch.full((N,), float(rank + 1), device=state.device)
        output = torch.empty(world, N, device=state.device)
        probe = output.view(-1)[:1].data_ptr()
        handle = state.cp.cp_all_gather_into_tensor_async(output, x, side)
        del x, output, handle
        fillers = [torch.full((N,), -3.0, device=state.device) for _ in range(8)]
        wide = [torch.full((world, N), -3.0, device=state.device) for _ in range(8)]
        assert probe not in {tensor.data_ptr() for tensor in wide}
        torch.cuda.synchronize()
        assert all((tensor == -3.0).all() for tensor in fillers + wide)


def keep_symmetric_tensors_alive(rank: int, world: int, method: str) -> None:
    """As before, but their memory is free for what the caller's stream does next, at once and on
    all ranks alike: it comes after the gather."""
    with start(rank, world, method, cp=world, symmetric_reserve="64MiB") as state:
        side = torch.cuda.Stream()
        for trial in range(20):
            torch.cuda.synchronize()
            with torch.cuda.stream(side):
                torch.cuda._sleep(DELAY_CYCLES if rank == trial % world else 0)
            with state.cp.symmetric_memory():
                x = torch.full((N,), float(rank + 1), device=state.device)
                output = torch.empty(world, N, device=state.device)
            places = x.data_ptr(), output.data_ptr()  # neighbours, which become one when free
            handle = state.cp.cp_all_gather_into_tensor_async(output, x, side)
            del x, output, handle
            with state.cp.symmetric_memory():
                wide = torch.full((world, N), -3.0, device=state.device)
            assert wide.data_ptr() in places
            torch.cuda.synchronize()
            assert (wide == -3.0).all()


def two_groups_at_once(rank: int, world: int, method: str) -> None:
    with start(rank, world, method, cp=world) as state:
        pair = state.create_group("reversed", list(reversed(range(world))))
        streams = torch.cuda.Stream(), torch.cuda.Stream()
        for trial in range(50):
            with torch.cuda.stream(streams[0]):
                first = state.tp.all_reduce(late(rank + trial, state.device))
            with torch.cuda.stream(streams[1]):
                second = pair.all_gather(torch.full((2,), rank + trial, device=state.device), dim=0)
            torch.cuda.synchronize()
            assert (first == sum(range(world)) + world * trial).all()
            assert second[::2].tolist() == [r + trial for r in reversed(range(world))]


def test_work_follows_the_current_stream(gpus: WorkerPool, world: int) -> None:
    gpus.run(follow_the_current_stream, fresh_init_method(), ranks=world)


def test_async_gather_is_ordered_on_both_sides(gpus: WorkerPool, world: int) -> None:
    gpus.run(run_beside_the_caller, fresh_init_method(), ranks=world)


def test_async_gather_keeps_its_tensors(gpus: WorkerPool, world: int) -> None:
    gpus.run(keep_tensors_alive, fresh_init_method(), ranks=world)


def test_async_gather_of_symmetric_tensors(gpus: WorkerPool, world: int) -> None:
    gpus.run(keep_symmetric_tensors_alive, fresh_init_method(), ranks=world)


def test_two_groups_on_two_streams(gpus: WorkerPool, world: int) -> None:
    gpus.run(two_groups_at_once, fresh_init_method(), ranks=world)
