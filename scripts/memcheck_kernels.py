#!/usr/bin/env python3
"""All kernels on small and odd sizes, for compute-sanitizer; see `make memcheck`."""

from __future__ import annotations

import os

import torch

from distcomm import GroupCoordinator, init_distributed
from distcomm.algorithms import ALGORITHMS
from distcomm.calibration import MEASURED

SIZES = (16, 48, 4112, 600_016)  # bytes of a rank's share
ROWS = ((1, 64), (3, 1032), (40, 4096))


def main() -> None:
    world_size = int(os.environ["WORLD_SIZE"])
    # Instrumented code is slow, and kernels wait for each other.
    with init_distributed(
        tp=world_size, device="cuda", symmetric_reserve="256MiB", timeout=300
    ) as state:
        for op in MEASURED:
            for size in SIZES:
                run(state.tp, op, size // 2)
        for num_rows, hidden in ROWS:
            norm(state.tp, num_rows, hidden)
        torch.cuda.synchronize()
        if state.rank == 0:
            print("all results are right")


def run(group: GroupCoordinator, op: str, share: int) -> None:
    """All algorithms of `op`, on symmetric tensors of so many elements a rank."""
    kernels = group.kernels
    if kernels is None:
        raise SystemExit("the group has no kernels")
    w = group.world_size
    inputs, outputs = {"all_gather": (1, w), "reduce_scatter": (w, 1)}.get(op, (w, w))
    with group.symmetric_memory():
        x = torch.empty(inputs * share, dtype=torch.bfloat16, device=group.device)
        out = torch.empty(outputs * share, dtype=torch.bfloat16, device=group.device)
    for algorithm in ALGORITHMS[op]:
        if algorithm == "nccl" or x.nbytes > kernels.most_bytes(op, algorithm):
            continue
        x.fill_(group.rank_in_group + 1)
        out.fill_(-1)
        kernels.run(op, algorithm, x, out)
        total = torch.full_like(out, w * (w + 1) / 2)
        gathered = torch.arange(1, w + 1, device=out.device).repeat_interleave(share).to(out.dtype)
        check(f"{op} by {algorithm} of {x.nbytes} bytes", out, gathered if inputs == 1 else total)


def norm(group: GroupCoordinator, num_rows: int, hidden: int) -> None:
    """Rows of the same numbers, whose norm is 1."""
    x = torch.full((num_rows, hidden), 1.0, dtype=torch.bfloat16, device=group.device)
    weight, residual = torch.ones_like(x[0]), torch.ones_like(x)
    normed, h = group.all_reduce_rms_norm(x, weight, residual)
    check(f"norm of {num_rows} x {hidden}", h, torch.full_like(h, group.world_size + 1))
    check(f"norm of {num_rows} x {hidden}", normed, torch.ones_like(normed))


def check(name: str, result: torch.Tensor, wanted: torch.Tensor) -> None:
    if not torch.equal(result, wanted):
        raise SystemExit(f"{name} is wrong")


if __name__ == "__main__":
    main()
