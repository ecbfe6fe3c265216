"""Which rank holds which tokens: the plan against definitions written out by hand."""

from __future__ import annotations

import doctest
import pickle
import random

import pytest
import torch

import distcomm.context_parallel.plan
from distcomm import ArgumentError, ContextParallelPlan
from distcomm.context_parallel.plan import MODES, AttentionLengths, TokenRun


def blocks_of(length: int, num_blocks: int) -> list[list[int]]:
    """Positions of a sequence in blocks, the first of which have one more."""
    share, rest = divmod(length, num_blocks)
    positions = iter(range(length))
    return [[next(positions) for _ in range(share + (b < rest))] for b in range(num_blocks)]


def positions_of(mode: str, length: int, cp_size: int, rank: int) -> list[list[int]]:
    """The definition of each mode: positions of one sequence that a rank holds, by piece."""
    if mode == "round_robin":
        return [list(range(rank, length, cp_size))]
    if mode == "contiguous":
        return [blocks_of(length, cp_size)[rank]]
    blocks = blocks_of(length, 2 * cp_size)
    return [blocks[rank], blocks[2 * cp_size - 1 - rank]]


def seq_starts(seq_lens: list[int]) -> list[int]:
    return [sum(seq_lens[:n]) for n in range(len(seq_lens))]


def random_seq_lens(rng: random.Random, cp_size: int) -> list[int]:
    choices = [0, 1, 2, cp_size, 2 * cp_size - 1, 2 * cp_size, 2 * cp_size + 1, 37, 64]
    return [rng.choice(choices) for _ in range(rng.randrange(6))]


def test_the_docstrings_examples():
    result = doctest.testmod(distcomm.context_parallel.plan)
    assert result.attempted >= 10
    assert result.failed == 0


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("cp_size", range(1, 9))
def test_random_batches_follow_the_definitions(mode: str, cp_size: int):
    rng = random.Random(f"{mode} {cp_size}")
    for _ in range(25):
        seq_lens = random_seq_lens(rng, cp_size)
        plan = ContextParallelPlan(seq_lens, cp_size, mode)
        starts = seq_starts(seq_lens)
        everyone: list[int] = []
        for rank in range(cp_size):
            pieces = [positions_of(mode, length, cp_size, rank) for length in seq_lens]
            positions = [p for sequence in pieces for piece in sequence for p in piece]
            ids = [n for n, sequence in enumerate(pieces) for piece in sequence for _ in piece]
            tokens = [starts[n] + p for n, p in zip(ids, positions, strict=True)]
            assert plan.token_indices(rank).tolist() == tokens
            assert plan.positions(rank).tolist() == positions
            assert plan.sequence_ids(rank).tolist() == ids
            assert plan.tokens_per_rank[rank] == len(tokens)
            assert plan.rank_offsets[rank] == len(everyone)
            assert plan.attention_lengths(rank) == AttentionLengths(
                tuple(tuple(map(len, sequence)) for sequence in pieces),
                tuple(tuple(p[-1] + 1 if p else 0 for p in sequence) for sequence in pieces),
            )
            everyone += tokens
        assert plan.token_order().tolist() == everyone
        assert sorted(everyone) == list(range(plan.num_tokens))
        assert [everyone[row] for row in plan.gathered_rows()] == list(range(plan.num_tokens))
        assert plan.is_gathered_in_order == (everyone == sorted(everyone))


@pytest.mark.parametrize("mode", MODES)
def test_runs_are_the_tokens_in_as_few_pieces_as_possible(mode: str):
    rng = random.Random(mode)
    for _ in range(60):
        cp_size = rng.randrange(1, 9)
        plan = ContextParallelPlan(random_seq_lens(rng, cp_size), cp_size, mode)
        stride = cp_size if mode == "round_robin" else 1
        for rank in range(cp_size):
            runs = plan.runs(rank)
            tokens = [
                run.token_start + i * run.stride for run in runs for i in range(run.num_tokens)
            ]
            assert tokens == plan.token_indices(rank).tolist()
            assert [run.local_start for run in runs] == [
                sum(run.num_tokens for run in runs[:n]) for n in range(len(runs))
            ]
            assert all(run.num_tokens > 0 and run.stride == stride for run in runs)
            ends = [run.token_start + run.num_tokens * stride for run in runs]
            assert all(end != run.token_start for end, run in zip(ends, runs[1:], strict=False))


def test_the_last_rank_of_a_zigzag_has_one_run():
    """Its two blocks are neighbours."""
    plan = ContextParallelPlan([16], cp_size=4)
    assert plan.runs(3) == (TokenRun(0, 6, 4, 1),)
    assert plan.runs(0) == (TokenRun(0, 0, 2, 1), TokenRun(2, 14, 2, 1))


@pytest.mark.parametrize("mode", MODES)
def test_every_token_has_one_owner(mode: str):
    plan = ContextParallelPlan([5, 0, 1, 13], 4, mode)
    for token in range(plan.num_tokens):
        rank, row = plan.owner(token)
        assert plan.token_indices(rank)[row] == token
    for token in (-1, 19, True, 1.0):
        with pytest.raises(ArgumentError, match="token must be between 0 and 18"):
            plan.owner(token)  # type: ignore[arg-type]


def test_ranks_without_tokens_own_none():
    plan = ContextParallelPlan([2], 4)
    assert plan.tokens_per_rank == (1, 1, 0, 0)
    assert [plan.owner(token) for token in range(2)] == [(0, 0), (1, 0)]


