#!/usr/bin/env python3
"""Writes the tables of docs/performance.md and README.md anew, from the files in docs/results.

A table stands between ``<!-- table: NAME -->`` and ``<!-- end -->``; NAME is one of `TABLES`.

python scripts/update_tables.py [--check]
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
DOCUMENTS = ("docs/performance.md", "README.md")
TORCH = "torch.distributed"
OURS = ("distcomm", "distcomm, symmetric buffers")
OTHERS = (TORCH, "NCCL", "NCCL symmetric", "torch symm_mem one-shot", "torch symm_mem two-shot")
Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; fail if it would")
    options = parser.parse_args()
    outdated = []
    for name in DOCUMENTS:
        path = ROOT / name
        text = path.read_text()
        updated = re.sub(
            r"(<!-- table: (.+?) -->\n).*?(<!-- end -->)", renewed, text, flags=re.DOTALL
        )
        if updated != text:
            outdated.append(name)
            if not options.check:
                path.write_text(updated)
    if options.check and outdated:
        sys.exit(f"not as docs/results says: {', '.join(outdated)}")


def renewed(match: re.Match[str]) -> str:
    """A table as its result says; as it is where that isn't there yet."""
    try:
        table = TABLES[match[2]]()
    except FileNotFoundError as error:
        print(f"{match[2]}: left as it is: there is no {error.filename}", file=sys.stderr)
        return match[0]
    return f"{match[1]}{table}\n{match[3]}"


