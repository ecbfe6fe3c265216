"""`ParallelState.describe`: what it says of jobs on CPU and on GPUs, small and huge, and closed."""

from __future__ import annotations

import platform
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import distcomm
from distcomm import GroupMember, ParallelLayout, ParallelState
from distcomm.communicators import JobContext
from distcomm.describe import describe_job
from distcomm.layout import format_ranks
from distcomm.nccl import KnownIssues
from tests.cpu.job import Job, start
from tests.worker_pool import WorkerPool, fresh_init_method

HOST = "node1/boot id"


@pytest.mark.parametrize(
    ("ranks", "text"),
    [
        ((3,), "[3]"),
        ((0, 1), "[0,1]"),
        ((4, 5, 6), "[4..6]"),
        (range(8), "[0..7]"),
        ([0, 2, 1, 3], "[0,2,1,3]"),
        ((2, 1, 0), "[2,1,0]"),
        (range(0, 8, 4), "[0,4]"),
        (range(0, 40, 8), "[0,8,..,32]"),
        ((0, 2, 1, 3, 4), "[0,2,..,4]"),
    ],
)
def test_ranks_are_shortened_in_their_order(ranks: tuple[int, ...], text: str):
    assert format_ranks(ranks) == text


# ---- on CPU -------------------------------------------------------------------------------------


def describe(state: ParallelState) -> tuple[str, str]:
    return state.describe(), state.hosts[0].split("/")[0]


