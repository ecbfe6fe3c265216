"""Which backend runs what, what the argument checks let pass, and what is counted."""

from __future__ import annotations

import itertools
import logging
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from distcomm import ArgumentError, GroupClosedError, GroupMember, ParallelState
from distcomm.backends import TorchPgBackend
from distcomm.checks import (
    check_dim,
    check_distinct,
    check_exchange,
    check_output,
    check_peer,
    check_shape,
    check_sizes,
    check_splits,
    gathered_shapes,
    scattered_shapes,
)
from distcomm.dispatch import Choice, GroupFacts, Request, choose_backend
from distcomm.routing import Router
from tests.cpu.job import Job

MEMBER = GroupMember("tp", (4, 2, 7), rank=2)  # the middle one of three

# choose_backend

LOCAL, GLOO, PYNCCL = Choice("local"), Choice("gloo"), Choice("pynccl")
TORCH_NCCL = Choice("torch_nccl", "PyNCCL is disabled by change_state")


@pytest.mark.parametrize(
    ("tensor", "world_size", "job", "pynccl_enabled", "expected"),
    [
        ("cpu", 1, "cpu", False, LOCAL),
        ("cpu", 2, "cpu", False, GLOO),
        ("cuda", 2, "cpu", False, None),
        ("cuda", 1, "cpu", False, None),
        ("cpu", 1, "cuda", False, LOCAL),
        ("cuda", 1, "cuda", False, LOCAL),
        ("cpu", 4, "cuda", True, GLOO),
        ("cpu", 4, "cuda", False, GLOO),
        ("cuda", 4, "cuda", True, PYNCCL),
        ("cuda", 4, "cuda", False, TORCH_NCCL),
    ],
)
def test_the_backend_follows_from_the_request_and_the_group(
    tensor: str, world_size: int, job: str, pynccl_enabled: bool, expected: Choice | None
):
    facts = GroupFacts(world_size, job, pynccl_enabled)
    for op in ("all_reduce", "send"):
        assert choose_backend(Request(op, tensor), facts) == expected


def test_every_request_on_the_jobs_device_has_a_backend():
    for tensor, world_size, job, enabled in itertools.product(
        ("cpu", "cuda"), (1, 2, 9), ("cpu", "cuda"), (False, True)
    ):
        choice = choose_backend(Request("gather", tensor), GroupFacts(world_size, job, enabled))
        assert (choice is None) == (tensor == "cuda" and job == "cpu")


# Checks: what passes. What doesn't is in test_bad_input.py


def test_a_peer_is_a_rank_in_the_group():
    for peer in range(3):
        check_peer("send", "dst", peer, MEMBER)
    for peer in (0, 2):
        check_peer("send", "dst", peer, MEMBER, other=True)
    with pytest.raises(
        ArgumentError, match="dst must be another rank than the caller's own; got 1"
    ):
        check_peer("send", "dst", 1, MEMBER, other=True)


@pytest.mark.parametrize(("dim", "ndim", "index"), [(0, 1, 0), (-1, 1, 0), (-1, 3, 2), (1, 3, 1)])
def test_a_dim_is_counted_from_the_front(dim: int, ndim: int, index: int):
    assert check_dim("gather", dim, ndim, MEMBER) == index


def test_gathered_shapes():
    assert gathered_shapes(torch.empty(2, 5), 3) == [(6, 5), (3, 2, 5)]
    assert gathered_shapes(torch.empty(0, 5), 3) == [(0, 5), (3, 0, 5)]
    assert gathered_shapes(torch.empty(()), 3) == [(3,)]


def test_scattered_shapes():
    assert scattered_shapes("call", torch.empty(6, 5), MEMBER) == [(2, 5)]
    assert scattered_shapes("call", torch.empty(3, 2, 5), MEMBER) == [(1, 2, 5), (2, 5)]
    assert scattered_shapes("call", torch.empty(0, 5), MEMBER) == [(0, 5)]


def test_sizes_and_splits_that_add_up():
    rows = torch.empty(6, 2)
    check_sizes("call", [1, 2, 3], rows, MEMBER, of="sum")
    check_sizes("call", (0, 6, 9), rows, MEMBER, of="own entry")
    assert check_splits("call", "input_splits", None, rows, MEMBER) == [2, 2, 2]
    assert check_splits("call", "input_splits", (6, 0, 0), rows, MEMBER) == (6, 0, 0)
    assert check_splits("call", "input_splits", None, rows[:0], MEMBER) == [0, 0, 0]


def test_a_shape_may_be_a_list_or_a_size():
    assert check_shape("recv", "shape", [2, 0], MEMBER) == (2, 0)
    assert check_shape("recv", "shape", torch.Size([]), MEMBER) == ()


