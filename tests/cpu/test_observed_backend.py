"""A backend that someone looks at: each call is told first, then made with the same arguments."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from distcomm import GroupMember
from distcomm.backends import Backend, LocalBackend, ObservedBackend
from distcomm.routing import Router

X, Y = torch.arange(6.0), torch.zeros(6)
MEMBER = GroupMember("tp", (0,), 0)

# (method, arguments, keywords, what the backend is given, what the observer is told). A call has
# no entry in the last place if nobody is told of it. The observer is told of True where the
# tensors also have to be at the same place.
CALLS: list[tuple[str, tuple[Any, ...], dict[str, Any], tuple[Any, ...], tuple[Any, ...]]] = [
    ("all_reduce", (X, "max", Y), {}, (X, "max", Y), ("all_reduce max", (X, Y), True)),
    ("all_reduce", (X,), {"out": X}, (X, "sum", X), ("all_reduce sum", (X, X), True)),
    ("reduce", (X,), {}, (X, 0, "sum", None), ("reduce sum to 0", (X,), False)),
    ("reduce", (X, 1, "min", Y), {}, (X, 1, "min", Y), ("reduce min to 1", (X,), False)),
    (
        "reduce_scatter_tensor",
        (Y, X, "avg"),
        {},
        (Y, X, "avg"),
        ("reduce_scatter_tensor avg", (X, Y), True),
    ),
    (
        "reduce_scatter_tensor",
        (),
        {"output": Y, "input": X},
        (Y, X, "sum"),
        ("reduce_scatter_tensor sum", (X, Y), True),
    ),
    ("reduce_scatterv", (X, [6]), {}, (X, [6], None, "sum"), ("reduce_scatterv sum", (X,), False)),
    (
        "reduce_scatterv",
        (X, [6], Y, "max"),
        {},
        (X, [6], Y, "max"),
        ("reduce_scatterv max", (X,), False),
    ),
    ("all_gather_into_tensor", (Y, X), {}, (Y, X), ("all_gather_into_tensor", (X, Y), True)),
    ("all_gatherv", (X, [6]), {}, (X, [6], None), ("all_gatherv torch.float32", (), False)),
    ("all_gatherv", (X, [6], Y), {}, (X, [6], Y), ("all_gatherv torch.float32", (), False)),
    (
        "all_to_all_single",
        (Y, X),
        {},
        (Y, X, None, None),
        ("all_to_all_single torch.float32", (), False),
    ),
    (
        "all_to_all_single",
        (Y, X, [6], [5]),
        {},
        (Y, X, [6], [5]),
        ("all_to_all_single torch.float32", (), False),
    ),
    ("broadcast", (X,), {}, (X, 0), ("broadcast from 0", (X,), False)),
    ("broadcast", (X, 3), {}, (X, 3), ("broadcast from 3", (X,), False)),
    ("gather", (X,), {}, (X, 0, None), ("gather to 0", (X,), False)),
    ("gather", (X, 2, Y), {}, (X, 2, Y), ("gather to 2", (X,), False)),
    ("send", (X, 1), {}, (X, 1), ()),
    ("recv", (Y, 1), {}, (Y, 1), ()),
]
NAMES = [f"{name}-{index}" for index, (name, *_) in enumerate(CALLS)]


def methods(of: type) -> set[str]:
    members = inspect.getmembers(of, inspect.isfunction)
    return {name for name, _ in members if not name.startswith("_")}


def same(actual: Any, expected: Any) -> bool:
    """Equal, and the very same tensors."""
    if isinstance(expected, tuple):
        return len(actual) == len(expected) and all(map(same, actual, expected))
    return actual is expected or (not isinstance(expected, torch.Tensor) and actual == expected)


def test_every_method_of_a_backend_is_tested():
    assert {name for name, *_ in CALLS} == methods(Backend) == methods(ObservedBackend)


@pytest.mark.parametrize("name", sorted(methods(Backend)))
def test_signatures_are_those_of_a_backend(name: str):
    signatures = [inspect.signature(getattr(each, name)) for each in (Backend, ObservedBackend)]
    assert signatures[0] == signatures[1]


@pytest.mark.parametrize(("name", "args", "kwargs", "given", "told"), CALLS, ids=NAMES)
def test_a_call_is_told_and_then_made(
    name: str,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    given: tuple[Any, ...],
    told: tuple[Any, ...],
):
    both = mock.Mock()
    both.backend = mock.create_autospec(LocalBackend, instance=True)
    both.attach_mock(getattr(both.backend, name), "call")
    result = getattr(ObservedBackend(both.backend, both.observe), name)(*args, **kwargs)
    assert result is (None if name == "send" else both.call.return_value)
    names, arguments, _ = zip(*both.mock_calls, strict=True)
    assert names == (("observe", "call") if told else ("call",))
    assert same(arguments[-1], given)
    if told:
        assert same(arguments[0], told)


@pytest.mark.parametrize(("name", "args", "kwargs", "given", "told"), CALLS, ids=NAMES)
def test_what_the_observer_raises_keeps_the_call_from_being_made(
    name: str,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    given: tuple[Any, ...],
    told: tuple[Any, ...],
):
    backend = mock.create_autospec(LocalBackend, instance=True)
    observed = ObservedBackend(backend, mock.Mock(side_effect=LookupError("no")))
    if not told:
        getattr(observed, name)(*args, **kwargs)
        return
    with pytest.raises(LookupError, match="no"):
        getattr(observed, name)(*args, **kwargs)
    assert backend.mock_calls == []


def test_an_output_is_made_before_the_observer_is_told():
    x = torch.arange(6.0).view(2, 3).T
    observe = mock.Mock()
    out = ObservedBackend(LocalBackend(MEMBER), observe).all_reduce(x)
    ((op, (seen, output), placed), _) = observe.call_args
    assert placed
    assert op == "all_reduce sum"
    assert torch.equal(seen, x)
    assert seen.is_contiguous(), "a copy is made where the observer sees it"
    assert output is out is not x
    assert out.is_contiguous()
    assert (out.shape, out.dtype) == (x.shape, x.dtype)
    assert torch.equal(out, x)


def test_observers_of_a_group_are_told_of_nccl_collectives_only():
    pynccl = mock.create_autospec(LocalBackend, instance=True)
    pynccl.enabled = True
    communicators = SimpleNamespace(pynccl=pynccl, cpu_group=mock.Mock(), kernels=None)
    job = SimpleNamespace(device=torch.device("cuda", 0), deterministic=False, symmetric_pool=None)
    member = GroupMember("tp", (0, 1), 0)
    router = Router(member, communicators, job)  # type: ignore[arg-type]
    x: Any = SimpleNamespace(is_cuda=True, nbytes=4)  # all that routing looks at
    told: list[tuple[str, str]] = []
    observers = [lambda op, *_, who=who: told.append((who, op)) for who in ("first", "second")]

    def backend() -> Backend:
        return router.route("broadcast", x)

    assert backend() is pynccl
    for observer in observers:
        router.add_observer(observer)
    backend().broadcast(X)
    assert told == [("first", "broadcast from 0"), ("second", "broadcast from 0")]
    told.clear()
    router.remove_observer(observers[0])
    backend().broadcast(X)
    assert told == [("second", "broadcast from 0")]
    with mock.patch("distcomm.routing.TorchPgBackend") as gloo:
        assert router.route("broadcast", torch.ones(1)) is gloo.return_value
    router.remove_observer(observers[1])
    assert backend() is pynccl
    with pytest.raises(ValueError, match="not in list"):
        router.remove_observer(observers[1])
    assert router.stats()["ops"]["broadcast"]["pynccl"]["calls"] == 4
