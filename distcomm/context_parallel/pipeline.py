"""KV gathers that run beside compute, into buffers that are used again."""

from __future__ import annotations

from collections import deque
from contextlib import nullcontext
from typing import cast

import torch

from ..errors import ArgumentError, DistcommError
from ..group import GroupCoordinator
from ..outside_graphs import outside_graphs
from .gather import Gathered, KvGather, all_gather_kv
from .plan import ContextParallelPlan
from .request import Stream

__all__ = ["PipelinedKvGather"]

_Specs = tuple[tuple[tuple[int, ...], torch.dtype], ...]


class PipelinedKvGather:
    """`all_gather_kv` beside compute: the next gather runs while the last result is used.

        pipeline = PipelinedKvGather(state.cp, plan.num_tokens)
        pipeline.start(plan, k)       # runs beside what follows
        v = project_v(x)
        pipeline.start(plan, v)
        q = project_q(x)
        attend(q, pipeline.finish(), pipeline.finish())   # K, then V

    Gathers are finished in the order in which they were started. Their results lie in `depth`
    buffers that take turns, symmetric where that is possible: a result is valid until `depth`
    more gathers have been started. What the current stream was given before a start may still
    read the buffer that this start writes to, on this rank and on its peers; work on other
    streams has to be ordered before it by the caller.

    Args:
        group: as for `all_gather_kv`.
        max_tokens: the most tokens that a plan may have.
        depth: how many buffers, and how many gathers may be started and not finished.
        stream: where the gathers run; by default a new one of the group's device.
        method: as for `all_gather_kv`.

    Raises:
        ArgumentError: an argument doesn't fit.
    """

    def __init__(
        self,
        group: GroupCoordinator,
        max_tokens: int,
        *,
        depth: int = 2,
        stream: Stream | None = None,
        method: str = "auto",
    ) -> None:
        for name, value, least in (("max_tokens", max_tokens, 0), ("depth", depth, 1)):
            if type(value) is not int or value < least:
                raise ArgumentError(
                    name,
                    f"an integer >= {least}",
                    repr(value),
                    call="PipelinedKvGather",
                    member=group.member,
                )
        self._group = group
        self._max_tokens = max_tokens
        self._depth = depth
        self._stream = stream
        self._method = method
        self._specs: _Specs | None = None
        self._buffers: list[tuple[torch.Tensor, ...]] = []
        self._num_started = 0
        self._under_way: deque[KvGather[Gathered]] = deque()

    @property
    def num_under_way(self) -> int:
        """How many gathers have been started and not finished."""
        return len(self._under_way)

    @outside_graphs
    def start(self, plan: ContextParallelPlan, *tensors: torch.Tensor) -> None:
        """Starts a gather, after all that the current stream was given before. Collective.

        Args:
            plan: at most `max_tokens` tokens.
            tensors: as for `all_gather_kv`; rows of the same shapes and dtypes as in the first
                start.

        Raises:
            ArgumentError, PlanMismatchError, CollectiveError, NcclError: as `all_gather_kv`.
            DistcommError: `depth` gathers are under way.
        """
        call, member = "PipelinedKvGather.start", self._group.member
        if len(self._under_way) == self._depth:
            raise DistcommError(
                f"{call}: {self._depth} gathers are under way, as many as there are buffers: "
                f"finish one first [{member}]"
            )
        if plan.num_tokens > self._max_tokens:
            raise ArgumentError(
                "plan",
                f"of at most {self._max_tokens} tokens, the size of the buffers",
                f"one of {plan.num_tokens}",
                call=call,
                member=member,
            )
        specs = tuple((tuple(x.shape[1:]), x.dtype) for x in tensors)
        if self._specs is None:
            self._make_buffers(tensors)
            self._specs = specs
        elif specs != self._specs:
            raise ArgumentError(
                "tensors",
                f"with rows as in the first start, {_described(self._specs)}",
                _described(specs),
                call=call,
                member=member,
            )
        buffers = self._buffers[self._num_started % self._depth]
        gather = all_gather_kv(
            self._group,
            plan,
            *tensors,
            out=[buffer[: plan.num_tokens] for buffer in buffers],
            stream=self._stream,
            method=self._method,
        )
        self._num_started += 1
        self._under_way.append(cast(KvGather[Gathered], gather))  # as there is a stream

    @outside_graphs
    def finish(self) -> Gathered:
        """The result of the oldest gather under way, which the current stream may use now. Local.

        Raises:
            DistcommError: no gather is under way.
        """
        if not self._under_way:
            raise DistcommError(
                f"PipelinedKvGather.finish: no gather is under way [{self._group.member}]"
            )
        return self._under_way.popleft().wait()

    def _make_buffers(self, tensors: tuple[torch.Tensor, ...]) -> None:
        """On first use, as only then it is known what is gathered; collective if the pool grows."""
        on_cuda = bool(tensors) and tensors[0].is_cuda
        if self._stream is None:
            self._stream = torch.cuda.Stream(self._group.device) if on_cuda else torch.cpu.Stream()
        symmetric = on_cuda and self._method != "collective"
        with self._group.symmetric_memory() if symmetric else nullcontext():
            self._buffers = [
                tuple(x.new_empty((self._max_tokens, *x.shape[1:])) for x in tensors)
                for _ in range(self._depth)
            ]


def _described(specs: _Specs) -> str:
    return ", ".join(f"{dtype} {list(shape)}" for shape, dtype in specs) or "none"
