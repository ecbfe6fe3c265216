"""The demo's generation: token for token what one process makes, and it notices if it isn't."""

import math
import textwrap
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from distcomm import ContextParallelPlan
from tests.cpu.demo_runs import (
    DEMO,
    REPOSITORY,
    parse_options,
    run,
    run_demo,
    run_torchrun,
    table,
)

# After demo_runs, which makes them importable.
from demo_cache import CacheShape, ShardedKvCache, merged  # isort: skip
from demo_collectives import CallCounts  # isort: skip
from demo_generate import Generation  # isort: skip
from demo_model import causal_attention  # isort: skip
from demo_report import compare_tokens  # isort: skip

# ---- runs -----------------------------------------------------------------------------------


def test_four_ranks_with_cp_inside_tp() -> None:
    done = run_demo("--nproc", 4, "--layers", 2, "--max-tokens", 600, "--generate", 6)

    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert "4 paragraphs, tokens are bytes" in done.stdout
    assert "20 tokens in" in done.stdout  # four prompts, five steps
    assert "(5 steps, eager)" in done.stdout
    assert "equal tokens        24 of 24\n" in done.stdout
    assert done.stdout.endswith("\nOK\n")
    of_token = 4 * 256 * 4  # four sequences' hidden state
    calls = {key: cells[:3] for key, cells in table(done.stdout).items()}
    # Five steps of two layers, of four heads on each rank.
    assert calls["all_gather_into_tensor", "cp"] == ["gloo", "10", f"{10 * 4 * 4 * 33 * 4:,}"]
    for group in ("tp", "attn_tp"):
        expected = ["unfused", "10", f"{10 * of_token:,}"]
        assert calls["all_reduce_rms_norm", group] == expected
        assert calls["all_reduce", group][1] == "12"  # those of the prompts, too
    assert calls["all_gather", "tp"] == ["gloo", "6", f"{6 * 4 * 64 * 4:,}"]
    assert calls["all_gather_kv", "cp"][1] == "4"
    assert calls["all_reduce", "cp"] == ["gloo", "1", f"{of_token:,}"]
    assert ("broadcast", "cp") not in calls


def test_eight_ranks_with_cp_beside_tp_and_shared_kv_heads() -> None:
    sizes = ("--nproc", 8, "--tp", 4, "--cp", 2, "--layers", 2, "--kv-heads", 2)

    done = run_demo(*sizes, "--cp-layout", "beside_tp", "--max-tokens", 900, "--generate", 7)

    assert done.returncode == 0, done.stderr
    assert "8 ranks, cp beside_tp" in done.stdout
    assert "equal tokens        28 of 28\n" in done.stdout
    assert table(done.stdout)["broadcast", "cp"][:3] == ["gloo", "7", str(7 * 4 * 8)]
    assert done.stdout.endswith("\nOK\n")


