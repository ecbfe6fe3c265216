#!/usr/bin/env python3
"""Draws the figure of docs/performance.md from a result of `python -m distcomm.bench kv_gather`.

python scripts/plot_kv_gather.py docs/results/kv_gather_nccl-4xh200.json docs/kv_gather.svg
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("svg")
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

REFERENCE = "pad-gather-cat, symmetric"
WAYS = {  # name in the result -> label, colour, marker
    "pad-gather-cat": ("pad-gather-cat, ordinary buffers", "#9a9a9a", "s"),
    REFERENCE: ("pad-gather-cat, symmetric buffers", "#4a4a4a", "D"),
    "all_gather_kv, collective": ("all_gather_kv, collective", "#7fb2d9", "v"),
    "all_gather_kv, copy_engine": ("all_gather_kv, copy_engine", "#e08a3c", "^"),
    "all_gather_kv, kernel": ("all_gather_kv, kernel", "#b3282d", "o"),
}
LINKS_GB_S = 450  # nominal, in one direction: 18 links of NVLink 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("result", type=Path)
    parser.add_argument("figure", type=Path)
    options = parser.parse_args()
    result = json.loads(options.result.read_text())
    mpl.rcParams["svg.hashsalt"] = "distcomm"  # the same figure from the same result
    figure = draw(result)
    figure.savefig(options.figure, metadata={"Date": None})


def draw(result: dict[str, Any]) -> Figure:
    rows, conditions = result["gather_us"], result["conditions"]
    tokens = [row["tokens"] for row in rows]
    figure, (times, ratios) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for name, (label, colour, marker) in WAYS.items():
        style: dict[str, Any] = {"color": colour, "marker": marker, "label": label}
        times.plot(tokens, [row["graph"][name] for row in rows], **style)
        speedups = [row["graph"][REFERENCE] / row["graph"][name] for row in rows]
        ratios.plot(tokens, speedups, **style)
    peers = conditions["world_size"] - 1
    sent_bytes = [count / conditions["world_size"] * 2048 * peers for count in tokens]
    limit = [num_bytes / LINKS_GB_S / 1e3 for num_bytes in sent_bytes]
    label = f"links, nominal {LINKS_GB_S} GB/s"
    times.plot(tokens, limit, color="#4a4a4a", linestyle=":", label=label)
    times.set(yscale="log", ylabel="µs a gather, in a CUDA graph")
    ratios.set(ylabel="speed (pad-gather-cat, symmetric = 1)", ylim=(0, None))
    for axes in (times, ratios):
        axes.set(xscale="log", xlabel="tokens of 2 KiB")
        axes.set_xticks(tokens, [f"{count:,}" for count in tokens])
        axes.minorticks_off()
        axes.grid(visible=True, color="#e4e4e4")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    times.legend(frameon=False, fontsize=8)
    figure.suptitle(f"KV gather over {conditions['world_size']} x {conditions['gpu']}", fontsize=11)
    return figure


if __name__ == "__main__":
    main()
