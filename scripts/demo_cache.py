"""Keys and values of a batch in context parallelism: each rank keeps its tokens' and no others'.

L layers, N sequences, R slots of a sequence on one rank, S prompt tokens of this rank, H and K
query and key/value heads of this rank, G = H / K, D head dim, W ranks of the cp group.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from distcomm import ContextParallelPlan, GroupCoordinator

__all__ = ["CacheShape", "ShardedKvCache", "merged"]


@dataclass(frozen=True)
class CacheShape:
    """What a rank's cache is made for: L, K, D, and tokens to come after each prompt."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    num_new: int


class ShardedKvCache:
    """This rank's part of the keys and values of a batch, at fixed places in memory.

    A prompt's tokens are on the ranks that the plan gives them to, and those that follow go round
    the ranks by position. A rank's slots of a sequence fill up from the first on; all tensors have
    the same shapes in every step, and are changed in place, so that a CUDA graph can hold them.

    Args:
        plan: of the prompts.
        group: the cp group.
        shape: what there must be room for.
    """

    def __init__(
        self, plan: ContextParallelPlan, group: GroupCoordinator, shape: CacheShape
    ) -> None:
        self._rank, self._world_size = group.rank_in_group, group.world_size
        device = group.device
        of_prompts = [_tokens_by_sequence(plan, rank) for rank in range(plan.cp_size)]
        # The same on all ranks, though they hold different numbers of tokens. One more for the
        # token that a rank writes down and doesn't count, when it is another rank's.
        self._num_slots = max(map(max, of_prompts)) + -(-shape.num_new // plan.cp_size) + 1
        sizes = (len(plan.seq_lens), shape.num_kv_heads, self._num_slots, shape.head_dim)
        self._k = torch.zeros(shape.num_layers, *sizes, device=device)
        self._v = torch.zeros(shape.num_layers, *sizes, device=device)
        self._sequences = torch.arange(len(plan.seq_lens), device=device)
        self._slots = torch.arange(self._num_slots, device=device)
        own = of_prompts[self._rank]
        self._prompt_sequences = plan.sequence_ids(self._rank, device)
        self._prompt_slots = torch.cat([torch.arange(n) for n in own]).to(device)
        self._num_of_prompts = torch.tensor(own, device=device)
        self._num_used = self._num_of_prompts.clone()
        self._scale = 1 / math.sqrt(shape.head_dim)

    def keep_prompts(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """Stores this rank's tokens of all prompts: [S, K, D] each."""
        self._k[layer][self._prompt_sequences, :, self._prompt_slots] = k
        self._v[layer][self._prompt_sequences, :, self._prompt_slots] = v

    def forget_new(self) -> None:
        """Drops all but the prompts."""
        self._num_used.copy_(self._num_of_prompts)

    def write(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """Stores one token of each sequence, [N, K, D] each, in the next slot: on every rank, but
        only its owner will count it, in `advance`. The others write over it later."""
        self._k[layer][self._sequences, :, self._num_used] = k
        self._v[layer][self._sequences, :, self._num_used] = v

    def filled_slots(self, positions: torch.Tensor) -> torch.Tensor:
        """How many slots hold tokens once those at `positions` are written: int64 [N] -> [N]."""
        return self._num_used + (positions % self._world_size == self._rank)

    def advance(self, filled_slots: torch.Tensor) -> None:
        """Ends a step; takes what `filled_slots` gave."""
        self._num_used.copy_(filled_slots)

    def attend(self, layer: int, q: torch.Tensor, filled_slots: torch.Tensor) -> torch.Tensor:
        """Attention of one query of each sequence, q [N, H, D], to what this rank has of it.

        Returns:
            [N, H, D + 1]: values, and the log-sum-exp of the scores; zeros and -inf where this
            rank has nothing of a sequence.
        """
        k, v = self._k[layer], self._v[layer]
        grouped = q.unflatten(1, (k.shape[1], -1))  # [N, K, G, D]
        scores = grouped @ k.transpose(-1, -2) * self._scale  # [N, K, G, R]
        empty = self._slots >= filled_slots[:, None]  # [N, R]
        scores = scores.masked_fill(empty[:, None, None], -math.inf)
        lse = scores.logsumexp(-1, keepdim=True)
        # A finite number in the place of -inf, as the difference of two infinities is no number.
        finite = lse.clamp_min(torch.finfo(lse.dtype).min)
        values = (scores - finite).exp() @ v
        return torch.cat((values, lse), dim=-1).flatten(1, 2)


def merged(attended: torch.Tensor) -> torch.Tensor:
    """Attention to all tokens, from every rank's attention to its own.

    A rank's values count by its share of the sum of all exponentials, of which its log-sum-exp is
    the logarithm.

    Args:
        attended: [W, N, H, D + 1], as from `ShardedKvCache.attend`; not -inf on all ranks.

    Returns:
        [N, H * D].
    """
    values, lse = attended[..., :-1], attended[..., -1:]
    return (lse.softmax(dim=0) * values).sum(dim=0).flatten(1)


def _tokens_by_sequence(plan: ContextParallelPlan, rank: int) -> list[int]:
    return [sum(lengths) for lengths in plan.attention_lengths(rank).q_lens]
