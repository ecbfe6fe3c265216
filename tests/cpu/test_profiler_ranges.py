"""Profiler ranges: what they are called, that they enclose the call, and that off means off."""

from __future__ import annotations

import contextlib
import inspect
import re
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

import distcomm
from distcomm import (
    ArgumentError,
    ContextParallelPlan,
    GroupMember,
    ParallelState,
    all_gather_kv,
    all_gather_kv_into_cache,
)
from distcomm.backends import Backend, LocalBackend, TorchPgBackend, ranged
from distcomm.backends.ranged import RangedBackend
from distcomm.handles import WorkHandle
from distcomm.routing import Router
from tests.cpu.job import Job, start
from tests.worker_pool import WorkerError, WorkerPool, fresh_init_method

X, Y = torch.arange(6.0), torch.zeros(3)  # 24 and 12 bytes
VARIABLE = "DISTCOMM_PROFILER_RANGES"

# (method, all of its arguments, bytes of the range)
CALLS: list[tuple[str, tuple[Any, ...], int]] = [
    ("all_reduce", (X, "max", Y), 24),
    ("reduce", (X, 1, "max", Y), 24),
    ("reduce_scatter_tensor", (Y, X, "max"), 24),
    ("reduce_scatterv", (X, [6], Y, "max"), 24),
    ("all_gather_into_tensor", (X, Y), 12),
    ("all_gatherv", (X, [6], Y), 24),
    ("all_to_all_single", (Y, X, [3], [6]), 24),
    ("broadcast", (X, 3), 24),
    ("gather", (X, 2, Y), 24),
    ("send", (X, 1), 24),
    ("recv", (Y, 1), 12),
]


def methods(of: type) -> set[str]:
    members = inspect.getmembers(of, inspect.isfunction)
    return {name for name, _ in members if not name.startswith("_")}


@pytest.fixture
def nvtx() -> Iterator[mock.Mock]:
    """In the place of NVTX: remembers `range_push(name)` and `range_pop()`."""
    with mock.patch("torch.cuda.nvtx") as recorder:
        yield recorder


def names_of(nvtx: mock.Mock) -> list[str]:
    return [call.args[0] for call in nvtx.range_push.mock_calls]


# ---- the backend --------------------------------------------------------------------------------


def test_every_method_of_a_backend_is_tested():
    assert {name for name, *_ in CALLS} == methods(Backend) == methods(RangedBackend)


@pytest.mark.parametrize("name", sorted(methods(Backend)))
def test_signatures_are_those_of_a_backend(name: str):
    signatures = [inspect.signature(getattr(each, name)) for each in (Backend, RangedBackend)]
    assert signatures[0] == signatures[1]


@pytest.mark.parametrize(("name", "args", "num_bytes"), CALLS)
@pytest.mark.parametrize("error", [None, LookupError("no")])
def test_a_call_is_made_in_its_range(
    nvtx: mock.Mock,
    name: str,
    args: tuple[Any, ...],
    num_bytes: int,
    error: Exception | None,
):
    both = mock.Mock()
    both.backend = mock.create_autospec(LocalBackend, instance=True)
    both.attach_mock(getattr(both.backend, name), "call")
    both.attach_mock(nvtx, "nvtx")
    both.call.side_effect = error
    call = getattr(ranged(both.backend, "nvtx", "the_op", "tp", "local"), name)
    if error is None:
        assert call(*args) is (None if name == "send" else both.call.return_value)
    else:
        with pytest.raises(LookupError, match="no"):
            call(*args)
    calls = [(what, given) for what, given, _ in both.mock_calls]
    assert [what for what, _ in calls] == ["nvtx.range_push", "call", "nvtx.range_pop"]
    assert calls[0][1] == (f"distcomm.the_op tp {num_bytes} B local",)
    assert all(one is other for one, other in zip(calls[1][1], args, strict=True))


def test_a_name_may_have_braces(nvtx: mock.Mock):
    ranged(LocalBackend(GroupMember("{0}", (0,), 0)), "nvtx", "op", "{0}", "local").broadcast(X)
    assert names_of(nvtx) == ["distcomm.op {0} 24 B local"]


# ---- the router ---------------------------------------------------------------------------------


def router_of_one() -> Router:
    communicators = SimpleNamespace(pynccl=None, kernels=None)
    job = SimpleNamespace(device=torch.device("cpu"), deterministic=False, symmetric_pool=None)
    return Router(GroupMember("tp", (0,), 0), communicators, job)  # type: ignore[arg-type]


def test_off_is_the_bare_backend(nvtx: mock.Mock):
    router = router_of_one()
    bare = router.route("broadcast", X)
    assert type(bare) is LocalBackend
    router.use_ranges("nvtx")
    assert type(router.route("broadcast", X)) is RangedBackend
    router.use_ranges(None)
    assert router.route("broadcast", X) is bare
    with router.profiler_range("op", "how", 1):
        pass
    assert nvtx.mock_calls == []
    assert router.stats()["ops"] == {"broadcast": {"local": {"calls": 3, "bytes": 72, "last": 3}}}


