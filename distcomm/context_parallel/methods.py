"""The ways to gather: each moves every row into its final place, and gives the same bits.

Shapes: W ranks of the group, T tokens of the plan, S_r tokens of rank r.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch

from ..errors import ArgumentError
from ..handles import AsyncHandle, CompletedHandle
from ..kernels import MAX_BLOCKS, PushedTensor, place_rows, push_rows
from ..memory import PeerChannel, PushedRows, RowRun, RowRuns
from .choice import Choice, GatherFacts, choose_method
from .plan import ContextParallelPlan
from .request import KvRequest, row_num_bytes

__all__ = ["run"]

Outputs = tuple[torch.Tensor, ...]

# What one block of the kernel should have to move at least, and how many blocks may take SMs from
# work that goes on beside them. The links are the limit, not the SMs, so that few are enough.
_BYTES_PER_BLOCK = 16 << 10
_MAX_BLOCKS_BESIDE = 32


def run(request: KvRequest) -> tuple[AsyncHandle, Outputs]:
    """Gathers, on the request's stream. Collective."""
    device = request.device
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):  # kernels go to the thread's current one
            return _run(request)
    return _run(request)


def _run(request: KvRequest) -> tuple[AsyncHandle, Outputs]:
    if request.group.world_size == 1:
        return _on_stream(request, _own_rows, _outputs_of_one(request))
    outputs = _new_outputs(request) if request.outputs is None else request.outputs
    choice = _choose(request, outputs)
    if choice.fallback_reason is not None:
        request.group.count_fallback(request.call, choice.method, choice.fallback_reason)
    return _on_stream(request, _METHODS[choice.method], outputs)


def _on_stream(
    request: KvRequest, method: Callable[[KvRequest, Outputs], None], outputs: Outputs
) -> tuple[AsyncHandle, Outputs]:
    if request.stream is None:
        method(request, outputs)
        return CompletedHandle(), outputs
    used = [*outputs, *request.tensors]
    if request.slots is not None:
        used.append(request.slots)
    request.stream.wait_stream(torch.cuda.current_stream())
    try:
        with torch.cuda.stream(request.stream):
            method(request, outputs)
    finally:  # also after an error, as a part may have been enqueued
        handle = request.group.stream_handle(request.stream, used)
    return handle, outputs


def _new_outputs(request: KvRequest) -> Outputs:
    """On GPUs symmetric, wherever that can be."""

    def make() -> Outputs:
        return tuple(x.new_empty((request.plan.num_tokens, *x.shape[1:])) for x in request.tensors)

    if not request.tensors[0].is_cuda or request.method == "collective":
        return make()
    with request.group.symmetric_memory():
        return make()


def _choose(request: KvRequest, outputs: Outputs) -> Choice:
    plan = request.plan
    on_cuda = request.tensors[0].is_cuda
    not_direct = None
    channel: PeerChannel | str | None = None
    if on_cuda and request.method != "collective":
        channel = request.group.peer_channel()
        if isinstance(channel, str):
            not_direct = channel
        elif not all(request.group.is_symmetric(each) for each in outputs if each.numel()):
            not_direct = "the outputs are ordinary memory"
    no_copies = None
    if request.slots is not None:
        no_copies = "copy engines can't write to the slots of a cache"
    elif isinstance(channel, PeerChannel) and not channel.can_copy:
        no_copies = "the CUDA driver lacks what it takes"
    facts = GatherFacts(
        on_cuda=on_cuda,
        not_direct=not_direct,
        no_copies=no_copies,
        beside_compute=request.stream is not None,
        bytes_per_run=plan.tokens_per_run * min(request.row_bytes),
    )
    choice = choose_method(request.method, facts)
    if isinstance(choice, str):
        raise ArgumentError(
            "method",
            "one that is possible here",
            f"{request.method!r}, but {choice}",
            call=request.call,
            member=request.group.member,
        )
    return choice


# ---- a group of one -----------------------------------------------------------------------------


def _outputs_of_one(request: KvRequest) -> Outputs:
    return request.tensors if request.outputs is None else request.outputs


def _own_rows(request: KvRequest, outputs: Outputs) -> None:
    """All tokens are this rank's, in token order."""
    for x, output in zip(request.tensors, outputs, strict=True):
        request.group.count(request.call, "local", x.nbytes)
        with request.group.profiler_range(request.call, "local", x.nbytes):
            if request.slots is not None:
                place_rows(x, output, request.slots)
            elif output is not x:
                output.copy_(x.detach())


