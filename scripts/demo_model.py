"""A small causal transformer in one process: weights, building blocks, and the whole as reference.

T tokens at hand, S tokens of the keys, C hidden size, H query heads, K key/value heads, G = H / K,
D head dim, M columns of the MLP, V vocabulary. Everything is fp32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from demo_options import VOCABULARY_SIZE, Options
from torch.nn import functional

__all__ = [
    "NORM_EPSILON",
    "KeysAndValues",
    "LayerWeights",
    "ModelWeights",
    "apply_rope",
    "causal_attention",
    "gated_mlp",
    "make_weights",
    "reference_generation",
    "reference_logits",
    "rms_norm",
    "rope_tables",
]

NORM_EPSILON = 1e-6

_ROPE_BASE = 10_000.0
_QUERY_CHUNK = 512  # query rows at a time, so that scores take [H, 512, S] and not [H, S, S]


@dataclass(frozen=True)
class LayerWeights:
    """One layer, or one rank's share of it; a projection is applied as ``x @ w``."""

    attn_norm: torch.Tensor  # [C]
    wq: torch.Tensor  # [C, H * D]
    wk: torch.Tensor  # [C, K * D]
    wv: torch.Tensor  # [C, K * D]
    wo: torch.Tensor  # [H * D, C]
    mlp_norm: torch.Tensor  # [C]
    w_gate: torch.Tensor  # [C, M]
    w_up: torch.Tensor  # [C, M]
    w_down: torch.Tensor  # [M, C]


@dataclass(frozen=True)
class ModelWeights:
    """The whole model, or one rank's share of it."""

    embedding: torch.Tensor  # [V, C]
    layers: list[LayerWeights]
    final_norm: torch.Tensor  # [C]
    lm_head: torch.Tensor  # [C, V]


def make_weights(options: Options, device: torch.device) -> ModelWeights:
    """All weights, from the seed alone: the same on every rank and every device.

    They are scaled so that activations and logits are of order 1.
    """
    generator = torch.Generator().manual_seed(options.seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    def projection(num_in: int, num_out: int) -> torch.Tensor:
        return (normal(num_in, num_out) / math.sqrt(num_in)).to(device)

    def norm() -> torch.Tensor:
        return (1 + 0.1 * normal(options.hidden)).to(device)

    def layer() -> LayerWeights:
        c, m = options.hidden, options.mlp
        kv = options.kv_heads * options.head_dim
        return LayerWeights(
            attn_norm=norm(),
            wq=projection(c, c),
            wk=projection(c, kv),
            wv=projection(c, kv),
            wo=projection(c, c),
            mlp_norm=norm(),
            w_gate=projection(c, m),
            w_up=projection(c, m),
            w_down=projection(m, c),
        )

    return ModelWeights(
        embedding=normal(VOCABULARY_SIZE, options.hidden).to(device),
        layers=[layer() for _ in range(options.layers)],
        final_norm=norm(),
        lm_head=projection(options.hidden, VOCABULARY_SIZE),
    )


def rms_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + NORM_EPSILON) * weight


def gated_mlp(x: torch.Tensor, layer: LayerWeights) -> torch.Tensor:
    """[T, C] -> [T, C]; a partial sum if `layer` has a share of the columns."""
    return (functional.silu(x @ layer.w_gate) * (x @ layer.w_up)) @ layer.w_down


