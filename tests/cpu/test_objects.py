"""Python objects and nested values with tensors, between the ranks of a group."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch

from distcomm import ArgumentError, CollectiveError, GroupCoordinator, ParallelState
from tests.cpu.job import Job

GROUPS = ["tp", "cp", "pp"]  # 8 ranks, 2 that aren't neighbours, and 1


class Batch(NamedTuple):
    tokens: torch.Tensor
    lengths: list[int]
    name: str = "batch"


class PicklesBadly:
    """Raises when pickled, with an error of no type that pickling usually raises."""

    def __reduce__(self) -> Any:
        raise LookupError("not today")


UNPICKLABLE: dict[str, Callable[[], Any]] = {
    "lambda": lambda: lambda: None,
    "lock": threading.Lock,
    "generator": lambda: (i for i in range(3)),
    "own error": PicklesBadly,
    "nested": lambda: {"deep": [1, (2, threading.Lock())]},
}


def numbers(rank: int) -> Any:
    """An object that differs from rank to rank, also in size."""
    return {"rank": rank, "list": list(range(rank * 100)), "text": "é" * rank, "none": None}


def assert_group_works(group: GroupCoordinator) -> None:
    assert group.all_gather_object(group.rank) == group.ranks
    assert group.all_reduce(torch.ones(2)).tolist() == [group.world_size] * 2


def shape_of(value: Any) -> Any:
    """A nested value with plain lists in place of tensors, to compare and to show."""
    if isinstance(value, torch.Tensor):
        return (str(value.dtype), tuple(value.shape), value.reshape(-1).tolist())
    if isinstance(value, dict):
        return {key: shape_of(child) for key, child in value.items()}
    if isinstance(value, list | tuple):
        return type(value), [shape_of(child) for child in value]
    return value


def nested_value(seed: int) -> dict[str, Any]:
    """Tensors of all kinds at all depths; the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(4, 6, generator=generator)
    return {
        "plain": weights,
        "transposed": weights.t(),
        "sliced": weights[:, 1::2],
        "expanded": weights[:1].expand(5, 6),
        "scalar": torch.tensor(seed, dtype=torch.int64),
        "flags": torch.tensor([True, False, True]),
        "half": weights.to(torch.bfloat16),
        "quantized": weights.to(torch.float8_e4m3fn).view(torch.uint8),
        "empty": torch.empty(0, 3, dtype=torch.int32),
        "parameter": torch.nn.Parameter(weights.clone()),
        "list": [torch.tensor([seed]), None, [torch.tensor(2.0)], []],
        "tuple": (torch.tensor([1, 2]), "text", ()),
        "batch": Batch(torch.arange(seed % 5), [1, 2, 3]),
        "dict": {"inner": {"tensor": weights[0]}, 3: "three", ("a", 1): torch.tensor(1)},
        "size": weights.shape,
        "dtype": torch.float16,
        "number": 1.5,
    }


# Objects


def gather_objects(state: ParallelState, name: str) -> None:
    group = state.groups[name]
    mine = numbers(group.rank)
    gathered = group.all_gather_object(mine)
    assert gathered == [numbers(rank) for rank in group.ranks]
    assert group.all_gather_object(None) == [None] * group.world_size


def broadcast_objects(state: ParallelState, name: str) -> None:
    group = state.groups[name]
    for src, rank in enumerate(group.ranks):
        mine = numbers(group.rank)
        received = group.broadcast_object(mine, src)
        assert received == numbers(rank)
        assert (received is mine) == (group.rank_in_group == src)
    assert group.broadcast_object(group.rank) == group.first_rank
    is_first = group.is_first_rank
    assert group.broadcast_object(*(["only here"] if is_first else [])) == "only here"