def test_ranks_without_any_token_of_a_prompt(tmp_path: Path) -> None:
    text = tmp_path / "short.txt"
    text.write_text("a\n\nbcdefghi\n\njk\n")

    done = run(
        DEMO, "--device", "cpu", "--input", text, "--nproc", 4, "--tp", 1, "--cp", 4,
        "--layers", 2, "--prompts", 3, "--generate", 3,
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
    assert "prompt 1      1 tokens  b'a'\n" in done.stdout
    assert "prompt 3      2 tokens  b'jk'\n" in done.stdout
    assert "equal tokens        9 of 9\n" in done.stdout


def test_a_single_token_takes_no_step() -> None:
    done = run_demo("--nproc", 1, "--layers", 1, "--max-tokens", 400, "--generate", 1)

    assert done.returncode == 0, done.stderr
    assert "equal tokens        4 of 4\n" in done.stdout
    assert "decode" not in done.stdout


@pytest.mark.timeout(300)  # a compiler may have to start from nothing
def test_a_compiled_step() -> None:
    sizes = ("--nproc", 2, "--layers", 1, "--max-tokens", 400, "--prompts", 2)

    done = run_demo(*sizes, "--generate", 5, "--compile", timeout_s=280)

    assert done.returncode == 0, done.stderr
    assert "(4 steps, compiled)" in done.stdout
    assert "equal tokens        10 of 10\n" in done.stdout
    gathers = table(done.stdout)["all_gather_into_tensor", "cp"]
    assert gathers[:2] + gathers[3:] == ["gloo", "4", "-"]


@pytest.mark.parametrize(
    "wrong",
    [
        "demo_cache.ShardedKvCache.advance = lambda self, filled_slots: None",
        "demo_generate.merged = lambda attended: attended[0, ..., :-1].flatten(1)",
    ],
    ids=["a token is not counted", "other ranks' tokens are left out"],
)
def test_a_wrong_step_fails(wrong: str, tmp_path: Path) -> None:
    script = tmp_path / "wrong.py"
    script.write_text(
        textwrap.dedent(f"""
            import runpy, sys
            sys.path[:0] = [{str(REPOSITORY)!r}, {str(DEMO.parent)!r}]
            import demo_cache, demo_generate

            {wrong}
            runpy.run_path({str(DEMO)!r}, run_name="__main__")
        """)
    )
    text = tmp_path / "short.txt"  # so that each new token weighs much
    text.write_text("ab\n\ncde\n")
    sizes = ("--layers=1", "--prompts=2", "--generate=5")

    done = run_torchrun(2, script, "--device=cpu", f"--input={text}", *sizes)

    assert done.returncode != 0
    assert done.stdout.endswith("\nFAILED\n"), done.stderr
    # The first token comes from the prompts' pass, which is right.
    assert "new token 1:" not in done.stdout
    assert "prompt 2, new token " in done.stdout


def test_too_few_paragraphs_are_reported_before_anything_starts(tmp_path: Path) -> None:
    path = tmp_path / "one.txt"
    path.write_text("one\n\n\n")

    done = run(DEMO, "--input", path, "--generate", 4)

    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == (
        f"demo: error: --prompts: '{path}' must have 4 paragraphs in its first 4096 bytes; got 1\n"
    )


# ---- the cache ------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_shards_that_are_merged_are_attention_to_all_tokens(world_size: int) -> None:
    heads, kv_heads, dim, num_new = 4, 2, 8, 5
    seq_lens = [1, 13, 4]  # the first is on one rank alone
    torch.manual_seed(world_size)
    plan = ContextParallelPlan(seq_lens, world_size)
    shape = CacheShape(1, kv_heads, dim, num_new)
    k, v = torch.randn(2, sum(seq_lens), kv_heads, dim)
    caches = []
    for rank in range(world_size):
        place = SimpleNamespace(
            rank_in_group=rank, world_size=world_size, device=torch.device("cpu")
        )
        caches.append(ShardedKvCache(plan, place, shape))
        caches[rank].keep_prompts(0, plan.shard(k, rank), plan.shard(v, rank))
    known = [list(pair) for pair in zip(k.split(seq_lens), v.split(seq_lens), strict=True)]
    positions = torch.tensor(seq_lens)

    for _ in range(num_new):
        new_k, new_v = torch.randn(2, len(seq_lens), kv_heads, dim)
        q = torch.randn(len(seq_lens), heads, dim)
        attended = []
        num_known = torch.zeros_like(positions)
        for cache in caches:
            cache.write(0, new_k, new_v)
            filled = cache.filled_slots(positions)
            attended.append(cache.attend(0, q, filled))
            num_known += filled
            cache.advance(filled)
        assert torch.equal(num_known, positions + 1)  # each token on one rank
        result = merged(torch.stack(attended))

        for number, pair in enumerate(known):
            pair[0] = torch.cat((pair[0], new_k[number, None]))
            pair[1] = torch.cat((pair[1], new_v[number, None]))
            expected = causal_attention(q[number, None], *pair, int(positions[number]))
            assert torch.allclose(result[number], expected[0], atol=1e-6)
        positions += 1


def test_a_rank_without_tokens_gives_zeros_and_no_weight() -> None:
    place = SimpleNamespace(rank_in_group=1, world_size=2, device=torch.device("cpu"))
    cache = ShardedKvCache(ContextParallelPlan([1], 2), place, CacheShape(1, 1, 4, 1))

    attended = cache.attend(0, torch.ones(1, 2, 4), torch.zeros(1, dtype=torch.int64))

    assert (attended[..., :-1] == 0).all()
    assert (attended[..., -1] == -math.inf).all()
    other = torch.ones(1, 2, 5)
    assert torch.equal(merged(torch.stack((attended, other))), torch.ones(1, 8))


# ---- the comparison -------------------------------------------------------------------------

OPTIONS = parse_options(["--nproc", "2", "--generate", "2"], world_size=None, num_gpus=0)


def made(tokens: list[list[int]], logits: torch.Tensor) -> Generation:
    return Generation(torch.tensor(tokens), logits, 1.0, 1.0, CallCounts())


def logits_of(tokens: list[list[int]]) -> torch.Tensor:
    """Half a logit ahead of all others."""
    return 0.5 * torch.nn.functional.one_hot(torch.tensor(tokens), 256).float()


def expected_of(tokens: list[list[int]]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    logits = logits_of(tokens)
    return [(torch.tensor(tokens)[:, n], logits[:, n]) for n in range(len(tokens[0]))]


def test_a_token_that_differs_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    logits = logits_of([[1, 2], [3, 9]])
    logits[1, 1, 4] = 0.25

    passed = compare_tokens(made([[1, 2], [3, 9]], logits), expected_of([[1, 2], [3, 4]]), OPTIONS)

    assert not passed
    assert capsys.readouterr().out == (
        "prompt 2, new token 2: 9 (0.25 ahead of 4) over 2 processes, 4 (0.5 ahead of 0) in one\n"
        "equal tokens        3 of 4\n"
        "smallest gap        0.5 between the best and the second-best logit of a token\n"
        "largest difference  0.5 between logits, tolerance 0.0001\n"
        "FAILED\n"
    )


def test_what_follows_a_token_that_differs_is_no_further_difference(
    capsys: pytest.CaptureFixture[str],
) -> None:
    logits = logits_of([[5], [7]])
    logits[1] += 100

    compare_tokens(made([[5], [7]], logits), expected_of([[1], [7]]), OPTIONS)

    out = capsys.readouterr().out
    assert out.startswith("prompt 1, new token 1: 5 ")
    assert "equal tokens        1 of 2\n" in out
    assert "largest difference  0.5 between" in out


@pytest.mark.parametrize("off", [0.001, math.nan])
def test_logits_that_are_too_far_off_fail_though_all_tokens_are_equal(
    off: float, capsys: pytest.CaptureFixture[str]
) -> None:
    tokens = [[1], [2]]
    logits = logits_of(tokens)
    logits[0, 0, 3] += off

    assert not compare_tokens(made(tokens, logits), expected_of(tokens), OPTIONS)
    lenient = replace(OPTIONS, tolerance=0.01)
    assert compare_tokens(made(tokens, logits), expected_of(tokens), lenient) == (off == 0.001)
    assert capsys.readouterr().out.count("equal tokens        2 of 2\n") == 2
