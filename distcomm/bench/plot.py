"""Figures of collectives: latency and bandwidth by size. They need the extra `docs`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .collectives import BUS_FACTORS

__all__ = ["plot_collective"]

_COLOURS = {
    "torch.distributed": "#9a9a9a",
    "NCCL": "#6a6a6a",
    "NCCL symmetric": "#2f2f2f",
    "torch symm_mem one-shot": "#8fb8de",
    "torch symm_mem two-shot": "#3b7ab8",
    "distcomm": "#e08a3c",
    "distcomm, symmetric buffers": "#b3282d",
}


def plot_collective(result: Mapping[str, Any], path: Path) -> None:
    """Draws what `run_collective` gave: microseconds and busbw in CUDA graphs against bytes.

    Args:
        path: its ending says in which format, such as ``.png`` or ``.svg``.

    Raises:
        SystemExit: there is no matplotlib.
    """
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise SystemExit("a plot needs matplotlib: pip install 'distcomm[docs]'") from error
    mpl.use("agg")
    mpl.rcParams["svg.hashsalt"] = "distcomm"  # the same figure from the same result
    from matplotlib import pyplot as plt

    rows, conditions = result["rows"], result["conditions"]
    factor = BUS_FACTORS[result["op"]](conditions["world_size"])
    figure, (times, rates) = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    for name, colour in _COLOURS.items():
        points = [(row["bytes"], row["graph"][name]) for row in rows if name in row["graph"]]
        if not points:
            continue
        sizes, micros = zip(*points, strict=True)
        own = name.startswith("distcomm")
        style = {"color": colour, "label": name, "marker": "o" if own else ".",
                 "linewidth": 1.8 if own else 1.2}  # fmt: skip
        times.plot(sizes, micros, **style)
        rates.plot(sizes, [size * factor / us / 1e3 for size, us in points], **style)
    limit = conditions.get("links_gb_s")
    if limit:
        all_sizes = [row["bytes"] for row in rows]
        label = f"links, nominal {limit:.0f} GB/s"
        style = {"color": "#4a4a4a", "linestyle": ":", "label": label}
        rates.plot(all_sizes, [limit] * len(rows), **style)
        times.plot(all_sizes, [size * factor / limit / 1e3 for size in all_sizes], **style)
    ticks = [row["bytes"] for row in rows][::3]
    times.set(ylabel="µs a call, in a CUDA graph", ylim=(1, None))
    rates.set(ylabel="busbw, GB/s")
    for axes in (times, rates):
        axes.set(xscale="log", yscale="log", xlabel="bytes")
        axes.set_xticks(ticks, [_short(size) for size in ticks])
        axes.minorticks_off()
        axes.grid(visible=True, color="#e4e4e4")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    times.legend(frameon=False, fontsize=8)
    figure.suptitle(
        f"{result['op']} of {conditions['dtype']} over {conditions['world_size']} x "
        f"{conditions['gpu']}",
        fontsize=11,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, metadata={"Date": None} if path.suffix == ".svg" else None)


def _short(num_bytes: int) -> str:
    for unit, name in ((1 << 20, "Mi"), (1 << 10, "Ki")):
        if num_bytes % unit == 0:
            return f"{num_bytes // unit} {name}"
    return f"{num_bytes:,}"