def test_observers_and_ranges_come_and_go_on_their_own(nvtx: mock.Mock):
    pynccl = mock.create_autospec(LocalBackend, instance=True)
    pynccl.enabled = True
    communicators = SimpleNamespace(pynccl=pynccl, cpu_group=None, kernels=None)
    job = SimpleNamespace(device=torch.device("cuda", 0), deterministic=False, symmetric_pool=None)
    router = Router(GroupMember("tp", (0, 1), 0), communicators, job)  # type: ignore[arg-type]
    x: Any = SimpleNamespace(is_cuda=True, nbytes=4)  # all that routing looks at
    observe = mock.Mock()
    seen = []
    for change in (
        lambda: router.add_observer(observe),
        lambda: router.use_ranges("nvtx"),
        lambda: router.remove_observer(observe),
        lambda: router.use_ranges(None),
    ):
        change()
        router.route("broadcast", x).broadcast(X)
        seen.append((observe.call_count, nvtx.range_push.call_count))
    assert seen == [(1, 0), (2, 1), (2, 2), (2, 2)]
    assert names_of(nvtx) == ["distcomm.broadcast tp 24 B pynccl"] * 2
    assert router.route("broadcast", x) is pynccl


def test_what_is_switched_off_during_a_call_still_ends(nvtx: mock.Mock):
    router = router_of_one()
    router.use_ranges("nvtx")
    backend = router.route("broadcast", X)
    switch_off = mock.Mock(side_effect=lambda *_: router.use_ranges(None))
    with mock.patch.object(LocalBackend, "broadcast", switch_off):
        backend.broadcast(X)
    assert nvtx.range_pop.call_count == nvtx.range_push.call_count == 1


