"""What all ranks agree on before any group is made: the same wishes, one layout, one device."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from . import env
from .algorithms import load_tables
from .backends import check_range_kind
from .call_order import CallOrder
from .communicators import JobContext
from .devices import CudaProbe, agreed_device_type, check_device, host_name, probe_cuda
from .errors import InitializationError
from .layout import ParallelLayout
from .memory import AllocatorSettings, SymmetricPool, block_settings, parse_num_bytes
from .mesh import describe_mesh, layout_of_mesh
from .nccl import KnownIssues
from .rendezvous import Launch, MissedMeetingError, check_in, open_store

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["JobWish", "LayoutWish", "agree_on_job", "agree_on_layout"]

logger = logging.getLogger(__name__)

# Enough for the activations of a large model's decode steps; what doesn't fit makes segments.
_AUTO_RESERVE = 1 << 30
_AUTO_SHARE = 64  # of a small GPU's memory, one part of so many


@dataclass(frozen=True)
class LayoutWish:
    """The groups that the caller asked for, and their memory; must be the same on all ranks.

    Attributes:
        sizes: of tp, cp, pp, dp and ep.
        order, cp_layout: as `ParallelLayout` takes them.
        symmetric_reserve: bytes to reserve, as a number or a text, or ``"auto"``.
        mesh: what has these groups already; `layout_of_mesh` says what it leaves to the others.
    """

    sizes: Mapping[str, int]
    order: str = "tp-cp-pp-dp"
    cp_layout: str = "auto"
    symmetric_reserve: int | str = "auto"
    mesh: DeviceMesh | None = None

    def layout(self, world_size: int) -> ParallelLayout:
        if self.mesh is not None:
            return layout_of_mesh(self.mesh, world_size, self.sizes, self.order, self.cp_layout)
        return ParallelLayout(world_size, **self.sizes, order=self.order, cp_layout=self.cp_layout)

    def reserved_bytes(self, job: JobContext) -> int:
        """What to reserve: on GPUs that differ, by the smallest.

        Raises:
            ArgumentError: `symmetric_reserve` is no number of bytes.
        """
        if self.symmetric_reserve == "auto":
            num_bytes = min(_AUTO_RESERVE, job.gpu_memory // _AUTO_SHARE)
        else:
            num_bytes = self._parsed_reserve()
        return num_bytes if job.symmetric_pool is not None and len(job.hosts) > 1 else 0

    def check(self, world_size: int) -> None:
        """Raises `LayoutError` or `ArgumentError` if it can't be had, on any rank alike."""
        if self.symmetric_reserve != "auto":
            self._parsed_reserve()
        self.layout(world_size)

    def as_json(self) -> dict[str, Any]:
        # As text: a wrong value may be of a type that JSON hasn't.
        wishes = {**self.sizes, "order": self.order, "cp_layout": self.cp_layout}
        wishes["symmetric_reserve"] = self.symmetric_reserve
        texts = {name: repr(value) for name, value in wishes.items()}
        return {**texts, "mesh": describe_mesh(self.mesh)}

    def _parsed_reserve(self) -> int:
        return parse_num_bytes("symmetric_reserve", self.symmetric_reserve, "init_distributed")


@dataclass(frozen=True)
class JobWish:
    """What all groups will have in common; must be the same on all ranks.

    Attributes:
        device: ``"auto"``, ``"cuda"`` or ``"cpu"``.
        ignore_known_issues: names of known issues.
        verify_symmetric: whether collectives' buffers are compared between ranks.
        tune: ``"shipped"``, ``"startup"``, ``"nccl"``, or the path of a table on rank 0's host.
        deterministic: whether reductions' bits may not depend on how much is reduced at once.
    """

    device: str
    ignore_known_issues: Collection[str] = ()
    verify_symmetric: bool = False
    tune: str = "shipped"
    deterministic: bool = False

    def as_json(self) -> dict[str, Any]:
        return {
            "device": repr(self.device),
            "ignore_known_issues": repr(sorted(map(str, self.ignore_known_issues))),
            "verify_symmetric": repr(self.verify_symmetric),
            "tune": repr(self.tune),
            "deterministic": repr(self.deterministic),
            # Ranks that cut their memory differently would place symmetric tensors differently.
            "torch's allocator settings": block_settings(AllocatorSettings().current()),
        }


