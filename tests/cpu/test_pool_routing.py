"""Which pool a thread allocates from, over a stand-in that keeps torch's rules."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from distcomm.errors import DistcommError
from distcomm.memory import torch_pools
from distcomm.memory.pool_routing import PoolRouting
from tests.cpu.torch_stand_in import DEVICE_INDEX, GRAPH, Torch, patched


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[Torch]:
    with patched(monkeypatch) as there:
        yield there


def make_routing() -> PoolRouting:
    return PoolRouting(SimpleNamespace(path="lib.so"), torch.device("cuda", DEVICE_INDEX))


def check_end(there: Torch, routing: PoolRouting) -> None:
    """After closing, every pool is gone, at once and not at a collection."""
    gc.disable()
    try:
        routing.close()
        assert there.routes == []
        unused = [pool.id for pool in routing._pools._never_used.values()]
        assert list(there.use_counts) == unused, "pools are left"
    finally:
        gc.enable()
    assert there.faults == []


def test_nested_and_suspended(stand_in: Torch) -> None:
    routing = make_routing()
    routing.enter()
    pool = stand_in.allocates_from()
    routing.enter()
    assert stand_in.allocates_from() == pool
    routing.suspend()
    assert stand_in.allocates_from() is None
    routing.suspend()
    routing.enter()
    assert stand_in.allocates_from() == pool
    routing.leave()
    assert stand_in.allocates_from() is None
    routing.leave()
    routing.leave()
    assert stand_in.allocates_from() == pool
    routing.leave()
    routing.leave()
    assert stand_in.allocates_from() is None
    routing.enter()
    assert stand_in.allocates_from() == pool, "a thread goes on with its pool"
    routing.leave()
    assert stand_in.num_pools == 1
    check_end(stand_in, routing)


def test_a_capture_has_a_pool_of_its_own(stand_in: Torch) -> None:
    routing = make_routing()
    routing.enter()
    eager = stand_in.allocates_from()
    stand_in.begin_capture()
    assert stand_in.allocates_from() == GRAPH
    pools = []
    for _ in range(2):
        routing.enter()
        pools.append(stand_in.allocates_from())
        routing.suspend()
        assert stand_in.allocates_from() == GRAPH
        routing.leave()
        assert stand_in.allocates_from() == pools[-1]
        routing.leave()
        assert stand_in.allocates_from() == GRAPH
    assert pools[0] == pools[1] != eager
    assert stand_in.watched == [stand_in.capture_id]
    capture_id = stand_in.end_capture()
    assert stand_in.allocates_from() == eager
    routing.leave()
    assert routing.captured() == ([1], 1)
    routing.drop_captured([], 1)
    assert pools[0] in stand_in.use_counts, "the graph lives"
    stand_in.ended.append(capture_id)
    assert routing.captured() == ([], 1)
    assert routing.num_captures() == 0
    routing.drop_captured([1], 1)
    assert pools[0] in stand_in.use_counts, "given back only where all ranks do"
    stand_in.live.add(pools[0])
    routing.drop_captured([], 3)
    assert pools[0] in stand_in.use_counts, "a tensor lies in it"
    stand_in.live.clear()
    routing.enter()
    routing.enter()
    routing.leave()
    assert pools[0] in stand_in.use_counts
    routing.leave()
    assert pools[0] not in stand_in.use_counts, "seen when a context is left"
    assert routing.captured() == ([], 3)
    check_end(stand_in, routing)


def test_generations_are_levelled(stand_in: Torch) -> None:
    routing = make_routing()
    routing.renew()
    assert routing.generation == 1
    routing.renew(5)
    assert routing.generation == 5
    routing.renew(5)
    assert routing.generation == 6
    check_end(stand_in, routing)


def test_the_numbers_of_captures_are_levelled(stand_in: Torch) -> None:
    routing = make_routing()
    routing.drop_captured([], 7)
    number, _ = routing.open_graph_pool()
    assert number == 8
    assert routing.captured() == ([8], 8)
    check_end(stand_in, routing)


def test_renewed_pools(stand_in: Torch) -> None:
    routing = make_routing()
    routing.enter()
    first = stand_in.allocates_from()
    routing.leave()
    routing.renew()
    routing.enter()
    second = stand_in.allocates_from()
    assert second != first
    routing.enter()
    routing.suspend()
    routing.renew()
    assert stand_in.allocates_from() is None
    routing.leave()
    third = stand_in.allocates_from()
    assert third not in (first, second), "contexts go on with a new pool"
    stand_in.live.add(third)
    routing.renew()
    fourth = stand_in.allocates_from()
    assert fourth not in (first, second, third)
    routing.leave()
    assert stand_in.allocates_from() == fourth
    assert {first, second} <= stand_in.use_counts.keys()
    routing.leave()
    assert not {first, second} & stand_in.use_counts.keys(), "empty pools go"
    assert third in stand_in.use_counts, "a tensor lies in it"
    stand_in.live.clear()
    routing.enter()
    assert stand_in.allocates_from() == fourth
    routing.leave()
    assert third not in stand_in.use_counts
    check_end(stand_in, routing)


def test_a_suspended_pool_stays(stand_in: Torch) -> None:
    """A context of another thread that is suspended comes back to its pool."""
    routing = make_routing()
    suspended, done = threading.Event(), threading.Event()
    pools = []

    def other() -> None:
        routing.enter()
        pools.append(stand_in.allocates_from())
        routing.suspend()
        suspended.set()
        done.wait(10)
        routing.leave()
        pools.append(stand_in.allocates_from())
        routing.leave()

    thread = threading.Thread(target=other)
    thread.start()
    assert suspended.wait(10)
    routing.renew()
    routing.drop_empty()
    assert pools[0] in stand_in.use_counts
    done.set()
    thread.join(10)
    assert pools[0] == pools[1]
    assert pools[0] not in stand_in.use_counts
    check_end(stand_in, routing)


def test_threads_have_pools_of_their_own(stand_in: Torch) -> None:
    routing = make_routing()
    routing.enter()
    mine, theirs = stand_in.allocates_from(), []
    inside, done = threading.Event(), threading.Event()

    def other() -> None:
        assert stand_in.allocates_from() is None
        routing.enter()
        theirs.append(stand_in.allocates_from())
        inside.set()
        done.wait(10)
        routing.leave()

    thread = threading.Thread(target=other)
    thread.start()
    assert inside.wait(10)
    assert stand_in.allocates_from() == mine != theirs[0]
    routing.renew()
    routing.leave()
    assert mine not in stand_in.use_counts
    assert theirs[0] in stand_in.use_counts, "the other thread is in it"
    done.set()
    thread.join(10)
    assert theirs[0] not in stand_in.use_counts
    check_end(stand_in, routing)


def test_a_thread_goes_on_with_the_pool_of_one_that_is_gone(stand_in: Torch) -> None:
    """Whatever other threads there have been meanwhile: their names and numbers don't matter."""
    routing = make_routing()
    pools = []

    def use() -> None:
        routing.enter()
        pools.append(stand_in.allocates_from())
        routing.leave()

    def run(function: Callable[[], object]) -> None:
        thread = threading.Thread(target=function)
        thread.start()
        thread.join(10)

    use()
    run(use)
    run(threading.get_ident)
    run(use)
    use()
    assert pools[0] == pools[3] != pools[1] == pools[2]
    routing.renew()
    run(use)
    assert pools[4] not in pools[:4]
    check_end(stand_in, routing)


