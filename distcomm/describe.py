"""What a job is and runs on, as text for people. Local; also after the job's end."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Mapping, Sequence

import torch

from .communicators import JobContext
from .group import GroupCoordinator
from .layout import ParallelLayout, format_ranks
from .memory import SymmetricPool

__all__ = ["describe_job"]

_MOST_HOSTS = 8


def describe_job(
    rank: int,
    job: JobContext,
    layout: ParallelLayout | None,
    groups: Mapping[str, GroupCoordinator],
    *,
    closed: bool,
    ranges: str | None,
) -> str:
    """The text of `ParallelState.describe`: a screen, however large the job.

    Args:
        rank: this process's.
        job: what all groups share.
        layout: None while there is none.
        groups: this rank's, by name.
        closed: whether all that has ended.
        ranges: the kind of profiler ranges.
    """
    nccl = job.nccl
    runs_on = f"NCCL {nccl.version_text} ({nccl.path})" if nccl else "gloo"
    title = str(layout) if layout is not None else f"{len(job.hosts)} ranks, no layout yet"
    lines = [
        title,
        f"rank {rank}: device {job.device}, local rank {job.local_rank}, {runs_on}"
        + ("; closed" if closed else ""),
    ]
    if layout is not None:
        place = layout.coordinates(rank)
        lines.append("place    " + ", ".join(f"{axis} {index}" for axis, index in place.items()))
    cuda = f", CUDA {torch.version.cuda}" if torch.version.cuda else ""
    lines.append(f"software torch {torch.__version__}{cuda}, Python {platform.python_version()}")
    lines += _under("hosts", _hosts(job))
    lines += _under("groups", _groups(groups.values()))
    lines.append(f"memory   {_memory(job)}")
    lines += _under("issues", _issues(job, groups.values()))
    lines += _under("options", _options(job, ranges))
    return "\n".join(lines)


def _under(title: str, lines: Sequence[str]) -> list[str]:
    """Nothing where there are no lines."""
    return [f"{'' if number else title:<8} {line}" for number, line in enumerate(lines)]


def _hosts(job: JobContext) -> list[str]:
    """Each host with its ranks and GPUs."""
    ranks_of: dict[str, list[int]] = {}
    for rank, host in enumerate(job.hosts):
        ranks_of.setdefault(host, []).append(rank)
    lines = []
    for host, ranks in list(ranks_of.items())[:_MOST_HOSTS]:
        name = host.split("/")[0]  # without the boot id
        gpus = dict.fromkeys(job.gpu_names[rank] for rank in ranks) if job.gpu_names else {}
        on = f" on {', '.join(gpus)}" if gpus else ""
        lines.append(f"{name}: ranks {format_ranks(ranks)}{on}")
    if len(ranks_of) > _MOST_HOSTS:
        lines.append(f"and {len(ranks_of) - _MOST_HOSTS} more")
    return lines


def _groups(groups: Iterable[GroupCoordinator]) -> list[str]:
    """One line for each set of ranks: groups of the same ones run on the same."""
    names: dict[tuple[int, ...], list[str]] = {}
    lines: dict[tuple[int, ...], str] = {}
    for group in groups:
        names.setdefault(group.member.ranks, []).append(group.name)
        lines[group.member.ranks] = f"{format_ranks(group.ranks)} {_runs_on(group)}"
    width = max((len(", ".join(each)) for each in names.values()), default=0)
    return [f"{', '.join(names[ranks]):<{width}}  {line}" for ranks, line in lines.items()]


def _runs_on(group: GroupCoordinator) -> str:
    if group.world_size == 1:
        return "alone"
    comm = group.pynccl_comm
    if comm is None:
        return "gloo"
    stats = group.stats()
    why = group.why_not_symmetric
    memory = f"windows: {stats['symmetric_memory']['windows']}"
    return "; ".join(
        [
            "gloo, pynccl" + (f" ({comm.why_unusable})" if comm.why_unusable else ""),
            f"kernels: {stats['algorithms'] or 'none'}",
            memory if why is None else f"windows: none: {why}",
        ]
    )


def _memory(job: JobContext) -> str:
    pool: SymmetricPool | None = job.symmetric_pool
    if pool is None:
        return f"no symmetric memory: {job.no_symmetric}"
    heap = pool.heap.stats()
    state = (", frozen" if pool.frozen else "") + (", asleep" if pool.asleep else "")
    return (
        f"symmetric: {heap['bytes_reserved'] >> 20} MiB reserved in {heap['segments']} segment(s), "
        f"{heap['bytes_used'] >> 20} MiB in use{state}"
    )


def _issues(job: JobContext, groups: Iterable[GroupCoordinator]) -> list[str]:
    """The known issues of this NCCL where this job is: what is done about each."""
    if job.issues is None:
        return []
    several = [group.ranks for group in groups if group.world_size > 1]
    return job.issues.describe(job.topology(ranks) for ranks in several) or ["none known"]


def _options(job: JobContext, ranges: str | None) -> list[str]:
    """Those that change what calls do."""
    options = {
        "deterministic": job.deterministic,
        "verify_symmetric": job.verifies_symmetric,
        f"profiler ranges: {ranges}": ranges is not None,
    }
    named = ", ".join(text for text, given in options.items() if given)
    return [named] if named else []