def rope_tables(positions: torch.Tensor, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines, [T, 1, D / 2] each, for tokens at `positions` [T]."""
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float64)
    angles = positions[:, None].double() * _ROPE_BASE ** (-exponents / head_dim)
    return angles.cos().float()[:, None], angles.sin().float()[:, None]


def apply_rope(x: torch.Tensor, tables: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Rotary position embedding of `x` [T, heads, D]."""
    cos, sin = tables
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def causal_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, first_position: int
) -> torch.Tensor:
    """Attention of consecutive tokens to themselves and to all before them.

    Args:
        q: [T, H, D], of the tokens at `first_position` and on.
        k, v: [S, K, D], of all tokens from position 0 on; S >= first_position + T.

    Returns:
        [T, H * D].
    """
    k, v = k.permute(1, 2, 0), v.transpose(0, 1)  # [K, D, S], [K, S, D]
    results = []
    for rows in q.split(_QUERY_CHUNK):
        end = first_position + len(rows)
        results.append(_attend(rows, k[..., :end], v[:, :end], first_position))
        first_position = end
    return torch.cat(results)


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, first_position: int) -> torch.Tensor:
    """One chunk: q [T, H, D], k [K, D, S], v [K, S, D] with S = first_position + T."""
    num_kv_heads, head_dim, num_keys = k.shape
    num_queries = len(q)
    grouped = q.view(num_queries, num_kv_heads, -1, head_dim).permute(1, 2, 0, 3)  # [K, G, T, D]
    scores = grouped.flatten(1, 2) @ k / math.sqrt(head_dim)  # [K, G * T, S]
    positions = torch.arange(num_keys, device=q.device)
    hidden = positions > positions[first_position:, None]  # [T, S]
    scores = scores.view(num_kv_heads, -1, num_queries, num_keys).masked_fill(hidden, -math.inf)
    values = scores.softmax(-1).flatten(1, 2) @ v  # [K, G * T, D]
    values = values.view(num_kv_heads, -1, num_queries, head_dim)
    return values.permute(2, 0, 1, 3).flatten(1)


class KeysAndValues:
    """All keys and values of one text so far, of every layer."""

    def __init__(self) -> None:
        self._of_layer: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    @property
    def num_tokens(self) -> int:
        return len(self._of_layer[0][0]) if self._of_layer else 0

    def extended(
        self, layer: int, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Those of the tokens that follow, [T, K, D] each -> those of all tokens, [S, K, D]."""
        if layer in self._of_layer:
            k, v = (torch.cat(pair) for pair in zip(self._of_layer[layer], (k, v), strict=True))
        self._of_layer[layer] = k, v
        return k, v


def reference_logits(
    options: Options,
    weights: ModelWeights,
    token_ids: torch.Tensor,
    on_layer: Callable[[int], None] | None = None,
    past: KeysAndValues | None = None,
) -> torch.Tensor:
    """The whole model in this process, with all weights: token ids [T] -> logits [T, V].

    Args:
        on_layer: called with the number of layers done.
        past: of the tokens before these; those of these are added.
    """
    past = KeysAndValues() if past is None else past
    first = past.num_tokens
    positions = torch.arange(first, first + len(token_ids), device=token_ids.device)
    rope = rope_tables(positions, options.head_dim)
    heads = (len(token_ids), -1, options.head_dim)
    x = weights.embedding[token_ids]
    for number, layer in enumerate(weights.layers):
        normed = rms_norm(x, layer.attn_norm)
        q = apply_rope((normed @ layer.wq).view(heads), rope)
        k = apply_rope((normed @ layer.wk).view(heads), rope)
        k, v = past.extended(number, k, (normed @ layer.wv).view(heads))
        x = x + causal_attention(q, k, v, first) @ layer.wo
        x = x + gated_mlp(rms_norm(x, layer.mlp_norm), layer)
        if on_layer is not None:
            on_layer(number + 1)
    return rms_norm(x, weights.final_norm) @ weights.lm_head


def reference_generation(
    options: Options, weights: ModelWeights, token_ids: torch.Tensor, num_new: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The likeliest `num_new` tokens after token ids [T], one at a time, and the logits of each.

    Returns:
        int64 [num_new], and [num_new, V].
    """
    past = KeysAndValues()
    all_logits: list[torch.Tensor] = []
    for _ in range(num_new):
        logits = reference_logits(options, weights, token_ids, past=past)[-1]
        all_logits.append(logits)
        token_ids = logits.argmax(keepdim=True)
    stacked = torch.stack(all_logits)
    return stacked.argmax(-1), stacked
