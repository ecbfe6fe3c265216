"""Generation over the ranks of a job: prompts in one pass, then one token of each at a time.

N sequences, M new tokens of each, C hidden size, H and K query and key/value heads of this rank, D
head dim, W ranks of the cp group, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from demo_cache import CacheShape, ShardedKvCache, merged
from demo_collectives import CallCounts, CallTimer
from demo_model import (
    NORM_EPSILON,
    LayerWeights,
    ModelWeights,
    apply_rope,
    gated_mlp,
    rms_norm,
    rope_tables,
)
from demo_options import VOCABULARY_SIZE, Options
from demo_parallel import ParallelTransformer, share_of_model

from distcomm import ContextParallelPlan, GroupCoordinator, ParallelState

__all__ = ["Decoder", "Generation", "generate", "token_ids_of"]

T = TypeVar("T")


@dataclass(frozen=True)
class Generation:
    """What was generated, and what it took.

    Attributes:
        tokens: int64 [M, N]; the same on all ranks.
        logits: [M, N, V], of which they are the largest.
        prefill_s: seconds for the prompts and the first token of each.
        decode_s: seconds for all other tokens.
        counts: the collectives of both.
    """

    tokens: torch.Tensor
    logits: torch.Tensor
    prefill_s: float
    decode_s: float
    counts: CallCounts


class Decoder:
    """This rank's part of making one token of every sequence at a time.

    Every rank has the tokens of all sequences. Attention heads are split over attn_tp, and keys
    and values over cp, whose ranks merge what each has attended to; MLP and vocabulary are split
    over tp. All that a step reads and changes stays on the device, at the same place and of the
    same shape, so that a step can be captured.

    Args:
        options: the sizes.
        share: this rank's share of the weights.
        state: the groups.
        plan: of the prompts.
        timed: wraps every collective; None for a step that is compiled or captured.

    Attributes:
        cache: this rank's keys and values.
        tokens, logits: as in `Generation`; what isn't made yet is 0.
    """

    def __init__(
        self,
        options: Options,
        share: ModelWeights,
        state: ParallelState,
        plan: ContextParallelPlan,
        timed: CallTimer | None,
    ) -> None:
        self._tp, self._cp, self._attn_tp = state.tp, state.cp, state.attn_tp
        self._cp_is_inside_tp = state.layout.cp_layout == "inside_tp"
        self._head_dim = options.head_dim
        self._share, self._timed = share, timed
        num_kv_heads = share.layers[0].wk.shape[1] // options.head_dim
        shape = CacheShape(options.layers, num_kv_heads, options.head_dim, options.num_new)
        self.cache = ShardedKvCache(plan, state.cp, shape)
        most_tokens = max(plan.seq_lens) + options.num_new
        positions = torch.arange(most_tokens, device=state.device)
        self._cos, self._sin = rope_tables(positions, options.head_dim)
        self._prompt_lens = torch.tensor(plan.seq_lens, device=state.device)
        self._positions = self._prompt_lens.clone()  # of `_token_ids`, in their sequences
        self._token_ids = torch.zeros_like(self._positions)
        self._num_made = torch.zeros(1, dtype=torch.int64, device=state.device)
        made = (options.num_new, len(plan.seq_lens))
        self.tokens = torch.zeros(made, dtype=torch.int64, device=state.device)
        self.logits = torch.zeros(*made, VOCABULARY_SIZE, device=state.device)

    def begin(self, x: torch.Tensor) -> None:
        """The first token of each sequence, from the last of its prompt, normalized: [N, C].

        Collective, as `step` is.
        """
        self.rewind()
        self._choose(x)

    def rewind(self) -> None:
        """Forgets all but the prompts."""
        self.cache.forget_new()
        self._positions.copy_(self._prompt_lens)
        self._num_made.zero_()

    def step(self) -> None:
        """The next token of each sequence. Collective among all ranks."""
        filled_slots = self.cache.filled_slots(self._positions)
        rope = self._cos[self._positions], self._sin[self._positions]
        layers = self._share.layers
        x = self._share.embedding[self._token_ids]
        normed = rms_norm(x, layers[0].attn_norm)
        next_norms = [layer.attn_norm for layer in layers[1:]] + [self._share.final_norm]
        for number, (layer, next_norm) in enumerate(zip(layers, next_norms, strict=True)):
            attended = self._attention(normed, number, rope, filled_slots) @ layer.wo
            normed, x = self._reduce(self._attn_tp, attended, layer.mlp_norm, x)
            normed, x = self._reduce(self._tp, gated_mlp(normed, layer), next_norm, x)
        self.cache.advance(filled_slots)
        self._positions.add_(1)
        self._choose(normed)

    def _attention(
        self,
        x: torch.Tensor,
        number: int,
        rope: tuple[torch.Tensor, torch.Tensor],
        filled_slots: torch.Tensor,
    ) -> torch.Tensor:
        """[N, C] -> [N, H * D], of this rank's heads and all tokens."""
        layer: LayerWeights = self._share.layers[number]
        k = apply_rope(self._heads(x @ layer.wk), rope)
        self.cache.write(number, k, self._heads(x @ layer.wv))
        q = apply_rope(self._heads(x @ layer.wq), rope)
        own = self.cache.attend(number, q, filled_slots)  # [N, H, D + 1]
        everyone = own.new_empty(self._cp.world_size, *own.shape)
        return merged(
            self._call(
                self._cp,
                "all_gather_into_tensor",
                lambda: self._cp.all_gather_into_tensor(everyone, own),
            )
        )

    def _reduce(
        self, group: GroupCoordinator, x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The sum of all ranks' x and the residual, [N, C] each: normalized, and as it is."""
        return self._call(
            group,
            "all_reduce_rms_norm",
            lambda: group.all_reduce_rms_norm(x, weight, residual, eps=NORM_EPSILON),
        )

    def _choose(self, x: torch.Tensor) -> None:
        """Makes the likeliest tokens after those of `x` [N, C] the next ones to go in."""
        share = x @ self._share.lm_head
        logits = self._call(self._tp, "all_gather", lambda: self._tp.all_gather(share, dim=-1))
        chosen = logits.argmax(-1)
        if not self._cp_is_inside_tp:
            # Other tp groups have the same logits but for rounding. All must go on alike.
            self._call(self._cp, "broadcast", lambda: self._cp.broadcast(chosen, src=0))
        self.tokens.index_copy_(0, self._num_made, chosen[None])
        self.logits.index_copy_(0, self._num_made, logits[None])
        self._num_made.add_(1)
        self._token_ids.copy_(chosen)

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(len(x), -1, self._head_dim)

    def _call(self, group: GroupCoordinator, op: str, call: Callable[[], T]) -> T:
        if self._timed is None:
            return call()
        with self._timed(group, op):
            return call()


def generate(
    options: Options,
    weights: ModelWeights,
    state: ParallelState,
    prompts: Sequence[bytes],
    timed: CallTimer,
) -> Generation:
    """Continues all prompts by the likeliest tokens. Collective among all ranks.

    All is done once before it is timed: what is compiled, captured or connected on first use is in
    no number.

    Args:
        timed: wraps the collectives of the prompts; on CPU, unless compiled, also the others.
    """
    share = share_of_model(weights, options, state)
    model = ParallelTransformer(options, share, state, [len(each) for each in prompts], timed)
    is_eager = state.device.type == "cpu" and not options.compile
    decoder = Decoder(options, share, state, model.plan, timed if is_eager else None)
    token_ids = torch.cat([token_ids_of(each, state.device) for each in prompts])

    def prefill() -> None:
        decoder.begin(model.prefill(token_ids, decoder.cache.keep_prompts))

    prefill()
    num_steps = options.num_new - 1
    step, calls_of_replay = _prepared(decoder, options, state) if num_steps else _nothing()

    def decode() -> None:
        for _ in range(num_steps):
            step()

    timed.reset()
    before = CallCounts.of(state)
    prefill_s = _elapsed_s(state, prefill)
    decode_s = _elapsed_s(state, decode)
    counts = CallCounts.of(state) - before + calls_of_replay * num_steps
    return Generation(decoder.tokens, decoder.logits, prefill_s, decode_s, counts)


def token_ids_of(text: bytes, device: torch.device) -> torch.Tensor:
    """int64, one a byte."""
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).long().to(device)