def test_the_work_of_a_zigzag_is_balanced():
    """Query-key pairs of a causal mask differ by less than one in a hundred between ranks."""
    plan = ContextParallelPlan([4096], cp_size=8)
    pairs = [int((plan.positions(rank) + 1).sum()) for rank in range(8)]
    assert max(pairs) - min(pairs) <= max(pairs) / 100


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.bool])
def test_shard_and_unshard_are_inverse(mode: str, dtype: torch.dtype):
    plan = ContextParallelPlan([7, 0, 3, 32], 3, mode)
    x = torch.randint(0, 100, (42, 2, 3)).to(dtype)
    shards = [plan.shard(x, rank) for rank in range(3)]
    for rank, shard in enumerate(shards):
        assert torch.equal(shard.byte(), x.byte()[plan.token_indices(rank)])
    assert torch.equal(plan.unshard(shards).byte(), x.byte())


def test_an_empty_batch():
    for mode in MODES:
        plan = ContextParallelPlan([], 2, mode)
        assert plan.tokens_per_rank == (0, 0)
        assert plan.token_order().shape == plan.positions(1).shape == (0,)
        assert plan.runs(0) == ()
        assert plan.attention_lengths(0) == AttentionLengths((), ())
        assert plan.unshard([torch.empty(0, 4), torch.empty(0, 4)]).shape == (0, 4)


def test_cumulative_query_lengths():
    lengths = ContextParallelPlan([8, 3], 2).attention_lengths(0)
    assert lengths.cu_q_lens == [0, 2, 4, 5, 5]


def test_equal_plans_and_no_others_have_equal_digests():
    plans = [
        ContextParallelPlan(seq_lens, cp_size, mode)
        for seq_lens in ([], [1], [12], [1, 2], [2, 1], [0, 12])
        for cp_size in (1, 2)
        for mode in MODES
    ]
    assert len({plan.digest for plan in plans}) == len(plans)
    for plan in plans:
        same = ContextParallelPlan(list(plan.seq_lens), plan.cp_size, plan.mode)
        assert same.digest == plan.digest


def test_index_tensors_are_made_once():
    plan = ContextParallelPlan([9], 2)
    for make in (plan.token_indices, plan.positions, plan.sequence_ids):
        assert make(0) is make(0)
        assert make(0, "cpu") is make(0, torch.device("cpu"))
        assert make(0) is not make(1)
    assert plan.token_order() is plan.token_order()
    assert plan.gathered_rows() is plan.gathered_rows()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (([-1], 2), r"seq_lens must be integers >= 0; got -1"),
        (([1, 2.0], 2), r"seq_lens must be integers >= 0; got 2.0"),
        (([True], 2), r"seq_lens must be integers >= 0; got True"),
        (([1], 0), r"cp_size must be an integer >= 1; got 0"),
        (([1], "2"), r"cp_size must be an integer >= 1; got '2'"),
        (([1], 2, "zig"), r"mode must be one of zigzag, round_robin, contiguous; got 'zig'"),
    ],
)
def test_bad_arguments(arguments: tuple[object, ...], text: str):
    with pytest.raises(ArgumentError, match=text):
        ContextParallelPlan(*arguments)  # type: ignore[arg-type]


def test_bad_ranks_and_rows():
    plan = ContextParallelPlan([5], 2)
    for rank in (-1, 2, "0", None):
        for call in (plan.runs, plan.positions, plan.token_indices, plan.attention_lengths):
            with pytest.raises(ArgumentError, match="rank must be a rank in the group, 0 to 1"):
                call(rank)  # type: ignore[operator]
    with pytest.raises(ArgumentError, match=r"x must be of 5 rows.*shape \[4\]"):
        plan.shard(torch.zeros(4), 0)
    with pytest.raises(ArgumentError, match=r"shards\[1\] must be of 2 rows"):
        plan.unshard([torch.zeros(3), torch.zeros(3)])
    with pytest.raises(ArgumentError, match="shards must be 2 tensors, one per rank; got 1"):
        plan.unshard([torch.zeros(3)])


def test_long_batches_are_shortened_in_text():
    assert repr(ContextParallelPlan([1, 2], 2)) == (
        "ContextParallelPlan([1, 2], cp_size=2, mode='zigzag')"
    )
    assert "... (100 sequences, 300 tokens)" in repr(ContextParallelPlan([3] * 100, 2))


def test_torchs_default_device_is_no_matter():
    with torch.device("meta"):
        plan = ContextParallelPlan([5, 8], 2)
        tokens = plan.token_indices(1)
        assert plan.is_gathered_in_order is False
        assert plan.positions(0).device == tokens.device == torch.device("cpu")
    assert tokens.tolist() == ContextParallelPlan([5, 8], 2).token_indices(1).tolist()


def test_tables_of_inference_mode_serve_autograd():
    plan = ContextParallelPlan([6], 2)
    with torch.inference_mode():
        plan.token_indices(0)
    x = torch.zeros(6, requires_grad=True)
    plan.shard(x, 0).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [1, 1, 0, 0, 0, 1]


def test_a_pickled_plan_is_the_same_plan():
    plan = ContextParallelPlan([5, 8], 2, "contiguous")
    again = pickle.loads(pickle.dumps(plan))
    assert again.digest == plan.digest
    assert again.token_order().tolist() == plan.token_order().tolist()
