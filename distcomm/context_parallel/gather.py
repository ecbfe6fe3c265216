"""Gathers of keys and values over context-parallel ranks, each row straight into its final place.

Shapes: W ranks of the group, T tokens of the plan, S_r tokens of rank r.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeAlias, TypeVar, overload

import torch

from ..errors import ArgumentError
from ..group import GroupCoordinator
from ..handles import AsyncHandle
from ..outside_graphs import outside_graphs
from .agreement import agree, tell_failure
from .methods import run
from .plan import ContextParallelPlan
from .request import KvRequest, Stream, check_cache_request, check_gather_request, check_slots

__all__ = ["Gathered", "KvGather", "all_gather_kv", "all_gather_kv_into_cache"]


Gathered: TypeAlias = "torch.Tensor | tuple[torch.Tensor, ...]"
Result = TypeVar("Result", bound=Gathered)


class KvGather(Generic[Result]):
    """A gather under way."""

    def __init__(self, handle: AsyncHandle, result: Result) -> None:
        self._handle = handle
        self._result = result

    @outside_graphs
    def wait(self) -> Result:
        """The gathered tensor, or a tuple of several, which the current stream may use now.

        Makes the current stream wait, and not the host. Every stream that uses the result must
        wait on its own.
        """
        self._handle.wait()
        return self._result

    @outside_graphs
    def is_completed(self) -> bool:
        """Whether the gather has finished; never blocks."""
        return self._handle.is_completed()


@overload
def all_gather_kv(
    group: GroupCoordinator,
    plan: ContextParallelPlan,
    tensor: torch.Tensor,
    /,
    *,
    out: torch.Tensor | None = None,
    stream: None = None,
    method: str = "auto",
) -> torch.Tensor: ...


@overload
def all_gather_kv(
    group: GroupCoordinator,
    plan: ContextParallelPlan,
    first: torch.Tensor,
    second: torch.Tensor,
    /,
    *more: torch.Tensor,
    out: Sequence[torch.Tensor] | None = None,
    stream: None = None,
    method: str = "auto",
) -> tuple[torch.Tensor, ...]: ...


@overload
def all_gather_kv(
    group: GroupCoordinator,
    plan: ContextParallelPlan,
    tensor: torch.Tensor,
    /,
    *,
    out: torch.Tensor | None = None,
    stream: Stream,
    method: str = "auto",
) -> KvGather[torch.Tensor]: ...


@overload
def all_gather_kv(
    group: GroupCoordinator,
    plan: ContextParallelPlan,
    first: torch.Tensor,
    second: torch.Tensor,
    /,
    *more: torch.Tensor,
    out: Sequence[torch.Tensor] | None = None,
    stream: Stream,
    method: str = "auto",
) -> KvGather[tuple[torch.Tensor, ...]]: ...


@overload
def all_gather_kv(
    group: GroupCoordinator,
    plan: ContextParallelPlan,
    *tensors: torch.Tensor,
    out: torch.Tensor | Sequence[torch.Tensor] | None = None,
    stream: Stream | None = None,
    method: str = "auto",
) -> Gathered | KvGather[Gathered]: ...


@outside_graphs
def all_gather_kv(
    group: GroupCoordinator,
    plan: ContextParallelPlan,
    *tensors: torch.Tensor,
    out: torch.Tensor | Sequence[torch.Tensor] | None = None,
    stream: Stream | None = None,
    method: str = "auto",
) -> Gathered | KvGather[Any]:
    """All ranks' rows in token order. Collective among the ranks of `group`.

    Several tensors, such as keys and values, are gathered by one call. Rows are moved as bytes:
    any dtype, any trailing shape, the same on all ranks. Every method gives the same bits.

    - ``kernel``: a Triton kernel reads each local row once and writes it to its place on every
      rank.
    - ``copy_engine``: the same by peer copies, one peer after another, without any SM.
    - ``collective``: NCCL or gloo gathers the ranks' rows one rank after another, then one pass
      puts them in order. Takes the output's size once more in between.
    - ``auto``: on CPU, and where the ranks can't write into each other's outputs, ``collective``,
      which on GPUs is counted as a fallback in the group's `stats`. Else ``copy_engine`` for long
      runs of tokens beside the caller's work, and ``kernel`` for all else.

    The ranks compare plan and arguments when a plan is first used with a group; a rank whose
    arguments are wrong then raises on the others too. The first call that writes to peers, and
    the first with a plan, can't be captured in a CUDA graph; later ones can. Calls of one group,
    on whatever streams, run one after another; so must replays of graphs that hold them.

    Args:
        group: a group as large as the plan, such as ``state.cp``.
        plan: the same on all ranks.
        tensors: [S_r, ...] each, this rank's rows as `ContextParallelPlan.shard` would give; on
            the group's device, or on CPU.
        out: [T, ...] like each tensor, in other memory; a sequence for several. For ``kernel`` and
            ``copy_engine`` it must be symmetric, at the same place on all ranks. By default a new
            tensor, symmetric where that is possible.
        stream: runs the gather beside the caller's work, after all that the current stream was
            given before. ``torch.cpu.Stream()`` with tensors on CPU, where the gather has ended
            when the call returns. On all ranks or on none.
        method: one of the above; the same on all ranks.

    Returns:
        A tensor [T, ...] or a tuple of several; with `stream` a `KvGather`, whose `wait()` returns
        them. In a group of one without `out`, the tensors themselves.

    Raises:
        ArgumentError: an argument doesn't fit; nothing has been sent.
        PlanMismatchError: the ranks' plans or arguments differ, or another rank's don't fit.
        CollectiveError, NcclError: the gather failed.
    """
    # What is allocated here differs between ranks in size, but for the outputs.
    with group.suspend_symmetric_memory():
        request = _agreed(
            group,
            plan,
            lambda: check_gather_request(group, plan, tensors, out, stream, method),
        )
        handle, outputs = run(request)
    return _result(handle, outputs, stream)


@overload
def all_gather_kv_into_cache(
    group: GroupCoordinator,
    plan: ContextParallelPlan,
    tensors: torch.Tensor | Sequence[torch.Tensor],
    caches: torch.Tensor | Sequence[torch.Tensor],
    slot_mapping: torch.Tensor,
    *,
    stream: None = None,
    method: str = "auto",
    validate: bool = False,
) -> Gathered: ...


@overload
def all_gather_kv_into_cache(
    group: GroupCoordinator,
    plan: ContextParallelPlan,
    tensors: torch.Tensor | Sequence[torch.Tensor],
    caches: torch.Tensor | Sequence[torch.Tensor],
    slot_mapping: torch.Tensor,
    *,
    stream: Stream,
    method: str = "auto",
    validate: bool = False,
) -> KvGather[Gathered]: ...


@outside_graphs
def all_gather_kv_into_cache(
    group: GroupCoordinator,
    plan: ContextParallelPlan,
    tensors: torch.Tensor | Sequence[torch.Tensor],
    caches: torch.Tensor | Sequence[torch.Tensor],
    slot_mapping: torch.Tensor,
    *,
    stream: Stream | None = None,
    method: str = "auto",
    validate: bool = False,
) -> Gathered | KvGather[Any]:
    """Writes all ranks' rows into their slots of each rank's paged KV cache. Collective.

    As `all_gather_kv`, but row by row to ``cache[slot_mapping[token]]``; slots that no token has
    keep what they hold. ``copy_engine`` can't do this.

    Args:
        group, plan, stream, method: as for `all_gather_kv`.
        tensors: [S_r, ...], or several, such as ``(k, v)``.
        caches: [slots, ...] for each tensor, with contiguous slots. For ``kernel`` symmetric, and
            at the same place on all ranks.
        slot_mapping: [T], int64 or int32, in token order, the same on all ranks: the slot of each
            token, distinct; negative for tokens that aren't wanted.
        validate: checks that the slots are in range, distinct and the same on all ranks, which
            blocks the host. On all ranks or on none. Else a wrong slot writes where it shouldn't.

    Returns:
        `caches`; with `stream` a `KvGather`, whose `wait()` returns them.

    Raises:
        ArgumentError, PlanMismatchError, CollectiveError, NcclError: as `all_gather_kv`.
    """

    def check() -> KvRequest:
        request = check_cache_request(group, plan, tensors, caches, slot_mapping, stream, method)
        if validate:
            check_slots(request)
        return request

    with group.suspend_symmetric_memory():
        request = _agreed(group, plan, check, validate=validate)
        handle, outputs = run(request)
    return _result(handle, outputs, stream)


# ---- inside -----------------------------------------------------------------------------------


def _agreed(
    group: GroupCoordinator,
    plan: ContextParallelPlan,
    check: Callable[[], KvRequest],
    *,
    validate: bool = False,
) -> KvRequest:
    """The request, once the ranks are known to make the same one."""
    known = isinstance(plan, ContextParallelPlan) and plan.is_agreed_with(group)
    if group.world_size == 1 or (known and not validate):
        return check()
    try:
        request = check()
    except ArgumentError as error:
        tell_failure(group, error)
        raise
    agree(group, request.call, request.describe(with_slots=validate))
    plan.note_agreement(group)
    return request


def _result(
    handle: AsyncHandle, outputs: tuple[torch.Tensor, ...], stream: Stream | None
) -> Gathered | KvGather[Any]:
    result = outputs[0] if len(outputs) == 1 else outputs
    return result if stream is None else KvGather(handle, result)
