"""What all ranks agree on before any group is made: the same wishes, one layout, one device."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .algorithms import load_tables
from .communicators import JobContext
from .devices import CudaProbe, agreed_device_type, check_device, probe_cuda
from .errors import InitializationError
from .layout import ParallelLayout
from .memory import AllocatorSettings, SymmetricPool, block_settings, parse_num_bytes
from .nccl import KnownIssues
from .rendezvous import Launch, check_in, open_store

__all__ = ["Wish", "agree_on_job"]

logger = logging.getLogger(__name__)

# Enough for the activations of a large model's decode steps; what doesn't fit makes segments.
_AUTO_RESERVE = 1 << 30
_AUTO_SHARE = 64  # of a small GPU's memory, one part of so many


@dataclass(frozen=True)
class Wish:
    """What the caller of `init_distributed` asked for; must be the same on all ranks.

    Attributes:
        sizes: of tp, cp, pp, dp and ep.
        order, cp_layout: as `ParallelLayout` takes them.
        device: ``"auto"``, ``"cuda"`` or ``"cpu"``.
        symmetric_reserve: bytes to reserve, as a number or a text, or ``"auto"``.
        ignore_known_issues: names of known issues.
        verify_symmetric: whether collectives' buffers are compared between ranks.
        tune: ``"shipped"``, ``"startup"``, ``"nccl"``, or the path of a table on rank 0's host.
        deterministic: whether reductions' bits may not depend on how much is reduced at once.
    """

    sizes: dict[str, int]
    order: str
    cp_layout: str
    device: str
    symmetric_reserve: int | str = "auto"
    ignore_known_issues: Collection[str] = ()
    verify_symmetric: bool = False
    tune: str = "shipped"
    deterministic: bool = False

    def layout(self, world_size: int) -> ParallelLayout:
        return ParallelLayout(world_size, **self.sizes, order=self.order, cp_layout=self.cp_layout)

    def as_json(self, world_size: int) -> dict[str, Any]:
        # As text: a wrong value may be of a type that JSON hasn't.
        wishes = {**self.sizes, "order": self.order, "cp_layout": self.cp_layout}
        return {
            "world_size": world_size,
            **{name: repr(value) for name, value in wishes.items()},
            "device": repr(self.device),
            "symmetric_reserve": repr(self.symmetric_reserve),
            "ignore_known_issues": repr(sorted(map(str, self.ignore_known_issues))),
            "verify_symmetric": repr(self.verify_symmetric),
            "tune": repr(self.tune),
            "deterministic": repr(self.deterministic),
            # Ranks that cut their memory differently would place symmetric tensors differently.
            "torch's allocator settings": block_settings(AllocatorSettings().current()),
        }

    def reserved_bytes(self, gpu_memory: int) -> int:
        """What to reserve on GPUs of so many bytes; of the smallest if they differ.

        Raises:
            ArgumentError: `symmetric_reserve` is no number of bytes.
        """
        if self.symmetric_reserve == "auto":
            return min(_AUTO_RESERVE, gpu_memory // _AUTO_SHARE)
        return parse_num_bytes("symmetric_reserve", self.symmetric_reserve, "init_distributed")


def agree_on_job(
    wish: Wish, launch: Launch, timeout_s: float
) -> tuple[ParallelLayout, JobContext, int]:
    """The layout, what all groups will share, and the bytes of symmetric memory to reserve.

    Collective among all ranks.

    Raises:
        InitializationError: a rank failed, didn't come, or wishes something else; raised on
            every rank. A rank that failed by itself raises its own error instead.
    """
    store = open_store(launch, timeout_s)
    local_rank = launch.rank if launch.local_rank is None else launch.local_rank
    probe = CudaProbe()
    tables: list[dict[str, Any]] = []
    problem: Exception | None = None
    try:
        check_device(wish.device, launch.rank)
        wish.reserved_bytes(0)
        KnownIssues(0, wish.ignore_known_issues)
        if launch.rank == 0:
            tables = load_tables(wish.tune)
        layout = wish.layout(launch.world_size)
        if wish.device != "cpu":
            probe = probe_cuda(local_rank)
    except Exception as error:  # noqa: BLE001 - whatever it is, all ranks are told
        problem = error
    try:
        reports = check_in(
            store,
            launch,
            report={**probe.as_json(), "tables": tables},
            must_agree=wish.as_json(launch.world_size),
            failure=None if problem is None else str(problem),
            timeout_s=timeout_s,
        )
    except InitializationError:
        if problem is not None:
            raise problem from None
        raise
    device_type, problems = agreed_device_type(wish.device, reports, launch.rank)
    if launch.rank == 0:
        _log_choices(layout, wish, problems)
    if device_type == "cpu":
        job = JobContext(
            torch.device("cpu"),
            local_rank,
            store,
            timeout_s,
            None,
            deterministic=wish.deterministic,
        )
        return layout, job, 0
    torch.cuda.set_device(probe.device_index)
    job = JobContext(
        torch.device("cuda", probe.device_index),
        local_rank,
        store,
        timeout_s,
        probe.nccl,
        hosts=[report["host"] for report in reports],
        tune=wish.tune,
        tables=reports[0]["tables"],
        deterministic=wish.deterministic,
        **_nccl_options(wish, probe, reports),
    )
    has_pool = job.symmetric_pool is not None and launch.world_size > 1
    num_bytes = wish.reserved_bytes(min(report["memory"] for report in reports))
    return layout, job, num_bytes if has_pool else 0


def _nccl_options(
    wish: Wish, probe: CudaProbe, reports: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """What a job has because it runs on NCCL; a pool on all ranks or on none."""
    if probe.nccl is None or probe.native is None:
        return {}
    options: dict[str, Any] = {
        "issues": KnownIssues(probe.nccl.version, wish.ignore_known_issues),
        "verifies_symmetric": wish.verify_symmetric,
        "no_symmetric": f"NCCL {probe.nccl.version_text}, or the CUDA driver, has no windows",
    }
    if all(report["windows"] for report in reports):
        device = torch.device("cuda", probe.device_index)
        pool = options["symmetric_pool"] = SymmetricPool(probe.native, device)
        # Ranks may have made different numbers of segments in an earlier initialization.
        pool.heap.raise_ordinal(max(report["segment_ordinal"] for report in reports))
    return options


def _log_choices(layout: ParallelLayout, wish: Wish, problems: dict[int, str]) -> None:
    if wish.cp_layout == "auto" and layout.cp > 1:
        logger.info("cp_layout='auto' is %s for %d ranks", layout.cp_layout, layout.world_size)
    if problems and wish.device == "auto":
        rank, problem = next(iter(problems.items()))
        logger.info(
            "device='auto' is cpu, because CUDA isn't usable on %d rank(s); rank %d: %s",
            len(problems),
            rank,
            problem,
        )
