"""What benchmarks tell of the machine, and what they draw."""

from __future__ import annotations

from pathlib import Path

import pytest

from distcomm.bench.conditions import links_gb_s
from distcomm.bench.plot import plot_collective

STATUS = """GPU 0: NVIDIA H200 (UUID: GPU-0)
\t Link 0: 26.562 GB/s
\t Link 1: 26.562 GB/s
\t Link 2: <inactive>
"""


def test_links_are_added_up() -> None:
    assert links_gb_s(STATUS) == 53.1
    assert links_gb_s("") is None


def result(**conditions: object) -> dict[str, object]:
    ways = ("torch.distributed", "NCCL symmetric", "distcomm")
    rows = [
        {"bytes": size, "graph": {way: 2.0 + n + size / 1e5 for n, way in enumerate(ways)}}
        for size in (1024, 1 << 20)
    ]
    rows[0]["graph"]["torch symm_mem one-shot"] = 7.0  # type: ignore[index]
    about = {"world_size": 4, "gpu": "GPU X", "dtype": "bfloat16", **conditions}
    return {"op": "all_reduce", "conditions": about, "rows": rows}


@pytest.mark.parametrize("links", [None, 450.0])
def test_a_figure_has_what_was_measured(links: float | None, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "figures" / "all_reduce.svg"
    plot_collective(result(links_gb_s=links), path)
    text = path.read_text()
    for name in ("torch.distributed", "distcomm", "torch symm_mem one-shot"):
        assert f"<!-- {name} -->" in text
    assert ("<!-- links, nominal 450 GB/s -->" in text) == (links is not None)
    plot_collective(result(links_gb_s=links), path)
    assert path.read_text() == text


def test_a_figure_can_be_png(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plot_collective(result(), tmp_path / "all_reduce.png")
    assert (tmp_path / "all_reduce.png").read_bytes().startswith(b"\x89PNG")