# ---- collective ---------------------------------------------------------------------------------


def _by_collective(request: KvRequest, outputs: Outputs) -> None:
    plan = request.plan
    in_order = plan.is_gathered_in_order and request.slots is None
    if not in_order:
        rows_to = plan.token_order(request.device)
        request.group.keep_if_capturing(rows_to)
    for x, output in zip(request.tensors, outputs, strict=True):
        gathered = output if in_order else x.new_empty((plan.num_tokens, *x.shape[1:]))
        backend = request.group.route(request.call, x)
        if len(set(plan.tokens_per_rank)) == 1:
            backend.all_gather_into_tensor(gathered, x)
        else:
            backend.all_gatherv(x, plan.tokens_per_rank, gathered)
        if not in_order:
            place_rows(gathered, output, rows_to, request.slots)


# ---- direct writes to peers ---------------------------------------------------------------------


def _by_kernel(request: KvRequest, outputs: Outputs) -> None:
    group, plan, channel = request.group, request.plan, _channel(request)
    pushed = [
        PushedTensor(
            source=x.data_ptr(),
            output=channel.alias(output.data_ptr()) if output.numel() else 0,
            deltas=channel.deltas_table,
            row_bytes=row_bytes,
            source_pitch=_pitch(x),
            output_pitch=_pitch(output),
        )
        for x, output, row_bytes in zip(request.tensors, outputs, request.row_bytes, strict=True)
        if row_bytes and output.shape[0]
    ]
    _announce(request, outputs, "kernel")
    if not pushed or not plan.num_tokens:
        return
    most_bytes = max(plan.tokens_per_rank) * max(request.row_bytes)
    most_blocks = MAX_BLOCKS if request.stream is None else _MAX_BLOCKS_BESIDE
    rank = group.rank_in_group
    rows_to = plan.token_indices(rank, request.device)
    group.keep_if_capturing(rows_to)
    with _range(request, "kernel"), channel.in_order():
        push_rows(
            pushed,
            rows_to,
            slots=request.slots,
            rank=rank,
            world_size=group.world_size,
            signals=channel.kernel_signals,
            num_blocks=max(1, min(most_blocks, most_bytes // _BYTES_PER_BLOCK)),
        )


def _by_copy_engine(request: KvRequest, outputs: Outputs) -> None:
    group, plan, channel = request.group, request.plan, _channel(request)
    pushed = [
        PushedRows(
            source=x.data_ptr(),
            row_bytes=row_bytes,
            source_pitch=_pitch(x),
            output_pitch=_pitch(output),
            outputs=channel.addresses(output.data_ptr()),
        )
        for x, output, row_bytes in zip(request.tensors, outputs, request.row_bytes, strict=True)
        if row_bytes and output.shape[0]
    ]
    _announce(request, outputs, "copy_engine")
    if not pushed or not plan.num_tokens:
        return
    with _range(request, "copy_engine"), channel.in_order() as stream:
        channel.push(pushed, _row_runs(plan, group.rank_in_group), stream)


def _row_runs(plan: ContextParallelPlan, rank: int) -> RowRuns:
    def make() -> RowRuns:
        return RowRuns(
            RowRun(run.local_start, run.token_start, run.num_tokens, run.stride)
            for run in plan.runs(rank)
        )

    return plan.remember(f"copies of {rank}", make)


def _channel(request: KvRequest) -> PeerChannel:
    channel = request.group.peer_channel()
    if isinstance(channel, str):  # the choice has looked
        raise ArgumentError("method", "possible here", channel, call=request.call)
    return channel


def _announce(request: KvRequest, outputs: Outputs, method: str) -> None:
    request.group.announce(f"{request.call} {method}", *outputs)
    for x in request.tensors:
        request.group.count(request.call, method, x.nbytes)


def _range(request: KvRequest, method: str) -> AbstractContextManager[object]:
    num_bytes = sum(x.nbytes for x in request.tensors)
    return request.group.profiler_range(request.call, method, num_bytes)


def _pitch(x: torch.Tensor) -> int:
    """Bytes from one row to the next; where there is only one, its stride means nothing."""
    return row_num_bytes(x) if x.shape[0] < 2 else x.stride(0) * x.element_size()


_METHODS: dict[str, Callable[[KvRequest, Outputs], None]] = {
    "collective": _by_collective,
    "kernel": _by_kernel,
    "copy_engine": _by_copy_engine,
}
