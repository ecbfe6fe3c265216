"""All-reduce with RMSNorm on CPU: what it computes, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from distcomm import ArgumentError, ParallelState
from tests.cpu.job import Job

H = 24


def reference(
    total: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor | None, bias: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """In fp64, from the sum that was rounded once."""
    h = total.double() + (0 if residual is None else residual.double())
    normed = h / (h.square().mean(-1, keepdim=True) + 1e-5).sqrt() * (weight.double() + bias)
    return normed, h


def norms(state: ParallelState, dtype: torch.dtype, with_residual: bool, bias: float) -> None:
    generator = torch.Generator().manual_seed(3)
    for shape in ((5, H), (2, 3, H), (H,), (0, H)):
        # Whole numbers: gloo rounds a sum of bf16 at every step.
        xs = [torch.randint(-9, 9, shape, generator=generator).to(dtype) for _ in state.tp.ranks]
        weight = torch.randn(H, generator=generator).to(dtype)
        residual = torch.randn(shape, generator=generator).to(dtype) if with_residual else None
        x = (
            xs[state.tp.rank_in_group].transpose(0, -1).contiguous().transpose(0, -1)
        )  # strided, mostly
        before = [each.clone() for each in (x, weight) + ((residual,) if with_residual else ())]
        result: Any = state.tp.all_reduce_rms_norm(x, weight, residual, eps=1e-5, weight_bias=bias)
        total = sum(each.float() for each in xs).to(dtype)
        normed, h = reference(total, weight, residual, bias)
        tolerance = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {}
        if with_residual:
            result, new_residual = result
            torch.testing.assert_close(new_residual, h.to(dtype), **tolerance)
        torch.testing.assert_close(result, normed.to(dtype), **tolerance)
        after = [x, weight] + ([residual] if with_residual else [])
        assert all(map(torch.equal, before, after))
    assert state.tp.stats()["ops"]["all_reduce_rms_norm"]["unfused"]["calls"] >= 4


@pytest.mark.parametrize("bias", [0.0, 1.0])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms(job: Job, dtype: torch.dtype, with_residual: bool, bias: float) -> None:
    job.run(norms, dtype, with_residual, bias)


def refused(state: ParallelState) -> None:
    x, weight = torch.zeros(4, H), torch.zeros(H)
    for message, arguments in (
        ("x must be floating", (torch.zeros(4, H, dtype=torch.int32), weight)),
        ("x must be floating, with a dim", (torch.tensor(1.0), weight)),
        (r"weight must be torch.float32 \[24\]", (x, torch.zeros(4))),
        (r"weight must be torch.float32 \[24\]", (x, weight.half())),
        (r"residual must be torch.float32 \[4, 24\]", (x, weight, torch.zeros(3, H))),
        (r"residual must be torch.float32 \[4, 24\]", (x, weight, x.double())),
    ):
        with pytest.raises(ArgumentError, match=message):
            state.tp.all_reduce_rms_norm(*arguments)


def test_what_does_not_fit_is_refused(job: Job) -> None:
    job.run(refused)