def broadcast_object_lists(state: ParallelState, name: str) -> None:
    group = state.groups[name]
    for src, rank in enumerate(group.ranks):
        objects = [group.rank, numbers(group.rank)]
        assert group.broadcast_object_list(objects, src) is objects
        assert objects == [rank, numbers(rank)]
    assert group.broadcast_object_list([]) == []


def send_objects(state: ParallelState, name: str) -> None:
    """Around the ring, then back by explicit ranks; rank 0 of the group starts."""
    group = state.groups[name]
    if group.world_size == 1:
        return
    for forward in (True, False):
        onward, source = group.next_rank, group.prev_rank
        if not forward:
            onward, source = source, onward
        to, origin = group.ranks.index(onward), group.ranks.index(source)
        if group.is_first_rank:
            group.send_object(numbers(group.rank), *([] if forward else [to]))
            received = group.recv_object(*([] if forward else [origin]))
        else:
            received = group.recv_object(*([] if forward else [origin]))
            group.send_object(numbers(group.rank), *([] if forward else [to]))
        assert received == numbers(source)


@pytest.mark.parametrize("name", GROUPS)
@pytest.mark.parametrize(
    "exchange", [gather_objects, broadcast_objects, broadcast_object_lists, send_objects]
)
def test_objects_arrive(job: Job, exchange: Callable[..., None], name: str):
    job.run(exchange, name)


# Objects that can't be pickled

SENDERS: dict[str, Callable[[GroupCoordinator, Any], object]] = {
    "all_gather_object": lambda group, obj: group.all_gather_object(obj),
    "broadcast_object": lambda group, obj: group.broadcast_object(obj, 1),
    "broadcast_object_list": lambda group, obj: group.broadcast_object_list([obj], 1),
    "broadcast_tensor_dict": lambda group, obj: group.broadcast_tensor_dict(
        {"tensor": torch.ones(3), "bad": obj}, 1
    ),
    "send_object": lambda group, obj: (
        group.send_object(obj, 0) if group.rank_in_group == 1 else group.recv_object(1)
    ),
    "send_tensor_dict": lambda group, obj: (
        group.send_tensor_dict({"tensor": torch.ones(3), "bad": obj}, 0)
        if group.rank_in_group == 1
        else group.recv_tensor_dict(1)
    ),
}


def send_unpicklable(state: ParallelState, sender: str, kind: str) -> tuple[type, str]:
    group = state.cp
    obj = UNPICKLABLE[kind]() if group.rank_in_group == 1 else "fine"
    with pytest.raises((ArgumentError, CollectiveError)) as caught:
        SENDERS[sender](group, obj)
    assert_group_works(group)
    return type(caught.value), str(caught.value)


@pytest.mark.parametrize("kind", UNPICKLABLE)
@pytest.mark.parametrize("sender", SENDERS)
def test_an_unpicklable_object_fails_on_all_ranks_that_take_part(job: Job, sender: str, kind: str):
    results = job.run(send_unpicklable, sender, kind)
    for rank, (error, text) in enumerate(results):
        owner = rank % 4 + 4  # the cp groups are 0, 4 and 1, 5 and so on
        assert error is (ArgumentError if rank == owner else CollectiveError), text
        assert f"[group 'cp', rank {rank} ({rank // 4} of 2)]" in text
        assert "pickl" in text
        if rank != owner:
            assert f"rank {owner}'s object" in text


def gather_some_unpicklable(state: ParallelState) -> str:
    obj = threading.Lock() if state.rank in (2, 5) else state.rank
    with pytest.raises((ArgumentError, CollectiveError)) as caught:
        state.tp.all_gather_object(obj)
    assert_group_works(state.tp)
    return f"{type(caught.value).__name__}: {caught.value}"


def test_several_owners_of_unpicklable_objects_all_get_the_error_of_an_owner(job: Job):
    results = job.run(gather_some_unpicklable)
    for rank, text in enumerate(results):
        assert text.startswith("ArgumentError" if rank in (2, 5) else "CollectiveError"), text


