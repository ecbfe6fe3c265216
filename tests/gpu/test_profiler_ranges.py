"""Profiler ranges on GPUs: around kernels, copies and NCCL's calls, eager and captured."""

from __future__ import annotations

from collections.abc import Callable
from unittest import mock

import torch

from distcomm import ContextParallelPlan, ParallelState, all_gather_kv
from tests.gpu.job import start
from tests.worker_pool import WorkerPool, fresh_init_method

NUM_TOKENS = 64


def recorded(calls: Callable[[], object]) -> list[str]:
    """The ranges that torch's profiler sees, in the order of their beginning."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        calls()
    events = [event for event in profile.events() if event.name.startswith("distcomm.")]
    events.sort(key=lambda event: (event.time_range.start, -event.time_range.end))
    return [event.name for event in events]


class Calls:
    """Some of each kind; afterwards `total` and `kv` have their results."""

    def __init__(self, state: ParallelState) -> None:
        self.state = state
        self.plan = ContextParallelPlan([NUM_TOKENS], state.world_size)
        self.x = torch.ones(512, 8, dtype=torch.bfloat16, device=state.device)
        tokens = torch.arange(float(NUM_TOKENS), device=state.device)[:, None]
        self.k = self.plan.shard(tokens, state.rank)
        self.total = self.normed = self.kv = torch.empty(0)

    def __call__(self) -> None:
        tp, cp = self.state.tp, self.state.cp
        self.total = tp.all_reduce(self.x)
        tp.broadcast(self.x)
        self.normed = tp.all_reduce_rms_norm(self.x, self.x[0])
        self.kv = all_gather_kv(cp, self.plan, self.k, method="kernel")
        all_gather_kv(cp, self.plan, self.k, method="copy_engine")

    def check(self) -> None:
        torch.cuda.synchronize()
        assert (self.total == self.state.world_size).all()
        assert self.kv.flatten().tolist() == list(range(NUM_TOKENS))

    def names(self) -> list[str]:
        """What ranges should be called, by what the group has counted."""
        ops = self.state.tp.stats()["ops"]
        (add,), (norm,) = ops["all_reduce"], ops["all_reduce_rms_norm"]
        assert "push" in add
        assert "push" in norm
        num_bytes = self.k.nbytes
        return [
            f"distcomm.all_reduce tp 8192 B {add}",
            "distcomm.broadcast tp 8192 B pynccl",
            f"distcomm.all_reduce_rms_norm tp 8192 B {norm}",
            f"distcomm.all_gather_kv cp {num_bytes} B kernel",
            f"distcomm.all_gather_kv cp {num_bytes} B copy_engine",
        ]


def captured(calls: Calls) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with calls.state.graph_capture(symmetric=True) as c:
        with torch.cuda.graph(graph, pool=c.pool, stream=c.stream):
            calls()
    return graph


def profile(rank: int, world: int, method: str) -> None:
    with start(rank, world, method, cp=world, tune="shipped") as state:
        calls = Calls(state)
        calls()  # what the first call with a plan does is no part of it
        calls.check()
        with state.profiler_ranges("record_function"):
            assert recorded(calls) == calls.names()
            calls.check()
            graphs: list[torch.cuda.CUDAGraph] = []
            assert recorded(lambda: graphs.append(captured(calls))) == calls.names()
            assert recorded(graphs[0].replay) == []
            calls.check()
        assert recorded(calls) == []
        graphs.clear()


def push_to_nvtx(rank: int, world: int, method: str) -> None:
    with start(rank, world, method, cp=world, tune="shipped") as state:
        calls = Calls(state)
        calls()
        nvtx = torch.cuda.nvtx
        with state.profiler_ranges("nvtx"):
            with (
                mock.patch.object(nvtx, "range_push", wraps=nvtx.range_push) as push,
                mock.patch.object(nvtx, "range_pop", wraps=nvtx.range_pop) as pop,
            ):
                graph = captured(calls)
        assert [call.args[0] for call in push.mock_calls] == calls.names()
        assert pop.call_count == push.call_count
        graph.replay()
        calls.check()
        del graph


def describe(rank: int, world: int, method: str) -> None:
    state = start(rank, world, method, tune="shipped")
    text = state.describe()
    assert f"NCCL {state.tp.pynccl_comm.nccl.version_text} (" in text
    assert f"ranks [0,1] on {torch.cuda.get_device_name(state.device)}" in text
    assert f"kernels: {state.tp.stats()['algorithms']}; windows: 1" in text
    assert "symmetric: " in text
    state.close()
    closed = state.describe()
    assert "(the communicator is closed)" in closed
    assert closed.splitlines()[:1] == text.splitlines()[:1]


def test_torchs_profiler_sees_all_calls(gpus: WorkerPool, most_ranks: int) -> None:
    gpus.run(profile, fresh_init_method(), ranks=2)


def test_nvtx_ranges_in_a_capture(gpus: WorkerPool, most_ranks: int) -> None:
    gpus.run(push_to_nvtx, fresh_init_method(), ranks=2)


def test_description_of_a_job(gpus: WorkerPool, most_ranks: int) -> None:
    gpus.run(describe, fresh_init_method(), ranks=2)
