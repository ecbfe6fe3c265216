"""`DeviceMesh` on GPUs: torch's NCCL process groups, one for each set of ranks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import distcomm
from distcomm import ParallelState
from tests.gpu.job import start
from tests.worker_pool import WorkerPool, fresh_init_method


def num_nccl_groups() -> int:
    groups = dist.distributed_c10d._world.pg_map
    return sum("nccl" in dist.get_backend_config(group) for group in groups)


def check_redistribute(state: ParallelState, mesh: DeviceMesh) -> None:
    """Shard to replicate and back, and partial sums, over all dims of a mesh of all ranks."""
    num_ranks = state.world_size
    whole = torch.arange(8.0 * num_ranks * 3, device=state.device).reshape(8 * num_ranks, 3)
    x = distribute_tensor(whole, mesh, [Shard(0)] * mesh.ndim)
    assert x.to_local().device == state.device
    assert x.to_local().shape == (8, 3)
    assert torch.equal(x.redistribute(placements=[Replicate()] * mesh.ndim).to_local(), whole)
    last = mesh.ndim - 1
    placements = [Shard(0)] * last + [Replicate()]
    y = x.redistribute(placements=placements)
    assert y.to_local().shape == (8 * mesh.size(last), 3)
    assert torch.equal(y.redistribute(placements=x.placements).to_local(), x.to_local())
    part = DTensor.from_local(whole * (state.rank + 1), mesh, [Partial()] * mesh.ndim)
    total = whole * (num_ranks * (num_ranks + 1) // 2)
    assert torch.equal(part.full_tensor(), total)
    sums = part.redistribute(placements=[Shard(0)] + [Replicate()] * last)
    rows = total.chunk(mesh.size(0))[mesh.get_local_rank(0)]
    assert torch.equal(sums.to_local(), rows)


def one_dim(rank: int, world: int, method: str) -> None:
    with start(rank, world, method) as state:
        assert num_nccl_groups() == 0
        mesh = state.device_mesh("tp")
        assert mesh.device_type == "cuda"
        assert mesh.get_group() is state.tp.device_group
        assert state.device_mesh("world").get_group() is mesh.get_group()
        assert num_nccl_groups() == 1
        check_redistribute(state, mesh)
        x = torch.ones(5, device=state.device)
        assert torch.equal(state.tp.all_reduce(x), x * world)  # ours goes on beside it
    assert not dist.is_initialized()


def two_dims(rank: int, world: int, method: str) -> None:
    with start(rank, world, method, tp=2, dp=world // 2) as state:
        tp = state.device_mesh("tp")  # of some ranks: makes no other group
        assert num_nccl_groups() == 1
        assert tp.mesh.tolist() == state.tp.ranks
        mesh = state.device_mesh("dp", "tp")
        assert num_nccl_groups() == 2
        for axis in ("dp", "tp"):
            assert mesh[axis].get_group() is state.groups[axis].device_group
        check_redistribute(state, mesh)
        check_redistribute(state, state.device_mesh("tp", "dp"))
        assert num_nccl_groups() == 2


@contextmanager
def torch_job(rank: int, world: int, method: str) -> Iterator[None]:
    """torch's default process group, with NCCL; at its end no state is in force."""
    torch.cuda.set_device(rank)
    dist.init_process_group("cpu:gloo,cuda:nccl", init_method=method, rank=rank, world_size=world)
    try:
        yield
    finally:
        distcomm.destroy_distributed()
        dist.destroy_process_group()


def mesh_in(rank: int, world: int, method: str) -> None:
    with torch_job(rank, world, method):
        theirs = init_device_mesh("cuda", (1, world), mesh_dim_names=("dp", "tp"))
        before = num_nccl_groups()
        with distcomm.init_distributed(mesh=theirs, local_rank=rank, timeout=60) as state:
            assert state.device == torch.device("cuda", rank)
            assert state.tp.ranks == [*range(world)]
            assert state.tp.pynccl_comm is not None
            assert state.tp.device_group is theirs.get_group("tp")
            ours = state.device_mesh("dp", "tp")
            assert ours.get_group("tp") is theirs.get_group("tp")
            assert ours.get_group("dp") is theirs.get_group("dp")
            assert num_nccl_groups() == before
            check_redistribute(state, ours)
            x = torch.ones(5, device=state.device)
            assert torch.equal(state.tp.all_reduce(x), x * world)
        x = torch.ones(5, device=f"cuda:{rank}")
        dist.all_reduce(x, group=theirs.get_group("tp"))  # the caller's groups survive
        assert x.tolist() == [world] * 5


def sharded_layer(rank: int, world: int, method: str) -> None:
    with start(rank, world, method) as state:
        torch.manual_seed(3)
        layers = [torch.nn.Linear(8, 16).to(state.device) for _ in range(2)]
        layers[1].load_state_dict(layers[0].state_dict())
        fully_shard(layers[1], mesh=state.device_mesh("tp"))
        x = torch.randn(world, 4, 8, device=state.device)
        x = state.tp.broadcast(x, src=0)
        layers[0](x.flatten(0, 1)).square().mean().backward()
        layers[1](x[rank]).square().mean().backward()
        for whole, sharded in zip(layers[0].parameters(), layers[1].parameters(), strict=True):
            torch.testing.assert_close(sharded.grad.full_tensor(), whole.grad)


def test_a_mesh_of_all_ranks(gpus: WorkerPool, world: int) -> None:
    gpus.run(one_dim, fresh_init_method(), ranks=world)


def test_a_mesh_of_two_axes(gpus: WorkerPool, most_ranks: int) -> None:
    gpus.run(two_dims, fresh_init_method(), ranks=most_ranks - most_ranks % 2)


def test_a_mesh_that_has_groups_shares_them(gpus: WorkerPool, world: int) -> None:
    gpus.run(mesh_in, fresh_init_method(), ranks=world)


def test_fully_shard(gpus: WorkerPool, world: int) -> None:
    gpus.run(sharded_layer, fresh_init_method(), ranks=world)
