"""Tables that are measured when the job begins: on all ranks or on none, and the same ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from distcomm import DistcommError, GroupCoordinator, calibration, job_groups
from tests.cpu.job import start
from tests.worker_pool import WorkerPool, fresh_init_method


class Kernels:
    """What `KernelCollectives` is to a calibration, on CPU."""

    table = "none yet"

    def use_table(self, table: str) -> None:
        self.table = table


def calibrate_groups(rank: int, world_size: int, url: str) -> list[str]:
    """The groups that have measured, each with a table that tells who did."""
    calibrated: list[str] = []

    def calibrate(group: GroupCoordinator) -> str:
        calibrated.append(group.name)
        return f"measured by {group.all_gather_object(group.rank)}"  # collective, as measuring is

    with start(rank, world_size, url, tp=2, pp=2) as state, pytest.MonkeyPatch.context() as patch:
        patch.setattr(job_groups, "calibrate", calibrate)
        groups: Any = state._groups
        object.__setattr__(groups._job, "tune", "startup")
        for communicators in state.communicators:
            if len(communicators.ranks) > 1:
                communicators.kernels = Kernels()  # type: ignore[assignment]
        groups._calibrate_all()
        tables = {}
        for name, group in state.groups.items():
            if group.world_size > 1:
                tables[name] = group.kernels.table  # type: ignore[union-attr]
                assert group.all_gather_object(tables[name]) == [tables[name]] * group.world_size
        assert tables["world"] == "measured by [0, 1, 2, 3]"
        assert tables["tp"] == tables["attn_tp"] == f"measured by {state.tp.ranks}"
        # Ranks 0 and 2 have measured with other ranks: what the first rank of pp knows, holds.
        assert tables["pp"] == "measured by [0, 1]"
        return calibrated


def test_a_group_has_its_first_ranks_table(workers: WorkerPool):
    assert workers.run(calibrate_groups, fresh_init_method(), ranks=4) == [["world", "tp"]] * 4


def run_out_of_memory(rank: int, world_size: int, url: str, kind: str) -> str:
    """The error where rank 1 alone has no memory for tensors of a kind. Nothing is timed."""
    kinds: list[str] = []

    def zeros(*args: Any, **kwargs: Any) -> torch.Tensor:
        kinds.append(calibration.TENSORS[len(kinds)])
        if rank == 1 and kinds[-1] == kind:
            raise torch.OutOfMemoryError("no bytes left")
        return torch.empty(*args, **kwargs)

    with start(rank, world_size, url, tp=2) as state, pytest.MonkeyPatch.context() as patch:
        state._groups.communicators[tuple(state.tp.ranks)].kernels = Kernels()  # type: ignore[assignment]
        patch.setattr(calibration.torch, "zeros", zeros)
        patch.setattr(calibration, "timed", None)
        with pytest.raises(DistcommError) as caught:
            calibration.measure(state.tp, [1 << 12], 1)
        assert kinds[-1] == kind
        return str(caught.value)


@pytest.mark.parametrize("kind", calibration.TENSORS)
def test_nothing_is_timed_where_a_rank_has_no_memory(workers: WorkerPool, kind: str):
    for text in workers.run(run_out_of_memory, fresh_init_method(), kind, ranks=2):
        assert text.startswith(f"calibration: no {kind} tensors: {{1: 'no bytes left'}} [group ")