def test_outputs_that_fit():
    like = torch.empty(2, 3).t()
    check_output("call", "out", torch.empty(3, 2), [(9, 9), (3, 2)], like, MEMBER)
    check_output("call", "out", torch.empty(3, 9)[:, :0], [(3, 0)], like, MEMBER)


@pytest.mark.parametrize(
    "x",
    [
        torch.empty(2, 3).t(),
        torch.empty(4, 6)[::2, 1::3],
        torch.empty(1).expand(1, 1),
        torch.empty(()),
    ],
)
def test_strided_tensors_have_distinct_elements(x: torch.Tensor):
    check_distinct("broadcast", "x", x, MEMBER)


def test_the_message_says_who_got_what_and_wanted_what():
    with pytest.raises(ArgumentError) as caught:
        check_dim("gather", 5, 2, MEMBER)
    error = caught.value
    assert str(error) == (
        "gather: dim must be between -2 and 1; got 5 [group 'tp', rank 2 (1 of 3)]"
    )
    assert (error.argument, error.requirement, error.member) == (
        "dim",
        "between -2 and 1",
        MEMBER,
    )


def test_an_exchange_may_use_neighbouring_memory():
    memory = torch.arange(12.0).view(6, 2)
    fine = [(memory[:3], memory[3:]), (memory[3:], memory[:3]), (memory[2:2], memory[:4])]
    for output, x in fine:
        check_exchange("call", output, x, [1, 0, 2], [0, 0, 3], MEMBER)
    for output, x in [(memory[:3], memory[2:]), (memory[4:5], memory[:, :1])]:
        with pytest.raises(ArgumentError, match="output must be in other memory than input"):
            check_exchange("call", output, x, [1, 0, 2], [0, 0, 3], MEMBER)
    with pytest.raises(ArgumentError, match="output_splits must be 4 at index 1"):
        check_exchange("call", memory[:3], memory[3:], [1, 5, 2], [0, 4, 3], MEMBER)


# Counters

NO_CONTEXTS = {"contexts": 0, "inactive": {}, "windows": 0}


def count_calls(state: ParallelState) -> dict[str, Any]:
    group = state.create_group("counted", range(state.world_size))
    shared = state.world.stats()
    nothing = {
        "sequence": 0,
        "ops": {},
        "fallbacks": {},
        "algorithms": None,
        "symmetric_memory": NO_CONTEXTS,
    }
    assert group.stats() == nothing
    for _ in range(3):
        group.all_reduce(torch.ones(4))
    group.all_reduce(torch.ones(2, 2, dtype=torch.float64))
    group.all_gather(torch.ones(5, dtype=torch.int8))
    group.broadcast(torch.empty(0))
    group.barrier()
    assert state.world.stats() == shared, "groups of the same ranks have their own counters"
    return group.stats()


def test_calls_and_bytes_are_counted_by_op_and_backend(job: Job):
    for stats in job.run(count_calls):
        assert stats == {
            "sequence": 6,
            "ops": {
                "all_reduce": {"gloo": {"calls": 4, "bytes": 3 * 16 + 32, "last": 4}},
                "all_gather": {"gloo": {"calls": 1, "bytes": 5, "last": 5}},
                "broadcast": {"gloo": {"calls": 1, "bytes": 0, "last": 6}},
            },
            "fallbacks": {},
            "algorithms": None,
            "symmetric_memory": NO_CONTEXTS,
        }


def count_and_close(state: ParallelState) -> None:
    group = state.create_group("counted and closed", range(state.world_size))
    group.all_reduce(torch.ones(4))
    counted = group.stats()
    assert counted["ops"]["all_reduce"]["gloo"]["calls"] == 1
    for _ in range(2):
        group.close()
        assert group.stats() == counted
    with pytest.raises(GroupClosedError):
        group.all_reduce(torch.ones(4))
    assert group.stats() == counted


def test_counters_outlive_the_group(job: Job):
    job.run(count_and_close)


