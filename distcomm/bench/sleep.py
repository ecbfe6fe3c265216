"""What a sleeping pool still holds, and how long sleeping and waking up take.

Memory is counted by the driver (cudaMemGetInfo). Before the first count a small pool has been put
to sleep and woken up with all the kernels that are used here, and torch's cache is emptied before
each count: so the CUDA context, loaded kernels, streams and caches are in none of the differences,
but what the driver needs for the addresses of a sleeping pool is.

Times are those of whole calls of `sleep` and `wake_up`, in turn with copies between the GPU and
torch's own pinned memory. The first round, which pins host memory, is reported on its own. Every
round's content and addresses are checked before anything is reported.
"""

from __future__ import annotations

import gc
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ..memory import SleepablePool
from ..state import ParallelState
from .conditions import conditions

__all__ = ["format_sleep", "run_sleep"]

_PIECE = 1 << 30  # bytes of a tensor, and of a copy to compare with
_WORD = 4
_NUM_COPIES = 8  # of a piece, timed together
_MIB = 1 << 20


def run_sleep(
    state: ParallelState,
    *,
    num_bytes: int = 20 << 30,
    num_rounds: int = 5,
    cycle_bytes: int = 2 << 30,
    num_cycles: int = 50,
) -> dict[str, Any]:
    """Needs one GPU with 4 GiB beside `num_bytes`, as much host memory to pin, and one process.

    Args:
        state: of a CUDA job.
        num_bytes: of the pool that is timed; rounded down to MiB.
        num_rounds: rounds to take medians of, after the first one.
        cycle_bytes: of the pool that goes through cycles, half of it offloaded.
        num_cycles: sleeps and wake-ups of that pool, in which it mustn't grow.

    Returns:
        Bytes, GB/s (10^9 bytes a second) and milliseconds.
    """
    pieces = _pieces(num_bytes // _MIB * _MIB)
    device = state.device
    host = torch.empty(min(_PIECE, sum(pieces)), dtype=torch.uint8, pin_memory=True)
    with SleepablePool(device, name="warm-up") as pool:
        tensors = _Tensors(pool, "weights", [32 * _MIB])
        tensors.fill(1)
        pool.sleep(("weights",))
        pool.wake_up()
        tensors.check(1)
        pool.sleep()
        pool.wake_up()
        del tensors
    return {
        "conditions": {**conditions(state), "rounds": num_rounds, "bytes": sum(pieces)},
        **_timed(device, pieces, host, num_rounds),
        "cycles": _cycles(device, cycle_bytes // _MIB * _MIB, num_cycles),
    }


def format_sleep(result: dict[str, Any]) -> str:
    """The result as a table."""
    held, first, cycles = result["held"], result["first_offload"], result["cycles"]
    lines = [
        f"a pool of {result['conditions']['bytes'] / 2**30:.1f} GiB holds asleep: "
        f"{held['bytes']:,} bytes, {held['percent']:.3f} %",
        f"{'':<10} {'GB/s':>8} {'pinned copy GB/s':>17} {'ratio':>6} {'ms':>9}",
    ]
    for name in ("offload", "restore"):
        row = result[name]
        lines.append(
            f"{name:<10} {row['gb_s']:>8.2f} {row['copy_gb_s']:>17.2f} {row['ratio']:>6.3f} "
            f"{row['ms']:>9.1f}"
        )
    discard = result["discard"]
    lines += [
        f"first offload, which pins host memory: {first['ms']:.0f} ms, {first['gb_s']:.2f} GB/s",
        f"content discarded: sleep {discard['sleep_ms']:.1f} ms, "
        f"wake_up {discard['wake_up_ms']:.1f} ms",
        f"{cycles['cycles']} cycles of {cycles['bytes'] / 2**30:.1f} GiB, half of it offloaded, "
        f"grew: GPU {cycles['gpu_growth_bytes']:,}, pinned {cycles['pinned_growth_bytes']:,}, "
        f"resident set {cycles['resident_growth_bytes']:,} bytes; {cycles['ms']:.1f} ms each",
    ]
    return "\n".join(lines)


class _Tensors:
    """Tensors under one tag of a pool, whose content and addresses can be checked.

    Args:
        pool, tag: where they are made.
        sizes: their bytes.
    """

    def __init__(self, pool: SleepablePool, tag: str, sizes: Sequence[int]) -> None:
        with pool.use(tag):
            self._tensors = [
                torch.empty(size // _WORD, dtype=torch.int32, device=pool.device) for size in sizes
            ]
        self._places = [x.data_ptr() for x in self._tensors]

    def fill(self, seed: int) -> None:
        for number, x in enumerate(self._tensors):
            torch.arange(x.numel(), dtype=torch.int32, out=x)
            x.mul_(2 * (seed + number) + 1).add_(seed)

    def check(self, seed: int) -> None:
        """Addresses and content; anything wrong ends the benchmark."""
        if [x.data_ptr() for x in self._tensors] != self._places:
            raise SystemExit("a tensor has another address than before")
        for number, x in enumerate(self._tensors):
            wanted = torch.arange(x.numel(), dtype=torch.int32, device=x.device)
            wanted.mul_(2 * (seed + number) + 1).add_(seed)
            if not torch.equal(x, wanted):
                raise SystemExit(f"tensor {number} has another content than before")


def _timed(
    device: torch.device, pieces: Sequence[int], host: torch.Tensor, num_rounds: int
) -> dict[str, Any]:
    num_bytes = sum(pieces)
    piece = torch.empty(host.numel(), dtype=torch.uint8, device=device)
    times: dict[str, list[float]] = {}
    held = []

    def note(name: str, work: Callable[[], object]) -> None:
        times.setdefault(name, []).append(_seconds(work))

    def copy_all(to: torch.Tensor, source: torch.Tensor) -> None:
        for _ in range(_NUM_COPIES):
            to.copy_(source, non_blocking=True)

    before = _free_bytes()
    with SleepablePool(device, name="benchmark") as pool:
        tensors = _Tensors(pool, "weights", pieces)
        for seed in range(num_rounds + 1):
            tensors.fill(seed)
            note("offload", lambda: pool.sleep(("weights",)))
            if pool.usage()["weights"].offloaded_bytes != num_bytes:
                raise SystemExit("not all of the pool was offloaded")
            held.append(before - _free_bytes())
            note("copy to host", lambda: copy_all(host, piece))
            note("restore", pool.wake_up)
            note("copy to GPU", lambda: copy_all(piece, host))
            tensors.check(seed)
            note("discard", pool.sleep)
            held.append(before - _free_bytes())
            note("wake_up", pool.wake_up)
            tensors.fill(seed + 1)
            tensors.check(seed + 1)
        del tensors
    seconds = {name: statistics.median(each[1:]) for name, each in times.items()}
    copied = _NUM_COPIES * host.numel()
    return {
        "held": {"bytes": max(held), "percent": round(100 * max(held) / num_bytes, 4)},
        "first_offload": _rate(num_bytes, times["offload"][0]),
        "offload": _compared(num_bytes, seconds["offload"], copied, seconds["copy to host"]),
        "restore": _compared(num_bytes, seconds["restore"], copied, seconds["copy to GPU"]),
        "discard": {
            "sleep_ms": round(seconds["discard"] * 1e3, 2),
            "wake_up_ms": round(seconds["wake_up"] * 1e3, 2),
        },
    }


def _cycles(device: torch.device, num_bytes: int, num_cycles: int) -> dict[str, Any]:
    """Growth from after the second cycle, once each kind of step has been done, to the last."""
    half = num_bytes // 2 // _MIB * _MIB
    seconds, found = [], []
    with SleepablePool(device, name="cycles") as pool:
        weights = _Tensors(pool, "weights", _pieces(half))
        cache = _Tensors(pool, "cache", _pieces(num_bytes - half))
        for number in range(num_cycles + 2):
            weights.fill(number)
            cache.fill(number)
            cycle = _in_steps if number % 2 else _at_once
            seconds.append(_seconds(lambda: cycle(pool)))  # noqa: B023 - called at once
            weights.check(number)
            cache.fill(number + 1)
            cache.check(number + 1)
            found.append((-_free_bytes(), pool.stats()["host_bytes"], _resident_bytes()))
        del weights, cache
    first, last = found[1], found[-1]
    names = "gpu_growth_bytes", "pinned_growth_bytes", "resident_growth_bytes"
    return {
        "cycles": num_cycles,
        "bytes": num_bytes,
        "offloaded_bytes": half,
        "ms": round(statistics.median(seconds[2:]) * 1e3, 2),
        "pinned_bytes": last[1],
        **{name: b - a for name, a, b in zip(names, first, last, strict=True)},
    }


def _at_once(pool: SleepablePool) -> None:
    pool.sleep(("weights",))
    pool.wake_up()


def _in_steps(pool: SleepablePool) -> None:
    pool.sleep(tags=("cache",))
    pool.sleep(("weights",))
    pool.wake_up(("weights",))
    pool.wake_up(("cache",))


def _pieces(num_bytes: int) -> list[int]:
    rest = num_bytes % _PIECE
    return [_PIECE] * (num_bytes // _PIECE) + ([rest] if rest else [])


def _seconds(work: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def _rate(num_bytes: int, seconds: float) -> dict[str, float]:
    return {"ms": round(seconds * 1e3, 2), "gb_s": round(num_bytes / seconds / 1e9, 3)}


def _compared(num_bytes: int, seconds: float, copied: int, copy_seconds: float) -> dict[str, float]:
    copy_gb_s = copied / copy_seconds / 1e9
    return {
        **_rate(num_bytes, seconds),
        "copy_gb_s": round(copy_gb_s, 3),
        "ratio": round(num_bytes / seconds / 1e9 / copy_gb_s, 4),
    }


def _free_bytes() -> int:
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]


def _resident_bytes() -> int:
    pages = Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")
