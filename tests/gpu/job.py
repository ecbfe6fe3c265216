"""Starting `distcomm` in the workers of the GPU suite."""

from __future__ import annotations

from typing import Any

from distcomm import ParallelState, init_distributed

__all__ = ["start"]


def start(rank: int, world: int, method: str, **options: Any) -> ParallelState:
    """`init_distributed` on CUDA with this worker's place given by hand; tp is the world.

    Collectives go through NCCL, whose use most tests are about, unless `tune` says otherwise.
    """
    options = {"tp": world, "device": "cuda", "timeout": 60, "tune": "nccl", **options}
    return init_distributed(init_method=method, rank=rank, world_size=world, **options)
