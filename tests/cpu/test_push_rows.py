"""`push_rows` without a GPU: what it compiles to, and its data path in Triton's interpreter."""

from __future__ import annotations

import importlib
import re
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from distcomm.errors import ArgumentError
from distcomm.kernels import PushedTensor, push_rows, signal_bytes

triton = pytest.importorskip("triton")
from triton.runtime import driver  # noqa: E402

from tests.cpu.triton_kernels import PretendedDevice, check_in_interpreter  # noqa: E402

W = 4
KERNEL_FILE = importlib.import_module("distcomm.kernels.push_rows")


@pytest.mark.parametrize("cases", ["example", "row_sizes", "groups"])
def test_rows_arrive(cases: str) -> None:
    check_in_interpreter("pushed_rows.py", cases)


# ---- what it compiles to ------------------------------------------------------------------


@pytest.fixture(params=[80, 90, 100])
def arch(request: pytest.FixtureRequest) -> Iterator[int]:
    driver.set_active(PretendedDevice(request.param))
    yield request.param
    driver.set_active(None)


def pushed(row_bytes: int, **changes: Any) -> PushedTensor:
    arguments: dict[str, Any] = {
        "source": 0x7F0000000000,
        "output": 0x7E0000000000,
        "deltas": torch.zeros(W, dtype=torch.int64),
        "row_bytes": row_bytes,
        "source_pitch": row_bytes,
        "output_pitch": row_bytes,
    }
    return PushedTensor(**arguments | changes)


def compiled(
    tensors: Sequence[PushedTensor],
    *,
    synchronizing: bool = True,
    rows: int = 100,
    slots: torch.Tensor | None = None,
    table_dtype: torch.dtype = torch.int32,
) -> list[Any]:
    """The kernel of each launch, compiled from the launcher's own arguments."""
    rows_to = torch.zeros(rows, dtype=table_dtype)
    signals = torch.zeros(W, dtype=torch.int64) if synchronizing else None
    launches = KERNEL_FILE._launches(tensors, rows_to, slots, 0, W, signals, 32)
    return [
        KERNEL_FILE._push_rows_kernel.warmup(
            *arguments, *constants, grid=(32,), num_warps=KERNEL_FILE._NUM_WARPS
        )
        for arguments, _, constants in launches
    ]


def accesses(kernel: Any) -> tuple[set[str], set[str]]:
    """Types of the loads from a source, which are the evict-first ones, and of data stores."""
    ptx = kernel.asm["ptx"]
    loads = re.findall(r"ld\.global\.L1::evict_first\.(?:L2::cache_hint\.)?([\w.]+)", ptx)
    return set(loads), set(re.findall(r"st\.global\.([\w.]+)", ptx))


WIDEST = ({"v2.b64"}, {"v2.b64"})


@pytest.mark.parametrize("row_bytes", [2048, 1152, 128, 16])
@pytest.mark.usefixtures("arch")
def test_aligned_rows_move_in_words_of_16_bytes(row_bytes: int) -> None:
    slots = torch.zeros(10, dtype=torch.int64)
    for kernel in (
        *compiled([pushed(row_bytes)]),
        *compiled([pushed(row_bytes)], synchronizing=False, slots=slots),
        *compiled([pushed(row_bytes, source_pitch=row_bytes + 16)], table_dtype=torch.int64),
        *compiled([pushed(row_bytes), pushed(2048)], slots=slots),
    ):
        assert accesses(kernel) == WIDEST


@pytest.mark.parametrize(
    ("change", "width"),
    [
        ({"source": 0x7F0000000008}, "b64"),
        ({"output": 0x7F0000000004}, "b32"),
        ({"source_pitch": 2050}, "b16"),
        ({"output_pitch": 2056}, "b64"),
        ({"delta_alignment": 1}, "b8"),
    ],
)
@pytest.mark.usefixtures("arch")
def test_words_are_no_wider_than_addresses_allow(change: dict[str, int], width: str) -> None:
    (kernel,) = compiled([pushed(2048, **change)], synchronizing=False)
    assert accesses(kernel) == ({width}, {width})


@pytest.mark.parametrize(
    ("row_bytes", "width"), [(136, "b64"), (132, "b32"), (6, "b16"), (7, "b8")]
)
@pytest.mark.usefixtures("arch")
def test_words_divide_the_row(row_bytes: int, width: str) -> None:
    (kernel,) = compiled([pushed(row_bytes)], synchronizing=False)
    assert accesses(kernel) == ({width}, {width})


