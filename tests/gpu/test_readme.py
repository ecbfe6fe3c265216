"""The README's examples, run as printed."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import torch

from tests.gpu.job import start
from tests.worker_pool import WorkerPool, fresh_init_method

README = (Path(__file__).parents[2] / "README.md").read_text()


def example_of(title: str) -> str:
    section = README.split(f"## {title}")[1]
    example = re.search(r"```python\n(.*?)```", section, re.DOTALL)
    assert example is not None
    return example[1]


def run_symmetric(rank: int, world: int, method: str, example: str) -> None:
    with start(rank, world, method, cp=world) as state:
        names = {"torch": torch, "state": state}
        exec(compile(example, "README.md", "exec"), names)
        x, y, z = names["x"].fill_(rank + 1), names["y"], names["z"]
        state.tp.all_reduce(x, out=y)
        names["graph"].replay()
        assert (y == world * (world + 1) / 2).all()
        assert torch.equal(z, y)
        assert state.tp.is_symmetric(z)


def run_fast_collectives(rank: int, world: int, method: str, example: str) -> None:
    with start(rank, world, method, tune="shipped") as state:
        names = {"torch": torch, "state": state, "tp": state.tp}
        exec(compile(example, "README.md", "exec"), names)
        assert (names["total"] == world).all()
        assert (names["residual"] == world).all()
        assert (names["h"] == 1).all()
        assert "pynccl" not in state.tp.stats()["ops"]["all_reduce"]
        assert "unfused" not in state.tp.stats()["ops"]["all_reduce_rms_norm"]


def run_context_parallel(rank: int, world: int, method: str, example: str) -> None:
    with start(rank, world, method, cp=world) as state:
        names = {"torch": torch, "state": state}
        exec(compile(example, "README.md", "exec"), names)
        expected = names["tokens"][:, None].expand(-1, 128).bfloat16()
        assert torch.equal(names["all_k"], expected)
        assert torch.equal(names["all_v"], -expected)
        assert torch.equal(names["cache"][names["slots"]], expected)
        assert set(state.cp.stats()["ops"]["all_gather_kv"]) == {"kernel"}
        # Its cache is ordinary memory.
        assert set(state.cp.stats()["ops"]["all_gather_kv_into_cache"]) == {"pynccl"}


def run_sleep(rank: int, world: int, method: str, example: str) -> None:
    with start(rank, world, method) as state:
        names = {"torch": torch, "state": state}
        exec(compile(example, "README.md", "exec"), names)
        assert torch.equal(names["before"], names["after"])
        assert names["report"].freed_bytes >= names["weights"].nbytes + names["cache"].nbytes
        assert names["pool"].asleep_tags == ()
        names["cache"].zero_()


def run_compile(rank: int, world: int, method: str, example: str) -> None:
    with start(rank, world, method, tune="shipped") as state, torch.inference_mode():
        torch.manual_seed(1)
        names = {"torch": torch, "state": state, "tp": state.tp}
        exec(compile(example, "README.md", "exec"), names)
        arguments = (names[name] for name in ("x", "gate", "up", "gate"))
        torch.testing.assert_close(names["y"], names["mlp"](*arguments), atol=1e-1, rtol=1e-2)
        torch._dynamo.reset()


def run_mesh(rank: int, world: int, method: str, example: str) -> None:
    with start(rank, world, method, cp=2) as state:
        names = {"torch": torch, "state": state}
        exec(compile(example, "README.md", "exec"), names)
        share = torch.arange(64.0).reshape(8, 8).chunk(2)[state.cp.rank_in_group]
        assert torch.equal(names["rows"].to_local().cpu(), share)


def run_observability(rank: int, world: int, method: str, example: str) -> str:
    with start(rank, world, method, tune="shipped") as state:
        names = {"torch": torch, "state": state}
        with contextlib.redirect_stdout(io.StringIO()) as output:
            exec(compile(example, "README.md", "exec"), names)
    return output.getvalue()


def test_compile_example(gpus: WorkerPool, most_ranks: int) -> None:
    example = example_of("torch.compile")
    gpus.run(run_compile, fresh_init_method(), example, ranks=most_ranks)


def test_mesh_example(gpus: WorkerPool, most_ranks: int) -> None:
    gpus.run(run_mesh, fresh_init_method(), example_of("DeviceMesh"), ranks=most_ranks // 2 * 2)


def test_observability_example(gpus: WorkerPool, most_ranks: int) -> None:
    example = example_of("Observability")
    for output in gpus.run(run_observability, fresh_init_method(), example, ranks=most_ranks):
        assert "'distcomm.all_reduce tp 16384 B one_shot_push'" in output


def test_sleep_example(gpus: WorkerPool, most_ranks: int) -> None:
    gpus.run(run_sleep, fresh_init_method(), example_of("Sleep"), ranks=most_ranks)


def test_symmetric_memory_example(gpus: WorkerPool, most_ranks: int) -> None:
    example = example_of("Symmetric memory")
    gpus.run(run_symmetric, fresh_init_method(), example, ranks=most_ranks)


def test_fast_collectives_example(gpus: WorkerPool, most_ranks: int) -> None:
    example = example_of("Fast collectives")
    gpus.run(run_fast_collectives, fresh_init_method(), example, ranks=most_ranks)


def test_context_parallel_example(gpus: WorkerPool, most_ranks: int) -> None:
    example = example_of("Context parallelism")
    gpus.run(run_context_parallel, fresh_init_method(), example, ranks=most_ranks)
