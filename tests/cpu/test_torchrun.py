"""Real launches: `torchrun` on one and on two (pretended) hosts, as users start their jobs."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from distcomm import ParallelLayout

ROOT = Path(__file__).parents[2]
PROGRAM = Path(__file__).with_name("programs") / "launched.py"
TIMEOUT_S = 100.0

pytestmark = pytest.mark.timeout(TIMEOUT_S + 20)


@contextmanager
def started(command: Sequence[str], output: Any) -> Iterator[subprocess.Popen[bytes]]:
    """A process in a session of its own, which is killed with all that it has started."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    env = {name: value for name, value in os.environ.items() if name not in names}
    env |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, env=env, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def torchrun(agents: Sequence[Sequence[str]], program: Sequence[str]) -> str:
    """Runs one agent per argument list; all must exit with 0 in time. Returns their output."""
    with contextlib.ExitStack() as stack:
        outputs = [stack.enter_context(tempfile.TemporaryFile()) for _ in agents]
        launch = [sys.executable, "-m", "torch.distributed.run"]
        processes = [
            stack.enter_context(started([*launch, *options, *program], output))
            for options, output in zip(agents, outputs, strict=True)
        ]
        ends: list[int | str] = []
        for process in processes:
            try:
                ends.append(process.wait(TIMEOUT_S))
            except subprocess.TimeoutExpired:
                ends.append("timed out")
                break
        for output in outputs:
            output.seek(0)
        text = "\n".join(output.read().decode() for output in outputs)
    assert ends == [0] * len(agents), f"exits {ends}:\n{text}"
    return text


def run_program(
    agents: Sequence[Sequence[str]], folder: Path, sizes: list[dict[str, int]], *options: str
) -> tuple[list[list[dict[str, Any]]], str]:
    """What each rank found in each of its initializations, and the output."""
    text = torchrun(agents, [str(PROGRAM), str(folder), *map(json.dumps, sizes), *options])
    files = sorted(folder.glob("*.json"), key=lambda path: int(path.stem))
    return [json.loads(path.read_text()) for path in files], text


def assert_right(found: list[list[dict[str, Any]]], layouts: list[ParallelLayout]) -> None:
    """Every rank was in the groups of each layout, and called all of them."""
    for rank, initializations in enumerate(found):
        for one, layout in zip(initializations, layouts, strict=True):
            groups = {axis: list(ranks) for axis, ranks in layout.groups_of(rank).items()}
            assert one["groups"] == {"world": list(range(layout.world_size)), **groups}
            assert one["sums"] == {name: sum(ranks) for name, ranks in one["groups"].items()}


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def test_two_agents_of_two_processes(tmp_path: Path):
    endpoint = f"127.0.0.1:{free_port()}"
    agent = [
        *("--nnodes", "2", "--nproc-per-node", "2", "--local-addr", "127.0.0.1"),
        *("--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint, "--rdzv-id", "test"),
    ]
    sizes = [{"tp": 4, "cp": 2}, {"tp": 2, "pp": 2}]  # one after the other, in the same store
    found, _ = run_program([agent, agent], tmp_path, sizes)
    assert_right(found, [ParallelLayout(4, **each) for each in sizes])
    assert [ranks[0]["local_rank"] for ranks in found] == [0, 1, 0, 1]
    parents = [parent for _, parent in found[0][0]["host_processes"]]
    assert parents[0] == parents[1] != parents[2] == parents[3]


def test_one_agent_whose_processes_leave_their_groups_open(tmp_path: Path):
    agent = ["--standalone", "--nproc-per-node", "4"]
    sizes = [{"dp": 4}]
    found, text = run_program([agent], tmp_path, sizes, "--leave-open")
    assert_right(found, [ParallelLayout(4, dp=4)] * 2)
    assert [ranks[0]["local_rank"] for ranks in found] == [0, 1, 2, 3]
    assert "Traceback" not in text
    assert "terminate called" not in text
