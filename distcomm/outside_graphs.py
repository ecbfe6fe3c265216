"""Keeps `torch.compile` out of what can't be part of a graph."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import FunctionType
from typing import ParamSpec, TypeVar, cast

import torch
from torch._compile import _disable_dynamo
from torch.compiler import is_dynamo_compiling

__all__ = ["outside_graphs"]

P = ParamSpec("P")
R = TypeVar("R")


def outside_graphs(method: Callable[P, R]) -> Callable[P, R]:
    """Keeps `torch.compile` out of `method`: it ends a graph there, or with ``fullgraph=True`` says
    why it can't. Costs a call and no more where nothing is compiled."""
    reason = f"distcomm: {method.__name__} can't be part of a compiled graph: call it outside"
    # torch.compiler.disable would import all of Dynamo at once, which takes a second.
    disabled = _disable_dynamo(method)

    @functools.wraps(method)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if is_dynamo_compiling():
            torch._dynamo.graph_break(msg=reason)
            return disabled(*args, **kwargs)
        return method(*args, **kwargs)

    # Dynamo keeps what it knows by code object, and gives up on one of which it knows too much.
    function = cast(FunctionType, call)
    function.__code__ = function.__code__.replace(co_name=method.__name__)
    return call
