"""The transformer of demo_model.py over the ranks of a job.

S tokens of this rank, T tokens of all ranks of the cp group, C hidden size, H and K query and
key/value heads of this rank, D head dim, V vocabulary.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import cast

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

from distcomm import (
    ContextParallelPlan,
    GroupCoordinator,
    ParallelState,
    PipelinedKvGather,
    all_gather_kv,
)

__all__ = ["CallTimer", "ParallelTransformer"]


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


class ParallelTransformer:
    """This rank's part of the model.

    Attention heads are split over attn_tp, the text in zigzag over cp, the MLP and the vocabulary
    over tp. Where cp is inside tp, the ranks of a tp group hold different tokens, so what is split
    over tp first gathers the tokens over cp.

    Args:
        options: the sizes.
        weights: all weights; this rank's share is copied.
        state: the groups.
        num_tokens: tokens of the text.
        timed: wraps every collective.

    Attributes:
        plan: which rank of the cp group has which tokens.
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
        self.plan = ContextParallelPlan([num_tokens], state.cp.world_size)
        cp_rank = state.cp.rank_in_group
        self._tokens = self.plan.token_indices(cp_rank, state.device)
        self._attention_lengths = self.plan.attention_lengths(cp_rank)
        self._rope = rope_tables(self.plan.positions(cp_rank, state.device), options.head_dim)
        self._kv_gather = PipelinedKvGather(state.cp, num_tokens)

    def logits(
        self, token_ids: torch.Tensor, on_layer: Callable[[int], None]
    ) -> torch.Tensor | None:
        """Token ids of the whole text -> logits [T, V] on global rank 0, else None.

        Collective among all ranks. `on_layer` is called with the number of layers done.
        """
        x = self._embedding[token_ids[self._tokens]]
        for number, layer in enumerate(self._layers, start=1):
            x = x + self._attention(rms_norm(x, layer.attn_norm), layer)
            x = x + self._mlp(rms_norm(x, layer.mlp_norm), layer)
            on_layer(number)
        return self._collected(self._next_byte(rms_norm(x, self._final_norm)))

    def _attention(self, x: torch.Tensor, layer: LayerWeights) -> torch.Tensor:
        """[S, C] -> [S, C]. The gathers of keys and values run beside the next projection."""
        self._start_gather(apply_rope(self._heads(x @ layer.wk), self._rope))
        self._start_gather(self._heads(x @ layer.wv))
        q = apply_rope(self._heads(x @ layer.wq), self._rope)
        k, v = self._finish_gather(), self._finish_gather()
        (q_lens,), (kv_lens,) = self._attention_lengths.q_lens, self._attention_lengths.kv_lens
        attended = [
            causal_attention(block, k, v, kv_len - len(block))
            for block, kv_len in zip(q.split(q_lens), kv_lens, strict=True)
            if len(block)
        ]
        # A rank has no tokens at all where the text is shorter than the cp group.
        rows = torch.cat(attended) if attended else q.flatten(1)
        return self._all_reduce(self._attn_tp, rows @ layer.wo)

    def _mlp(self, x: torch.Tensor, layer: LayerWeights) -> torch.Tensor:
        """[S, C] -> [S, C]."""
        partial = gated_mlp(self._tokens_of_tp_group(x), layer)
        return self._own_tokens(self._all_reduce(self._tp, partial))

    def _next_byte(self, x: torch.Tensor) -> torch.Tensor:
        """[S, C] -> logits [S, V]."""
        share = self._tokens_of_tp_group(x) @ self._lm_head
        with self._timed(self._tp, "all_gather"):
            logits = self._tp.all_gather(share, dim=-1)
        return self._own_tokens(logits)

    def _collected(self, logits: torch.Tensor) -> torch.Tensor | None:
        """This rank's logits [S, V] -> those of the text, in order, on global rank 0."""
        if self._cp.first_rank != 0:
            return None  # another cp group has the same logits
        with self._timed(self._cp, "all_gather_kv"):
            gathered = all_gather_kv(self._cp, self.plan, logits)
        return gathered if self._cp.rank == 0 else None

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(len(x), x.shape[1] // self._head_dim, self._head_dim)

    def _start_gather(self, x: torch.Tensor) -> None:
        """[S, K, D] -> [T, K, D], beside what follows."""
        with self._timed(self._cp, "all_gather_kv"):
            self._kv_gather.start(self.plan, x)

    def _finish_gather(self) -> torch.Tensor:
        with self._timed(self._cp, "all_gather_kv"):
            return cast(torch.Tensor, self._kv_gather.finish())  # as one went in

    def _all_reduce(self, group: GroupCoordinator, x: torch.Tensor) -> torch.Tensor:
        with self._timed(group, "all_reduce"):
            return group.all_reduce(x, out=x)

    def _tokens_of_tp_group(self, x: torch.Tensor) -> torch.Tensor:
        """[S, C] -> all tokens of this rank's tp group: [T, C], rank after rank, or x itself."""
        if not self._cp_is_inside_tp:
            return x
        with self._timed(self._cp, "all_gatherv"):
            return self._cp.all_gatherv(x, self.plan.tokens_per_rank)

    def _own_tokens(self, x: torch.Tensor) -> torch.Tensor:
        """The way back from `_tokens_of_tp_group`."""
        if not self._cp_is_inside_tp:
            return x
        shares: tuple[torch.Tensor, ...] = x.split(self.plan.tokens_per_rank)
        return shares[self._cp.rank_in_group]


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