def test_each_thread_has_its_own_ranges(nvtx: mock.Mock):
    events: dict[int, list[str]] = {}
    both_inside = threading.Barrier(2, timeout=20)
    nvtx.range_push.side_effect = lambda name: events.setdefault(threading.get_ident(), []).append(
        name
    )
    nvtx.range_pop.side_effect = lambda: events[threading.get_ident()].append("end")
    router = router_of_one()
    router.use_ranges("nvtx")

    def call(op: str) -> None:
        router.route(op, X).broadcast(X)

    meet = mock.Mock(side_effect=lambda *_: both_inside.wait())
    with mock.patch.object(LocalBackend, "broadcast", meet):
        threads = [threading.Thread(target=call, args=(op,)) for op in ("one", "two")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
    expected = [[f"distcomm.{op} tp 24 B local", "end"] for op in ("one", "two")]
    assert sorted(events.values()) == expected


# ---- jobs ---------------------------------------------------------------------------------------


def recorded(calls: Callable[[], object]) -> list[str]:
    """The ranges that torch's profiler sees, in the order of their beginning."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        calls()
    events = [event for event in profile.events() if event.name.startswith("distcomm.")]
    events.sort(key=lambda event: (event.time_range.start, -event.time_range.end))
    return [event.name for event in events]


def call_everything(state: ParallelState) -> None:
    tp, cp, pp, x = state.tp, state.cp, state.pp, torch.ones(8)
    tp.all_reduce(x)
    tp.reduce(x)
    tp.all_gather(x)
    tp.reduce_scatter(x)
    tp.all_gatherv(x, [8] * 8)
    tp.broadcast(x)
    pp.all_reduce(x)
    cp.cp_all_gather_into_tensor_async(torch.empty(2, 8), x).wait()
    if cp.is_first_rank:
        cp.send(x)
    else:
        cp.recv(x.shape, x.dtype)
    tp.all_reduce_rms_norm(x, x)
    tp.barrier()
    cp.broadcast_object("text")
    tp.all_gather_object(1)


def names_of_everything(state: ParallelState) -> tuple[list[str], list[str]]:
    with state.profiler_ranges("record_function"):
        inside = recorded(lambda: call_everything(state))
    return inside, recorded(lambda: call_everything(state))


def test_every_call_has_a_range(job: Job):
    for rank, (inside, after) in enumerate(job.run(names_of_everything)):
        assert inside == [
            "distcomm.all_reduce tp 32 B gloo",
            "distcomm.reduce tp 32 B gloo",
            "distcomm.all_gather tp 32 B gloo",
            "distcomm.reduce_scatter tp 32 B gloo",
            "distcomm.all_gatherv tp 32 B gloo",
            "distcomm.broadcast tp 32 B gloo",
            "distcomm.all_reduce pp 32 B local",
            "distcomm.cp_all_gather_into_tensor_async cp 32 B gloo",
            f"distcomm.{'send' if rank < 4 else 'recv'} cp 32 B gloo",
            "distcomm.all_reduce_rms_norm tp 32 B unfused",
            "distcomm.all_reduce tp 32 B gloo",
            "distcomm.barrier tp gloo",
            "distcomm.broadcast_object cp gloo",
            "distcomm.all_gather_object tp gloo",
        ]
        assert after == []


def names_of_kv_gathers(state: ParallelState) -> list[str]:
    def gather(group: distcomm.GroupCoordinator) -> None:
        plan = ContextParallelPlan([8, 5], group.world_size)
        k = plan.shard(torch.arange(13.0)[:, None], group.rank_in_group)
        all_gather_kv(group, plan, k, k.double())
        all_gather_kv_into_cache(group, plan, k, torch.zeros(20, 1), torch.arange(13))

    with distcomm.profiler_ranges("record_function"):
        return recorded(lambda: [gather(state.cp), gather(state.pp)])


def test_kv_gathers_have_ranges(job: Job):
    for rank, names in enumerate(job.run(names_of_kv_gathers)):
        tokens = 7 if rank < 4 else 6
        assert [name for name in names if "_kv" in name] == [
            f"distcomm.all_gather_kv cp {4 * tokens} B gloo",
            f"distcomm.all_gather_kv cp {8 * tokens} B gloo",
            f"distcomm.all_gather_kv_into_cache cp {4 * tokens} B gloo",
            f"distcomm.all_gather_kv pp {4 * 13} B local",
            f"distcomm.all_gather_kv pp {8 * 13} B local",
            f"distcomm.all_gather_kv_into_cache pp {4 * 13} B local",
        ]


def gather_beside_compute(state: ParallelState) -> tuple[str, list[float]]:
    with state.profiler_ranges("record_function"):
        output, x = torch.empty(2, 1), torch.full((1,), float(state.rank))
        handle = state.cp.cp_all_gather_into_tensor_async(output, x)
        handle.wait()
    return type(handle).__name__, output.flatten().tolist()


def test_a_gather_beside_compute_stays_one(job: Job):
    expected = [(WorkHandle.__name__, [rank % 4.0, rank % 4 + 4.0]) for rank in range(8)]
    assert job.run(gather_beside_compute) == expected


def switch(state: ParallelState) -> None:
    def kinds() -> set[type]:
        groups = state.groups.values()
        return {type(group.route("all_gatherv", X)) for group in groups if group.world_size > 1}

    wrapped = type(ranged(TorchPgBackend(state.tp.member, None, state.device), "nvtx", "", "", ""))
    assert kinds() == {TorchPgBackend}
    state.profiler_ranges("record_function")
    assert kinds() == {wrapped}
    with contextlib.suppress(ZeroDivisionError), state.profiler_ranges(None):
        assert kinds() == {TorchPgBackend}
        raise ZeroDivisionError
    state.create_group("made while on", range(8))
    assert kinds() == {wrapped}
    for wrong in ("NVTX", "", 1, True, ["nvtx"]):
        requirement = "kind must be None or one of 'record_function', 'nvtx'; got"
        with pytest.raises(ArgumentError, match=re.escape(f"{requirement} {wrong!r}")):
            state.profiler_ranges(wrong)  # type: ignore[arg-type]
    without = RuntimeError("NVTX functions not installed")
    with mock.patch("torch.cuda.nvtx.range_push", side_effect=without):
        with pytest.raises(ArgumentError, match="got 'nvtx', which this torch can't do: NVTX func"):
            state.profiler_ranges("nvtx")
    assert kinds() == {wrapped}, "an error changes nothing"
    assert "profiler ranges: record_function" in state.describe()
    state.profiler_ranges(None)
    assert kinds() == {TorchPgBackend}
    assert "profiler ranges" not in state.describe()


def test_ranges_are_switched_for_all_groups(job: Job):
    job.run(switch)


def start_with_variable(rank: int, world: int, url: str, values: list[str]) -> list[str]:
    distcomm.destroy_distributed()  # the job of the tests above
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, values[rank])
        with start(rank, world, url, tp=world) as state:
            return recorded(lambda: state.world.all_reduce(torch.ones(1)))


def test_the_variable_is_for_one_process_from_the_start(workers: WorkerPool):
    values = ["record_function", ""]
    found = workers.run(start_with_variable, fresh_init_method(), values, ranks=2)
    assert found == [["distcomm.all_reduce world 4 B gloo"], []]


def test_a_wrong_variable_fails_all_ranks(workers: WorkerPool):
    values = ["record_function", "profiler"]
    with pytest.raises(WorkerError) as caught:
        workers.run(start_with_variable, fresh_init_method(), values, ranks=2)
    failures = caught.value.exceptions
    message = f"{VARIABLE} must be None or one of 'record_function', 'nvtx'; got 'profiler'"
    assert failures[1].type_name.endswith("ArgumentError")
    assert failures[0].type_name.endswith("InitializationError")
    assert all(message in failure.message for failure in failures.values())
