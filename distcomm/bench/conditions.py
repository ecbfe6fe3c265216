"""Under which conditions a benchmark ran, and its result file."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

import torch

from ..parallel_state import ParallelState

__all__ = ["conditions", "write_result"]


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
    }


def write_result(path: Path, benchmark: str, result: dict[str, Any]) -> None:
    """Writes one benchmark's result as JSON, making the folder if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"benchmark": benchmark, **result}, indent=2) + "\n")
