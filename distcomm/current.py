"""`init_distributed`: from a launch and a few sizes to the groups of this rank.

It has two halves, for callers who know the sizes later than the launch: `init_world` and
`lay_out_world`.

The one mutable state of this package is `_current`, the `ParallelState` in force; but for what a
process has only once: torch's allocator settings (`memory/alloc_conf.py`), its end
(`nccl/process_end.py`), torch's operators (`graph_ops.py`), and how many groups it has had
(`group.py`).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from datetime import timedelta

import torch
from torch.distributed.device_mesh import DeviceMesh

from . import env
from .agreement import JobWish, LayoutWish, agree_on_job
from .errors import AlreadyInitializedError, ArgumentError, NotInitializedError
from .group import GroupCoordinator
from .group_memory import GraphCapture
from .mesh import device_of_mesh
from .rendezvous import find_launch
from .state import ParallelState

__all__ = [
    "ParallelState",
    "destroy_distributed",
    "get_attn_tp_group",
    "get_cp_group",
    "get_dp_group",
    "get_ep_group",
    "get_moe_tp_group",
    "get_parallel_state",
    "get_pp_group",
    "get_tp_group",
    "get_world_group",
    "graph_capture",
    "init_distributed",
    "init_world",
    "is_initialized",
    "lay_out_world",
    "profiler_ranges",
]

_current: ParallelState | None = None


def init_distributed(  # noqa: PLR0913 - a launch and its sizes have that many parts
    tp: int = 1,
    cp: int = 1,
    pp: int = 1,
    dp: int = 1,
    ep: int = 1,
    *,
    cp_layout: str = "auto",
    order: str = "tp-cp-pp-dp",
    mesh: DeviceMesh | None = None,
    device: str = "auto",
    symmetric_reserve: int | str = "auto",
    verify_symmetric: bool = False,
    tune: str = "shipped",
    deterministic: bool = False,
    ignore_known_issues: Collection[str] = (),
    timeout: float | timedelta = 300.0,
    init_method: str | None = None,
    rank: int | None = None,
    world_size: int | None = None,
    local_rank: int | None = None,
) -> ParallelState:
    """Makes all groups of this rank. Collective among all ranks of the job.

    The ranks are found in torchrun's environment variables, in torch's default process group if
    there is one, or in `init_method`, `rank` and `world_size`.

    Args:
        tp, cp, pp, dp, ep: sizes of tensor, context, pipeline, data and expert parallelism.
        cp_layout: ``"inside_tp"``, ``"beside_tp"``, ``"adjacent_in_tp"`` or ``"auto"``; see
            `ParallelLayout`.
        order: axes, fastest-varying first.
        mesh: a torch `DeviceMesh` of all ranks, whose dims are named after axes: the groups are
            those of its dims, and sizes and order can be left out. ``"cp"`` beside ``"tp"`` is
            ``"beside_tp"``, ``"cp"`` beside ``"attn_tp"`` is ``"inside_tp"``; ``"ep"`` and
            ``"moe_tp"`` are given in the place of ``"tp"``. The mesh's NCCL process groups become
            the groups' `device_group`.
        device: ``"cuda"``, ``"cpu"``, or ``"auto"``: the mesh's if there is one; else CUDA if every
            rank has a GPU of its own and can load NCCL, else CPU with gloo. Agreed by all ranks.
        symmetric_reserve: GPU memory to reserve and register for symmetric tensors: bytes, a text
            such as ``"4GiB"``, 0 for none, or ``"auto"``: 1 GiB, and at most 1/64 of the GPU.
            What doesn't fit later makes segments as needed, but not during CUDA graph captures.
            33 MiB for each set of ranks, and for one more, come on top, unless `tune` is "nccl";
            with 0 no kernels of ours run collectives.
        verify_symmetric: compares the buffers of every NCCL collective between ranks, and raises
            `SymmetricMismatchError` where they differ. Slow; for debugging.
        tune: which algorithm runs a collective of which size on GPUs: ``"shipped"`` by tables that
            come with this package, a path by one that `python -m distcomm.bench tune` wrote, which
            only rank 0 reads, ``"startup"`` by what is measured now, in a few seconds for each
            size of a group, ``"nccl"`` always NCCL. For a GPU or group size that has no table,
            kernels run small collectives and NCCL the others.
        deterministic: sums are made from the first rank to the last and rounded once, so that an
            element's bits don't depend on how much is reduced at once, nor on the rank. On GPUs by
            kernels that do so anyway; where there are none, all is gathered and then reduced.
        ignore_known_issues: names of known issues of NCCL versions to do nothing about, or
            ``("all",)``; see `distcomm.nccl.known_issues`.
        timeout: seconds that each step of initialization, each CPU collective and closing may
            take.
        init_method: where the ranks meet, e.g. ``"tcp://host:port"`` or ``"file:///path"``. A
            TCP store that rank 0 serves ends with the state: another initialization needs a new
            port. torchrun's store outlives it.
        rank, world_size: this process's global rank, and the number of processes.
        local_rank: index of this process on its host; chooses its GPU.

    Returns:
        The state, which the module-level getters read too. Close it with `destroy_distributed()`
        or a ``with`` block.

    Raises:
        AlreadyInitializedError: there is a state already.
        LaunchError: this process doesn't know its job.
        LayoutError: the sizes don't fit the world size.
        ArgumentError: no layout has such a mesh, or sizes or order contradict it.
        InitializationError: any rank failed, didn't come, or was given other arguments. It is
            raised on every rank and names the ranks. Nothing is left half-made.
    """
    sizes = {"tp": tp, "cp": cp, "pp": pp, "dp": dp, "ep": ep}
    return _initialize(
        JobWish(
            device_of_mesh(mesh, device),
            ignore_known_issues,
            verify_symmetric,
            tune,
            deterministic,
        ),
        timeout,
        (init_method, rank, world_size, local_rank),
        LayoutWish(sizes, order, cp_layout, symmetric_reserve, mesh),
    )


def init_world(  # noqa: PLR0913 - the first half of init_distributed's
    *,
    device: str = "auto",
    verify_symmetric: bool = False,
    tune: str = "shipped",
    deterministic: bool = False,
    ignore_known_issues: Collection[str] = (),
    timeout: float | timedelta = 300.0,
    init_method: str | None = None,
    rank: int | None = None,
    world_size: int | None = None,
    local_rank: int | None = None,
) -> ParallelState:
    """The first half of `init_distributed`: a state that has the group of all ranks only.

    Collective among all ranks of the job. Arguments and errors are those of `init_distributed`. No
    symmetric memory is reserved.
    """
    return _initialize(
        JobWish(device, ignore_known_issues, verify_symmetric, tune, deterministic),
        timeout,
        (init_method, rank, world_size, local_rank),
    )


def lay_out_world(  # noqa: PLR0913 - the second half of init_distributed's
    tp: int = 1,
    cp: int = 1,
    pp: int = 1,
    dp: int = 1,
    ep: int = 1,
    *,
    cp_layout: str = "auto",
    order: str = "tp-cp-pp-dp",
    mesh: DeviceMesh | None = None,
    symmetric_reserve: int | str = "auto",
) -> ParallelState:
    """The second half: makes the groups of all axes. Collective among all ranks of the job.

    It may be done again after `ParallelState.clear_layout`, also with other sizes. Arguments are
    those of `init_distributed`; errors also those of `ParallelState.lay_out`. Memory that an
    earlier layout has reserved counts as reserved.
    """
    state = get_parallel_state()
    sizes = {"tp": tp, "cp": cp, "pp": pp, "dp": dp, "ep": ep}
    state.lay_out(LayoutWish(sizes, order, cp_layout, symmetric_reserve, mesh))
    return state


def is_initialized() -> bool:
    """Whether there is a `ParallelState` in force."""
    return _current is not None and not _current.closed


def destroy_distributed() -> None:
    """Closes the state in force, if there is one. Not collective; see `ParallelState.close`."""
    global _current
    if _current is not None:
        _current.close()
        _current = None


def get_parallel_state() -> ParallelState:
    """The state in force.

    Raises:
        NotInitializedError: there is none. The getters below raise it too.
    """
    if _current is None or _current.closed:
        raise NotInitializedError("no groups yet: call init_distributed() first")
    return _current


@contextmanager
def graph_capture(
    stream: torch.cuda.Stream | None = None, *, symmetric: bool = False
) -> Iterator[GraphCapture]:
    """`GroupCoordinator.graph_capture` for all groups of the state in force."""
    with get_parallel_state().graph_capture(stream, symmetric=symmetric) as capture:
        yield capture


def profiler_ranges(kind: str | None) -> AbstractContextManager[object]:
    """`ParallelState.profiler_ranges` of the state in force."""
    return get_parallel_state().profiler_ranges(kind)


def get_world_group() -> GroupCoordinator:
    """The group of all ranks."""
    return get_parallel_state().world


def get_tp_group() -> GroupCoordinator:
    """This rank's tensor-parallel group."""
    return get_parallel_state().tp


