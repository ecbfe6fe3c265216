"""Running the demo, and its parts."""

import os
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

from demo_options import Options, parse_options

__all__ = [
    "DEMO",
    "Finished",
    "Options",
    "REPOSITORY",
    "TEXT",
    "parse_options",
    "run",
    "run_demo",
    "run_torchrun",
    "table",
]

REPOSITORY = Path(__file__).resolve().parents[2]
DEMO = REPOSITORY / "scripts" / "demo.py"
TEXT = REPOSITORY / "LICENSE"
TIMEOUT_S = 100.0
STOP_TIMEOUT_S = 10.0

Finished = subprocess.CompletedProcess[str]


def run(*command: object, timeout_s: float = TIMEOUT_S) -> Finished:
    """Runs a Python command as a job of its own; on a timeout, nothing of it stays."""
    of_a_job = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    process = subprocess.Popen(
        [sys.executable, *map(str, command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={name: value for name, value in os.environ.items() if name not in of_a_job},
    )
    try:
        stdout, stderr = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        process.terminate()  # the agent then ends its ranks, which a SIGKILL wouldn't let it
        try:
            process.communicate(timeout=STOP_TIMEOUT_S)
        finally:
            process.kill()
        raise
    return Finished(process.args, process.returncode, stdout, stderr)


def run_demo(*options: object, timeout_s: float = TIMEOUT_S) -> Finished:
    return run(DEMO, "--device", "cpu", "--input", TEXT, *options, timeout_s=timeout_s)


def run_torchrun(num_processes: int, script: Path, *arguments: object) -> Finished:
    launcher = ("-m", "torch.distributed.run", "--standalone")
    return run(*launcher, f"--nproc-per-node={num_processes}", script, *arguments)


def table(output: str) -> dict[tuple[str, str], list[str]]:
    """The collectives: (op, group) -> [backend, calls, bytes, time]."""
    lines = output.split("waiting for slower ranks included\n")[1].split("\n\n")[0].splitlines()
    return {tuple(cells[:2]): cells[2:] for cells in map(str.split, lines[1:-1])}
