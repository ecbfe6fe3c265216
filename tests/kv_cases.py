"""Random KV gathers and what they must give: shared by the CPU and the GPU suite.

Every rank makes the same cases from the same seed, and the whole batch of each, so it knows what
has to come out, bit for bit.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch

from distcomm import ContextParallelPlan

__all__ = ["DTYPES", "ROW_SHAPES", "KvCase", "random_case", "same_bits", "whole_batch"]

DTYPES = (
    torch.bfloat16,
    torch.float16,
    torch.float32,
    torch.float8_e4m3fn,
    torch.uint8,
    torch.int64,
)
# Keys or values, a latent row, an index key, and rows that no wide word divides.
ROW_SHAPES = ((2, 128), (576,), (128,), (1, 3), (), (7, 1, 5))
_LENGTHS = (0, 1, 2, 3, 7, 16, 33, 100, 257)


@dataclass(frozen=True)
class KvCase:
    """One batch: its plan, and dtype and row shape of each tensor."""

    plan: ContextParallelPlan
    specs: tuple[tuple[torch.dtype, tuple[int, ...]], ...]
    seed: int


def random_case(rng: random.Random, cp_size: int, *, mode: str | None = None) -> KvCase:
    seq_lens = [rng.choice(_LENGTHS) for _ in range(rng.randrange(1, 7))]
    modes = ("zigzag", "round_robin", "contiguous")
    plan = ContextParallelPlan(seq_lens, cp_size, mode or rng.choice(modes))
    specs = tuple((rng.choice(DTYPES), rng.choice(ROW_SHAPES)) for _ in range(rng.randrange(1, 4)))
    return KvCase(plan, specs, rng.randrange(1 << 30))


def whole_batch(case: KvCase) -> list[torch.Tensor]:
    """[T, ...] of random bits for each tensor, in token order, on CPU."""
    generator = torch.Generator().manual_seed(case.seed)
    whole = []
    for dtype, shape in case.specs:
        num_bytes = torch.empty(shape, dtype=dtype).nbytes
        raw = torch.randint(
            0, 256, (case.plan.num_tokens, num_bytes), dtype=torch.uint8, generator=generator
        )
        whole.append(raw.view(dtype).reshape(case.plan.num_tokens, *shape))
    return whole


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether shape, dtype and every bit are the same, NaNs included."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    flat = [x.cpu().contiguous().flatten().view(torch.uint8) for x in (a, b)]
    return torch.equal(*flat)
