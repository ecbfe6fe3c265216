"""What a gather is asked to do, checked.

Shapes: T tokens of the plan, S_r tokens of this rank, W ranks.
"""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import torch

from ..checks import check_output, materialized, share_memory
from ..errors import ArgumentError, GroupMember
from ..group import GroupCoordinator
from .choice import METHODS
from .plan import ContextParallelPlan

# With torch.cpu.Stream, one program runs on both; there is nothing that it could order.
Stream: TypeAlias = "torch.cuda.Stream | torch.cpu.Stream"

__all__ = [
    "KvRequest",
    "Stream",
    "check_cache_request",
    "check_gather_request",
    "check_slots",
    "row_num_bytes",
]


@dataclass(frozen=True)
class KvRequest:
    """One gather.

    Attributes:
        call: the function's name.
        tensors: this rank's rows, each [S_r, ...] with contiguous rows.
        outputs: where each goes, [T, ...], or [slots, ...] with `slots`; None: to be made.
        slots: the row of `outputs` of each token, [T], negative for none; None: the token itself.
        method: one of `METHODS`.
        stream: to run on; None for the current one.
    """

    call: str
    group: GroupCoordinator
    plan: ContextParallelPlan
    tensors: tuple[torch.Tensor, ...]
    outputs: tuple[torch.Tensor, ...] | None
    slots: torch.Tensor | None
    method: str
    stream: torch.cuda.Stream | None

    @property
    def device(self) -> torch.device:
        return self.tensors[0].device

    @cached_property
    def row_bytes(self) -> list[int]:
        """Bytes of a row of each tensor."""
        return [row_num_bytes(x) for x in self.tensors]

    def describe(self, *, with_slots: bool) -> str:
        """What has to be the same on all ranks, as a person reads it."""
        rows = [f"{str(x.dtype).removeprefix('torch.')} {list(x.shape[1:])}" for x in self.tensors]
        parts = [f"{self.call} on {self.device.type} of rows {', '.join(rows)}", f"{self.plan}"]
        if self.outputs is not None:
            for output in self.outputs:
                place = self.group.placement(output)
                where = "ordinary memory" if place is None else f"segment #{place[0]} at {place[1]}"
                parts.append(f"into {where}")
        if self.slots is not None and with_slots:
            parts.append(f"slots with digest {_digest(self.slots)}")
        parts.append(f"method {self.method}" + (", beside the caller" if self.stream else ""))
        # The plan's text is shortened where there are many sequences.
        return f"{'; '.join(parts)} ({self.plan.digest.hex()[:16]})"


def row_num_bytes(x: torch.Tensor) -> int:
    """Of one row, also where there is none."""
    num_elements = 1
    for size in x.shape[1:]:
        num_elements *= size
    return num_elements * x.element_size()


def check_gather_request(
    group: GroupCoordinator,
    plan: ContextParallelPlan,
    tensors: Sequence[torch.Tensor],
    out: torch.Tensor | Sequence[torch.Tensor] | None,
    stream: Stream | None,
    method: str,
) -> KvRequest:
    """The request of `all_gather_kv`; raises `ArgumentError`. Local."""
    call = "all_gather_kv"
    prepared = _checked_inputs(call, group, plan, tensors)
    outputs = None if out is None else _as_tuple(out)
    if outputs is not None:
        _check_count(call, "out", outputs, prepared, group.member)
        for output, x in zip(outputs, prepared, strict=True):
            shape = (plan.num_tokens, *x.shape[1:])
            check_output(call, "out", output, [shape], x, group.member)
            _check_apart(call, "out", output, tensors, group.member)
    where = _checked_stream(call, group, prepared, stream)
    _check_method(call, method, group.member)
    return KvRequest(call, group, plan, prepared, outputs, None, method, where)


def check_cache_request(
    group: GroupCoordinator,
    plan: ContextParallelPlan,
    tensors: torch.Tensor | Sequence[torch.Tensor],
    caches: torch.Tensor | Sequence[torch.Tensor],
    slots: torch.Tensor,
    stream: Stream | None,
    method: str,
) -> KvRequest:
    """The request of `all_gather_kv_into_cache`; raises `ArgumentError`. Local."""
    call = "all_gather_kv_into_cache"
    given, outputs = _as_tuple(tensors), _as_tuple(caches)
    prepared = _checked_inputs(call, group, plan, given)
    _check_count(call, "caches", outputs, prepared, group.member)
    for cache, x in zip(outputs, prepared, strict=True):
        _check_cache(call, cache, x, group.member)
        _check_apart(call, "caches", cache, given, group.member)
    _check_tensors(call, "slot_mapping", [slots], group.member)
    problem: tuple[str, object] | None = None
    if slots.dtype not in (torch.int32, torch.int64):
        problem = ("of dtype int32 or int64", slots.dtype)
    elif slots.shape != (plan.num_tokens,):
        problem = (f"of shape [{plan.num_tokens}], one slot per token", list(slots.shape))
    elif slots.device != prepared[0].device:
        problem = (f"on {prepared[0].device}", slots.device)
    if problem is not None:
        raise ArgumentError("slot_mapping", *problem, call=call, member=group.member)
    where = _checked_stream(call, group, prepared, stream)
    _check_method(call, method, group.member)
    return KvRequest(call, group, plan, prepared, outputs, slots.contiguous(), method, where)


