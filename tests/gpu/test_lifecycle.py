"""Making and closing groups on GPUs: agreement, disabled and closed communicators, leaks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from distcomm import (
    ArgumentError,
    CommunicatorDisabledError,
    GroupClosedError,
    GroupCoordinator,
    InitializationError,
    PyNcclCommunicator,
)
from tests.gpu.job import start
from tests.worker_pool import WorkerPool, fresh_init_method

ROOT = Path(__file__).parents[2]


def single_rank(rank: int, world: int, method: str) -> None:
    """A group of one makes no communicator; one made by hand works."""
    with start(rank, world, method) as state:
        assert state.device.type == "cuda"
        assert state.tp.pynccl_comm is None
        x = torch.arange(5.0, device=state.device)
        assert torch.equal(state.tp.all_reduce(x), x)
        output = torch.empty(1, 5, device=state.device)
        state.cp.cp_all_gather_into_tensor_async(output, x, torch.cuda.Stream()).wait()
        assert torch.equal(output[0], x)
        with pytest.raises(ArgumentError, match="float32"):
            state.tp.all_reduce(x, out=x.double())
        comm = PyNcclCommunicator(state.world.cpu_group, state.device)
        assert torch.equal(comm.all_reduce(x), x)
        comm.close()


def fail_while_disabled(group: GroupCoordinator, x: torch.Tensor, total: torch.Tensor) -> None:
    """What a disabled communicator refuses, and the coordinator does through torch's NCCL."""
    comm = group.pynccl_comm
    with comm.change_state(enable=False):
        with pytest.raises(CommunicatorDisabledError, match=f"rank {group.rank}"):
            comm.all_reduce(x)
        with comm.change_state(enable=True):
            assert torch.equal(comm.all_reduce(x), total)
        assert not comm.enabled
        assert torch.equal(group.all_reduce(x), total)
        sizes = list(range(group.world_size))
        rows = group.all_gatherv(x[:1].expand(group.rank, 2), sizes)
        assert rows[:, 0].tolist() == [size + 1.0 for size in sizes for _ in range(size)]
        assert group.reduce_scatterv(rows, sizes).shape == (group.rank, 2)
        raise ZeroDivisionError


def disabled_and_closed(rank: int, world: int, method: str) -> None:
    state = start(rank, world, method)
    tp, comm = state.tp, state.tp.pynccl_comm
    x = torch.full((3,), rank + 1.0, device=state.device)
    total = torch.full((3,), world * (world + 1) / 2, device=state.device)
    with pytest.raises(ZeroDivisionError):
        fail_while_disabled(tp, x, total)
    assert comm.enabled
    assert torch.equal(tp.all_reduce(x), total)
    stats = tp.stats()
    assert stats["ops"]["all_reduce"]["torch_nccl"]["calls"] == 1
    assert stats["ops"]["all_reduce"]["pynccl"]["calls"] == 1
    fallbacks = {op: sum(calls.values()) for op, calls in stats["fallbacks"].items()}
    assert fallbacks == {"all_reduce": 1, "all_gatherv": 1, "reduce_scatterv": 1}
    # A CPU tensor in a CUDA job goes over gloo.
    assert torch.equal(tp.all_reduce(x.cpu()), total.cpu())
    state.close()
    state.close()
    with pytest.raises(GroupClosedError, match="tp"):
        tp.all_reduce(x)
    with pytest.raises(GroupClosedError):
        comm.all_reduce(x)


def wrong_device(rank: int, world: int, method: str) -> None:
    with start(rank, world, method) as state:
        other = torch.device("cuda", (state.device.index + 1) % world)
        with pytest.raises(ArgumentError, match=f"on {state.device}; got {other}"):
            state.tp.all_reduce(torch.ones(2, device=other))
        with pytest.raises(ArgumentError, match="a CUDA stream"):
            state.tp.cp_all_gather_into_tensor_async(
                torch.ones(world, device=state.device), torch.ones(1, device=state.device), None
            )
        x = torch.ones(2, device=state.device)
        assert state.tp.all_reduce(x).tolist() == [world, world]


def one_rank_without_nccl(rank: int, world: int, method: str, device: str) -> str:
    import os

    if rank == 1:
        os.environ["DISTCOMM_NCCL_SO"] = "/nonexistent/libnccl.so.2"
    try:
        with start(rank, world, method, device=device) as state:
            return str(state.device)
    finally:
        os.environ.pop("DISTCOMM_NCCL_SO", None)


