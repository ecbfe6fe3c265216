"""The demo: it finds what it should find, and says what is wrong in one place."""

import textwrap
from pathlib import Path

import pytest

from tests.cpu.demo_runs import (
    DEMO,
    REPOSITORY,
    TEXT,
    Options,
    parse_options,
    run,
    run_demo,
    run_torchrun,
    table,
)

# ---- runs -----------------------------------------------------------------------------------


def test_four_ranks_with_cp_inside_tp() -> None:
    done = run_demo("--nproc", 4, "--layers", 2, "--max-tokens", 256)

    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert "4 ranks, cp inside_tp" in done.stdout
    assert "rank 0: device cpu, local rank 0, gloo" in done.stdout
    assert "256 tokens (bytes), in zigzag 128 + 128 over the ranks of a cp group" in done.stdout
    over_ranks, in_one = done.stdout.split("in one process\n")[:2]
    for part in (over_ranks, in_one):
        assert "  layer 1 of 2 " in part
        assert "  layer 2 of 2 " in part
    assert "equal predictions   256 of 256" in done.stdout
    assert done.stdout.endswith("\nOK\n")
    hidden_bytes, logits_bytes = 128 * 256 * 4, 128 * 256 * 4  # of a rank's 128 tokens
    kv_bytes = 128 * 128 * 4 // 2  # of one of two attn_tp ranks
    assert {key: cells[:3] for key, cells in table(done.stdout).items()} == {
        # Keys and values of two layers, and the logits.
        ("all_gather_kv", "cp"): ["gloo", "5", f"{4 * kv_bytes + logits_bytes:,}"],
        ("all_reduce", "attn_tp"): ["gloo", "2", f"{2 * hidden_bytes:,}"],
        ("all_gatherv", "cp"): ["gloo", "3", f"{3 * hidden_bytes:,}"],
        ("all_reduce", "tp"): ["gloo", "2", f"{2 * 2 * hidden_bytes:,}"],
        ("all_gather", "tp"): ["gloo", "1", f"{2 * logits_bytes // 4:,}"],
    }


def test_eight_ranks_with_cp_beside_tp_shared_kv_heads_and_uneven_shares() -> None:
    sizes = ("--nproc", 8, "--tp", 4, "--cp", 2, "--layers", 2, "--kv-heads", 2)

    done = run_demo(*sizes, "--max-tokens", 249, "--cp-layout", "beside_tp")

    assert done.returncode == 0, done.stderr
    assert "8 ranks, cp beside_tp" in done.stdout
    assert "249 tokens (bytes), in zigzag 125 + 124 over" in done.stdout
    assert "equal predictions   249 of 249" in done.stdout
    assert ("all_gatherv", "cp") not in table(done.stdout)
    assert done.stdout.endswith("\nOK\n")


def test_fewer_tokens_than_blocks() -> None:
    done = run_demo("--nproc", 3, "--tp", 1, "--cp", 3, "--layers", 2, "--max-tokens", 2)

    assert done.returncode == 0, done.stderr
    assert "2 tokens (bytes), in zigzag 1 + 1 + 0 over" in done.stdout
    assert done.stdout.endswith("\nOK\n")


def test_a_difference_above_the_tolerance_fails() -> None:
    done = run_demo("--nproc", 2, "--layers", 1, "--max-tokens", 64, "--tolerance", 0)

    assert done.returncode == 1
    assert done.stdout.endswith("\nFAILED\n")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "wrong_call",
    [
        "GroupCoordinator.all_reduce = lambda self, x, op='sum', out=None: x",
        "PipelinedKvGather.start = lambda self, plan, x: start(self, plan, x.roll(1, 0))",
    ],
    ids=["all_reduce", "kv_gather"],
)
def test_a_wrong_collective_fails(wrong_call: str, tmp_path: Path) -> None:
    script = tmp_path / "wrong.py"
    script.write_text(
        textwrap.dedent(f"""
            import runpy, sys
            sys.path[:0] = [{str(REPOSITORY)!r}, {str(DEMO.parent)!r}]
            from distcomm import GroupCoordinator, PipelinedKvGather

            start = PipelinedKvGather.start
            {wrong_call}
            runpy.run_path({str(DEMO)!r}, run_name="__main__")
        """)
    )

    done = run_torchrun(
        2, script, "--device=cpu", "--layers=1", "--max-tokens=64", f"--input={TEXT}"
    )

    assert done.returncode != 0
    assert done.stdout.endswith("\nFAILED\n"), done.stderr


