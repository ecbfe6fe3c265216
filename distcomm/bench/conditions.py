"""Under which conditions a benchmark ran, and its result file."""

from __future__ import annotations

import json
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

from ..state import ParallelState

__all__ = ["conditions", "links_gb_s", "write_result"]


def conditions(state: ParallelState) -> dict[str, Any]:
    """Hardware and versions, as JSON values. Needs a CUDA job."""
    nccl = state.world.pynccl_comm.nccl if state.world.pynccl_comm else None
    return {
        "gpu": torch.cuda.get_device_name(state.device),
        "world_size": state.world_size,
        "cpu": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "nccl": None if nccl is None else nccl.version_text,
        **_of_driver(str(torch.cuda.get_device_properties(state.device).uuid)),
    }


def _of_driver(uuid: str) -> dict[str, Any]:
    """The driver's version, clocks in MHz, and what the GPU's links carry in one direction; None
    for what nvidia-smi doesn't tell."""
    gpu = uuid if uuid.startswith("GPU-") else f"GPU-{uuid}"
    fields = "driver_version,clocks.sm,clocks.max.sm,clocks.max.memory"
    query = _nvidia_smi(f"--query-gpu={fields}", "--format=csv,noheader,nounits", f"--id={gpu}")
    driver, *clocks = [*query.strip().split(", "), *[""] * 4][:4]
    names = ("sm_clock_mhz", "max_sm_clock_mhz", "max_memory_clock_mhz")
    return {
        "driver": driver or None,
        **{
            name: int(mhz) if mhz.isdigit() else None
            for name, mhz in zip(names, clocks, strict=True)
        },
        "links_gb_s": links_gb_s(_nvidia_smi("nvlink", "--status", f"--id={gpu}")),
    }


def links_gb_s(status: str) -> float | None:
    """The sum over the links that ``nvidia-smi nvlink --status`` lists; None for none."""
    links = re.findall(r"Link \d+: ([\d.]+) GB/s", status)
    return round(sum(map(float, links)), 1) if links else None


def _nvidia_smi(*arguments: str) -> str:
    """What it prints; nothing if it can't be run."""
    try:
        return subprocess.run(
            ["nvidia-smi", *arguments], capture_output=True, text=True, timeout=20, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


def write_result(path: Path, benchmark: str, result: dict[str, Any]) -> None:
    """Writes one benchmark's result as JSON, making the folder if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"benchmark": benchmark, **result}, indent=2) + "\n")