def broadcast_unequal_lists(state: ParallelState) -> str | None:
    group = state.attn_tp
    objects = [1, 2] if group.rank_in_group == 2 else [1, 2, 3]
    try:
        group.broadcast_object_list(objects, src=0)
    except ArgumentError as error:
        assert objects == [1, 2]
        return str(error)
    finally:
        assert_group_works(group)
    return None


def test_object_lists_of_unequal_length_are_refused_where_they_differ(job: Job):
    results = job.run(broadcast_unequal_lists)
    assert [rank for rank, text in enumerate(results) if text is not None] == [2, 6]
    assert "objects must be 3 entries long, as on rank_in_group 0; got 2" in str(results[2])


# Nested values with tensors


def assert_received(received: dict[str, Any], seed: int) -> None:
    expected = nested_value(seed)
    assert shape_of(received) == shape_of(expected)
    assert type(received["batch"]) is Batch
    assert type(received["size"]) is torch.Size


def broadcast_nested(state: ParallelState, name: str) -> None:
    group = state.groups[name]
    for src, rank in enumerate(group.ranks):
        if group.rank_in_group == src:
            value = nested_value(rank)
            assert group.broadcast_tensor_dict(value, src) is value
            assert_received(value, rank)
        else:
            received = group.broadcast_tensor_dict(src=src)
            assert_received(received, rank)
            assert received["transposed"].is_contiguous()
            assert all(x.device.type == "cpu" for x in received["tuple"][:1])


def send_nested(state: ParallelState, name: str) -> None:
    """To the next rank by default, and back by explicit ranks."""
    group = state.groups[name]
    last = group.world_size - 1
    if group.world_size == 1:
        return
    if group.is_last_rank:
        group.send_tensor_dict(nested_value(group.rank))
        assert_received(group.recv_tensor_dict(0), group.first_rank)
    elif group.is_first_rank:
        assert_received(group.recv_tensor_dict(), group.last_rank)
        group.send_tensor_dict(nested_value(group.rank), last)


def broadcast_values_without_tensors(state: ParallelState) -> None:
    group = state.tp
    for value in ({}, {"a": 1}, {"a": torch.empty(0)}, {"a": {"b": [torch.empty(2, 0, 3)]}}):
        received = group.broadcast_tensor_dict(value if group.is_first_rank else None)
        assert shape_of(received) == shape_of(value)


@pytest.mark.parametrize("name", GROUPS)
@pytest.mark.parametrize("exchange", [broadcast_nested, send_nested])
def test_nested_values_arrive(job: Job, exchange: Callable[..., None], name: str):
    job.run(exchange, name)


def test_values_without_data_arrive(job: Job):
    job.run(broadcast_values_without_tensors)


def send_tensors_around(state: ParallelState) -> None:
    """`send` and `recv` without a rank go to the next and come from the previous."""
    group = state.attn_tp
    x = torch.full((3,), group.rank)
    if group.is_first_rank:
        group.send(x)
        received = group.recv((3,), torch.int64)
    else:
        received = group.recv(torch.empty_like(x))
        group.send(x)
    assert received.tolist() == [group.prev_rank] * 3


def test_tensors_go_to_the_next_rank_by_default(job: Job):
    job.run(send_tensors_around)


def refuse_a_meta_tensor(state: ParallelState) -> str:
    group = state.cp
    value = {"fine": torch.ones(2), "bad": [torch.empty(2, device="meta")]}
    send = group.broadcast_tensor_dict if group.is_first_rank else group.send_tensor_dict
    with pytest.raises(ArgumentError) as caught:
        send(value)
    assert_group_works(group)
    return str(caught.value)


def test_a_tensor_of_another_device_is_refused_before_anything_is_sent(job: Job):
    for text in job.run(refuse_a_meta_tensor):
        assert "tensor_dict must be of tensors on cpu" in text
        assert "got meta [group 'cp'" in text