def result(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((ROOT / "docs" / "results" / f"{name}.json").read_text())
    return found


def markdown(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def size_text(num_bytes: int) -> str:
    for unit, name in ((1 << 20, "Mi"), (1 << 10, "Ki")):
        if num_bytes % unit == 0:
            return f"{num_bytes // unit} {name}"
    return f"{num_bytes:,}"


def micros(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.2f}" if value < 100 else f"{value:,.0f}"


def least(row: Row, names: Sequence[str]) -> float:
    return min(float(row[name]) for name in names if name in row)


def collective(name: str, *, others: Sequence[tuple[str, str]], every: int = 1) -> str:
    """Microseconds in CUDA graphs, and how much faster than torch, and than the best other."""
    rows = []
    for row in result(name)["rows"][::every]:
        graph = row["graph"]
        ours = least(graph, OURS)
        rows.append(
            [
                size_text(row["bytes"]),
                *(micros(graph.get(other)) for other, _ in others),
                *(micros(graph[own]) for own in OURS),
                f"**{graph[TORCH] / ours:.2f}**",
                f"{least(graph, OTHERS) / ours:.2f}",
            ]
        )
    titles = [title for _, title in others]
    return markdown(
        ["bytes", *titles, "distcomm", "symmetric", "× torch", "× best other"], rows
    )  # fmt: skip


def eager(name: str) -> str:
    rows = [
        [
            size_text(row["bytes"]),
            *(micros(row["eager"][each]) for each in (TORCH, "NCCL", OURS[0])),
            f"{row['eager'][TORCH] / row['eager'][OURS[0]]:.2f}",
        ]
        for row in result(name)["rows"]
        if row["bytes"] <= 1 << 20
    ]
    return markdown(["bytes", TORCH, "NCCL", "distcomm", "× torch"], rows)


def rms_norm(name: str) -> str:
    rows = []
    for row in result(name)["rows"]:
        us = row["us"]
        fused, alone = us["group.all_reduce_rms_norm"], us["all_reduce alone"]
        unfused = us["torch.distributed, then add and norm"]
        rows.append(
            [
                f"{row['hidden']:,}",
                str(row["tokens"]),
                micros(unfused),
                micros(alone),
                micros(fused),
                f"{fused - alone:+.2f}",
                f"{unfused / fused:.2f}",
            ]
        )
    titles = ["hidden", "tokens", "torch, one after another", "our all_reduce alone",
              "all_reduce_rms_norm", "more than alone", "× torch"]  # fmt: skip
    return markdown(titles, rows)


def decode_step(name: str) -> str:
    names = (TORCH, "NCCL symmetric", "distcomm all_reduce", "distcomm all_reduce_rms_norm")
    rows = []
    for row in result(name)["rows"]:
        us = row["us"]
        rows.append(
            [
                str(row["batch"]),
                *(f"{row['batch'] / us[each] * 1e6:,.0f}" for each in names),
                f"**{us[TORCH] / least(us, names[2:]):.2f}**",
                f"{1 - us['no communication'] / us[TORCH]:.0%}",
                f"{max(0.0, 1 - us['no communication'] / least(us, names[2:])):.0%}",
            ]
        )
    titles = ["batch", TORCH, "NCCL symmetric", "all_reduce", "all_reduce_rms_norm", "× torch",
              "share of communication, torch", "and ours"]  # fmt: skip
    return markdown(titles, rows)


def sleep(name: str) -> str:
    found = result(name)
    held, discard, cycles = found["held"], found["discard"], found["cycles"]
    first = found["first_offload"]
    rows = [
        ["pool", f"{found['conditions']['bytes'] / 2**30:.0f} GiB"],
        [
            "GPU memory held asleep",
            f"**{held['percent']:.2f} %**, {held['bytes'] / 2**20:,.0f} MiB",
        ],
        *(
            [
                f"{way}, of the bandwidth of a pinned copy",
                f"**{found[way]['ratio']:.0%}**: {found[way]['gb_s']:.1f} of "
                f"{found[way]['copy_gb_s']:.1f} GB/s, {found[way]['ms']:,.0f} ms",
            ]
            for way in ("offload", "restore")
        ),
        ["first offload, which pins host memory", f"{first['ms']:,.0f} ms"],
        ["sleep, content discarded", f"{discard['sleep_ms']:.0f} ms"],
        ["wake_up, content discarded", f"{discard['wake_up_ms']:.0f} ms"],
        [
            f"growth in {cycles['cycles']} cycles: GPU, pinned, resident set",
            ", ".join(
                f"{cycles[f'{kind}_growth_bytes']:,}" for kind in ("gpu", "pinned", "resident")
            )
            + " bytes",
        ],
    ]
    return markdown(["", "sleepable pool"], rows)


_NCCL = ((TORCH, TORCH), ("NCCL symmetric", "NCCL symmetric"))
_WITH_TORCH = (
    *_NCCL,
    ("torch symm_mem one-shot", "torch one-shot"),
    ("torch symm_mem two-shot", "torch two-shot"),
)


def compiled_step(name: str) -> str:
    rows = []
    for row in result(name)["rows"]:
        us = row["us"]
        graph = us["graph"]
        compiled, by_torch = us["compiled, graph"], us["compiled, mode=reduce-overhead"]
        rows.append(
            [
                f"`{row['collective']}`",
                str(row["batch"]),
                f"{us['plain']:,.0f}",
                f"{graph:,.0f}",
                f"{compiled:,.0f}",
                f"**{graph / compiled:.3f}**",
                f"{by_torch:,.0f}",
                f"{graph / by_torch:.3f}",
            ]
        )
    titles = ["", "batch", "without a graph, µs", "graph, µs", "compiled, µs", "ratio",
              "compiled, graph by torch, µs", "ratio"]  # fmt: skip
    return markdown(titles, rows)


TABLES: dict[str, Callable[[], str]] = {
    "all_reduce of 4": partial(collective, "all_reduce-4xh200", others=_WITH_TORCH),
    "all_reduce of 2": partial(collective, "all_reduce-2xh200", others=_WITH_TORCH),
    "all_reduce in short": partial(collective, "all_reduce-4xh200", others=_NCCL, every=3),
    "all_reduce eager": partial(eager, "all_reduce-4xh200"),
    "all_gather of 4": partial(collective, "all_gather-4xh200", others=_NCCL),
    "all_gather of 4 in place": partial(collective, "all_gather_in_place-4xh200", others=_NCCL),
    "reduce_scatter of 4": partial(collective, "reduce_scatter-4xh200", others=_NCCL),
    "all_reduce_rms_norm of 4": partial(rms_norm, "all_reduce_rms_norm-4xh200"),
    "compiled_step of 4": partial(compiled_step, "compiled_step-4xh200"),
    "decode_step of 4": partial(decode_step, "decode_step-4xh200"),
    "sleep": partial(sleep, "sleep-h200"),
}


if __name__ == "__main__":
    main()
