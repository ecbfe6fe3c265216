"""For tests of torch.compile: a tensor-parallel transformer block, and Dynamo's counters.

B sequences of one token each, C hidden size, H heads of D of all ranks, S slots of the KV cache.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch._dynamo
import torch._functorch.config
import torch._inductor.config
from torch import nn
from torch.nn import functional

from distcomm import GroupCoordinator

__all__ = ["MOST", "C", "TensorParallelBlock", "dynamo", "num_calls"]

C, H, D, M, S = 64, 12, 8, 96, 16  # 12 heads: so that 2, 3 and 4 ranks can share them
MOST = 64  # sequences


@contextmanager
def dynamo() -> Iterator[Counter[str]]:
    """With nothing compiled at the beginning, nor on disk; counts what Dynamo does."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    torch._inductor.config.fx_graph_cache = False
    torch._functorch.config.enable_autograd_cache = False
    torch._inductor.config.compile_threads = 1  # no processes of its own for each of the workers
    stats: Counter[str] = torch._dynamo.utils.counters["stats"]
    yield stats
    torch._dynamo.reset()


def num_calls(group: GroupCoordinator) -> int:
    """How often the group's backends were called, but for `send` and `recv`."""
    return int(group.stats()["sequence"])


class TensorParallelBlock(nn.Module):
    """Attention over a KV cache and a gated MLP; heads and MLP columns are split over the group.

    All ranks have the same weights and take their shares, so that a result can be compared with
    that of one rank.
    """

    def __init__(self, group: GroupCoordinator, dtype: torch.dtype) -> None:
        super().__init__()
        self.group = group
        generator = torch.Generator().manual_seed(1)
        size, rank = group.world_size, group.rank_in_group

        def split(rows: int, columns: int, dim: int) -> nn.Parameter:
            whole = torch.randn(rows, columns, generator=generator) / rows**0.5
            share = whole.chunk(size, dim)[rank].contiguous()
            return nn.Parameter(share.to(group.device, dtype), requires_grad=False)

        self.wq, self.wk, self.wv = (split(C, H * D, 1) for _ in range(3))
        self.wo = split(H * D, C, 0)
        self.gate, self.up = split(C, M, 1), split(C, M, 1)
        self.down = split(M, C, 0)
        norm = torch.ones(C, device=group.device, dtype=dtype)
        self.norm = nn.Parameter(norm, requires_grad=False)
        cache = torch.zeros(2, MOST, H // size, S, D, device=group.device, dtype=dtype)
        self.register_buffer("cache", cache)

    def forward(self, x: torch.Tensor, slot: torch.Tensor) -> torch.Tensor:
        """x [B, C] of the tokens in `slot`, an index tensor [1]; writes their keys and values."""
        batch = x.shape[0]
        q, k, v = (
            (x @ w).view(batch, -1, 1, D) for w in (self.wq, self.wk, self.wv)
        )  # [B, H / W, 1, D]
        keys, values = self.cache[0, :batch], self.cache[1, :batch]
        keys.index_copy_(2, slot, k)
        values.index_copy_(2, slot, v)
        hidden = torch.arange(S, device=x.device) > slot
        mask = torch.zeros(S, device=x.device, dtype=x.dtype).masked_fill(hidden, -torch.inf)
        attended = functional.scaled_dot_product_attention(q, keys, values, mask.view(1, 1, 1, S))
        partial = attended.reshape(batch, -1) @ self.wo
        x, residual = self.group.all_reduce_rms_norm(partial, self.norm, x)
        partial = (functional.silu(x @ self.gate) * (x @ self.up)) @ self.down
        return residual + self.group.all_reduce(partial)