def test_registers_suffice(arch: int) -> None:
    slots = torch.zeros(10, dtype=torch.int32)
    for kernel in (
        *compiled([pushed(2048)]),
        *compiled([pushed(1152)], slots=slots),
        *compiled([pushed(2048), pushed(2048)], slots=slots),
    ):
        cubin = Path(next(p for p in kernel.metadata_group.values() if p.endswith(".cubin")))
        cuobjdump = triton.knobs.nvidia.cuobjdump.path
        usage = subprocess.run(
            [cuobjdump, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True
        ).stdout
        (registers,) = re.findall(r"REG:(\d+)", usage)
        (stack_bytes,) = re.findall(r"STACK:(\d+)", usage)
        assert int(registers) <= 128, (arch, usage)
        # Some versions of ptxas keep an address or two there, which the loops don't use.
        assert int(stack_bytes) <= 16, (arch, usage)


OPENS = "st.relaxed.sys.global.u32 [ADDRESS], 1"
CLOSES = "st.release.sys.global.u32 [ADDRESS], 1"
WAITS = "ld.relaxed.sys.global.u32"
CLEARS = "st.relaxed.sys.global.u32 [ADDRESS], 0"


def steps(kernel: Any) -> list[str]:
    """Flags, barriers, loads of rows and stores of rows, in the PTX's order, no repetitions."""
    ptx = re.sub(r"\[%\w+\]", "[ADDRESS]", kernel.asm["ptx"])
    wanted = [OPENS, CLOSES, WAITS, CLEARS, "bar.sync", "ld.global.L1::evict_first", "st.global"]
    found = re.findall("|".join(map(re.escape, wanted)), ptx)
    return [each for i, each in enumerate(found) if i == 0 or found[i - 1] != each]


@pytest.mark.usefixtures("arch")
def test_ranks_meet_before_the_first_and_after_the_last_launch() -> None:
    load, store = "ld.global.L1::evict_first", "st.global"
    opening, closing = [OPENS, load, WAITS, CLEARS, "bar.sync"], ["bar.sync", CLOSES, WAITS, CLEARS]
    moving = [store, load]  # and the load of the next tile
    tensor = pushed(256)
    assert [steps(k) for k in compiled([tensor])] == [[*opening, *moving, *closing]]
    one, two = [*moving], [*moving, *moving]
    assert [steps(k) for k in compiled([tensor] * 2)] == [[*opening, *two, *closing]]
    first, middle, last = [steps(k) for k in compiled([tensor] * 5)]
    assert (first, middle) == ([*opening, *two], [load, *two])
    assert last == [load, *one, *closing]
    for kernel in compiled([tensor] * 3, synchronizing=False):
        assert not {OPENS, CLOSES, WAITS, CLEARS} & {*steps(kernel)}


@pytest.mark.usefixtures("arch")
def test_each_flag_belongs_to_one_thread() -> None:
    (kernel,) = compiled([pushed(2048), pushed(132)])
    ttgir = kernel.asm["ttgir"]
    types = re.findall(r"elementwise_inline_asm.*-> tensor<(\d+)xi32, #(\w+)>", ttgir)
    assert len(types) == 4
    for num_elements, layout in types:
        assert int(num_elements) == kernel.metadata.num_warps * 32
        (parameters,) = re.findall(rf"^#{layout} = #ttg\.blocked<(.*)>", ttgir, re.MULTILINE)
        assert "sizePerThread = [1]" in parameters
        assert "threadsPerWarp = [32]" in parameters
        assert f"warpsPerCTA = [{kernel.metadata.num_warps}]" in parameters


@pytest.mark.usefixtures("arch")
def test_values_do_not_cause_compilations() -> None:
    first = compiled([pushed(2048)])
    tensor = pushed(2048, source=0x7F0000000010, output=0x7E0000000100, output_pitch=4096)
    for rows in (0, 1, 16, 17, 100):
        (again,) = compiled([tensor], rows=rows)
        assert again is first[0]


def test_launches_of_other_types_are_told_apart() -> None:
    """Whatever makes Triton compile another kernel is in the key of the launcher's."""
    wide = torch.zeros(4, dtype=torch.int64)
    narrow, deltas = wide.int(), torch.zeros(1, dtype=torch.int64)
    calls = [
        ([pushed(256, deltas=each)] * num_tensors, rows_to, slots, 0, 1, signals, 32)
        for num_tensors in (1, 2, 5)
        for rows_to in (wide, narrow)
        for slots in (None, wide, narrow)
        for signals in (None, deltas)
        for each in (None, deltas)
    ]
    kinds = {}
    for call in calls:
        for arguments, types, constants in KERNEL_FILE._launches(*call):
            seen = [getattr(each, "dtype", type(each)) for each in arguments]
            assert kinds.setdefault((types, constants), seen) == seen


# ---- the launcher -------------------------------------------------------------------------


def test_signal_area_has_two_flags_per_block_and_rank() -> None:
    assert signal_bytes(world_size=4, max_blocks=32) == 4 * 32 * 2 * 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows_to": torch.zeros(3)}, "push_rows: rows_to must be int32 or int64 of one dim"),
        ({"rows_to": torch.zeros(6, dtype=torch.int32)[::2]}, "rows_to must be contiguous"),
        ({"slots": torch.zeros(3, 1, dtype=torch.int32)}, "slots must be int32 or int64"),
        ({"rank": 4}, "rank must be a rank in the group, 0 to 3"),
        ({"world_size": 300}, "world_size must be 1 to 256"),
        ({"num_blocks": 0}, "num_blocks must be at least 1; got 0"),
        ({"signals": torch.zeros(3, dtype=torch.int64)}, "signals must be contiguous int64"),
        ({"tensors": [pushed(0)]}, "row_bytes must be at least 1; got 0"),
        ({"tensors": [pushed(16, output_pitch=8)]}, "output_pitch must be at least row_bytes 16"),
        ({"tensors": [pushed(16, deltas=None)]}, "deltas must be given in a group of 4"),
        ({"tensors": [pushed(16, deltas=torch.zeros(4))]}, "deltas must be contiguous int64"),
        ({"tensors": [pushed(16, delta_alignment=0)]}, "delta_alignment must be a power of two"),
    ],
)
def test_wrong_arguments_are_named(changes: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "tensors": [pushed(16)],
        "rows_to": torch.zeros(3, dtype=torch.int32),
        "slots": None,
        "rank": 0,
        "world_size": W,
        "signals": None,
        "num_blocks": 1,
    }
    with pytest.raises(ArgumentError, match=message):
        push_rows(**arguments | changes)
