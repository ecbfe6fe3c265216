"""Triton kernels without a GPU: run in its interpreter, and compiled as for GPUs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from triton.backends.compiler import GPUTarget

__all__ = ["PretendedDevice", "check_in_interpreter"]

ROOT = Path(__file__).parents[2]
PROGRAMS = Path(__file__).with_name("programs")
TIMEOUT_S = 100


def check_in_interpreter(program: str, case: str) -> None:
    """Runs one of `programs`, which has to set TRITON_INTERPRET before it imports Triton."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, PROGRAMS / program, case],
        env=env,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert result.returncode == 0, result.stderr


class PretendedDevice:
    """Stands for Triton's driver, so that a kernel is compiled as for a launch on `arch`."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0