def same_gpu_twice(rank: int, world: int, method: str) -> None:
    start(rank, world, method, local_rank=0)


def make_and_close(rank: int, world: int, method: str) -> None:
    with start(rank, world, method) as state:
        x = torch.ones(1 << 20, device=state.device)
        assert (state.tp.all_reduce(x) == world).all()


def memory_in_use(rank: int, world: int) -> int:
    """Bytes of this rank's GPU, by the driver's count: all processes' contexts and buffers."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    return total - free


def test_group_of_one(gpus: WorkerPool) -> None:
    gpus.run(single_rank, fresh_init_method(), ranks=1)


def test_disabled_and_closed_communicators(gpus: WorkerPool, world: int) -> None:
    gpus.run(disabled_and_closed, fresh_init_method(), ranks=world)


def test_wrong_device_is_refused_and_the_group_goes_on(gpus: WorkerPool, world: int) -> None:
    gpus.run(wrong_device, fresh_init_method(), ranks=world)


def test_one_rank_without_nccl_fails_every_rank(gpus: WorkerPool, world: int) -> None:
    with pytest.raises(Exception, match="InitializationError") as caught:
        gpus.run(one_rank_without_nccl, fresh_init_method(), "cuda", ranks=world)
    failures = caught.value.exceptions
    assert sorted(failures) == list(range(world))
    for failure in failures.values():
        assert failure.type_name.endswith(InitializationError.__name__)
        assert "rank 1: no libnccl could be loaded" in failure.message


def test_one_rank_without_nccl_makes_auto_choose_cpu(gpus: WorkerPool, world: int) -> None:
    devices = gpus.run(one_rank_without_nccl, fresh_init_method(), "auto", ranks=world)
    assert devices == ["cpu"] * world


def test_two_ranks_on_one_gpu_are_named(gpus: WorkerPool, world: int) -> None:
    with pytest.raises(Exception, match="same GPU as rank 0"):
        gpus.run(same_gpu_twice, fresh_init_method(), ranks=world)


@pytest.mark.alone
def test_cycles_leave_gpu_memory_flat(gpus: WorkerPool, most_ranks: int) -> None:
    gpus.reset()
    used = []
    for _ in range(20):
        gpus.run(make_and_close, fresh_init_method(), ranks=most_ranks)
        used.append(gpus.run(memory_in_use, ranks=most_ranks))  # once all ranks have closed
    for rank, (first, *later) in enumerate(zip(*used, strict=True)):
        assert max(later) - first <= 4 << 20, f"rank {rank}: {[first, *later]}"
    # Each process has its CUDA context on its own GPU alone.
    assert max(used[-1]) - min(used[-1]) <= 64 << 20, used[-1]


PROGRAM_THAT_EXITS = """
import torch
import torch.distributed as dist
from distcomm import init_distributed
state = init_distributed(tp={world}, device="cuda", timeout=60)
kept = state.tp.all_reduce(torch.ones(4, device=state.device))
device_group = state.tp.device_group
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    {capture}
graph.replay()
torch.cuda.synchronize()
assert captured[0].item() == {world} ** 2
{close}
"""


EXITS = {
    "unclosed": "",
    "closed": "state.close()",
    "closed at the exit": "import atexit; atexit.register(state.close)",
    "closed, graph dropped at the end": "state.close(); del graph",
    "graph dropped, closed": "del graph; state.close()",
}


CAPTURES = {
    "ours": "captured = state.tp.all_reduce(kept)",
    "torch's": "captured = kept; dist.all_reduce(captured, group=device_group)",
}


@pytest.mark.parametrize("capture", CAPTURES.values(), ids=CAPTURES)
@pytest.mark.parametrize("close", EXITS.values(), ids=EXITS)
def test_exit_code_with_live_tensors_and_graphs(
    most_ranks: int, close: str, capture: str, tmp_path: Path
) -> None:
    script = tmp_path / "program.py"
    script.write_text(PROGRAM_THAT_EXITS.format(world=most_ranks, close=close, capture=capture))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(most_ranks), str(script)]
    done = subprocess.run(
        command, cwd=ROOT, timeout=100, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_demo_on_all_gpus(gpus: WorkerPool) -> None:
    gpus.reset()  # its processes would hold memory and CPU cores
    command = [sys.executable, "scripts/demo.py", "--layers", "2"]
    done = subprocess.run(
        command, cwd=ROOT, timeout=110, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