def get_cp_group() -> GroupCoordinator:
    """This rank's context-parallel group."""
    return get_parallel_state().cp


def get_attn_tp_group() -> GroupCoordinator:
    """The ranks that share this rank's part of the sequence and split its attention heads."""
    return get_parallel_state().attn_tp


def get_pp_group() -> GroupCoordinator:
    """This rank's pipeline-parallel group."""
    return get_parallel_state().pp


def get_dp_group() -> GroupCoordinator:
    """This rank's data-parallel group."""
    return get_parallel_state().dp


def get_ep_group() -> GroupCoordinator:
    """This rank's expert-parallel group."""
    return get_parallel_state().ep


def get_moe_tp_group() -> GroupCoordinator:
    """The ranks that split the experts of this rank among them."""
    return get_parallel_state().moe_tp


def _initialize(
    wish: JobWish,
    timeout: float | timedelta,
    given: tuple[str | None, int | None, int | None, int | None],
    layout: LayoutWish | None = None,
) -> ParallelState:
    """Makes the state in force.

    Args:
        given: init_method, rank, world_size and local_rank.
        layout: the groups to make at once.
    """
    global _current
    if is_initialized():
        raise AlreadyInitializedError(
            "init_distributed() was called before; call destroy_distributed() first "
            f"[rank {get_parallel_state().rank}]"
        )
    timeout_s = _checked_timeout(timeout)
    launch = find_launch(*given)
    verifies = wish.verify_symmetric or env.verifies_symmetric_memory()
    wish = replace(wish, verify_symmetric=verifies)
    state = ParallelState(launch, agree_on_job(wish, launch, timeout_s, layout))
    if layout is not None:
        try:
            state.lay_out(layout, agreed=True)
        except BaseException:  # also an interrupt: nothing is left half-made
            state.close()
            raise
    _current = state
    return _current


def _checked_timeout(timeout: float | timedelta) -> float:
    seconds = timeout.total_seconds() if isinstance(timeout, timedelta) else timeout
    if not isinstance(seconds, int | float) or not 0 < seconds < math.inf:
        raise ArgumentError(
            "timeout", "a finite number of seconds > 0", repr(timeout), call="init_distributed"
        )
    return float(seconds)