# ---- input that can't be used ---------------------------------------------------------------


def test_a_missing_input_is_reported_before_anything_starts(tmp_path: Path) -> None:
    path = tmp_path / "absent.txt"

    done = run(DEMO, "--input", path)

    assert done.returncode == 2
    assert done.stdout == ""
    reason = "No such file or directory"
    assert done.stderr == f"demo: error: --input: can't read '{path}': {reason}\n"


def test_an_empty_input_is_reported_before_anything_starts(tmp_path: Path) -> None:
    path = tmp_path / "empty.txt"
    path.touch()

    done = run(DEMO, "--input", path)

    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith(f"demo: error: --input: '{path}' must have at least 2 bytes")
    assert done.stderr.count("\n") == 1


def test_under_torchrun_every_rank_learns_of_a_missing_input(tmp_path: Path) -> None:
    path = tmp_path / "absent.txt"

    done = run_torchrun(2, DEMO, "--device", "cpu", "--input", path)

    assert done.returncode != 0
    assert done.stdout == ""
    assert done.stderr.count(f"can't read '{path}'") == 1
    assert "InputError" not in done.stderr


# ---- options --------------------------------------------------------------------------------


def options_of(command_line: str, **job: int | None) -> Options:
    return parse_options(command_line.split(), **{"world_size": None, "num_gpus": 0, **job})


@pytest.mark.parametrize(
    ("command_line", "job", "sizes"),
    [
        ("", {}, (8, 8, 2)),
        ("", {"num_gpus": 4}, (4, 4, 2)),
        ("", {"num_gpus": 1}, (1, 1, 1)),
        ("--device cpu", {"num_gpus": 4}, (8, 8, 2)),
        ("--nproc 4", {"world_size": 2}, (2, 2, 2)),
        ("--cp-layout beside_tp", {}, (8, 4, 2)),
        ("--cp 4", {}, (8, 8, 4)),
        ("--tp 8", {}, (8, 8, 2)),
        ("--tp 4", {}, (8, 4, 2)),
        ("--tp 2 --nproc 8", {}, (8, 2, 4)),
    ],
)
def test_sizes_that_are_not_given(
    command_line: str, job: dict[str, int], sizes: tuple[int, int, int]
) -> None:
    options = options_of(command_line, **job)

    assert (options.nproc, options.tp, options.cp) == sizes


@pytest.mark.parametrize(
    ("command_line", "message"),
    [
        ("--nproc 8 --tp 5", "world_size must be tp·pp·dp = 5 (inside_tp)"),
        ("--nproc 8 --cp 3", "cp must divide tp = 8 for inside_tp; got 3"),
        ("--tp 4 --cp 2 --cp-layout inside_tp", "world_size must be tp·pp·dp = 4 (inside_tp)"),
        ("--hidden 100", "--hidden must be divisible by --heads = 8; got 100"),
        ("--hidden 24", "--hidden / --heads must be even, for rotary embeddings; got 3"),
        ("--kv-heads 3", "--heads must be divisible by --kv-heads = 3; got 8"),
        ("--heads 2 --kv-heads 2", "--heads must be divisible by attn_tp = 4"),
        (
            "--nproc 6 --tp 6 --cp 1 --heads 12 --hidden 96 --mlp 96",
            "--kv-heads must divide, or be divisible by, attn_tp = 6",
        ),
        ("--mlp 1001", "--mlp must be divisible by --tp = 8; got 1001"),
        (
            "--nproc 3 --heads 6 --kv-heads 3 --hidden 96 --mlp 96",
            "--tp must divide the vocabulary",
        ),
        ("--layers 0", "argument --layers: must be an integer >= 1; got '0'"),
        ("--max-tokens 1", "argument --max-tokens: must be an integer >= 2; got '1'"),
        ("--tolerance nan", "argument --tolerance: must be a number >= 0; got 'nan'"),
        ("--generate 0", "argument --generate: must be an integer >= 1; got '0'"),
        ("--generate 1 --prompts 0", "argument --prompts: must be an integer >= 1; got '0'"),
        ("--prompts 4", "--prompts needs --generate"),
        ("--compile", "--compile needs --generate"),
        ("--device cuda", "--device cuda needs a GPU for each of 8 ranks; got 0"),
    ],
)
def test_options_that_do_not_fit(
    command_line: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        options_of(command_line)

    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_only_rank_0_complains(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")

    with pytest.raises(SystemExit) as stopped:
        options_of("--layers 0")

    assert stopped.value.code == 2
    assert capsys.readouterr().err == ""
