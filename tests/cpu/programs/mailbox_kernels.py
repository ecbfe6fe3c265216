"""Runs the kernels that use mailboxes, or other ranks' tensors, in Triton's interpreter.

    mailbox_kernels.py CASES

Each rank is a process; all have the same shared memory at the same addresses. What PTX does is done
here by NumPy. Ends with 0 if all ranks got what they should and all mailboxes are empty again.
TRITON_INTERPRET must be set before Triton is imported, so this is a program of its own.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

import ctypes
import importlib
import mmap
import random
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import TensorHandle

from distcomm import kernels
from distcomm.kernels import Mailboxes, PeerTensors, mailbox_bytes, signal_bytes

TIMEOUT_S = 30
MODULES = (
    "mailbox",
    "one_shot_push",
    "two_shot_push",
    "reduce_scatter_push",
    "all_gather_push",
    "rms_norm",
    "one_shot_rms_norm",
    "two_shot_rms_norm",
    "all_gather_direct",
    "meeting",
)
GUARD = 64
EMPTY = -1


# ---- what PTX does ------------------------------------------------------------------------------


def numpy_of(x: Any) -> Any:
    return x.handle.data if isinstance(x, tl.tensor) else np.asarray(getattr(x, "value", x))


def integer(x: Any) -> int:
    return int(np.asarray(numpy_of(x)).reshape(-1)[0])


def tensor_of(data: Any) -> tl.tensor:
    return tl.tensor(
        TensorHandle(data.astype(np.int32), tl.int32), tl.block_type(tl.int32, [len(data)])
    )


def vector_at(address: int) -> Any:
    return np.ctypeslib.as_array((ctypes.c_int32 * 4).from_address(int(address)))


def load_vectors(address: tl.tensor, active: tl.tensor) -> tuple[tl.tensor, ...]:
    found = np.zeros((4, len(numpy_of(address))), np.int32)
    for thread in np.nonzero(numpy_of(active))[0]:
        found[:, thread] = vector_at(numpy_of(address)[thread])
    return tuple(tensor_of(word) for word in found)


def store_vectors(address: tl.tensor, *words_and_active: Any) -> None:
    *words, active = map(numpy_of, words_and_active)
    words = [np.broadcast_to(word, active.shape) for word in words]
    for thread in np.nonzero(active)[0]:
        at = int(numpy_of(address)[thread])
        place, vector = vector_at(at), np.array([word[thread] for word in words])
        if SHARED.is_mailbox(at) and (vector != EMPTY).any():
            assert (place == EMPTY).all(), f"stored over {place}, which nobody has taken yet"
        place[:] = vector
    if random.random() < SHARED.laziness:
        time.sleep(random.random() * 2e-3)  # so that ranks drift apart


def poll_vectors(
    address: tl.tensor, active: tl.tensor, own: Any, *rest: Any
) -> tuple[tl.tensor, ...]:
    *words, num_slots, slot_bytes, flags = rest
    num_slots, slot_bytes = integer(num_slots), integer(slot_bytes)
    flags = [integer(flag) for flag in flags]
    active, own = numpy_of(active), integer(own)
    given = [np.broadcast_to(numpy_of(word), active.shape) for word in words]
    found = np.array(given * num_slots, np.int32)
    deadline = time.monotonic() + TIMEOUT_S
    for thread in np.nonzero(active)[0]:
        for slot in set(range(num_slots)) - {own}:
            place = vector_at(int(numpy_of(address)[thread]) + slot * slot_bytes)
            while EMPTY in place[flags]:
                if time.monotonic() > deadline:
                    raise TimeoutError(f"slot {slot}, thread {thread}: nothing has arrived")
                time.sleep(0)
            found[4 * slot : 4 * slot + 4, thread] = place
    return tuple(tensor_of(word) for word in found)


def set_flag(address: tl.tensor, active: tl.tensor, releases: Any) -> None:
    for thread in np.nonzero(numpy_of(active))[0]:
        flag = ctypes.c_uint32.from_address(int(numpy_of(address)[thread]))
        assert flag.value == 0, "a flag is set again before it was seen"
        flag.value = 1


def wait_and_clear_flag(address: tl.tensor, active: tl.tensor, acquires: Any) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    for thread in np.nonzero(numpy_of(active))[0]:
        flag = ctypes.c_uint32.from_address(int(numpy_of(address)[thread]))
        while flag.value == 0:
            if time.monotonic() > deadline:
                raise TimeoutError(f"flag of {thread} isn't set")
            time.sleep(0)
        flag.value = 0


def replace_ptx() -> None:
    replacements = {
        "load_vectors": load_vectors,
        "store_vectors": store_vectors,
        "poll_vectors": poll_vectors,
        "set_flag": set_flag,
        "wait_and_clear_flag": wait_and_clear_flag,
        "fence": lambda thread: None,
    }
    for module in MODULES:
        loaded = importlib.import_module(f"distcomm.kernels.{module}")
        for name, function in replacements.items():
            if hasattr(loaded, name):
                setattr(loaded, name, function)


class BlocksAtOnce:
    """Launches a kernel with a process for each block, as its blocks wait for each other.

    All that they write to has to be shared memory, but for the turns, of which each has its own.
    """

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def launch(self, num_blocks: int, arguments: Any, constants: Any, **_: Any) -> None:
        turns, *others = arguments
        turns_of = [turns.clone().share_memory_() for _ in range(num_blocks)]

        def run(block: int) -> None:
            builder = interpreter.interpreter_builder
            builder.create_get_program_id = lambda axis: scalar_of(block)
            builder.create_get_num_programs = lambda axis: scalar_of(num_blocks)
            self.kernel[(1,)](turns_of[block], *others, *constants)

        run_in_processes(run, num_blocks)
        for block in range(num_blocks):
            turns[block::num_blocks] = turns_of[block][block::num_blocks]


def scalar_of(value: int) -> TensorHandle:
    return TensorHandle(np.array([value], np.int32), tl.int32)


def run_in_processes(run: Callable[[int], None], count: int) -> None:
    """Runs `run(0)`, ..., `run(count - 1)` at the same time, and waits for all of them."""
    children = []
    for number in range(count):
        child = os.fork()
        if child == 0:
            try:
                run(number)
            except BaseException:  # noqa: BLE001 - the process ends here, with the reason on stderr
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert codes == [0] * count, codes


# ---- ranks --------------------------------------------------------------------------------------


class Shared:
    """Memory that all ranks have at the same addresses: mailboxes, flags, and tensors."""

    laziness = 0.0

    def __init__(self, world_size: int, tensor_bytes: int) -> None:
        self.world_size = world_size
        self.tensor_bytes = tensor_bytes
        sizes = (mailbox_bytes(), signal_bytes(world_size, kernels.MAX_BLOCKS), tensor_bytes)
        self.stride = sum(sizes) + -sum(sizes) % 4096
        self._memory = mmap.mmap(-1, world_size * self.stride)
        self.base = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        self.flags_at, self.tensors_at = sizes[0], sizes[0] + sizes[1]
        for rank in range(world_size):
            ctypes.memset(self.base + rank * self.stride, 0xFF, mailbox_bytes())

    def is_mailbox(self, address: int) -> bool:
        offset = address - self.base
        inside = 0 <= offset < self.world_size * self.stride
        return inside and offset % self.stride < mailbox_bytes()

    def bytes_of(self, rank: int, at: int, num_bytes: int) -> torch.Tensor:
        array = (ctypes.c_uint8 * num_bytes).from_address(self.base + rank * self.stride + at)
        return torch.frombuffer(array, dtype=torch.uint8)

    def at_rest(self, rank: int) -> bool:
        boxes = self.bytes_of(rank, 0, mailbox_bytes())
        flags = self.bytes_of(rank, self.flags_at, self.tensors_at - self.flags_at)
        return bool((boxes == 0xFF).all()) and not flags.any()


SHARED: Shared


@dataclass
class NormCall:
    """All-reduce with RMSNorm, the same on all ranks."""

    dtype: torch.dtype
    num_tokens: int
    hidden: int
    has_residual: bool
    in_place: bool


@dataclass
class Call:
    """One collective, the same on all ranks."""

    op: str
    dtype: torch.dtype
    num_vectors: int  # of a rank's share of the result, or of the result
    in_place: bool

    @property
    def num_elements(self) -> int:
        return self.num_vectors * 16 // self.dtype.itemsize


GATHERS = ("all_gather_push", "all_gather_direct")
ADDS = ("one_shot_push", "two_shot_push", "two_shot_direct", "reduce_scatter_push")


def inputs(call: Call, world_size: int, seed: int) -> list[torch.Tensor]:
    """Every rank's, with values that are hard to carry."""
    generator = torch.Generator().manual_seed(seed)
    shares = world_size if "scatter" in call.op else 1
    size = call.num_elements * shares
    ranks = []
    for _ in range(world_size):
        if call.op in ADDS:
            x = torch.randn(size, generator=generator) * 10
            if call.dtype != torch.float32:
                x = x.round()  # the interpreter rounds to bf16 in its own way
            for value in (0.0, -0.0, float("inf"), float("-inf"), float("nan")):
                x[torch.randint(size, (1 + size // 50,), generator=generator)] = value
            x = x.to(call.dtype)
        else:
            bits = torch.randint(0, 256, (size * call.dtype.itemsize,), generator=generator)
            x = bits.to(torch.uint8).view(call.dtype)
        words = x.view(torch.int32)
        words[torch.randint(len(words), (1 + len(words) // 20,), generator=generator)] = EMPTY
        ranks.append(x)
    return ranks


def expected(call: Call, xs: list[torch.Tensor], rank: int) -> torch.Tensor:
    if call.op in GATHERS:
        return torch.cat(xs)
    total = xs[0].float()
    for x in xs[1:]:
        total += x.float()
    total = total.to(call.dtype)
    if "scatter" in call.op:
        return total[rank * call.num_elements : (rank + 1) * call.num_elements]
    return total


class Rank:
    def __init__(self, rank: int) -> None:
        self.rank = rank
        w = SHARED.world_size
        self.boxes = Mailboxes(
            base=SHARED.base,
            stride=SHARED.stride,
            turns=torch.zeros(512, dtype=torch.int32),
            rank=rank,
            world_size=w,
            overlaps=False,
        )
        flags = [SHARED.base + peer * SHARED.stride + SHARED.flags_at for peer in range(w)]
        self.peers = PeerTensors(torch.tensor(flags), SHARED.stride, rank, w)

    def run(self, call: Call | NormCall, seed: int) -> None:
        time.sleep(random.random() * 0.01)
        if isinstance(call, NormCall):
            self.run_norm(call, seed)
            return
        if call.op == "meet":
            kernels.meet(self.peers)
            return
        xs = inputs(call, SHARED.world_size, seed)
        result, guards = self.result_of(call, xs[self.rank])
        wanted = expected(call, xs, self.rank)
        same = (result.view(torch.int32) == wanted.view(torch.int32)) | both_nan(result, wanted)
        if call.op in GATHERS:
            same = result.view(torch.int32) == wanted.view(torch.int32)
        assert same.all(), (
            f"{call}: {(~same).sum()} of {len(same)} words are wrong, "
            f"{result.view(len(same), -1)[~same][:3]} instead of "
            f"{wanted.view(len(same), -1)[~same][:3]}"
        )
        assert all((guard == 77).all() for guard in guards), f"{call}: a guard was written to"

    def run_norm(self, call: NormCall, seed: int) -> None:
        """Both algorithms: they have to give the same bits."""
        shape = (call.num_tokens, call.hidden)
        generator = torch.Generator().manual_seed(seed)

        def values() -> torch.Tensor:
            x = torch.randint(-8, 9, shape, generator=generator)
            return x.to(call.dtype)  # whole numbers, as the interpreter has its own rounding

        def shared(x: torch.Tensor) -> torch.Tensor:
            return x.clone().share_memory_()

        xs = [values() for _ in range(SHARED.world_size)]
        weight = values()[:1].reshape(-1)
        residual = values() if call.has_residual else None
        h = sum(x.float() for x in xs) + (0 if residual is None else residual.float())
        wanted = h * torch.rsqrt((h * h).mean(1, keepdim=True) + 1e-3) * (weight.float() + 1)
        results = []
        for function in (kernels.one_shot_rms_norm, kernels.two_shot_rms_norm):
            x = shared(xs[self.rank])
            old = None if residual is None else shared(residual)
            normed = x if call.in_place else shared(torch.full_like(x, float("nan")))
            new = old if call.in_place or old is None else shared(torch.full_like(x, float("nan")))
            rows = kernels.NormedRows(x, weight, old, normed, new, 1e-3, 1.0)
            function(rows, self.boxes)
            results.append(normed)
            assert new is None or torch.equal(new.float(), h), call
            tolerance = 1e-5 if call.dtype == torch.float32 else 2e-2
            torch.testing.assert_close(normed.float(), wanted, atol=1e-5, rtol=tolerance)
        assert torch.equal(*results), f"{call}: the algorithms differ"

    def result_of(self, call: Call, x: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Runs the call on tensors at the same place of each rank's memory, between guards."""
        w = SHARED.world_size
        outputs = w if call.op in GATHERS else 1
        size = x.nbytes
        output_bytes = call.num_vectors * 16 * outputs
        area = SHARED.bytes_of(self.rank, SHARED.tensors_at, SHARED.tensor_bytes)
        area.fill_(77)
        source = area[GUARD : GUARD + size].view(call.dtype)
        source.copy_(x)
        at = GUARD + size + GUARD
        if call.in_place:
            inside = self.rank * output_bytes if "scatter" in call.op else 0
            at = GUARD + inside
        if call.in_place and call.op in GATHERS:
            at = 2 * GUARD + size
            part = area[at + self.rank * size :][:size].view(call.dtype)
            part.copy_(x)
            source = part
        output = area[at : at + output_bytes].view(call.dtype)
        base = SHARED.base + SHARED.tensors_at
        if call.op == "two_shot_direct":
            kernels.two_shot_direct(source, base + at, self.boxes, self.peers)
        elif call.op == "all_gather_direct":
            kernels.all_gather_direct(source.data_ptr(), base + at, size, self.peers)
        else:
            getattr(kernels, call.op)(source, output, self.boxes)
        guards = [area[:GUARD], area[-GUARD:]]
        if not call.in_place:
            guards += [area[GUARD + size : at], area[at + output_bytes :]]
        return output.clone(), guards


def both_nan(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """By words: whether the elements that differ are NaNs on both sides."""
    fine = (x.isnan() & y.isnan()) | (x == y)
    return fine.view(-1, 4 // x.dtype.itemsize).all(dim=1)


# ---- cases --------------------------------------------------------------------------------------

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MAILBOX_OPS = ("one_shot_push", "two_shot_push", "reduce_scatter_push", "all_gather_push")
DIRECT_OPS = ("two_shot_direct", "all_gather_direct")


def one_op(op: str) -> tuple[int, list[Call | NormCall]]:
    calls = [
        Call(op, dtype, num_vectors, in_place)
        for dtype in DTYPES
        for num_vectors, in_place in ((1, False), (3, True), (64, True), (201, False))
    ]
    return 3, calls


def many_chunks(world_size: int) -> tuple[int, list[Call | NormCall]]:
    """Blocks that have more chunks than there are turns."""
    two_shot = importlib.import_module("distcomm.kernels.two_shot_push")
    one_step = importlib.import_module("distcomm.kernels.reduce_scatter_push")
    two_shot._MAX_BLOCKS = one_step._MAX_BLOCKS = 2
    two_shot._ENOUGH_CHUNKS = 1000
    chunk = world_size * two_shot._LEAST_SHARE
    one_step._LEAST_CHUNK = one_step._MOST_CHUNK = two_shot._LEAST_SHARE
    calls: list[Call | NormCall] = []
    for chunks, more in ((2, 1), (5, 0), (21, -3), (0, 1), (38, 7), (1, 0), (3, 1)):
        for op in ("two_shot_push", "two_shot_direct", "reduce_scatter_push"):
            size = chunk * chunks + more
            calls.append(
                Call(op, torch.bfloat16, size // world_size if "scatter" in op else size, False)
            )
    return world_size, [call for call in calls if call.num_vectors]


def norms(world_size: int) -> tuple[int, list[Call | NormCall]]:
    one = importlib.import_module("distcomm.kernels.one_shot_rms_norm")
    two = importlib.import_module("distcomm.kernels.two_shot_rms_norm")
    importlib.import_module("distcomm.kernels.rms_norm")._MOST_THREADS = 64
    one._BLOCKS = (2 * world_size,)
    one._launcher = BlocksAtOnce(one._one_shot_rms_norm_kernel)
    two._BLOCKS = (2,)
    calls: list[Call | NormCall] = [
        NormCall(dtype, num_tokens, hidden, number % 2 == 0, number % 3 == 0)
        for dtype in DTYPES
        for number, (num_tokens, hidden) in enumerate(((1, 64), (3, 520), (13, 128), (2, 1032)))
    ]
    calls.insert(5, Call("two_shot_push", torch.bfloat16, 700, False))
    return world_size, calls


def mixed(world_size: int) -> tuple[int, list[Call | NormCall]]:
    choose = random.Random(world_size)
    importlib.import_module("distcomm.kernels.two_shot_push")._MAX_BLOCKS = 3
    calls = [
        Call(choose.choice((*MAILBOX_OPS, *DIRECT_OPS, "meet")), choose.choice(DTYPES),
             choose.choice((1, 2, 70, 300)), choose.random() < 0.3)
        for _ in range(40)
    ]  # fmt: skip
    return world_size, calls


CASES: dict[str, Callable[[], tuple[int, list[Call | NormCall]]]] = {
    **{op: (lambda op=op: one_op(op)) for op in MAILBOX_OPS + DIRECT_OPS},
    **{f"chunks_{w}": (lambda w=w: many_chunks(w)) for w in (2, 4)},
    **{f"norms_{w}": (lambda w=w: norms(w)) for w in (2, 3)},
    **{f"mixed_{w}": (lambda w=w: mixed(w)) for w in (2, 3, 8)},
}


def run_rank(rank: int, calls: list[Call | NormCall]) -> None:
    random.seed(rank)
    this = Rank(rank)
    for number, call in enumerate(calls):
        this.run(call, number)


def main(case: str) -> int:
    global SHARED
    world_size, calls = CASES[case]()
    replace_ptx()
    SHARED = Shared(world_size, 1 << 20)
    SHARED.laziness = 0.02
    run_in_processes(lambda rank: run_rank(rank, calls), world_size)
    for rank in range(world_size):
        assert SHARED.at_rest(rank), f"rank {rank}: something is left in a mailbox or a flag"
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main(sys.argv[1]))
