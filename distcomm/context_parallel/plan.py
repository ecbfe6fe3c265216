"""Which rank holds which tokens under context parallelism.

Shapes: N sequences, W ranks of the context-parallel group, T tokens of all sequences, S tokens of
one rank, K pieces of a sequence that one rank holds (2 in zigzag, else 1).
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakSet

import torch

from ..errors import ArgumentError
from .tables import DeviceTables

if TYPE_CHECKING:
    from ..group import GroupCoordinator

__all__ = ["MODES", "AttentionLengths", "ContextParallelPlan", "TokenRun"]

T = TypeVar("T")

MODES = ("zigzag", "round_robin", "contiguous")
_CALL = "ContextParallelPlan"


@dataclass(frozen=True)
class TokenRun:
    """Local rows of one rank, one after another, whose tokens are evenly spaced.

    Attributes:
        local_start: the first row of this rank's tensor.
        token_start: its token, counted over all sequences.
        num_tokens: how many rows.
        stride: from one row's token to the next row's; 1 except in round_robin.
    """

    local_start: int
    token_start: int
    num_tokens: int
    stride: int


@dataclass(frozen=True)
class AttentionLengths:
    """What variable-length attention kernels ask for, for one rank's queries.

    A rank's rows are one block of queries after another: the K pieces of the first sequence, those
    of the second, and so on. Block ``(n, k)`` has ``q_lens[n][k]`` queries, and its last one
    attends to the first ``kv_lens[n][k]`` tokens of sequence n. In zigzag and contiguous the
    queries of a block are consecutive, so a causal mask that is aligned to the ends of queries and
    keys ("bottom right") is right for it; in round_robin a mask has to be made from `positions`.
    A block without queries has `kv_lens` 0.

    Attributes:
        q_lens, kv_lens: N entries of K numbers.
    """

    q_lens: tuple[tuple[int, ...], ...]
    kv_lens: tuple[tuple[int, ...], ...]

    @property
    def cu_q_lens(self) -> list[int]:
        """Where each block of queries begins, and where the last one ends; N * K + 1 numbers."""
        starts = [0]
        for lengths in self.q_lens:
            for length in lengths:
                starts.append(starts[-1] + length)
        return starts


class ContextParallelPlan:
    """Where the tokens of a batch are: built once per batch, the same on all ranks.

    The tokens of all sequences, one sequence after another, are numbered from 0: "token order".
    Every sequence is spread over all ranks by itself; nothing is padded, so ranks may hold
    different numbers of tokens, also none. A rank keeps its tokens in token order.

    - ``zigzag``: a sequence is cut into 2W blocks, and rank r holds blocks r and 2W-1-r, so that
      each has an early part, which attends to little, and a late one, which attends to much.
    - ``contiguous``: a sequence is cut into W blocks, and rank r holds block r.
    - ``round_robin``: rank r holds the tokens at positions r, r + W, r + 2W, ...

    Where a sequence can't be cut evenly, the first blocks have one token more.

    Two ranks, sequences of 8 and 3 tokens, so tokens 0 to 7 and 8 to 10:

    >>> plan = ContextParallelPlan([8, 3], cp_size=2)
    >>> [plan.token_indices(rank).tolist() for rank in range(2)]  # 8 = 2+2+2+2, 3 = 1+1+1+0
    [[0, 1, 6, 7, 8], [2, 3, 4, 5, 9, 10]]
    >>> plan.token_order().tolist()  # the token of each row, where rank after rank is concatenated
    [0, 1, 6, 7, 8, 2, 3, 4, 5, 9, 10]
    >>> plan.gathered_rows().tolist()  # and back: the row of each token there
    [0, 1, 5, 6, 7, 8, 2, 3, 4, 9, 10]
    >>> plan.attention_lengths(rank=0)
    AttentionLengths(q_lens=((2, 2), (1, 0)), kv_lens=((2, 8), (1, 0)))

    Four ranks, one sequence of 10 tokens in eight blocks of 2, 2, 1, 1, 1, 1, 1 and 1:

    >>> plan = ContextParallelPlan([10], cp_size=4)
    >>> [plan.token_indices(rank).tolist() for rank in range(4)]
    [[0, 1, 9], [2, 3, 8], [4, 7], [5, 6]]
    >>> plan.tokens_per_rank
    (3, 3, 2, 2)
    >>> contiguous = ContextParallelPlan([10], cp_size=4, mode="contiguous")
    >>> [contiguous.token_indices(rank).tolist() for rank in range(4)]
    [[0, 1, 2], [3, 4, 5], [6, 7], [8, 9]]
    >>> round_robin = ContextParallelPlan([10], cp_size=4, mode="round_robin")
    >>> [round_robin.token_indices(rank).tolist() for rank in range(4)]
    [[0, 4, 8], [1, 5, 9], [2, 6], [3, 7]]

    The ranks compare a plan when it is first used with a group, so a plan is new to all of them or
    to none: make it on every rank, or send each one once.

    Index tensors are int64, made once per device and kept: don't change them. In a CUDA graph
    capture they must exist already, as they do after a call with this plan, or `prepare`.

    Args:
        seq_lens: tokens of each sequence; any number of sequences, of any length from 0.
        cp_size: W.
        mode: one of `MODES`.

    Raises:
        ArgumentError: an argument is none of these.
    """

    def __init__(self, seq_lens: Iterable[int], cp_size: int, mode: str = "zigzag") -> None:
        self.seq_lens = tuple(seq_lens)
        self.cp_size = cp_size
        self.mode = mode
        if any(type(length) is not int or length < 0 for length in self.seq_lens):
            odd = next(each for each in self.seq_lens if type(each) is not int or each < 0)
            raise ArgumentError("seq_lens", "integers >= 0", repr(odd), call=_CALL)
        if type(cp_size) is not int or cp_size < 1:
            raise ArgumentError("cp_size", "an integer >= 1", repr(cp_size), call=_CALL)
        if mode not in MODES:
            raise ArgumentError("mode", f"one of {', '.join(MODES)}", repr(mode), call=_CALL)
        self.num_tokens = sum(self.seq_lens)
        self._stride = cp_size if mode == "round_robin" else 1
        self._starts, self._lengths = self._pieces()
        self.tokens_per_rank: tuple[int, ...] = tuple(self._lengths.sum(dim=(1, 2)).tolist())
        self._tables = DeviceTables()
        self._agreed: WeakSet[GroupCoordinator] = WeakSet()
        self._remembered: dict[str, Any] = {}

    def __repr__(self) -> str:
        lengths = ", ".join(map(str, self.seq_lens[:8]))
        if len(self.seq_lens) > 8:
            lengths += f", ... ({len(self.seq_lens)} sequences, {self.num_tokens} tokens)"
        return f"ContextParallelPlan([{lengths}], cp_size={self.cp_size}, mode={self.mode!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles as its arguments, so that one rank can make a plan for all.

        What the others get is a new plan; so for the first gather, this has to be one here too.
        """
        return type(self), (self.seq_lens, self.cp_size, self.mode)

    # ---- groups -----------------------------------------------------------------------------

    # By object and not by content: a rank that is one batch behind must not go unnoticed because
    # both batches have been seen before.

    def is_agreed_with(self, group: GroupCoordinator) -> bool:
        """Whether the ranks of `group` have found that this plan is the same on all of them."""
        return group in self._agreed

    def note_agreement(self, group: GroupCoordinator) -> None:
        """From now on `is_agreed_with` says so."""
        self._agreed.add(group)

    # ---- integers ---------------------------------------------------------------------------

    @cached_property
    def digest(self) -> bytes:
        """32 bytes that are the same for equal plans, and for no others."""
        text = f"{self.mode} {self.cp_size} {self.seq_lens}"
        return hashlib.sha256(text.encode()).digest()

    @cached_property
    def is_gathered_in_order(self) -> bool:
        """Whether rank after rank, concatenated, is token order."""
        order = self.token_order()
        return bool((order == torch.arange(self.num_tokens, device="cpu")).all())

    @property
    def rank_offsets(self) -> tuple[int, ...]:
        """The row at which each rank's tokens begin, where rank after rank is concatenated."""
        offsets = [0]
        for num_tokens in self.tokens_per_rank[:-1]:
            offsets.append(offsets[-1] + num_tokens)
        return tuple(offsets)

    def owner(self, token: int) -> tuple[int, int]:
        """The rank in the group that holds a token of token order, and its row there."""
        if type(token) is not int or not 0 <= token < self.num_tokens:
            raise ArgumentError(
                "token", f"between 0 and {self.num_tokens - 1}", repr(token), call="owner"
            )
        row = int(self.gathered_rows()[token])
        # Of several ranks that begin at the same row, the last is the one with tokens.
        rank = bisect_right(self.rank_offsets, row) - 1
        return rank, row - self.rank_offsets[rank]

    @cached_property
    def tokens_per_run(self) -> int:
        """How many neighbouring tokens a rank holds, on average over all ranks and sequences."""
        if self._stride > 1:
            return 1
        return self.num_tokens // max(1, int(self._lengths.count_nonzero()))

    def runs(self, rank: int) -> tuple[TokenRun, ...]:
        """Rank `rank`'s rows as the fewest evenly spaced runs, none of them empty."""
        self._check_rank("runs", rank)
        return self.remember(f"runs of {rank}", lambda: self._merged_runs(rank))

    def attention_lengths(self, rank: int) -> AttentionLengths:
        """Lengths of rank `rank`'s blocks of queries, and of the keys they attend to."""
        self._check_rank("attention_lengths", rank)
        lengths = self._lengths[rank]
        last = self._starts[rank] + (lengths - 1) * self._stride - self._seq_starts[:, None]
        kv_lens = torch.where(lengths > 0, last + 1, 0)
        return AttentionLengths(
            q_lens=tuple(map(tuple, lengths.tolist())), kv_lens=tuple(map(tuple, kv_lens.tolist()))
        )

    def remember(self, name: str, make: Callable[[], T]) -> T:
        """What `make` returns, made once per plan and name."""
        if name not in self._remembered:
            self._remembered[name] = make()
        known: T = self._remembered[name]
        return known

    # ---- index tensors ----------------------------------------------------------------------

    def token_indices(self, rank: int, device: torch.device | str = "cpu") -> torch.Tensor:
        """The tokens that rank `rank` holds, in the order of its rows: int64 [S]."""
        self._check_rank("token_indices", rank)

        def build(where: torch.device) -> torch.Tensor:
            return self._expanded(self._starts[rank], self._lengths[rank], where)

        return self._tables.get(f"tokens of {rank}", device, build)

    def positions(self, rank: int, device: torch.device | str = "cpu") -> torch.Tensor:
        """Where in their sequences rank `rank`'s tokens are: int64 [S]."""
        self._check_rank("positions", rank)

        def build(where: torch.device) -> torch.Tensor:
            in_sequence = self._starts[rank] - self._seq_starts[:, None]
            return self._expanded(in_sequence, self._lengths[rank], where)

        return self._tables.get(f"positions of {rank}", device, build)

    def sequence_ids(self, rank: int, device: torch.device | str = "cpu") -> torch.Tensor:
        """Of which sequence each of rank `rank`'s tokens is: int64 [S]."""
        self._check_rank("sequence_ids", rank)

        def build(where: torch.device) -> torch.Tensor:
            counts = self._lengths[rank].sum(dim=1)
            ids = _cpu(range(len(self.seq_lens)))
            return _repeated(ids, counts, self.tokens_per_rank[rank], where)

        return self._tables.get(f"sequences of {rank}", device, build)

    def token_order(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """The token of each row, where rank after rank is concatenated: int64 [T]."""

        def build(where: torch.device) -> torch.Tensor:
            return self._expanded(self._starts, self._lengths, where)

        return self._tables.get("token order", device, build)

    def gathered_rows(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """The row of each token, where rank after rank is concatenated: int64 [T]."""

        def build(where: torch.device) -> torch.Tensor:
            order = self.token_order(where)
            rows = torch.empty_like(order)
            rows[order] = torch.arange(self.num_tokens, device=where)
            return rows

        return self._tables.get("gathered rows", device, build)

    def prepare(self, group: GroupCoordinator) -> None:
        """Makes the index tensors that gathers of `group` need on its device, before a capture.

        Not collective.
        """
        self.token_indices(group.rank_in_group, group.device)
        self.token_order(group.device)

    # ---- tensors ----------------------------------------------------------------------------

    def shard(self, x: torch.Tensor, rank: int) -> torch.Tensor:
        """Rank `rank`'s rows of `x`: [T, ...] -> a new tensor [S, ...], on x's device."""
        self._check_rank("shard", rank)
        _check_rows("shard", "x", x, self.num_tokens)
        return x.index_select(0, self.token_indices(rank, x.device))

    def unshard(self, shards: Sequence[torch.Tensor]) -> torch.Tensor:
        """All ranks' rows in token order: W tensors [S, ...] of one device -> a new [T, ...]."""
        if len(shards) != self.cp_size:
            raise ArgumentError(
                "shards", f"{self.cp_size} tensors, one per rank", len(shards), call="unshard"
            )
        for rank, (shard, rows) in enumerate(zip(shards, self.tokens_per_rank, strict=True)):
            _check_rows("unshard", f"shards[{rank}]", shard, rows)
        gathered = torch.cat(list(shards))
        return gathered.index_select(0, self.gathered_rows(gathered.device))

    # ---- inside -----------------------------------------------------------------------------

    @cached_property
    def _seq_starts(self) -> torch.Tensor:
        """The first token of each sequence: int64 [N]."""
        lengths = _cpu(self.seq_lens)
        return lengths.cumsum(0) - lengths

    def _pieces(self) -> tuple[torch.Tensor, torch.Tensor]:
        """First token and number of tokens of every piece: int64 [W, N, K] each."""
        lengths = _cpu(self.seq_lens)[:, None]
        ranks = _cpu(range(self.cp_size))
        if self.mode == "round_robin":
            starts = self._seq_starts[:, None] + ranks
            counts = (lengths - ranks + self.cp_size - 1).div(self.cp_size, rounding_mode="floor")
            return starts.T[..., None], counts.T[..., None]
        num_blocks = 2 * self.cp_size if self.mode == "zigzag" else self.cp_size
        share, rest = lengths // num_blocks, lengths % num_blocks
        blocks = _cpu(range(num_blocks))
        starts = self._seq_starts[:, None] + blocks * share + torch.minimum(blocks, rest)
        counts = share + (blocks < rest)
        mine = torch.stack((ranks, num_blocks - 1 - ranks), dim=1)
        if self.mode == "contiguous":
            mine = ranks[:, None]
        return starts[:, mine].transpose(0, 1), counts[:, mine].transpose(0, 1)

    def _merged_runs(self, rank: int) -> tuple[TokenRun, ...]:
        runs: list[TokenRun] = []
        local_start = 0
        starts, lengths = self._starts[rank].flatten(), self._lengths[rank].flatten()
        for start, length in zip(starts.tolist(), lengths.tolist(), strict=True):
            if not length:
                continue
            last = runs[-1] if runs else None
            if last is not None and start == last.token_start + last.num_tokens * self._stride:
                runs[-1] = TokenRun(
                    last.local_start, last.token_start, last.num_tokens + length, self._stride
                )
            else:
                runs.append(TokenRun(local_start, start, length, self._stride))
            local_start += length
        return tuple(runs)

    def _expanded(
        self, starts: torch.Tensor, lengths: torch.Tensor, device: torch.device
    ) -> torch.Tensor:
        """Pieces that follow one another -> what each row has: its start, and on by the stride."""
        starts, lengths = starts.flatten(), lengths.flatten()
        first_rows = lengths.cumsum(0) - lengths
        num_rows = int(lengths.sum())
        base = _repeated(starts - first_rows * self._stride, lengths, num_rows, device)
        return base + torch.arange(num_rows, device=device) * self._stride

    def _check_rank(self, call: str, rank: int) -> None:
        if type(rank) is not int or not 0 <= rank < self.cp_size:
            raise ArgumentError(
                "rank", f"a rank in the group, 0 to {self.cp_size - 1}", repr(rank), call=call
            )


def _cpu(values: Iterable[int]) -> torch.Tensor:
    """int64, on CPU whatever torch's default device is."""
    return torch.tensor(list(values), dtype=torch.int64, device="cpu")


def _check_rows(call: str, argument: str, x: torch.Tensor, rows: int) -> None:
    if x.dim() == 0 or len(x) != rows:
        raise ArgumentError(
            argument, f"of {rows} rows, as the plan says", f"shape {list(x.shape)}", call=call
        )


def _repeated(
    values: torch.Tensor, counts: torch.Tensor, total: int, device: torch.device
) -> torch.Tensor:
    """`values[i]`, `counts[i]` times each, on `device`; only the short lists travel there."""
    table = torch.stack((values, counts))
    if device.type == "cuda":
        table = table.pin_memory()
    values, counts = table.to(device, non_blocking=True)
    return values.repeat_interleave(counts, output_size=total)