def fall_back_and_return(state: ParallelState) -> tuple[dict[str, Any], list[str]]:
    """A group of a CUDA job whose PyNCCL is disabled for two calls, without any CUDA."""
    group = state.cp.cpu_group
    pynccl = SimpleNamespace(enabled=True)
    communicators = SimpleNamespace(
        pynccl=pynccl, cpu_group=group, device_group=group, kernels=None
    )
    job = SimpleNamespace(device=torch.device("cuda", 0), deterministic=False, symmetric_pool=None)
    router = Router(state.cp.member, communicators, job)
    warnings: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: warnings.append(record.getMessage())
    logging.getLogger("distcomm.routing").addHandler(handler)
    x = SimpleNamespace(is_cuda=True, nbytes=12)  # all that routing looks at
    assert router.route("all_reduce", x) is pynccl
    pynccl.enabled = False
    assert [type(router.route("all_reduce", x)) for _ in range(2)] == [TorchPgBackend] * 2
    pynccl.enabled = True
    assert router.route("all_reduce", x) is pynccl
    logging.getLogger("distcomm.routing").removeHandler(handler)
    return router.stats(), warnings


def test_a_fallback_is_counted_with_its_reason_and_logged_once(job: Job):
    reason = TORCH_NCCL.fallback_reason
    for rank, (stats, warnings) in enumerate(job.run(fall_back_and_return)):
        assert stats == {
            "sequence": 4,
            "ops": {
                "all_reduce": {
                    "pynccl": {"calls": 2, "bytes": 24, "last": 4},
                    "torch_nccl": {"calls": 2, "bytes": 24, "last": 3},
                }
            },
            "fallbacks": {"all_reduce": {reason: 2}},
        }
        place = f"[group 'cp', rank {rank} ({rank // 4} of 2)]"
        assert warnings == [f"all_reduce: using 'torch_nccl', because {reason} {place}"]


def forget_and_fall_back_again(state: ParallelState) -> list[Any]:
    """Calls of a group that torch runs, before and after its process group is another one."""
    pynccl = SimpleNamespace(enabled=False)
    communicators = SimpleNamespace(
        pynccl=pynccl, cpu_group=state.cp.cpu_group, device_group=state.cp.cpu_group, kernels=None
    )
    job = SimpleNamespace(device=torch.device("cuda", 0), deterministic=False, symmetric_pool=None)
    router = Router(state.cp.member, communicators, job)
    x = SimpleNamespace(is_cuda=True, nbytes=12)
    first = router.route("all_reduce", x)
    pynccl.enabled = True
    assert router.route("all_reduce", x) is pynccl
    pynccl.enabled = False
    before = router.stats()
    router.forget_device_group()
    assert router.stats() == before
    communicators.device_group = state.tp.cpu_group
    second = router.route("all_reduce", x)
    assert second is not first
    assert second._group is state.tp.cpu_group
    return [before, router.stats()]


def test_calls_take_the_next_device_group_and_go_on_counting(job: Job):
    reason = TORCH_NCCL.fallback_reason
    for before, after in job.run(forget_and_fall_back_again):
        torchs = [each["ops"]["all_reduce"]["torch_nccl"] for each in (before, after)]
        assert torchs == [
            {"calls": 1, "bytes": 12, "last": 1},
            {"calls": 2, "bytes": 24, "last": 3},
        ]
        assert [each["fallbacks"]["all_reduce"][reason] for each in (before, after)] == [1, 2]


def test_counters_can_be_asked_for_while_a_group_closes():
    """`close` comes between any two lines of `stats`: the same is counted."""
    communicators = SimpleNamespace(pynccl=None, kernels=None)
    job = SimpleNamespace(device=torch.device("cpu"), deterministic=False, symmetric_pool=None)
    for line in range(1, 100):
        router = Router(GroupMember("tp", (0,), 0), communicators, job)
        router.route("all_reduce", torch.ones(3))
        expected, num_lines = router.stats(), 0

        def close_at_a_line(frame: Any, event: str, _: Any) -> Any:
            nonlocal num_lines
            if frame.f_code is not Router.stats.__code__:
                return None
            if event == "line":
                num_lines += 1
                if num_lines == line:  # noqa: B023 - called in this round
                    sys.settrace(None)
                    router.close()  # noqa: B023
                    return None
            return close_at_a_line

        before = sys.gettrace()
        sys.settrace(close_at_a_line)
        try:
            assert router.stats() == expected
        finally:
            sys.settrace(before)
        if num_lines < line:
            assert line > 5
            return
    pytest.fail("no end of lines")


def count_alone(state: ParallelState) -> dict[str, Any]:
    nothing = {"calls": 0, "bytes": 0, "last": 0}
    before = state.pp.stats()["ops"].get("all_reduce", {}).get("local", nothing)
    x = torch.ones(3)
    assert state.pp.all_reduce(x) is x
    after = state.pp.stats()["ops"]["all_reduce"]["local"]
    return {name: after[name] - before[name] for name in ("calls", "bytes")}


def test_a_group_of_one_runs_locally(job: Job):
    assert job.run(count_alone) == [{"calls": 1, "bytes": 12}] * 8
