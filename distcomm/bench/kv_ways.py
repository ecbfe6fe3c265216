"""Ways to gather KV rows over context-parallel ranks that ours are compared with.

Shapes: W ranks, T tokens, S_r tokens of rank r, P the most tokens of any rank.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch

from ..context_parallel import ContextParallelPlan
from ..group import GroupCoordinator

__all__ = ["GatherAndIndexCopy", "PadGatherCat"]


class PadGatherCat:
    """How engines do it: pad to equal shares, all-gather, cut the padding, sort the blocks.

    Args:
        group: the context-parallel group.
        plan: one sequence, in zigzag.
        x: this rank's rows, [S_r, ...].
        symmetric: whether the padded and the gathered rows lie in symmetric memory.
    """

    def __init__(
        self,
        group: GroupCoordinator,
        plan: ContextParallelPlan,
        x: torch.Tensor,
        *,
        symmetric: bool,
    ) -> None:
        self._group = group
        self._plan = plan
        self._x = x
        self._symmetric = symmetric and x.is_cuda
        self._most = max(plan.tokens_per_rank)
        blocks = [
            (start, length, rank)
            for rank in range(plan.cp_size)
            for start, length in _blocks(plan, rank)
        ]
        self._block_lens = [length for _, length, _ in blocks]
        self._order = sorted(range(len(blocks)), key=lambda number: blocks[number][0])

    def __call__(self) -> torch.Tensor:
        """[T, ...] in token order. Collective."""
        group, x, num_ranks = self._group, self._x, self._plan.cp_size
        with group.symmetric_memory() if self._symmetric else nullcontext():
            padded = x.new_empty((self._most, *x.shape[1:]))
            gathered = x.new_empty((num_ranks * self._most, *x.shape[1:]))
        padded[: len(x)] = x
        group.all_gather_into_tensor(gathered, padded)
        shares = gathered.split(self._most)
        rows = [
            share[:length] for share, length in zip(shares, self._plan.tokens_per_rank, strict=True)
        ]
        blocks = torch.cat(rows).split(self._block_lens)
        return torch.cat([blocks[number] for number in self._order])


class GatherAndIndexCopy:
    """Into a paged cache: pad to equal shares, all-gather, one index copy that skips the padding.

    Args:
        group: the context-parallel group.
        plan: any.
        tensors: this rank's rows, [S_r, ...] each.
        caches: [slots, ...] each; the last slot gets the padding.
        slots: the slot of each token, int64 [T].
        symmetric: whether the padded and the gathered rows lie in symmetric memory.
    """

    def __init__(
        self,
        group: GroupCoordinator,
        plan: ContextParallelPlan,
        tensors: tuple[torch.Tensor, ...],
        caches: tuple[torch.Tensor, ...],
        slots: torch.Tensor,
        *,
        symmetric: bool,
    ) -> None:
        self._group = group
        self._num_ranks = plan.cp_size
        self._tensors = tensors
        self._caches = caches
        self._symmetric = symmetric and slots.is_cuda
        self._most = max(plan.tokens_per_rank)
        padding = len(caches[0]) - 1
        self._slots = slots.new_full((plan.cp_size, self._most), padding)
        of_rank = slots[plan.token_order(slots.device)].split(plan.tokens_per_rank)
        for rank, own in enumerate(of_rank):
            self._slots[rank, : len(own)] = own
        self._slots = self._slots.flatten()

    def __call__(self) -> None:
        """Collective."""
        for x, cache in zip(self._tensors, self._caches, strict=True):
            with self._group.symmetric_memory() if self._symmetric else nullcontext():
                padded = x.new_empty((self._most, *x.shape[1:]))
                gathered = x.new_empty((self._num_ranks * self._most, *x.shape[1:]))
            padded[: len(x)] = x
            self._group.all_gather_into_tensor(gathered, padded)
            cache.index_copy_(0, self._slots, gathered)


def _blocks(plan: ContextParallelPlan, rank: int) -> list[tuple[int, int]]:
    """First token and length of a rank's two blocks of one sequence."""
    lengths = plan.attention_lengths(rank)
    return [
        (end - length, length)
        for length, end in zip(lengths.q_lens[0], lengths.kv_lens[0], strict=True)
    ]