def test_a_job_on_cpu(job: Job):
    for rank, (text, host) in enumerate(job.run(describe)):
        table, _, rest = text.partition("\nrank ")
        assert table == str(ParallelLayout(8, tp=8, cp=2, ep=4))
        cp, moe_tp = ([rank % 4, rank % 4 + 4], [rank // 2 * 2, rank // 2 * 2 + 1])
        attn_tp, ep = ("[0..3]" if rank < 4 else "[4..7]", f"[{rank % 2},{rank % 2 + 2},")
        lines = rest.splitlines()
        assert lines[:4] == [
            f"{rank}: device cpu, local rank {rank}, gloo",
            f"place    tp {rank}, cp {rank // 4}, attn_tp {rank % 4}, pp 0, dp 0, ep {rank // 2}, "
            f"moe_tp {rank % 2}",
            f"software torch {torch.__version__}, Python {platform.python_version()}",
            f"hosts    {host}: ranks [0..7]",
        ]
        groups = [line[9:].rsplit("  ", 1) for line in lines[4:-1]]
        assert [[names.rstrip(), runs_on] for names, runs_on in groups] == [
            ["world, tp", "[0..7] gloo"],
            ["cp", f"[{cp[0]},{cp[1]}] gloo"],
            ["attn_tp", f"{attn_tp} gloo"],
            ["pp, dp", f"[{rank}] alone"],
            ["ep", f"{ep}{rank % 2 + 4},{rank % 2 + 6}] gloo"],
            ["moe_tp", f"[{moe_tp[0]},{moe_tp[1]}] gloo"],
        ]
        assert lines[-1] == "memory   no symmetric memory: the job runs on CPU"


def describe_closed(rank: int, world: int, url: str) -> tuple[str, str]:
    distcomm.destroy_distributed()  # the job of the tests above
    with start(rank, world, url, tp=world, deterministic=True) as state:
        before = state.describe()
    return before, state.describe()


def test_a_closed_job(workers: WorkerPool):
    for before, after in workers.run(describe_closed, fresh_init_method(), ranks=2):
        assert before.endswith("options  deterministic")
        assert after == before.replace(", gloo\n", ", gloo; closed\n")


# ---- on GPUs that aren't there ------------------------------------------------------------------


def cuda_job(num_ranks: int, **changes: Any) -> JobContext:
    facts: dict[str, Any] = {
        "device": torch.device("cuda", 1),
        "local_rank": 1,
        "store": None,
        "timeout_s": 1.0,
        "nccl": SimpleNamespace(version_text="2.28.9", path="/lib/libnccl.so.2"),
        "hosts": [HOST] * num_ranks,
        "gpu_names": ["NVIDIA H200"] * num_ranks,
        "issues": KnownIssues(22809, ["window-register-in-capture"]),
        "symmetric_pool": SimpleNamespace(
            heap=SimpleNamespace(
                stats=lambda: {
                    "bytes_reserved": (1 << 30) + (33 << 20),
                    "bytes_used": 34 << 20,
                    "segments": 2,
                }
            ),
            frozen=False,
            asleep=False,
        ),
    }
    return JobContext(**{**facts, **changes})


def cuda_group(
    name: str,
    ranks: tuple[int, ...],
    algorithms: str | None = "shipped: NVIDIA H200 x 2",
    why_not: str | None = None,
    unusable: str | None = None,
) -> Any:
    memory = {"contexts": 0, "inactive": {}, "windows": 2}
    return SimpleNamespace(
        name=name,
        member=GroupMember(name, ranks, ranks[0]),
        ranks=list(ranks),
        world_size=len(ranks),
        pynccl_comm=SimpleNamespace(why_unusable=unusable) if len(ranks) > 1 else None,
        why_not_symmetric=why_not,
        stats=lambda: {"algorithms": algorithms, "symmetric_memory": memory},
    )


def text_of(job: JobContext, layout: ParallelLayout | None, *groups: Any, **options: Any) -> str:
    by_name = {group.name: group for group in groups}
    options = {"closed": False, "ranges": None, **options}
    return describe_job(1, job, layout, by_name, **options)


def test_a_job_on_gpus(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    layout = ParallelLayout(4, tp=2, dp=2)
    text = text_of(
        cuda_job(4),
        layout,
        cuda_group("world", (0, 1, 2, 3), "none: too many ranks"),
        cuda_group("tp", (0, 1)),
        cuda_group("pp", (1,), None),
        cuda_group("cp", (1, 2), None),
        cuda_group("dp", (1, 3), why_not="no windows here", unusable="it is suspended"),
        cuda_group("attn_tp", (0, 1)),
        ranges="nvtx",
    )
    assert (
        text
        == f"""{layout}
rank 1: device cuda:1, local rank 1, NCCL 2.28.9 (/lib/libnccl.so.2)
place    tp 1, cp 0, attn_tp 1, pp 0, dp 0, ep 0, moe_tp 1
software torch {torch.__version__}, CUDA 13.0, Python {platform.python_version()}
hosts    node1: ranks [0..3] on NVIDIA H200
groups   world        [0..3] gloo, pynccl; kernels: none: too many ranks; windows: 2
         tp, attn_tp  [0,1] gloo, pynccl; kernels: shipped: NVIDIA H200 x 2; windows: 2
         pp           [1] alone
         cp           [1,2] gloo, pynccl; kernels: none; windows: 2
         dp           [1,3] gloo, pynccl (it is suspended); kernels: shipped: NVIDIA H200 x 2; \
windows: none: no windows here
memory   symmetric: 1057 MiB reserved in 2 segment(s), 34 MiB in use
issues   captured-symmetric-race (symmetric_capture: fence; fixed in 2.30.7; \
sgl-project/sglang#37768)
         window-register-in-capture (window_register_in_capture: ignored; fixed in 2.30.7; \
NVIDIA/nccl#2209)
         copy-engine-pair-hang (copy_engine_collectives: off; fixed in 2.31.2; NVIDIA/nccl#2241)
options  profiler ranges: nvtx"""
    )


def test_what_is_off_or_away_is_said():
    pool = cuda_job(2).symmetric_pool
    assert pool is not None
    pool.frozen = pool.asleep = True
    lines = text_of(
        cuda_job(2, symmetric_pool=pool, issues=KnownIssues(29999), verifies_symmetric=True), None
    ).splitlines()
    assert lines[0] == "2 ranks, no layout yet"
    assert not any(line.startswith(("place", "groups")) for line in lines)
    assert lines[-3].endswith("34 MiB in use, frozen, asleep")
    assert lines[-2:] == ["issues   none known", "options  verify_symmetric"]
    lines = text_of(cuda_job(2, symmetric_pool=None, no_symmetric="no windows"), None).splitlines()
    assert "memory   no symmetric memory: no windows" in lines


def test_hosts_have_their_ranks_and_gpus():
    job = cuda_job(4, hosts=["a/1", "b/1", "a/1", "a/2"], gpu_names=["X", "Y", "Z", "X"])
    lines = text_of(job, None).splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("hosts"))
    assert lines[start : start + 3] == [
        "hosts    a: ranks [0,2] on X, Z",
        "         b: ranks [1] on Y",
        "         a: ranks [3] on X",
    ]


def test_a_huge_job_fits_on_a_screen():
    num_ranks = 65_536
    job = cuda_job(num_ranks, hosts=[f"node{rank // 8}/boot" for rank in range(num_ranks)])
    groups = [cuda_group("world", tuple(range(num_ranks))), cuda_group("tp", (0, 1))]
    lines = text_of(job, ParallelLayout(num_ranks, tp=8, dp=num_ranks // 8), *groups).splitlines()
    assert len(lines) < 40
    assert max(map(len, lines)) < 160
    assert "         and 8184 more" in lines
