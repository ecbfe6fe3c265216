"""The transformer of demo_model.py over the ranks of a job: texts that are there as a whole.

N sequences, S tokens of this rank, T tokens of all ranks of the cp group, C hidden size, H and K
query and key/value heads of this rank, D head dim, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias, cast

import torch
from demo_collectives import CallTimer
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

__all__ = ["ParallelTransformer", "share_of_model"]

KeepKv: TypeAlias = Callable[[int, torch.Tensor, torch.Tensor], None]
"""Takes the number of a layer and this rank's keys and values there, [S, K, D] each."""


class ParallelTransformer:
    """This rank's part of the model.

    Attention heads are split over attn_tp, the texts in zigzag over cp, the MLP and the vocabulary
    over tp. Where cp is inside tp, the ranks of a tp group hold different tokens, so what is split
    over tp first gathers the tokens over cp.

    Args:
        options: the sizes.
        share: this rank's share of the weights.
        state: the groups.
        seq_lens: tokens of each text.
        timed: wraps every collective.

    Attributes:
        plan: which rank of the cp group has which tokens.
    """

    def __init__(
        self,
        options: Options,
        share: ModelWeights,
        state: ParallelState,
        seq_lens: Sequence[int],
        timed: CallTimer,
    ) -> None:
        self._tp, self._cp, self._attn_tp = state.tp, state.cp, state.attn_tp
        self._cp_is_inside_tp = state.layout.cp_layout == "inside_tp"
        self._head_dim = options.head_dim
        self._share = share
        self._timed = timed
        self.plan = ContextParallelPlan(seq_lens, state.cp.world_size)
        cp_rank = state.cp.rank_in_group
        self._tokens = self.plan.token_indices(cp_rank, state.device)
        self._blocks = _query_blocks(self.plan, cp_rank)
        self._rope = rope_tables(self.plan.positions(cp_rank, state.device), options.head_dim)
        self._kv_gather = PipelinedKvGather(state.cp, self.plan.num_tokens)
        self._last_rows, self._last_of = _last_tokens(self.plan, cp_rank, state.device)

    def logits(
        self, token_ids: torch.Tensor, on_layer: Callable[[int], None]
    ) -> torch.Tensor | None:
        """Token ids of all texts -> logits [T, V] on global rank 0, else None.

        Collective among all ranks. `on_layer` is called with the number of layers done.
        """

        def after_layer(layer: int, _: torch.Tensor, __: torch.Tensor) -> None:
            on_layer(layer + 1)

        return self._collected(self._next_byte(self._forward(token_ids, after_layer)))

    def prefill(self, token_ids: torch.Tensor, keep: KeepKv) -> torch.Tensor:
        """Token ids of all texts -> the last token of each, normalized: [N, C], on every rank.

        Collective among all ranks. `keep` is called with the number of each layer, from 0, and its
        keys and values of this rank's tokens and heads.
        """
        x = self._forward(token_ids, keep)
        # Each is on one rank of the cp group; the others add zeros.
        last = x.new_zeros(len(self.plan.seq_lens), x.shape[1])
        last[self._last_of] = x[self._last_rows]
        return self._all_reduce(self._cp, last)

    def _forward(self, token_ids: torch.Tensor, after_layer: KeepKv) -> torch.Tensor:
        """Token ids of all texts -> this rank's tokens after all layers, normalized: [S, C]."""
        x = self._share.embedding[token_ids[self._tokens]]
        for number, layer in enumerate(self._share.layers):
            attended, k, v = self._attention(rms_norm(x, layer.attn_norm), layer)
            x = x + attended
            x = x + self._mlp(rms_norm(x, layer.mlp_norm), layer)
            after_layer(number, k, v)
        return rms_norm(x, self._share.final_norm)

    def _attention(
        self, x: torch.Tensor, layer: LayerWeights
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """[S, C] -> [S, C], and this rank's keys and values, [S, K, D] each.

        The gathers of keys and values run beside the next projection.
        """
        own_k = apply_rope(self._heads(x @ layer.wk), self._rope)
        self._start_gather(own_k)
        own_v = self._heads(x @ layer.wv)
        self._start_gather(own_v)
        q = apply_rope(self._heads(x @ layer.wq), self._rope)
        k, v = self._finish_gather(), self._finish_gather()
        attended = [
            causal_attention(q[each.rows], k[each.keys], v[each.keys], each.first_position)
            for each in self._blocks
        ]
        # A rank has no tokens at all where the texts are shorter than the cp group.
        rows = torch.cat(attended) if attended else q.flatten(1)
        return self._all_reduce(self._attn_tp, rows @ layer.wo), own_k, own_v

    def _mlp(self, x: torch.Tensor, layer: LayerWeights) -> torch.Tensor:
        """[S, C] -> [S, C]."""
        partial = gated_mlp(self._tokens_of_tp_group(x), layer)
        return self._own_tokens(self._all_reduce(self._tp, partial))

    def _next_byte(self, x: torch.Tensor) -> torch.Tensor:
        """[S, C] -> logits [S, V]."""
        share = self._tokens_of_tp_group(x) @ self._share.lm_head
        with self._timed(self._tp, "all_gather"):
            logits = self._tp.all_gather(share, dim=-1)
        return self._own_tokens(logits)

    def _collected(self, logits: torch.Tensor) -> torch.Tensor | None:
        """This rank's logits [S, V] -> those of the texts, in order, on global rank 0."""
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


def share_of_model(weights: ModelWeights, options: Options, state: ParallelState) -> ModelWeights:
    """This rank's heads, MLP columns and columns of the vocabulary, copied; the rest is shared."""
    return ModelWeights(
        embedding=weights.embedding,
        layers=[_share_of_layer(layer, options, state) for layer in weights.layers],
        final_norm=weights.final_norm,
        lm_head=_columns(weights.lm_head, state.tp),
    )


@dataclass(frozen=True)
class _QueryBlock:
    """Consecutive queries of one sequence.

    Attributes:
        rows: where this rank has them.
        keys: the sequence's tokens up to the last of them, among those of all sequences.
        first_position: of the first query, in its sequence.
    """

    rows: slice
    keys: slice
    first_position: int


def _query_blocks(plan: ContextParallelPlan, cp_rank: int) -> list[_QueryBlock]:
    """The blocks that have queries."""
    blocks: list[_QueryBlock] = []
    lengths = plan.attention_lengths(cp_rank)
    row = first_token = 0
    for seq_len, q_lens, kv_lens in zip(
        plan.seq_lens, lengths.q_lens, lengths.kv_lens, strict=True
    ):
        for q_len, kv_len in zip(q_lens, kv_lens, strict=True):
            if q_len:
                keys = slice(first_token, first_token + kv_len)
                blocks.append(_QueryBlock(slice(row, row + q_len), keys, kv_len - q_len))
            row += q_len
        first_token += seq_len
    return blocks


def _last_tokens(
    plan: ContextParallelPlan, cp_rank: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """This rank's rows of sequences' last tokens, and the sequences: int64 [n] each, n <= N."""
    found: list[tuple[int, int]] = []
    end = 0
    for number, seq_len in enumerate(plan.seq_lens):
        end += seq_len
        owner, row = plan.owner(end - 1)
        if owner == cp_rank:
            found.append((row, number))
    rows, sequences = torch.tensor(found, dtype=torch.int64).view(-1, 2).T.to(device)
    return rows, sequences


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
