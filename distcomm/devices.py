"""Which device a job runs on: each rank reports what it has, all draw the same conclusion."""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from . import env
from .errors import ArgumentError, InitializationError
from .memory import next_ordinal_of_device
from .native import NativeNccl
from .nccl import NcclLibrary

__all__ = ["CudaProbe", "agreed_device_type", "check_device", "host_name", "probe_cuda"]

_DEVICES = ("auto", "cuda", "cpu")
_BOOT_ID = "/proc/sys/kernel/random/boot_id"


@dataclass(frozen=True)
class CudaProbe:
    """What one rank found when it looked for CUDA.

    Attributes:
        problem: why this rank can't use CUDA; None if it can, or didn't look.
        device_index: of its GPU.
        gpu: the UUID of its GPU.
        nccl: the NCCL library.
        native: the C++ library's binding to it.
        memory: bytes of its GPU.
        gpu_name: what CUDA calls its GPU.
    """

    problem: str | None = None
    device_index: int = 0
    gpu: str | None = None
    nccl: NcclLibrary | None = None
    native: NativeNccl | None = None
    memory: int = 0
    gpu_name: str = ""

    def as_json(self) -> dict[str, Any]:
        """What the other ranks need to know."""
        version = None if self.nccl is None else self.nccl.version_text
        ordinal = 0
        if self.native is not None:
            ordinal = next_ordinal_of_device(self.native, self.device_index)
        return {
            "problem": self.problem,
            "gpu": self.gpu,
            "nccl_version": version,
            "windows": self._has_windows(),
            "memory": self.memory,
            "gpu_name": self.gpu_name,
            "segment_ordinal": ordinal,
        }

    def _has_windows(self) -> bool:
        if self.nccl is None or self.native is None:
            return False
        has_driver = bool(self.native.functions.distcomm_has_cuda_driver())
        return has_driver and all(map(self.nccl.supports, ("mem_alloc", "window_register")))


def check_device(device: str, rank: int) -> None:
    """Raises `ArgumentError` unless `device` is ``"auto"``, ``"cuda"`` or ``"cpu"``."""
    if device not in _DEVICES:
        raise ArgumentError("device", f"one of {', '.join(_DEVICES)}", f"{device!r} [rank {rank}]")


def probe_cuda(local_rank: int) -> CudaProbe:
    """Looks for this rank's GPU and loads NCCL. Starts CUDA on that GPU."""
    try:
        if not torch.cuda.is_available():
            return CudaProbe("torch sees no CUDA device")
        # Launchers that show each process only its own GPU leave one device for any local rank.
        index = local_rank % torch.cuda.device_count()
        properties = torch.cuda.get_device_properties(index)
        nccl = NcclLibrary()
        native = NativeNccl(nccl.path)
        uuid, memory = str(properties.uuid), properties.total_memory
        return CudaProbe(None, index, uuid, nccl, native, memory, properties.name)
    except RuntimeError as error:
        return CudaProbe(str(error))


def host_name() -> str:
    """What NCCL takes for this process's host."""
    boot_id = Path(_BOOT_ID)
    boot = boot_id.read_text().strip() if boot_id.exists() else ""
    return env.nccl_host_id() or f"{socket.gethostname()}/{boot}"


def agreed_device_type(
    wanted: str, reports: Sequence[Mapping[str, Any]], rank: int
) -> tuple[str, dict[int, str]]:
    """``"cuda"`` or ``"cpu"``, and per rank what speaks against CUDA.

    A pure function of the reports, hence the same on all ranks.

    Args:
        wanted: ``"auto"``, ``"cuda"`` or ``"cpu"``.
        reports: every rank's `CudaProbe.as_json()`, in rank order.
        rank: this process's rank, for the error.

    Raises:
        InitializationError: CUDA was asked for and a rank can't use it.
    """
    if wanted == "cpu":
        return "cpu", {}
    problems = _cuda_problems(reports)
    if not problems:
        return "cuda", {}
    if wanted == "cuda":
        raise InitializationError("device='cuda' can't be used", problems, rank=rank)
    return "cpu", problems


def _cuda_problems(reports: Sequence[Mapping[str, Any]]) -> dict[int, str]:
    problems: dict[int, str] = {}
    owners: dict[str, int] = {}
    version = reports[0]["nccl_version"]
    for rank, report in enumerate(reports):
        if report["problem"] is not None:
            problems[rank] = report["problem"]
        elif report["gpu"] in owners:
            problems[rank] = (
                f"has the same GPU as rank {owners[report['gpu']]} ({report['gpu']}); "
                "NCCL needs one per rank"
            )
        elif version is not None and report["nccl_version"] != version:
            problems[rank] = f"has NCCL {report['nccl_version']}, rank 0 has {version}"
        else:
            owners[report["gpu"]] = rank
    return problems
