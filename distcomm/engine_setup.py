"""Making and closing groups by the calls and sizes that SGLang, vLLM and Megatron have for it."""

from __future__ import annotations

import inspect
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
    "prefill_context_model_parallel_size": "beside_tp",
    "context_parallel_size": "beside_tp",
    "decode_context_model_parallel_size": "adjacent_in_tp",
    "decode_context_parallel_size": "adjacent_in_tp",
}
_AXES = {
    "tensor_model_parallel_size": "tp",
    "pipeline_model_parallel_size": "pp",
    "expert_model_parallel_size": "ep",
}
_HAVE_TO_BE_1 = ("attention_data_parallel_size", "moe_data_model_parallel_size")


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
    arguments = {
        "tensor_model_parallel_size": tensor_model_parallel_size,
        "pipeline_model_parallel_size": pipeline_model_parallel_size,
        "expert_model_parallel_size": expert_model_parallel_size,
        "attention_context_model_parallel_size": attention_context_model_parallel_size,
        "context_parallel_size": context_parallel_size,
        "prefill_context_model_parallel_size": prefill_context_model_parallel_size,
        "decode_context_model_parallel_size": decode_context_model_parallel_size,
        "decode_context_parallel_size": decode_context_parallel_size,
        "attention_data_parallel_size": attention_data_parallel_size,
        "moe_data_model_parallel_size": moe_data_model_parallel_size,
        "backend": backend,
        "symmetric_reserve": symmetric_reserve,
    }
    wish, problem = _wish(state, arguments)
    state.lay_out(wish, problem=problem)
    return state


def ensure_model_parallel_initialized(
    tensor_model_parallel_size: int,
    pipeline_model_parallel_size: int,
    prefill_context_model_parallel_size: int = 1,
    decode_context_model_parallel_size: int | None = 1,
    backend: str | None = None,
    **options: Any,
) -> ParallelState:
    """`initialize_model_parallel`, unless there are groups already: then they must be those that
    these arguments would make, sizes that are left out included.

    Args:
        options: the other arguments of `initialize_model_parallel`. ``symmetric_reserve`` counts
            only where groups are made.

    Raises:
        ArgumentError: there are groups already, and this argument is another one than theirs.
        LayoutError: there are groups already, and an argument is no size.
    """
    arguments = {
        "tensor_model_parallel_size": tensor_model_parallel_size,
        "pipeline_model_parallel_size": pipeline_model_parallel_size,
        "prefill_context_model_parallel_size": prefill_context_model_parallel_size,
        "decode_context_model_parallel_size": decode_context_model_parallel_size,
        "backend": backend,
        **options,
    }
    if not model_parallel_is_initialized():
        return initialize_model_parallel(**arguments)
    state = get_parallel_state()
    bound = inspect.signature(initialize_model_parallel).bind(**arguments)
    bound.apply_defaults()
    wish, problem = _wish(state, bound.arguments)
    if problem is None:
        problem = _difference(state, bound.arguments, wish)
    if problem is not None:
        raise problem
    wish.check(state.world_size)
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


def _wish(
    state: ParallelState, arguments: Mapping[str, Any]
) -> tuple[LayoutWish, ArgumentError | None]:
    """What all arguments of `initialize_model_parallel` ask for, and what is wrong with them."""
    cp, cp_layout, problem = _context_parallelism(_context_sizes(arguments))
    sizes = {axis: arguments[name] for name, axis in _AXES.items()}
    sizes["cp"] = cp
    sizes["dp"] = _what_is_left(state.world_size, sizes, cp_layout)
    backend = arguments["backend"]
    if _DEVICES.get(backend, "") not in ("auto", state.device.type):
        requirement = f"None, or the one of {state.device.type}, on which this job runs"
        problem = _refused("backend", requirement, backend)
    for name in _HAVE_TO_BE_1:
        if arguments[name] != 1:
            requirement = "1, as there are no such groups of more ranks"
            problem = _refused(name, requirement, arguments[name])
    reserve = arguments["symmetric_reserve"]
    return LayoutWish(sizes, cp_layout=cp_layout, symmetric_reserve=reserve), problem


def _difference(
    state: ParallelState, arguments: Mapping[str, Any], wish: LayoutWish
) -> ArgumentError | None:
    """Which argument asks for another layout than there is."""
    layout = state.layout
    given = {**arguments, **_context_sizes(arguments)}
    expected = {name: getattr(layout, axis) for name, axis in _AXES.items()}
    expected.update(dict.fromkeys(_CP_LAYOUTS, 1))
    kind = [name for name, cp_layout in _CP_LAYOUTS.items() if cp_layout == layout.cp_layout]
    named = [name for name in kind if given[name] != 1] or kind[:1]
    expected.update(dict.fromkeys(named, layout.cp))
    for name, there in expected.items():
        if given[name] != there:
            requirement = f"{there}, as there are groups already [rank {state.rank}]"
            return _refused(name, requirement, given[name], "ensure_model_parallel_initialized")
    return None


def _context_sizes(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The sizes of all kinds of context parallelism."""
    sizes = {name: arguments[name] for name in _CP_LAYOUTS}
    if sizes["decode_context_model_parallel_size"] is None:  # vLLM's for none
        sizes["decode_context_model_parallel_size"] = 1
    return sizes


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


def _refused(
    argument: str, requirement: str, actual: object, call: str = "initialize_model_parallel"
) -> ArgumentError:
    return ArgumentError(argument, requirement, repr(actual), call=call)
