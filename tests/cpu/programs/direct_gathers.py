"""Gathers by ``kernel`` and ``copy_engine``, over ranks that are objects of this process.

    direct_gathers.py METHOD

Everything of the library between the arguments and the memory runs as it does on GPUs: the checks,
the plan's tables and runs, pitches and addresses, the kernel in Triton's interpreter, and the copy
engines' C++ on a stand-in for the driver. What stands for the group and its channel has its
ranks' symmetric memory in one process. Ends with 0 if all bytes are as expected.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

import random
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch

from distcomm.context_parallel import methods
from distcomm.context_parallel.plan import ContextParallelPlan
from distcomm.context_parallel.request import check_cache_request, check_gather_request
from distcomm.errors import GroupMember
from distcomm.memory import PeerChannel, PeerCopies, PushedRows, RowRuns
from distcomm.native import NativeNccl
from tests.fake_cuda import FakeCuda
from tests.fake_nccl import fake_nccl_path
from tests.kv_cases import random_case, whole_batch

GAP_BYTES = 64  # between outputs, to be left alone


class SymmetricMemory:
    """The same bytes at the same offsets on every rank, with noise in them."""

    def __init__(self, world_size: int, num_bytes: int) -> None:
        num_bytes += 16
        raw = [torch.randint(0, 256, (num_bytes,), dtype=torch.uint8) for _ in range(world_size)]
        # At the same distance from a multiple of 16 on all ranks, as with NCCL.
        self.ranks = [x[-x.data_ptr() % 16 :][: num_bytes - 16] for x in raw]
        self.ranks = [x.copy_(self.ranks[0]) for x in self.ranks]
        self._used = 0

    def make(self, like: torch.Tensor, num_rows: int, *, apart: bool) -> list[torch.Tensor]:
        """[rows, ...] on every rank; `apart`: as the first of two interleaved tensors."""
        shape = (num_rows, 2, *like.shape[1:]) if apart else (num_rows, *like.shape[1:])
        num_bytes = torch.empty(shape, dtype=like.dtype).nbytes
        at = self._used + GAP_BYTES
        self._used = at + num_bytes + -num_bytes % 16
        made = [x[at : at + num_bytes].view(like.dtype).view(shape) for x in self.ranks]
        return [x[:, 0] for x in made] if apart else made


class Channel(PeerChannel):
    """What a `PeerChannel` offers, without NCCL's windows."""

    def __init__(self, rank: int, memory: SymmetricMemory, copies: PeerCopies) -> None:
        self._rank = rank
        self._bases = [x.data_ptr() for x in memory.ranks]
        self.deltas = [base - self._bases[rank] for base in self._bases]
        self.deltas_table = torch.tensor(self.deltas)
        self.kernel_signals = None  # the ranks run one after another
        self.can_copy = True
        self._copies = copies

    def alias(self, address: int) -> int:
        return address

    def in_order(self) -> Any:
        return nullcontext()

    def push(self, tensors: Sequence[PushedRows], runs: RowRuns, stream: object) -> None:
        self._copies.push(tensors, runs, stream=0)


def make_groups(memory: SymmetricMemory, native: NativeNccl) -> list[Any]:
    world_size = len(memory.ranks)
    initial = PeerCopies.initial_signals(world_size)
    signals = [torch.frombuffer(bytearray(initial), dtype=torch.uint8) for _ in memory.ranks]
    addresses = [each.data_ptr() for each in signals]
    groups = []
    for rank in range(world_size):
        channel = Channel(rank, memory, PeerCopies(native, rank, addresses))
        group = SimpleNamespace(
            member=GroupMember("cp", tuple(range(world_size)), rank),
            world_size=world_size,
            rank_in_group=rank,
            device=torch.device("cpu"),
            signals=signals,  # kept alive
            peer_channel=lambda channel=channel: channel,
            announce=lambda op, *tensors: None,
            count=lambda op, how, num_bytes: None,
            keep_if_capturing=lambda tensor: None,
            profiler_range=lambda op, how, num_bytes: nullcontext(),
        )
        groups.append(group)
    return groups


def on_all_ranks(method: str, calls: list[Callable[[], None]]) -> None:
    if method == "kernel":
        for call in calls:
            call()
        return
    with ThreadPoolExecutor(len(calls)) as pool:
        for future in [pool.submit(call) for call in calls]:
            future.result()


def write_rows(
    expected: torch.Tensor,
    output: torch.Tensor,
    memory: torch.Tensor,
    whole: torch.Tensor,
    slots: Sequence[int],
) -> None:
    """Row i of `whole` to row ``slots[i]`` of where `output` is in `memory`, but in `expected`."""
    if not whole.numel():
        return
    at = output.data_ptr() - memory.data_ptr()
    pitch = output.stride(0) * output.element_size()
    for row, slot in zip(whole.reshape(len(whole), -1).view(torch.uint8), slots, strict=True):
        if slot >= 0:
            expected[at + slot * pitch :][: len(row)] = row


def gather(rng: random.Random, world_size: int, method: str, native: NativeNccl) -> None:
    case = random_case(rng, world_size)
    plan: ContextParallelPlan = case.plan
    whole = whole_batch(case)
    into_cache = method == "kernel" and rng.random() < 0.5
    num_rows = plan.num_tokens + rng.randrange(9) if into_cache else plan.num_tokens
    num_bytes = sum(2 * num_rows * x[:1].nbytes + GAP_BYTES + 16 for x in whole if len(x))
    memory = SymmetricMemory(world_size, num_bytes + len(whole) * 2 * GAP_BYTES)
    apart = into_cache and rng.random() < 0.5
    outputs = [memory.make(x, num_rows, apart=apart) for x in whole]
    expected = [x.clone() for x in memory.ranks]
    slots = list(range(plan.num_tokens))
    if into_cache:
        chosen = rng.sample(range(num_rows), plan.num_tokens)
        slots = [-1 if rng.random() < 0.2 else slot for slot in chosen]
    for made, x in zip(outputs, whole, strict=True):
        for rank, output in enumerate(made):
            write_rows(expected[rank], output, memory.ranks[rank], x, slots)
    calls = []
    table = torch.tensor(slots, dtype=rng.choice([torch.int32, torch.int64]))
    for rank, group in enumerate(make_groups(memory, native)):
        mine = [plan.shard(x, rank) for x in whole]
        if rng.random() < 0.3:  # rows of a wider tensor
            mine = [torch.stack((x, x), dim=1)[:, 1] for x in mine]
        own = [made[rank] for made in outputs]
        if into_cache:
            request = check_cache_request(group, plan, mine, own, table, None, method)
        else:
            request = check_gather_request(group, plan, mine, own, None, method)
        run = getattr(methods, f"_by_{method}")
        calls.append(lambda run=run, request=request: run(request, request.outputs))
    on_all_ranks(method, calls)
    for rank in range(world_size):
        if not torch.equal(memory.ranks[rank], expected[rank]):
            raise SystemExit(f"rank {rank} of {world_size} has wrong bytes: {case}")


def main(method: str) -> None:
    torch.set_num_threads(1)
    FakeCuda()
    native = NativeNccl(str(fake_nccl_path()))
    rng = random.Random(method)
    for world_size in range(1, 9):
        for _ in range(6 if method == "kernel" else 25):
            gather(rng, world_size, method, native)


if __name__ == "__main__":
    main(sys.argv[1])
