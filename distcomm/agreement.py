"""What all ranks agree on before any group is made: the same wishes, one layout, one device."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch

from .communicators import JobContext
from .devices import CudaProbe, agreed_device_type, check_device, probe_cuda
from .errors import InitializationError
from .layout import ParallelLayout
from .rendezvous import Launch, check_in, open_store

__all__ = ["Wish", "agree_on_job"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Wish:
    """What the caller of `init_distributed` asked for; must be the same on all ranks.

    Attributes:
        sizes: of tp, cp, pp, dp and ep.
        order, cp_layout: as `ParallelLayout` takes them.
        device: ``"auto"``, ``"cuda"`` or ``"cpu"``.
    """

    sizes: dict[str, int]
    order: str
    cp_layout: str
    device: str

    def layout(self, world_size: int) -> ParallelLayout:
        return ParallelLayout(world_size, **self.sizes, order=self.order, cp_layout=self.cp_layout)

    def as_json(self, world_size: int) -> dict[str, Any]:
        # As text: a wrong value may be of a type that JSON hasn't.
        wishes = {**self.sizes, "order": self.order, "cp_layout": self.cp_layout}
        return {
            "world_size": world_size,
            **{name: repr(value) for name, value in wishes.items()},
            "device": repr(self.device),
        }


def agree_on_job(wish: Wish, launch: Launch, timeout_s: float) -> tuple[ParallelLayout, JobContext]:
    """The layout, and the device that all ranks will use. Collective among all ranks.

    Raises:
        InitializationError: a rank failed, didn't come, or wishes something else; raised on
            every rank. A rank that failed by itself raises its own error instead.
    """
    store = open_store(launch, timeout_s)
    local_rank = launch.rank if launch.local_rank is None else launch.local_rank
    probe = CudaProbe()
    problem: Exception | None = None
    try:
        check_device(wish.device, launch.rank)
        layout = wish.layout(launch.world_size)
        if wish.device != "cpu":
            probe = probe_cuda(local_rank)
    except Exception as error:  # noqa: BLE001 - whatever it is, all ranks are told
        problem = error
    try:
        reports = check_in(
            store,
            launch,
            report=probe.as_json(),
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
    device, nccl = torch.device("cpu"), None
    if device_type == "cuda":
        device, nccl = torch.device("cuda", probe.device_index), probe.nccl
        torch.cuda.set_device(device)
    return layout, JobContext(device, local_rank, store, timeout_s, nccl)


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
