"""Which backend runs a collective: pure functions of the request and of facts about the group.

Rules are tried in order; the first that applies wins. A new backend adds a rule.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["Choice", "GroupFacts", "Request", "choose_backend"]


@dataclass(frozen=True)
class Request:
    """One kind of call.

    Attributes:
        op: the collective's name, e.g. ``"all_reduce"``.
        device_type: ``"cpu"`` or ``"cuda"``: where its tensors are.
    """

    op: str
    device_type: str


@dataclass(frozen=True)
class GroupFacts:
    """What the choice depends on in a group; the same on all its ranks.

    Attributes:
        world_size: number of ranks.
        device_type: the job's device, ``"cpu"`` or ``"cuda"``.
        pynccl_enabled: whether the PyNCCL communicator accepts calls at the moment.
    """

    world_size: int
    device_type: str
    pynccl_enabled: bool


@dataclass(frozen=True)
class Choice:
    """A backend's name, and why a better one wasn't chosen (None if it was the best)."""

    backend: str
    fallback_reason: str | None = None


@dataclass(frozen=True)
class _Rule:
    choice: Choice
    applies: Callable[[Request, GroupFacts], bool]


_RULES = (
    _Rule(Choice("local"), lambda _, group: group.world_size == 1),
    # Also in a CUDA job: a CPU tensor isn't worth a copy to the GPU and back.
    _Rule(Choice("gloo"), lambda request, _: request.device_type == "cpu"),
    _Rule(Choice("pynccl"), lambda _, group: group.pynccl_enabled),
    _Rule(Choice("torch_nccl", "PyNCCL is disabled by change_state"), lambda *_: True),
)


def choose_backend(request: Request, group: GroupFacts) -> Choice | None:
    """The backend for a request: ``local``, ``gloo``, ``pynccl`` or ``torch_nccl``.

    None when the group can't take tensors of that device at all.
    """
    if request.device_type not in ("cpu", group.device_type):
        return None
    return next(rule.choice for rule in _RULES if rule.applies(request, group))
