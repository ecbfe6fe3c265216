"""The names that SGLang, vLLM and Megatron have for groups, sizes and collectives.

An engine swaps its import: all are spellings of what the `ParallelState` in force has, and there is
no state here. Which is which is in tables (`engine_names.py`, and `COLLECTIVES` below);
`docs/migration.md` says what differs. A name says no more than its engine means by it:
`get_dcp_group` is the cp group of a layout that was made for decode context parallelism, and one
rank alone in others.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from . import current
from .current import (
    destroy_distributed,
    get_parallel_state,
    init_distributed,
    init_world,
    is_initialized,
    lay_out_world,
)
from .engine_names import ATTRIBUTES, BY_CP_LAYOUT, GROUPS, SIZES_AND_RANKS
from .engine_setup import (
    destroy_distributed_environment,
    destroy_model_parallel,
    ensure_model_parallel_initialized,
    init_distributed_environment,
    initialize_model_parallel,
    model_parallel_is_initialized,
)
from .errors import ArgumentError
from .group import GroupCoordinator
from .group_memory import GraphCapture

# ---- groups, sizes and ranks ----------------------------------------------------------------


def _group(of: str) -> GroupCoordinator:
    state = get_parallel_state()
    if of in BY_CP_LAYOUT:
        of = BY_CP_LAYOUT[of][state.layout.cp_layout]
    group: GroupCoordinator = getattr(state, of)
    return group


def _group_getter(of: str) -> Callable[..., Any]:
    def getter() -> GroupCoordinator:
        return _group(of)

    return getter


def _attribute_getter(of: str, attribute: str) -> Callable[..., Any]:
    def getter() -> Any:
        return getattr(_group(of), attribute)

    return getter


# ---- collectives ----------------------------------------------------------------------------


def _all_reduce(of: str) -> Callable[..., Any]:
    def call(input_: torch.Tensor) -> torch.Tensor:
        return _group(of).all_reduce(input_)

    return call


def _all_gather(of: str) -> Callable[..., Any]:
    def call(input_: torch.Tensor, dim: int = -1) -> torch.Tensor:
        return _group(of).all_gather(input_, dim)

    return call


def _gather(of: str) -> Callable[..., Any]:
    def call(input_: torch.Tensor, dst: int = 0, dim: int = -1) -> torch.Tensor | None:
        return _group(of).gather(input_, dst, dim)

    return call


def _reduce_scatter(of: str) -> Callable[..., Any]:
    def call(input_: torch.Tensor, dim: int = -1) -> torch.Tensor:
        return _group(of).reduce_scatter(input_, dim)

    return call


def _into_tensor(of: str, method: str) -> Callable[..., Any]:
    def call(output: torch.Tensor, input: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = getattr(_group(of), method)(output, input)
        return result

    return call


def _all_reduce_rms_norm(of: str) -> Callable[..., Any]:
    def call(
        input_: torch.Tensor, residual_inp_: torch.Tensor, weight_: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return _group(of).all_reduce_rms_norm(input_, weight_, residual_inp_, eps=eps)

    return call


def _broadcast_tensor_dict(of: str) -> Callable[..., Any]:
    def call(tensor_dict: dict[str, Any] | None = None, src: int = 0) -> dict[str, Any]:
        return _group(of).broadcast_tensor_dict(tensor_dict, src)

    return call


COLLECTIVES: dict[str, tuple[Callable[..., Any], str]] = {
    "tensor_model_parallel_all_reduce": (_all_reduce("tp"), "tp.all_reduce"),
    "tensor_model_parallel_all_gather": (_all_gather("tp"), "tp.all_gather"),
    "tensor_model_parallel_gather": (_gather("tp"), "tp.gather"),
    "tensor_model_parallel_reduce_scatter": (_reduce_scatter("tp"), "tp.reduce_scatter"),
    "tensor_model_parallel_fused_allreduce_rmsnorm": (
        _all_reduce_rms_norm("tp"),
        "tp.all_reduce_rms_norm",
    ),
    "attention_tensor_model_parallel_all_reduce": (
        _all_reduce("attention_tp"),
        "attention_tp.all_reduce",
    ),
    "moe_tensor_model_parallel_all_reduce": (_all_reduce("moe_tp"), "moe_tp.all_reduce"),
    "moe_expert_parallel_all_reduce": (_all_reduce("ep"), "ep.all_reduce"),
    "attn_cp_all_gather_into_tensor": (
        _into_tensor("attention_cp", "all_gather_into_tensor"),
        "attention_cp.all_gather_into_tensor",
    ),
    "attn_cp_reduce_scatter_tensor": (
        _into_tensor("attention_cp", "reduce_scatter_tensor"),
        "attention_cp.reduce_scatter_tensor",
    ),
    "broadcast_tensor_dict": (_broadcast_tensor_dict("tp"), "tp.broadcast_tensor_dict"),
}
"""Functions that make a collective, and which; arguments have the engines' names and order."""


