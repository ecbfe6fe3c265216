"""The transformer of demo_model.py over the ranks of a job.

W size of the cp group, T tokens of this rank, P = W * T tokens of all ranks, C hidden size,
H and K query and key/value heads of this rank, D head dim, V vocabulary.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from demo_model import (
    LayerWeights,
    ModelWeights,
    apply_rope,
    causal_attention,
    gated_mlp,
    rms_norm,
    rope_tables,
)
from demo_options import Options

from distcomm import AsyncHandle, GroupCoordinator, ParallelState

__all__ = ["CallTimer", "ParallelTransformer", "Zigzag"]


class CallTimer:
    """Host time in collectives, by group and op: waiting for slower ranks included.

    A call starts when the current stream has done all earlier work, and ends when it has done
    the collective, so that no other work is counted.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seconds: defaultdict[tuple[str, str], float] = defaultdict(float)

    @contextmanager
    def __call__(self, group: GroupCoordinator, op: str) -> Iterator[None]:
        self._synchronize()
        start = time.perf_counter()
        yield
        self._synchronize()
        self._seconds[group.name, op] += time.perf_counter() - start

    def milliseconds(self, group_name: str, op: str) -> float:
        return 1e3 * self._seconds[group_name, op]

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()


class Zigzag:
    """Which tokens a context-parallel rank has: blocks r and 2W-1-r of 2W equal blocks.

    So every rank has an early block, which attends to little, and a late one, which attends to
    much. Six tokens over W = 2 ranks are padded to eight, in blocks of two:

    >>> Zigzag(6, cp_size=2, cp_rank=0).positions().tolist()
    [0, 1, 6, 7]
    >>> Zigzag(6, cp_size=2, cp_rank=1).positions().tolist()
    [2, 3, 4, 5]
    """

    def __init__(self, num_tokens: int, cp_size: int, cp_rank: int) -> None:
        self._cp_size = cp_size
        self._cp_rank = cp_rank
        self.block_size = -(-num_tokens // (2 * cp_size))
        self.num_padded_tokens = 2 * cp_size * self.block_size
        self.block_starts = self._starts(cp_rank)

    def positions(self) -> torch.Tensor:
        """Positions in the text of this rank's tokens, int64 [T]."""
        return self._positions(self._cp_rank)

    def token_order(self) -> torch.Tensor:
        """The row of each token where all ranks' tokens lie one rank after another, int64 [P]."""
        return torch.cat([self._positions(rank) for rank in range(self._cp_size)]).argsort()

    def _starts(self, rank: int) -> tuple[int, int]:
        return rank * self.block_size, (2 * self._cp_size - 1 - rank) * self.block_size

    def _positions(self, rank: int) -> torch.Tensor:
        blocks = [torch.arange(start, start + self.block_size) for start in self._starts(rank)]
        return torch.cat(blocks)


class ParallelTransformer:
    """This rank's part of the model.

    Attention heads are split over attn_tp, the text over cp, the MLP and the vocabulary over tp.
    Where cp is inside tp, the ranks of a tp group hold different tokens, so what is split over
    tp first gathers the tokens over cp.

    Args:
        options: the sizes.
        weights: all weights; this rank's share is copied.
        state: the groups.
        num_tokens: tokens of the text.
        timed: wraps every collective.
    """

    def __init__(
        self,
        options: Options,
        weights: ModelWeights,
        state: ParallelState,
        num_tokens: int,
        timed: CallTimer,
    ) -> None:
        self._tp, self._cp, self._attn_tp = state.tp, state.cp, state.attn_tp
        self._cp_is_inside_tp = state.layout.cp_layout == "inside_tp"
        self._head_dim = options.head_dim
        self._embedding, self._final_norm = weights.embedding, weights.final_norm
        self._layers = [_share_of_layer(layer, options, state) for layer in weights.layers]
        self._lm_head = _columns(weights.lm_head, state.tp)
        self._timed = timed
        self.zigzag = Zigzag(num_tokens, state.cp.world_size, state.cp.rank_in_group)
        self.num_tokens = num_tokens
        self._positions = self.zigzag.positions().to(state.device)
        self._token_order = self.zigzag.token_order().to(state.device)
        self._rope = rope_tables(self._positions, options.head_dim)
        on_cuda = state.device.type == "cuda"
        self._stream = torch.cuda.Stream(state.device) if on_cuda else None

    def logits(
        self, token_ids: torch.Tensor, on_layer: Callable[[int], None]
    ) -> torch.Tensor | None:
        """Token ids of the whole text -> logits [num_tokens, V] on global rank 0, else None.

        Collective among all ranks. `on_layer` is called with the number of layers done.
        """
        num_padding = self.zigzag.num_padded_tokens - self.num_tokens
        # At the end, where no token of the text attends to it.
        padded_ids = torch.nn.functional.pad(token_ids, (0, num_padding))
        x = self._embedding[padded_ids[self._positions]]
        for number, layer in enumerate(self._layers, start=1):
            x = x + self._attention(rms_norm(x, layer.attn_norm), layer)
            x = x + self._mlp(rms_norm(x, layer.mlp_norm), layer)
            on_layer(number)
        return self._collected(self._next_byte(rms_norm(x, self._final_norm)))

    def _attention(self, x: torch.Tensor, layer: LayerWeights) -> torch.Tensor:
        """[T, C] -> [T, C]. The gathers of keys and values run beside the next projection."""
        k = apply_rope(self._heads(x @ layer.wk), self._rope)
        all_k, k_handle = self._start_gather(k)
        v = self._heads(x @ layer.wv)
        all_v, v_handle = self._start_gather(v)
        q = apply_rope(self._heads(x @ layer.wq), self._rope)
        all_k = self._finish_gather(all_k, k_handle)
        all_v = self._finish_gather(all_v, v_handle)
        blocks = zip(q.split(self.zigzag.block_size), self.zigzag.block_starts, strict=True)
        attended = torch.cat([causal_attention(b, all_k, all_v, start) for b, start in blocks])
        return self._all_reduce(self._attn_tp, attended @ layer.wo)

    def _mlp(self, x: torch.Tensor, layer: LayerWeights) -> torch.Tensor:
        """[T, C] -> [T, C]."""
        partial = gated_mlp(self._tokens_of_tp_group(x), layer)
        return self._own_tokens(self._all_reduce(self._tp, partial))

    def _next_byte(self, x: torch.Tensor) -> torch.Tensor:
        """[T, C] -> logits [T, V]."""
        share = self._tokens_of_tp_group(x) @ self._lm_head
        with self._timed(self._tp, "all_gather"):
            logits = self._tp.all_gather(share, dim=-1)
        return self._own_tokens(logits)

    def _collected(self, logits: torch.Tensor) -> torch.Tensor | None:
        """This rank's logits [T, V] -> those of the text, in order, on global rank 0."""
        if self._cp.first_rank != 0:
            return None  # another cp group has the same logits
        with self._timed(self._cp, "gather"):
            gathered = self._cp.gather(logits, dst=0, dim=0)
        return None if gathered is None else gathered[self._token_order][: self.num_tokens]

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(len(x), -1, self._head_dim)

    def _start_gather(self, x: torch.Tensor) -> tuple[torch.Tensor, AsyncHandle]:
        """[T, K, D] -> [P, K, D], rank after rank, ready when the handle has been waited for."""
        gathered = x.new_empty((self.zigzag.num_padded_tokens, *x.shape[1:]))
        with self._timed(self._cp, "cp_all_gather_into_tensor_async"):
            handle = self._cp.cp_all_gather_into_tensor_async(gathered, x, self._stream)
        return gathered, handle

    def _finish_gather(self, gathered: torch.Tensor, handle: AsyncHandle) -> torch.Tensor:
        """The same in token order."""
        with self._timed(self._cp, "cp_all_gather_into_tensor_async"):
            handle.wait()
        return gathered[self._token_order]

    def _all_reduce(self, group: GroupCoordinator, x: torch.Tensor) -> torch.Tensor:
        with self._timed(group, "all_reduce"):
            return group.all_reduce(x, out=x)

    def _tokens_of_tp_group(self, x: torch.Tensor) -> torch.Tensor:
        """[T, C] -> all tokens of this rank's tp group: [P, C], rank after rank, or x itself."""
        if not self._cp_is_inside_tp:
            return x
        with self._timed(self._cp, "all_gather"):
            return self._cp.all_gather(x, dim=0)

    def _own_tokens(self, x: torch.Tensor) -> torch.Tensor:
        """The way back from `_tokens_of_tp_group`."""
        if not self._cp_is_inside_tp:
            return x
        return x.chunk(self._cp.world_size)[self._cp.rank_in_group]


def _share_of_layer(layer: LayerWeights, options: Options, state: ParallelState) -> LayerWeights:
    """This rank's heads and MLP columns.

    A rank has the key/value heads of its query heads: with more attn_tp ranks than such heads,
    neighbours have the same one.
    """
    num_heads = options.heads // state.attn_tp.world_size
    heads_per_kv_head = options.heads // options.kv_heads
    first = state.attn_tp.rank_in_group * num_heads
    last = first + num_heads - 1
    d = options.head_dim
    q = slice(first * d, (last + 1) * d)
    kv = slice(first // heads_per_kv_head * d, (last // heads_per_kv_head + 1) * d)
    return LayerWeights(
        attn_norm=layer.attn_norm,
        wq=layer.wq[:, q].contiguous(),
        wk=layer.wk[:, kv].contiguous(),
        wv=layer.wv[:, kv].contiguous(),
        wo=layer.wo[q].contiguous(),
        mlp_norm=layer.mlp_norm,
        w_gate=_columns(layer.w_gate, state.tp),
        w_up=_columns(layer.w_up, state.tp),
        w_down=_columns(layer.w_down.T, state.tp).T.contiguous(),
    )


def _columns(weight: torch.Tensor, group: GroupCoordinator) -> torch.Tensor:
    """This rank's equal share of the columns."""
    return weight.chunk(group.world_size, dim=1)[group.rank_in_group].contiguous()
