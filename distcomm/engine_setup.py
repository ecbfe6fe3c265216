"""Making and closing groups by the calls and sizes that SGLang, vLLM and Megatron have for it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from .agreement import LayoutWish
from .current import destroy_distributed, get_parallel_state, init_world, is_initialized
from .errors import ArgumentError
from .state import ParallelState

__all__ = [
    "destroy_distributed_environment",
    "destroy_model_parallel",
    "ensure_model_parallel_initialized",
    "init_distributed_environment",
    "initialize_model_parallel",
    "model_parallel_is_initialized",
]

_DEVICES = {"nccl": "cuda", "gloo": "cpu", None: "auto"}
_CP_LAYOUTS = {
    "attention_context_model_parallel_size": "inside_tp",
    "context_parallel_size": "beside_tp",
    "prefill_context_model_parallel_size": "beside_tp",
    "decode_context_model_parallel_size": "adjacent_in_tp",
    "decode_context_parallel_size": "adjacent_in_tp",
}


def init_distributed_environment(
    world_size: int = -1,
    rank: int = -1,
    distributed_init_method: str | None = "env://",
    local_rank: int = -1,
    backend: str | None = None,
    timeout: float | timedelta | None = None,
    **options: Any,
) -> ParallelState:
    """Makes the group of all ranks, and no other one yet. Collective among all ranks of the job.

    Args:
        world_size, rank, local_rank: this process's place; -1 for what the launch says.
        distributed_init_method: ``"env://"`` for torchrun's environment, or where the ranks meet.
            Of no effect where torch's default process group is there already.
        backend: ``"nccl"`` for GPUs, ``"gloo"`` for CPU, None for what all ranks can have.
        timeout: seconds, or a `timedelta`; by default 300 s.
        options: of `init_distributed`: ``tune``, ``deterministic``, ``verify_symmetric``,
            ``ignore_known_issues``.

    Raises:
        AlreadyInitializedError: it was called before.
        ArgumentError, LaunchError, InitializationError: as `init_distributed`.
    """
    if backend not in _DEVICES:
        requirement = "'nccl', 'gloo' or None"
        raise ArgumentError(
            "backend", requirement, repr(backend), call="init_distributed_environment"
        )
    return init_world(
        device=_DEVICES[backend],
        timeout=300.0 if timeout is None else timeout,
        init_method=None if dist.is_initialized() else distributed_init_method,
        rank=None if rank == -1 else rank,
        world_size=None if world_size == -1 else world_size,
        local_rank=None if local_rank == -1 else local_rank,
        **options,
    )


def initialize_model_parallel(  # noqa: PLR0913 - the engines' arguments
    tensor_model_parallel_size: int = 1,
    *,
    pipeline_model_parallel_size: int = 1,
    expert_model_parallel_size: int = 1,
    attention_context_model_parallel_size: int = 1,
    context_parallel_size: int = 1,
    prefill_context_model_parallel_size: int = 1,
    decode_context_model_parallel_size: int | None = 1,
    decode_context_parallel_size: int = 1,
    attention_data_parallel_size: int = 1,
    moe_data_model_parallel_size: int = 1,
    backend: str | None = None,
    symmetric_reserve: int | str = "auto",
) -> ParallelState:
    """Makes the groups of all axes. Collective among all ranks of the job: on all, or on none.

    Data parallelism is what is left of the world size. Only the first size may be given by
    position, as engines don't agree on the order of the others.

    Args:
        expert_model_parallel_size: divides the tensor-parallel size.
        attention_context_model_parallel_size: SGLang's: cp ``"inside_tp"``.
        context_parallel_size, prefill_context_model_parallel_size: Megatron's and vLLM's: cp
            ``"beside_tp"``.
        decode_context_model_parallel_size, decode_context_parallel_size: vLLM's and SGLang's: cp
            ``"adjacent_in_tp"``. There is one kind of context parallelism at a time.
        attention_data_parallel_size, moe_data_model_parallel_size: have to be 1.
        backend: None, or that of the job.
        symmetric_reserve: as for `init_distributed`. What an earlier layout has reserved counts.

    Raises:
        NotInitializedError: `init_distributed_environment` was not called.
        AlreadyInitializedError: there are groups; see `destroy_model_parallel`.
        ArgumentError: two kinds of context parallelism, or another argument that can't be had.
        LayoutError: the sizes don't fit the world size.
        InitializationError: a rank failed, didn't come, or was given other arguments: on every
            rank, naming it.
    """
    state = get_parallel_state()
    context_sizes = {
        "attention_context_model_parallel_size": attention_context_model_parallel_size,
        "context_parallel_size": context_parallel_size,
        "prefill_context_model_parallel_size": prefill_context_model_parallel_size,
        "decode_context_model_parallel_size": decode_context_model_parallel_size or 1,
        "decode_context_parallel_size": decode_context_parallel_size,
    }
    cp, cp_layout, problem = _context_parallelism(context_sizes)
    sizes = {
        "tp": tensor_model_parallel_size,
        "cp": cp,
        "pp": pipeline_model_parallel_size,
        "ep": expert_model_parallel_size,
    }
    sizes["dp"] = _what_is_left(state.world_size, sizes, cp_layout)
    wish = LayoutWish(sizes, cp_layout=cp_layout, symmetric_reserve=symmetric_reserve)
    if _DEVICES.get(backend, "") not in ("auto", state.device.type):
        requirement = f"None, or the one of {state.device.type}, on which this job runs"
        problem = _refused("backend", requirement, backend)
    for name, value in (
        ("attention_data_parallel_size", attention_data_parallel_size),
        ("moe_data_model_parallel_size", moe_data_model_parallel_size),
    ):
        if value != 1:
            problem = _refused(name, "1, as there are no such groups of more ranks", value)
    state.lay_out(wish, problem=problem)
    return state


def ensure_model_parallel_initialized(
    tensor_model_parallel_size: int, pipeline_model_parallel_size: int, **arguments: Any
) -> ParallelState:
    """`initialize_model_parallel`, unless there are groups already, which must be of these sizes.

    Raises:
        ArgumentError: there are groups of another size of tp or pp.
    """
    if not model_parallel_is_initialized():
        return initialize_model_parallel(
            tensor_model_parallel_size,
            pipeline_model_parallel_size=pipeline_model_parallel_size,
            **arguments,
        )
    state = get_parallel_state()
    for name, wanted, there in (
        ("tensor_model_parallel_size", tensor_model_parallel_size, state.layout.tp),
        ("pipeline_model_parallel_size", pipeline_model_parallel_size, state.layout.pp),
    ):
        if wanted != there:
            requirement = f"{there}, as there are groups already [rank {state.rank}]"
            raise _refused(name, requirement, wanted)
    return state


def model_parallel_is_initialized() -> bool:
    """Whether there are groups of axes."""
    return is_initialized() and get_parallel_state().is_laid_out


def destroy_model_parallel() -> None:
    """`ParallelState.clear_layout`: closes the groups of axes. Idempotent."""
    if is_initialized():
        get_parallel_state().clear_layout()


def destroy_distributed_environment() -> None:
    """`destroy_distributed`: closes everything. Idempotent."""
    destroy_distributed()


# ---- sizes ----------------------------------------------------------------------------------


def _context_parallelism(sizes: Mapping[str, Any]) -> tuple[Any, str, ArgumentError | None]:
    """The size of cp, the `cp_layout`, and what is wrong with the sizes that were given."""
    given = {name: size for name, size in sizes.items() if size != 1}
    if not given:
        return 1, "auto", None
    first, cp = next(iter(given.items()))
    problem = None
    for name, size in given.items():
        if _CP_LAYOUTS[name] != _CP_LAYOUTS[first] or size != cp:
            problem = _refused(name, f"left out or 1 beside {first}={cp}: there is one cp", size)
    return cp, _CP_LAYOUTS[first], problem


def _what_is_left(world_size: int, sizes: Mapping[str, Any], cp_layout: str) -> int:
    """The data-parallel size; 1 if the others are no sizes, of which a layout says more."""
    axes = ("tp", "cp", "pp") if cp_layout == "beside_tp" else ("tp", "pp")
    if any(type(sizes[axis]) is not int or sizes[axis] < 1 for axis in axes):
        return 1
    product: int = math.prod(sizes[axis] for axis in axes)
    return max(1, world_size // product)


def _refused(argument: str, requirement: str, actual: object) -> ArgumentError:
    return ArgumentError(argument, requirement, repr(actual), call="initialize_model_parallel")
