"""The object half of a group: Python objects and nested values with tensors in them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch

from .checks import check_peer
from .errors import ArgumentError, GroupMember
from .objects import ObjectChannel
from .outside_graphs import outside_graphs
from .tensor_dict import Description, join_tensors, split_tensors

__all__ = ["ObjectCollectives"]


class ObjectCollectives(ABC):
    """Objects and tensor dicts between the members of a group.

    `src` and `dst` are ranks in the group. An object that can't be pickled fails the call on all
    ranks that take part.
    """

    member: GroupMember
    device: torch.device

    @abstractmethod
    def _channel(self, call: str) -> ObjectChannel:
        """What objects travel through; raises when the group is closed."""

    @abstractmethod
    def profiler_range(
        self, op: str, how: str, num_bytes: int | None = None
    ) -> AbstractContextManager[object]: ...

    @abstractmethod
    def broadcast(self, x: torch.Tensor, src: int = 0) -> torch.Tensor: ...

    @abstractmethod
    def send(self, x: torch.Tensor, dst: int | None = None) -> None: ...

    @abstractmethod
    def recv(
        self,
        shape_or_out: torch.Tensor | tuple[int, ...],
        dtype: torch.dtype | None = None,
        src: int | None = None,
    ) -> torch.Tensor: ...

    @outside_graphs
    def broadcast_object(self, obj: Any = None, src: int = 0) -> Any:
        """Rank `src`'s object, on every rank; `obj` counts on `src` alone. Collective.

        `src` gets `obj` itself, the others a copy.
        """
        check_peer("broadcast_object", "src", src, self.member)
        channel = self._channel("broadcast_object")
        with self._object_range("broadcast_object"):
            return channel.broadcast(obj, src)

    @outside_graphs
    def broadcast_object_list(self, objects: list[Any], src: int = 0) -> list[Any]:
        """Overwrites the entries of `objects` with rank `src`'s. Collective.

        Returns:
            `objects`. The lists must be equally long on all ranks.
        """
        received = self.broadcast_object(objects, src)
        if len(received) != len(objects):
            raise ArgumentError(
                "objects",
                f"{len(received)} entries long, as on rank_in_group {src}",
                len(objects),
                call="broadcast_object_list",
                member=self.member,
            )
        objects[:] = received
        return objects

    @outside_graphs
    def all_gather_object(self, obj: Any) -> list[Any]:
        """Every rank's object, in group order. Collective."""
        channel = self._channel("all_gather_object")
        with self._object_range("all_gather_object"):
            return channel.all_gather(obj)

    @outside_graphs
    def send_object(self, obj: Any, dst: int | None = None) -> None:
        """Sends to rank `dst` (default: the next rank), which must call `recv_object`."""
        dst = self._next_rank_in_group if dst is None else dst
        check_peer("send_object", "dst", dst, self.member, other=True)
        channel = self._channel("send_object")
        with self._object_range("send_object"):
            channel.send(obj, dst)

    @outside_graphs
    def recv_object(self, src: int | None = None) -> Any:
        """The object that rank `src` (default: the previous rank) sends."""
        src = self._prev_rank_in_group if src is None else src
        check_peer("recv_object", "src", src, self.member, other=True)
        channel = self._channel("recv_object")
        with self._object_range("recv_object"):
            return channel.recv(src)

    @outside_graphs
    def broadcast_tensor_dict(
        self, tensor_dict: dict[str, Any] | None = None, src: int = 0
    ) -> dict[str, Any]:
        """Rank `src`'s nested value, on every rank. Collective.

        Args:
            tensor_dict: dicts, lists and tuples of tensors and picklable values, to any depth;
                counts on `src` alone. CPU tensors arrive on CPU, CUDA tensors on the receiver's
                device; both contiguous.

        Returns:
            On `src` the argument itself, elsewhere a copy.
        """
        call = "broadcast_tensor_dict"
        check_peer(call, "src", src, self.member)
        if self.member.rank_in_group == src:
            description, tensors = self._split(call, tensor_dict)
            self.broadcast_object(description, src)
            self._each(tensors, lambda tensor: self.broadcast(tensor.contiguous(), src))
            return tensor_dict or {}
        received: Description = self.broadcast_object(None, src)
        tensors = received.empty_tensors(self.device)
        self._each(tensors, lambda tensor: self.broadcast(tensor, src))
        result: dict[str, Any] = join_tensors(received, tensors)
        return result

    @outside_graphs
    def send_tensor_dict(self, tensor_dict: dict[str, Any], dst: int | None = None) -> None:
        """Sends a nested value to rank `dst` (default: the next); see `broadcast_tensor_dict`."""
        description, tensors = self._split("send_tensor_dict", tensor_dict)
        self.send_object(description, dst)
        self._each(tensors, lambda tensor: self.send(tensor, dst))

    @outside_graphs
    def recv_tensor_dict(self, src: int | None = None) -> dict[str, Any]:
        """The nested value that rank `src` (default: the previous rank) sends."""
        description: Description = self.recv_object(src)
        tensors = description.empty_tensors(self.device)
        self._each(tensors, lambda tensor: self.recv(tensor, src=src))
        result: dict[str, Any] = join_tensors(description, tensors)
        return result

    @property
    def _next_rank_in_group(self) -> int:
        return (self.member.rank_in_group + 1) % self.member.world_size

    @property
    def _prev_rank_in_group(self) -> int:
        return (self.member.rank_in_group - 1) % self.member.world_size

    def _object_range(self, call: str) -> AbstractContextManager[object]:
        return self.profiler_range(call, "gloo" if self.member.world_size > 1 else "local")

    def _split(self, call: str, tensor_dict: Any) -> tuple[Description, list[torch.Tensor]]:
        """Takes a value apart, and refuses tensors that couldn't be sent before any is."""
        description, tensors = split_tensors(tensor_dict)
        for tensor in tensors:
            if tensor.device.type != "cpu" and tensor.device != self.device:
                raise ArgumentError(
                    "tensor_dict",
                    f"of tensors on cpu or {self.device}",
                    tensor.device,
                    call=call,
                    member=self.member,
                )
        return description, tensors

    def _each(
        self, tensors: list[torch.Tensor], function: Callable[[torch.Tensor], object]
    ) -> None:
        for tensor in tensors:
            if tensor.numel():
                function(tensor)
