"""Tables of algorithms: which they are, and what is wrong with a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from distcomm.algorithms import (
    ALGORITHMS,
    AlgorithmTable,
    SizeRanges,
    load_tables,
    table_for,
)
from distcomm.errors import ArgumentError

RANGES = {op: [[4096, names[0]], [None, "nccl"]] for op, names in ALGORITHMS.items()}
BOTH = {"ordinary": RANGES, "symmetric": RANGES}
TABLE = {"gpu": "GPU X", "world_size": 4, "eager": BOTH, "captured": BOTH}
ALL_REDUCE = ("eager", "ordinary", "all_reduce")


def written(folder: Path, content: Any) -> str:
    path = folder / "table.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def test_a_range_ends_with_its_limit() -> None:
    ranges = SizeRanges((1024, 65536), ("a", "b", "c"))
    sizes = {0: "a", 1024: "a", 1040: "b", 65536: "b", 65552: "c", 1 << 30: "c"}
    assert {size: ranges.of(size) for size in sizes} == sizes


def test_the_table_of_a_file_is_for_one_gpu_and_size(tmp_path: Path) -> None:
    tune = written(tmp_path, {"tables": [TABLE]})
    tables = load_tables(tune)
    table = table_for(tune, tables, "GPU X", 4)
    assert table.ranges[ALL_REDUCE] == SizeRanges((4096,), ("one_shot_push", "nccl"))
    assert table.source == f"{tune}: GPU X x 4"
    for gpu, world_size in (("GPU X", 2), ("GPU Y", 4)):
        assert table_for(tune, tables, gpu, world_size).source == "no measurements for this GPU"


def test_nccl_alone() -> None:
    table = table_for("nccl", [], "GPU X", 4)
    assert {ranges.of(16) for ranges in table.ranges.values()} == {"nccl"}


def test_what_is_shipped_can_be_read() -> None:
    tables = load_tables("shipped")
    for world_size in (2, 4):
        table = table_for("shipped", tables, "NVIDIA H200", world_size)
        assert table.source == f"shipped: NVIDIA H200 x {world_size}"
        assert len(table.ranges) == 4 * len(ALGORITHMS)
        assert table.ranges["captured", "ordinary", "all_reduce"].of(1024) == "one_shot_push"
    assert table_for("startup", load_tables("startup"), "NVIDIA H200", 4).source == (
        "no measurements for this GPU"
    )


@pytest.mark.parametrize(
    "content", ["", "[]", {}, {"tables": 3}, {"tables": ["x"]}, {"tables": None}]
)
def test_a_file_that_holds_no_tables_is_refused(content: Any, tmp_path: Path) -> None:
    tune = written(tmp_path, content)
    with pytest.raises(ArgumentError, match=r"tune must be 'shipped', 'startup', 'nccl'"):
        load_tables(tune)


@pytest.mark.parametrize("tune", ["", 3, None, "/nowhere/at/all.json"])
def test_what_names_no_table_is_refused(tune: Any) -> None:
    with pytest.raises(ArgumentError, match="tune must be"):
        load_tables(tune)


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [[1024, "nccl"]],
        [[2048, "nccl"], [1024, "nccl"], [None, "nccl"]],
        [[1024, "nccl"], [1024, "nccl"], [None, "nccl"]],
        [[-1, "nccl"], [None, "nccl"]],
        [[None, "magic"]],
        [["1024", "nccl"], [None, "nccl"]],
        [None],
        3,
    ],
)
def test_ranges_must_ascend_to_one_without_a_limit(rows: Any) -> None:
    with pytest.raises(ArgumentError, match="ranges for all_reduce are"):
        parse_with({**RANGES, "all_reduce": rows})


def test_every_op_needs_ranges() -> None:
    few = {op: rows for op, rows in RANGES.items() if op != "all_gather"}
    with pytest.raises(ArgumentError, match="ranges for eager calls of all_gather on ordinary"):
        parse_with(few)


def test_ordinary_tensors_have_no_algorithm_of_symmetric_ones() -> None:
    direct = {**RANGES, "all_reduce": [[None, "two_shot_direct"]]}
    with pytest.raises(ArgumentError, match="ranges for all_reduce are"):
        parse_with(direct)
    found = AlgorithmTable.parse("a file", {**TABLE, "eager": {**BOTH, "symmetric": direct}})
    assert found.ranges["eager", "symmetric", "all_reduce"].of(1) == "two_shot_direct"


def parse_with(ordinary: Any) -> AlgorithmTable:
    return AlgorithmTable.parse("a file", {**TABLE, "eager": {**BOTH, "ordinary": ordinary}})
