"""From measurements to ranges of sizes."""

from __future__ import annotations

import json
from pathlib import Path

from distcomm.algorithms import ALGORITHMS, load_tables, table_for
from distcomm.bench.tune import write_tables
from distcomm.calibration import ranges


def test_the_fastest_wins_its_sizes() -> None:
    rows = [
        (1024, {"a": 2.0, "b": 3.0, "nccl": 9.0}),
        (2048, {"a": 2.5, "b": 3.0, "nccl": 9.0}),
        (4096, {"a": 4.0, "b": 3.0, "nccl": 9.0}),
        (8192, {"b": 9.0, "nccl": 8.0}),
    ]
    assert ranges(rows) == [[2048, "a"], [4096, "b"], [None, "nccl"]]


def test_noise_makes_no_range() -> None:
    rows = [(1 << n, {"a": 100.0, "b": 99.5 if n % 2 else 101.0}) for n in range(5)]
    assert ranges(rows) == [[None, "a"]]


def test_what_no_longer_fits_ends_its_range() -> None:
    rows = [(1024, {"a": 1.0, "nccl": 5.0}), (2048, {"nccl": 6.0})]
    assert ranges(rows) == [[1024, "a"], [None, "nccl"]]


def test_the_file_can_be_used(tmp_path: Path) -> None:
    results = []
    for world_size in (2, 4):
        rows = {
            op: [[world_size * 1000, names[0]], [None, "nccl"]] for op, names in ALGORITHMS.items()
        }
        both = {"ordinary": rows, "symmetric": rows}
        table = {"gpu": "GPU X", "world_size": world_size, "eager": both, "captured": both}
        results.append({"conditions": {"torch": "2.11"}, "measured_us": {}, "tables": [table]})
    path = tmp_path / "tables.json"
    write_tables(path, results)
    found = table_for(str(path), load_tables(str(path)), "GPU X", 4)
    assert found.ranges["eager", "ordinary", "all_gather"].limits == (4000,)
    assert json.loads(path.read_text())["conditions"] == [{"torch": "2.11"}] * 2
