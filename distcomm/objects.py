"""Python objects between the members of a group: pickled, sent as bytes over gloo."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from .errors import ArgumentError, CollectiveError, GroupMember, InitializationError
from .process_groups import all_gather_single, collective_errors

__all__ = ["ObjectChannel"]


@dataclass(frozen=True)
class _Unpicklable:
    """Travels in place of an object that doesn't pickle, so that no receiver waits for it."""

    reason: str


class ObjectChannel:
    """Object collectives of one group; every wait is bounded by the process group's timeout.

    An object that doesn't pickle fails the call on every rank that takes part: `ArgumentError`
    on its owner, `CollectiveError` on the others. `src` and `dst` are ranks in the group.

    Args:
        member: this rank's place in the group.
        group: a gloo process group of the same ranks; None only for a group of one.
    """

    def __init__(self, member: GroupMember, group: dist.ProcessGroup | None) -> None:
        self._member = member
        self._group = group

    def broadcast(self, obj: Any, src: int) -> Any:
        """`src`'s object, on every rank. Collective. `src` gets `obj` itself, not a copy."""
        if self._group is None:
            return obj
        sender = self._member.rank_in_group == src
        with collective_errors("broadcast_object", self._member):
            payload, failure = _encode(obj) if sender else (None, None)
            length = _length(payload)
            dist.broadcast(length, group=self._group, group_src=src)
            if payload is None:
                data = bytearray(int(length))
                payload = _as_tensor(data)
            dist.broadcast(payload, group=self._group, group_src=src)
        self._raise_if(failure, "broadcast_object")
        return obj if sender else self._decode(data, "broadcast_object", src)

    def all_gather(self, obj: Any) -> list[Any]:
        """Every rank's object, in group order. Collective."""
        if self._group is None:
            return [obj]
        payload, failure = _encode(obj)
        with collective_errors("all_gather_object", self._member):
            lengths = torch.empty(self._member.world_size, dtype=torch.int64)
            all_gather_single(lengths, _length(payload), group=self._group)
            longest = int(lengths.max())
            padded = torch.nn.functional.pad(payload, (0, longest - payload.numel()))
            data = memoryview(bytearray(self._member.world_size * longest))
            all_gather_single(_as_tensor(data), padded, group=self._group)
        self._raise_if(failure, "all_gather_object")
        return [
            self._decode(data[src * longest :][:length], "all_gather_object", src)
            for src, length in enumerate(lengths.tolist())
        ]

    def send(self, obj: Any, dst: int) -> None:
        """Sends to rank_in_group `dst`, which must call `recv`. Returns when it is received."""
        payload, failure = _encode(obj)
        with collective_errors("send_object", self._member):
            dist.send(_length(payload), group=self._group, group_dst=dst)
            dist.send(payload, group=self._group, group_dst=dst)
        self._raise_if(failure, "send_object")

    def recv(self, src: int) -> Any:
        """The object that rank_in_group `src` sends."""
        with collective_errors("recv_object", self._member):
            length = _length(None)
            dist.recv(length, group=self._group, group_src=src)
            data = bytearray(int(length))
            dist.recv(_as_tensor(data), group=self._group, group_src=src)
        return self._decode(data, "recv_object", src)

    def agree(self, what: str, failure: str | None) -> None:
        """Passes only if no rank has failed. Collective; the same outcome on every rank.

        Args:
            what: what the ranks were doing, for the error.
            failure: why it failed on this rank; None if it didn't.

        Raises:
            InitializationError: at least one rank failed; it names those ranks.
        """
        failures = {
            rank: text
            for rank, text in zip(self._member.ranks, self.all_gather(failure), strict=True)
            if text is not None
        }
        if failures:
            raise InitializationError(what, failures, rank=self._member.rank)

    def _raise_if(self, failure: str | None, call: str) -> None:
        if failure is not None:
            raise ArgumentError("obj", "picklable", failure, call=call, member=self._member)

    def _decode(self, data: bytearray | memoryview, call: str, src: int) -> Any:
        obj = pickle.loads(data)
        if isinstance(obj, _Unpicklable):
            owner = self._member.ranks[src]
            raise CollectiveError(
                call, f"rank {owner}'s object can't be pickled: {obj.reason}", member=self._member
            )
        return obj


def _encode(obj: Any) -> tuple[torch.Tensor, str | None]:
    """The pickled object as uint8 [B], and why it couldn't be pickled, if so."""
    failure = None
    try:
        data = pickle.dumps(obj)
    except Exception as error:  # noqa: BLE001 - any class may raise anything while pickled
        failure = f"{type(obj).__name__} ({type(error).__name__}: {error})"
        data = pickle.dumps(_Unpicklable(failure))
    return _as_tensor(bytearray(data)), failure


def _as_tensor(data: bytearray | memoryview) -> torch.Tensor:
    """uint8 [B] that shares the buffer's memory (torch.Tensor.numpy would need numpy)."""
    return torch.frombuffer(data, dtype=torch.uint8)


def _length(payload: torch.Tensor | None) -> torch.Tensor:
    """int64 [1]: the payload's bytes; 0 where they are still to be received."""
    return torch.tensor([0 if payload is None else payload.numel()])