# ---- what takes more than a table -----------------------------------------------------------


@contextmanager
def graph_capture(
    stream: torch.cuda.Stream | torch.device | None = None,
    *,
    device: torch.device | None = None,
    symmetric: bool = False,
) -> Iterator[GraphCapture]:
    """`distcomm.graph_capture`, which SGLang gives a stream and vLLM a device: that of the job."""
    if isinstance(stream, torch.device):
        stream, device = None, stream
    own = get_parallel_state().device
    if device is not None and torch.device(device) not in (own, torch.device(own.type)):
        raise ArgumentError("device", f"{own}, the job's", device, call="graph_capture")
    with current.graph_capture(stream, symmetric=symmetric) as capture:
        yield capture


def in_the_same_node_as(
    pg: GroupCoordinator | dist.ProcessGroup, source_rank: int = 0
) -> list[bool]:
    """For each rank of a group, whether it is on the same host as the group's `source_rank`.

    Local: the ranks have told each other when the job began.

    Raises:
        ArgumentError: `source_rank` is no rank in the group.
        NotInitializedError: there is no state.
    """
    ranks = pg.ranks if isinstance(pg, GroupCoordinator) else dist.get_process_group_ranks(pg)
    if type(source_rank) is not int or not 0 <= source_rank < len(ranks):
        requirement = f"a rank in the group, from 0 to {len(ranks) - 1}"
        raise ArgumentError("source_rank", requirement, source_rank, call="in_the_same_node_as")
    hosts = get_parallel_state().hosts
    return [hosts[rank] == hosts[ranks[source_rank]] for rank in ranks]


def get_node_count() -> int:
    """How many hosts the job is on. Local. Raises `NotInitializedError` without a state."""
    return len(set(get_parallel_state().hosts))


def is_local_first_rank() -> bool:
    """Whether this is the first process on its host. Local. Raises `NotInitializedError` without a
    state."""
    state = get_parallel_state()
    return state.hosts.index(state.hosts[state.rank]) == state.rank


# ---- the module's names ---------------------------------------------------------------------


_LOCAL = "Local. Raises `NotInitializedError` if there are no such groups."


def _doc_of_collective(what: str) -> str:
    """Of what is ``group.method``: with shapes and errors as they are there."""
    of, method = what.split(".")
    return (
        f"`{method}` of the {of} group, with an engine's names of arguments. Collective among its "
        "ranks.\n\nRaises `NotInitializedError` if there are no such groups. The method says:\n\n"
        f"{inspect.getdoc(getattr(GroupCoordinator, method))}"
    )


def _made() -> dict[str, Callable[..., Any]]:
    """The functions of all tables by name. Those that `current` has for the same are its own."""
    made: dict[str, tuple[Callable[..., Any], str]] = {}
    for of, names in GROUPS.items():
        for name in names:
            made[name] = _group_getter(of), f"The {of} group. {_LOCAL}"
    for of, pairs in SIZES_AND_RANKS.items():
        for size, rank in pairs:
            made[size] = _attribute_getter(of, "world_size"), f"Size of the {of} group. {_LOCAL}"
            doc = f"This rank's index in the {of} group. {_LOCAL}"
            made[rank] = _attribute_getter(of, "rank_in_group"), doc
    for name, (of, attribute) in ATTRIBUTES.items():
        made[name] = _attribute_getter(of, attribute), f"`{attribute}` of the {of} group. {_LOCAL}"
    for name, (function, what) in COLLECTIVES.items():
        made[name] = function, _doc_of_collective(what)
    for name, (function, doc) in made.items():
        function.__name__ = function.__qualname__ = name
        function.__doc__ = doc
    found = {name: function for name, (function, _) in made.items()}
    same = [name for of in GROUPS.keys() - BY_CP_LAYOUT for name in GROUPS[of]]
    return {**found, **{name: getattr(current, name, found[name]) for name in same}}


if TYPE_CHECKING:

    def __getattr__(name: str) -> Callable[..., Any]: ...


_MADE = _made()
globals().update(_MADE)

__all__ = [
    "destroy_distributed",
    "destroy_distributed_environment",
    "destroy_model_parallel",
    "ensure_model_parallel_initialized",
    "get_node_count",
    "get_parallel_state",
    "graph_capture",
    "in_the_same_node_as",
    "init_distributed",
    "init_distributed_environment",
    "init_world",
    "initialize_model_parallel",
    "is_initialized",
    "is_local_first_rank",
    "lay_out_world",
    "model_parallel_is_initialized",
    *_MADE,
]