def check_slots(request: KvRequest) -> None:
    """No slot lies beyond a cache, and none is used twice; raises `ArgumentError`. Blocks."""
    slots, caches = request.slots, request.outputs
    if slots is None or caches is None:
        return
    num_slots = min(len(cache) for cache in caches)
    used = slots[slots >= 0].cpu()
    beyond = used[used >= num_slots]
    problem: tuple[str, object] | None = None
    if beyond.numel():
        problem = (f"below {num_slots}, the number of slots", f"slot {int(beyond[0])}")
    else:
        distinct, counts = used.unique(return_counts=True)
        if len(distinct) < len(used):
            problem = ("of distinct slots", f"slot {int(distinct[counts > 1][0])} more than once")
    if problem is not None:
        member = request.group.member
        raise ArgumentError("slot_mapping", *problem, call=request.call, member=member)


def _digest(slots: torch.Tensor) -> str:
    on_host = slots.cpu().to(torch.int64)
    return hashlib.sha256(ctypes.string_at(on_host.data_ptr(), on_host.nbytes)).hexdigest()[:16]


# ---- inside -----------------------------------------------------------------------------------


def _as_tuple(tensors: torch.Tensor | Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    return (tensors,) if isinstance(tensors, torch.Tensor) else tuple(tensors)


def _checked_inputs(
    call: str, group: GroupCoordinator, plan: ContextParallelPlan, tensors: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, ...]:
    member = group.member
    if not isinstance(plan, ContextParallelPlan):
        raise ArgumentError("plan", "a ContextParallelPlan", repr(plan), call=call, member=member)
    if plan.cp_size != group.world_size:
        raise ArgumentError(
            "plan",
            f"for {group.world_size} ranks, as the group has",
            f"one with cp_size={plan.cp_size}",
            call=call,
            member=member,
        )
    if not tensors:
        raise ArgumentError("tensors", "at least one tensor", "none", call=call, member=member)
    rows = plan.tokens_per_rank[group.rank_in_group]
    _check_tensors(call, "tensors", tensors, member)
    for x in tensors:
        if x.dim() == 0 or x.shape[0] != rows:
            raise ArgumentError(
                "tensors",
                f"of {rows} rows, this rank's tokens of the plan",
                f"shape {list(x.shape)}",
                call=call,
                member=member,
            )
        if x.device != tensors[0].device or x.device not in (torch.device("cpu"), group.device):
            raise ArgumentError(
                "tensors",
                f"all on {group.device}, or all on cpu",
                ", ".join(str(each.device) for each in tensors),
                call=call,
                member=member,
            )
    return tuple(x if _has_plain_rows(x) else materialized(x) for x in tensors)


def _check_tensors(
    call: str, argument: str, tensors: Sequence[object], member: GroupMember
) -> None:
    for x in tensors:
        if not isinstance(x, torch.Tensor):
            raise ArgumentError(argument, "tensors", type(x).__name__, call=call, member=member)


def _has_plain_rows(x: torch.Tensor) -> bool:
    """Whether each row is one piece of memory that holds its values, and no two share any."""
    if x.is_conj() or x.is_neg():
        return False
    if x.is_contiguous():
        return True
    is_apart = len(x) == 1 or x.stride(0) * x.element_size() >= row_num_bytes(x)
    return x[0].is_contiguous() and is_apart


def _check_count(
    call: str,
    argument: str,
    outputs: Sequence[torch.Tensor],
    tensors: Sequence[torch.Tensor],
    member: GroupMember,
) -> None:
    _check_tensors(call, argument, outputs, member)
    if len(outputs) != len(tensors):
        raise ArgumentError(
            argument,
            f"{len(tensors)} tensors, as many as are gathered",
            len(outputs),
            call=call,
            member=member,
        )


def _check_apart(
    call: str,
    argument: str,
    output: torch.Tensor,
    tensors: Sequence[torch.Tensor],
    member: GroupMember,
) -> None:
    if any(share_memory(output, x) for x in tensors):
        raise ArgumentError(
            argument,
            "in other memory than what is gathered, which is still read while it is written",
            "overlapping tensors",
            call=call,
            member=member,
        )


def _check_cache(call: str, cache: torch.Tensor, x: torch.Tensor, member: GroupMember) -> None:
    problem: tuple[str, object] | None = None
    if cache.dim() == 0 or cache.shape[1:] != x.shape[1:]:
        problem = (f"of shape {['slots', *x.shape[1:]]}", list(cache.shape))
    elif cache.dtype != x.dtype:
        problem = (f"of dtype {x.dtype}", cache.dtype)
    elif cache.device != x.device:
        problem = (f"on {x.device}", cache.device)
    elif not _has_plain_rows(cache):
        problem = (
            "of contiguous slots, because they are written in place",
            f"strides {cache.stride()} for shape {list(cache.shape)}",
        )
    if problem is not None:
        raise ArgumentError("caches", *problem, call=call, member=member)


def _checked_stream(
    call: str,
    group: GroupCoordinator,
    tensors: Sequence[torch.Tensor],
    stream: Stream | None,
) -> torch.cuda.Stream | None:
    """On CPU any stream will do, as there is nothing for it to order."""
    if stream is None or not tensors[0].is_cuda:
        return None
    return group.checked_stream(call, stream)


def _check_method(call: str, method: str, member: GroupMember) -> None:
    if method not in METHODS:
        raise ArgumentError(
            "method", f"one of {', '.join(METHODS)}", repr(method), call=call, member=member
        )