def agree_on_job(
    wish: JobWish, launch: Launch, timeout_s: float, layout: LayoutWish | None = None
) -> JobContext:
    """What all groups will share. Collective among all ranks.

    Args:
        layout: the groups, if they are to be made at once: agreed on, too.

    Raises:
        InitializationError: a rank failed, didn't come, or wishes something else; raised on
            every rank. A rank that failed by itself raises its own error instead.
    """
    store = open_store(launch, timeout_s)
    local_rank = launch.rank if launch.local_rank is None else launch.local_rank
    ranges = env.profiler_ranges()
    probe = CudaProbe()
    tables: list[dict[str, Any]] = []
    problem: Exception | None = None
    try:
        check_device(wish.device, launch.rank)
        KnownIssues(0, wish.ignore_known_issues)
        if launch.rank == 0:
            tables = load_tables(wish.tune)
        if layout is not None:
            layout.check(launch.world_size)
        check_range_kind(ranges, "DISTCOMM_PROFILER_RANGES", "init_distributed")
        if wish.device != "cpu":
            probe = probe_cuda(local_rank)
    except Exception as error:  # noqa: BLE001 - whatever it is, all ranks are told
        problem = error
    reports = _compared(
        store,
        launch,
        {**probe.as_json(), "host": host_name(), "tables": tables},
        {**({} if layout is None else layout.as_json()), **wish.as_json()},
        problem,
        timeout_s,
    )
    device_type, problems = agreed_device_type(wish.device, reports, launch.rank)
    if launch.rank == 0:
        _log_device(wish, problems)
    common: dict[str, Any] = {
        "hosts": [report["host"] for report in reports],
        "deterministic": wish.deterministic,
        "profiler_ranges": ranges,
    }
    if device_type == "cpu":
        return JobContext(torch.device("cpu"), local_rank, store, timeout_s, None, **common)
    torch.cuda.set_device(probe.device_index)
    device = torch.device("cuda", probe.device_index)
    return JobContext(
        device,
        local_rank,
        store,
        timeout_s,
        probe.nccl,
        gpu_memory=min(report["memory"] for report in reports),
        gpu_names=[report["gpu_name"] for report in reports],
        tune=wish.tune,
        tables=reports[0]["tables"],
        call_order=CallOrder(device),
        **common,
        **_nccl_options(wish, probe, reports),
    )


def agree_on_layout(
    wish: LayoutWish,
    launch: Launch,
    begin: Callable[[], Store],
    problem: Exception | None,
    timeout_s: float,
) -> None:
    """All ranks wish the same groups, which can be made, or all raise. Collective.

    A rank that missed a call finds it decided without it, and goes on to the one that the others
    are at.

    Args:
        begin: goes on to the next place to meet, for this and nothing else.
        problem: why this rank can't make groups now; None if it can.

    Raises:
        InitializationError: a rank failed, didn't come, or wishes something else; raised on
            every rank. A rank that failed by itself raises its own error instead.
    """
    try:
        wish.check(launch.world_size)
    except Exception as error:  # noqa: BLE001 - whatever it is, all ranks are told
        problem = problem or error
    while True:
        with suppress(MissedMeetingError):
            _compared(begin(), launch, {}, wish.as_json(), problem, timeout_s)
            return


def _compared(
    store: Store,
    launch: Launch,
    report: Mapping[str, Any],
    wishes: Mapping[str, Any],
    problem: Exception | None,
    timeout_s: float,
) -> list[dict[str, Any]]:
    """All ranks' reports, if all wish the same and none has a problem."""
    try:
        return check_in(
            store,
            launch,
            report=report,
            must_agree={"world_size": launch.world_size, **wishes},
            failure=None if problem is None else str(problem),
            timeout_s=timeout_s,
        )
    except MissedMeetingError:
        raise
    except InitializationError:
        if problem is not None:
            raise problem from None
        raise


def _nccl_options(
    wish: JobWish, probe: CudaProbe, reports: Sequence[Mapping[str, Any]]
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


def _log_device(wish: JobWish, problems: dict[int, str]) -> None:
    if problems and wish.device == "auto":
        rank, problem = next(iter(problems.items()))
        logger.info(
            "device='auto' is cpu, because CUDA isn't usable on %d rank(s); rank %d: %s",
            len(problems),
            rank,
            problem,
        )