def test_closing_inside_a_context(stand_in: Torch) -> None:
    routing = make_routing()
    routing.enter()
    routing.close()
    with pytest.raises(DistcommError, match="the pool is closed"):
        routing.open_graph_pool()
    routing.leave()
    check_end(stand_in, routing)


def test_closing_inside_a_suspended_context(stand_in: Torch) -> None:
    routing = make_routing()
    routing.enter()
    routing.suspend()
    routing.close()
    assert stand_in.allocates_from() is None
    routing.leave()
    assert stand_in.allocates_from() is None
    routing.leave()
    check_end(stand_in, routing)


def test_a_graph_pool_lives_as_long_as_its_graphs(stand_in: Torch) -> None:
    routing = make_routing()
    number, pool = routing.open_graph_pool()
    assert routing.captured() == ([number], 1), "graphs may still be captured"
    stand_in.begin(DEVICE_INDEX, pool)  # as a capture does
    routing.close_graph_pool(number)
    stand_in.end(DEVICE_INDEX, pool)
    assert routing.captured() == ([number], 1)
    stand_in.release(DEVICE_INDEX, pool)  # as a graph that goes
    assert routing.captured() == ([], 1)
    assert pool in stand_in.use_counts
    routing.drop_captured([], 1)
    assert pool not in stand_in.use_counts
    check_end(stand_in, routing)


