"""Which stream waits for which, over stand-ins for torch's streams."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from distcomm.handles import StreamHandle


class Stream:
    """Notes what it waits for; events are the names of the streams that recorded them."""

    device = torch.device("cuda", 0)

    def __init__(self, name: str) -> None:
        self.name = name
        self.waited: list[str] = []

    def record_event(self) -> str:
        return self.name

    def wait_event(self, event: str) -> None:
        self.waited.append(event)


class Tensor:
    def __init__(self) -> None:
        self.recorded: list[Stream] = []

    def record_stream(self, stream: Stream) -> None:
        self.recorded.append(stream)


class Cuda:
    def __init__(self) -> None:
        self.caller, self.side, self.third = Stream("caller"), Stream("side"), Stream("third")
        self.current = self.caller
        self.capturing: set[Stream] = set()
        self.parked: list[StreamHandle] = []

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        former, self.current = self.current, stream
        yield
        self.current = former

    def handle(self, tensors: list[Any], symmetric: list[Any]) -> StreamHandle:
        return StreamHandle(self.side, tensors, symmetric, self.parked)  # type: ignore[arg-type]


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    there = Cuda()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: there.current)
    monkeypatch.setattr(torch.cuda, "stream", there.stream)
    monkeypatch.setattr(
        torch.cuda, "is_current_stream_capturing", lambda: there.current in there.capturing
    )
    return there


def test_only_ordinary_memory_is_recorded(cuda: Cuda) -> None:
    ordinary, symmetric = Tensor(), Tensor()
    handle = cuda.handle([ordinary], [symmetric])
    assert (ordinary.recorded, symmetric.recorded) == ([cuda.side], [])
    handle.wait()
    handle.wait()
    assert cuda.caller.waited == ["side", "side"]
    del handle
    assert cuda.caller.waited == ["side", "side"]


def test_another_stream_that_waits_orders_the_caller_too(cuda: Cuda) -> None:
    """The memory is free for what the caller's stream does next."""
    for symmetric, expected in (([], []), ([Tensor()], ["side"])):
        handle = cuda.handle([], symmetric)
        with cuda.stream(cuda.third):
            handle.wait()
        assert cuda.third.waited.pop() == "side"
        assert cuda.caller.waited == expected


def test_a_handle_that_is_dropped(cuda: Cuda) -> None:
    cuda.handle([Tensor()], [])
    assert cuda.caller.waited == []
    cuda.handle([], [Tensor()])
    assert cuda.caller.waited == ["side"]


def test_a_handle_that_is_dropped_in_a_capture_is_parked(cuda: Cuda) -> None:
    handle = cuda.handle([], [Tensor()])
    cuda.capturing.add(cuda.caller)
    del handle
    assert len(cuda.parked) == 1
    StreamHandle.unpark(cuda.parked)
    assert len(cuda.parked) == 1, "the capture goes on"
    assert cuda.caller.waited == []
    cuda.capturing.clear()
    StreamHandle.unpark(cuda.parked)
    assert cuda.parked == []
    assert cuda.caller.waited == ["side"]


def test_a_captured_handle_that_is_dropped_later(cuda: Cuda) -> None:
    cuda.capturing.add(cuda.caller)
    handle = cuda.handle([], [Tensor()])
    cuda.capturing.clear()
    del handle
    assert cuda.parked == cuda.caller.waited == []