def _nothing() -> tuple[Callable[[], None], CallCounts]:
    return (lambda: None), CallCounts()


def _prepared(
    decoder: Decoder, options: Options, state: ParallelState
) -> tuple[Callable[[], None], CallCounts]:
    """The decoder's step, compiled if asked for and on GPUs captured. Collective.

    Returns:
        The step, after some have been made, and the collectives of one that nobody counts, because
        they are in a graph.
    """
    step: Callable[[], None] = decoder.step
    if options.compile:
        step = torch.compile(step, fullgraph=True, dynamic=False)
    decoder.rewind()
    step()  # not in symmetric memory: ranks may differ in what a compiler allocates
    if state.device.type == "cpu":
        return step, CallCounts()
    decoder.rewind()
    with state.world.symmetric_memory():
        step()  # so that the kernels that symmetric tensors have are loaded before the capture
    before = CallCounts.of(state)
    graph = torch.cuda.CUDAGraph()
    with (
        state.graph_capture(symmetric=True) as c,
        torch.cuda.graph(graph, pool=c.pool, stream=c.stream),  # type: ignore[arg-type]
    ):
        step()
    return graph.replay, CallCounts.of(state) - before


def _elapsed_s(state: ParallelState, work: Callable[[], None]) -> float:
    """Seconds until this rank has done `work`, which all ranks begin together."""
    _synchronize(state)
    state.world.barrier()
    start = time.perf_counter()
    work()
    _synchronize(state)
    return time.perf_counter() - start


def _synchronize(state: ParallelState) -> None:
    if state.device.type == "cuda":
        torch.cuda.synchronize(state.device)