def test_a_capture_that_torch_never_ends_does_no_harm(stand_in: Torch) -> None:
    """As after a failed end of a capture: to torch it goes on for ever."""
    routing = make_routing()
    routing.enter()
    routing.leave()
    number, pool = routing.open_graph_pool()
    stand_in.begin(DEVICE_INDEX, pool)
    routing.close_graph_pool(number)
    routing.renew()
    routing.enter()
    routing.leave()
    routing.close()
    assert stand_in.faults == []
    assert stand_in.use_counts[pool] == 1, "only what torch itself holds is left"


def test_a_failed_begin_changes_nothing(stand_in: Torch, monkeypatch: pytest.MonkeyPatch) -> None:
    routing = make_routing()

    def refuse(device: int, pool: int) -> None:
        raise RuntimeError("refused")

    with monkeypatch.context() as patch:
        patch.setattr(torch_pools, "_begin_in_thread", refuse)
        with pytest.raises(RuntimeError, match="refused"):
            routing.enter()
    assert stand_in.allocates_from() is None
    routing.enter()
    assert stand_in.allocates_from() is not None
    routing.leave()
    check_end(stand_in, routing)


class Model:
    """The stack as a user sees it: what was current before comes back."""

    def __init__(self, there: Torch, routing: PoolRouting) -> None:
        self.there, self.routing = there, routing
        self.stack: list[tuple[str, Any]] = []  # what was entered, and what was current before

    def step(self, action: str) -> None:
        there, routing = self.there, self.routing
        before = there.allocates_from()
        if action == "enter":
            self.stack.append(("context", before))
            routing.enter()
            assert there.allocates_from() not in (None, GRAPH)
        elif action == "suspend":
            self.stack.append(("context", before))
            routing.suspend()
            expected = GRAPH if there.capture_id else None
            assert there.allocates_from() == expected
        elif action == "capture" and not there.capture_id:
            self.stack.append(("capture", before))
            there.begin_capture()
        elif action == "renew":
            routing.renew()
            now = there.allocates_from()
            if before in (None, GRAPH) or there.capture_id:
                assert now == before
            else:
                assert now not in (None, GRAPH, before)
        elif action == "leave" and self.stack:
            self.leave()
        elif action == "settle" and not there.capture_id:
            routing.drop_captured(*routing.captured())
            assert there.allocates_from() == before

    def leave(self) -> None:
        kind, before = self.stack.pop()
        if kind == "context":
            self.routing.leave()
        else:
            self.there.ended.append(self.there.end_capture())  # the graph is gone at once
        now = self.there.allocates_from()
        # After a renewal another pool may be in the place of the one from before.
        assert now == before or (before not in (None, GRAPH) and now not in (None, GRAPH))


ACTIONS = ["enter", "enter", "suspend", "capture", "renew", "settle", "leave", "leave"]


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(actions=st.lists(st.sampled_from(ACTIONS), max_size=40))
def test_random_sequences(actions: list[str]) -> None:
    with patched(pytest.MonkeyPatch()) as there:
        routing = make_routing()
        model = Model(there, routing)
        for action in actions:
            model.step(action)
        while model.stack:
            model.leave()
        check_end(there, routing)
