"""The kernels that add up and gather, without a GPU: in Triton's interpreter, and compiled."""

from __future__ import annotations

import importlib
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from distcomm import kernels
from distcomm.errors import ArgumentError
from distcomm.kernels import Mailboxes, NormedRows, PeerTensors

triton = pytest.importorskip("triton")
from triton.runtime import driver  # noqa: E402

from tests.cpu.triton_kernels import PretendedDevice, check_in_interpreter  # noqa: E402

OPS = ("one_shot_push", "two_shot_push", "reduce_scatter_push", "all_gather_push")
DIRECT = ("two_shot_direct", "all_gather_direct")
NORMS = ("one_shot_rms_norm", "two_shot_rms_norm")


@pytest.mark.parametrize(
    "case",
    [
        *OPS,
        *DIRECT,
        *("chunks_2", "chunks_4", "norms_2", "norms_3", "mixed_2", "mixed_8"),
    ],
)
def test_ranks_get_what_they_should(case: str) -> None:
    check_in_interpreter("mailbox_kernels.py", case)


# ---- what they compile to ------------------------------------------------------------------


class Compiler:
    """Stands in for a launcher: compiles the kernel from the very arguments of a launch."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.compiled: list[Any] = []

    def launch(
        self,
        num_blocks: int,
        arguments: tuple[Any, ...],
        constants: tuple[Any, ...],
        *,
        types: tuple[Any, ...],
        device: torch.device,
        num_warps: int,
        launch_pdl: bool = False,
    ) -> None:
        self.compiled.append(
            self.kernel.warmup(
                *arguments,
                *constants,
                grid=(num_blocks,),
                num_warps=num_warps,
                launch_pdl=launch_pdl,
            )
        )


@pytest.fixture(params=[80, 90, 100])
def arch(request: pytest.FixtureRequest) -> Iterator[int]:
    driver.set_active(PretendedDevice(request.param))
    yield request.param
    driver.set_active(None)


def boxes(arch: int, world_size: int) -> Mailboxes:
    turns = torch.zeros(256, dtype=torch.int32)
    return Mailboxes(0x7F0000000000, 1 << 36, turns, 1, world_size, arch >= 90)


def compiled(
    op: str,
    arch: int,
    monkeypatch: pytest.MonkeyPatch,
    *,
    world_size: int = 4,
    dtype: torch.dtype = torch.bfloat16,
    num_bytes: int = 1 << 16,
) -> Any:
    name = {"two_shot_direct": "reduce_scatter_push"}.get(op, op)
    module = importlib.import_module(f"distcomm.kernels.{name}")
    (kernel,) = (each for key, each in vars(module).items() if re.fullmatch(r"_\w+_kernel", key))
    launcher = Compiler(kernel)
    monkeypatch.setattr(module, "_launcher", launcher)
    call = getattr(kernels, op)
    x = torch.zeros(num_bytes // dtype.itemsize, dtype=dtype)
    if op in DIRECT:
        signals = torch.zeros(world_size, dtype=torch.int64)
        peers = PeerTensors(signals, 1 << 36, 1, world_size)
        if op == "two_shot_direct":
            call(x, 1 << 20, boxes(arch, world_size), peers)
        else:
            call(0, 1 << 20, num_bytes, peers)
    elif op in NORMS:
        rows = x.view(-1, 8192 // dtype.itemsize)
        call(NormedRows(rows, rows[0], rows, rows, rows, 1e-6, 0.0), boxes(arch, world_size))
    else:
        shares = {"reduce_scatter_push": (world_size, 1), "all_gather_push": (1, world_size)}
        inputs, outputs = shares.get(op, (1, 1))
        call(x.repeat(inputs), x.repeat(outputs), boxes(arch, world_size))
    return launcher.compiled[0]


@pytest.mark.parametrize("op", [*OPS, *DIRECT, *NORMS])
@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_they_compile(op: str, world_size: int, arch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = compiled(op, arch, monkeypatch, world_size=world_size)
    ptx = kernel.asm["ptx"]
    moves = set(re.findall(r"\b(?:ld|st)\.(?:relaxed\.sys\.)?global\.v4\.b32", ptx))
    waits = {"ld.relaxed.sys.global.v4.b32"} if op != "all_gather_direct" else set()
    assert moves == {"ld.global.v4.b32", "st.relaxed.sys.global.v4.b32", *waits}
    ahead = re.findall(r"griddepcontrol\.\w+|(?:ld|st)\.[\w.]*global", ptx)
    if arch >= 90 and op != "all_gather_direct":
        assert ahead[:2] == ["griddepcontrol.wait", "griddepcontrol.launch_dependents"]
    else:
        assert not any("griddepcontrol" in each for each in ahead)
    threads = kernel.metadata.num_warps * 32
    types = re.findall(r"elementwise_inline_asm.*-> .*?tensor<(\d+)xi32", kernel.asm["ttgir"])
    # One flag a thread; of what it moves, it may have several.
    several = [4 * threads] if op == "all_gather_direct" else []
    assert {int(each) for each in types} <= {threads, *several}
    assert spilled_bytes(kernel) <= 32


def spilled_bytes(kernel: Any) -> int:
    cubin = Path(next(p for p in kernel.metadata_group.values() if p.endswith(".cubin")))
    usage = subprocess.run(
        [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", cubin],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    (stack_bytes,) = re.findall(r"STACK:(\d+)", usage)
    return int(stack_bytes)


@pytest.mark.parametrize("op", [*OPS, "two_shot_direct", *NORMS])
def test_values_do_not_cause_compilations(
    op: str, arch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = (1 << 13, 1 << 14) if op in NORMS else (16, 32, 1 << 11)
    first, *others = (compiled(op, arch, monkeypatch, num_bytes=size) for size in sizes)
    assert all(each is first for each in others)


def test_a_meeting_compiles(arch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("distcomm.kernels.meeting")
    launcher = Compiler(module._meet_kernel)
    monkeypatch.setattr(module, "_launcher", launcher)
    kernels.meet(PeerTensors(torch.zeros(4, dtype=torch.int64), 1 << 36, 1, 4))
    ptx = launcher.compiled[0].asm["ptx"]
    flags = re.findall(r"(?:ld|st)\.(release|acquire|relaxed)\.sys\.global\.u32", ptx)
    # What came before goes with the first flags; the second ones only say that those were seen.
    assert flags == ["release", "acquire", "relaxed", "relaxed", "relaxed", "relaxed"]


# ---- launchers -----------------------------------------------------------------------------


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    ("x", "output"),
    [
        (torch.zeros(8), torch.zeros(16)),
        (torch.zeros(6), torch.zeros(6)),
        (torch.zeros(8), torch.zeros(8, dtype=torch.float16)),
        (torch.zeros(16)[::2], torch.zeros(8)),
        (torch.zeros(9)[1:], torch.zeros(8)),
        (torch.zeros(8, dtype=torch.int32), torch.zeros(8, dtype=torch.int32)),
    ],
)
def test_wrong_tensors_are_refused(op: str, x: torch.Tensor, output: torch.Tensor) -> None:
    if op == "all_gather_push":
        output = output.repeat(2) if output.numel() != 16 else output.repeat(3)
        if x.dtype == torch.int32:
            x = x[:6]
    if op == "reduce_scatter_push":
        x = x.repeat(2) if x.is_contiguous() and not x.storage_offset() else x
    with pytest.raises(ArgumentError, match=f"{op}: x and output must be contiguous, of one"):
        getattr(kernels, op)(x, output, boxes(90, 2))


def test_what_does_not_fit_into_mailboxes_is_refused() -> None:
    module = importlib.import_module("distcomm.kernels.one_shot_push")
    x = torch.zeros(module.most_bytes(4) // 4 + 4)
    with pytest.raises(ArgumentError, match=f"x at most {module.most_bytes(4)} bytes"):
        kernels.one_shot_push(x, x, boxes(90, 4))


def test_splits_cover_all_vectors() -> None:
    split = importlib.import_module("distcomm.kernels.mailbox").split
    for num_vectors in (0, 1, 7, 8, 9, 4096, 4097, 32768):
        for most_part in (256, 1024):
            grid = split(num_vectors, (4, 8), 128, most_part)
            assert 1 <= grid.num_blocks <= 128
            assert (grid.num_blocks - 1) * grid.part < max(1, num_vectors)
            assert grid.num_blocks * grid.part >= num_vectors
            assert grid.part <= most_part
    assert split(300, (2,), 256, 32).num_blocks == 10
