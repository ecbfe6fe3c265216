"""The demo's generation on GPUs: captured steps make the tokens that one process makes."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.gpu.conftest import NUM_GPUS
from tests.worker_pool import WorkerPool

ROOT = Path(__file__).resolve().parents[2]
NUM_NEW = 8
NUM_PROMPTS = 4
TIMEOUT_S = 280


@pytest.mark.timeout(TIMEOUT_S + 20)  # a compiler may have to start from nothing
@pytest.mark.parametrize("compiled", [False, True], ids=["captured", "compiled"])
@pytest.mark.parametrize("cp_layout", ["inside_tp", "beside_tp"])
def test_generation_on_all_gpus(gpus: WorkerPool, cp_layout: str, compiled: bool) -> None:
    if cp_layout == "beside_tp" and NUM_GPUS % 2:
        pytest.skip("needs an even number of GPUs")
    gpus.reset()  # its processes would hold memory and CPU cores
    command = [sys.executable, "scripts/demo.py", "--generate", str(NUM_NEW), "--layers", "2"]
    command += ["--nproc", str(NUM_GPUS), "--cp-layout", cp_layout] + ["--compile"] * compiled
    done = subprocess.run(
        command, cwd=ROOT, timeout=TIMEOUT_S, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    how = "compiled, replayed from a CUDA graph" if compiled else "replayed from a CUDA graph"
    assert f"({NUM_NEW - 1} steps, {how})" in done.stdout
    num_tokens = NUM_NEW * NUM_PROMPTS
    assert f"equal tokens        {num_tokens} of {num_tokens}\n" in done.stdout
