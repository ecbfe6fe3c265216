"""The binding to distcomm's C++ library: what it refuses, and with which reason."""

from __future__ import annotations

import ctypes
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

import distcomm
from distcomm import native
from distcomm.errors import NativeLibraryError
from distcomm.native import NativeNccl, RaggedCollectives
from tests.fake_nccl import fake_nccl_path

FILE_NAME = "libdistcomm_native.so"
NCCL_FUNCTIONS = [
    "ncclGroupStart",
    "ncclGroupEnd",
    "ncclBroadcast",
    "ncclReduce",
    "ncclSend",
    "ncclRecv",
]


def compiled(path: Path, source: str) -> Path:
    """A small shared library."""
    compiler = os.environ.get("CXX", "c++")
    code = path.with_suffix(".cpp")
    code.write_text(source)
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(path), str(code)], check=True)
    return path


def stub(path: Path, functions: list[str], abi_version: int | None = None) -> Path:
    """A library of these functions, which do nothing."""
    lines = [f'extern "C" int {name}() {{ return 0; }}' for name in functions]
    if abi_version is not None:
        lines.append(f'extern "C" int distcomm_abi_version() {{ return {abi_version}; }}')
    return compiled(path, "\n".join(lines) + "\n")


def refused(directory: Path) -> str:
    """The error of a folder whose library can't be used."""
    with pytest.raises(NativeLibraryError) as caught:
        NativeNccl(str(fake_nccl_path()), directory=directory)
    return str(caught.value)


def test_the_library_of_this_tree_is_accepted() -> None:
    folder = Path(distcomm.__file__).parent
    for nccl in (
        NativeNccl(str(fake_nccl_path())),
        NativeNccl(str(fake_nccl_path()), directory=folder),
    ):
        assert nccl.path == folder / FILE_NAME
        assert nccl.functions.distcomm_abi_version() == native._ABI_VERSION


def test_a_missing_library(tmp_path: Path) -> None:
    error = refused(tmp_path)
    assert error.startswith(f"{tmp_path / FILE_NAME} doesn't exist: run `make build`")
    assert "install the wheel" in error


def test_the_default_folder_is_the_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_FILE_NAME", "libabsent.so")
    expected = Path(distcomm.__file__).parent / "libabsent.so"
    with pytest.raises(NativeLibraryError) as caught:
        NativeNccl(str(fake_nccl_path()))
    assert str(caught.value).startswith(f"{expected} doesn't exist")


@pytest.mark.parametrize("version", [0, native._ABI_VERSION - 1, native._ABI_VERSION + 1])
def test_another_abi_version(tmp_path: Path, version: int) -> None:
    stub(tmp_path / FILE_NAME, [], abi_version=version)
    assert refused(tmp_path) == (
        f"{tmp_path / FILE_NAME} has ABI version {version}, this code needs {native._ABI_VERSION}: "
        "run `make build` again, or reinstall"
    )


def test_a_library_of_the_right_version_without_the_functions(tmp_path: Path) -> None:
    functions = ["distcomm_nccl_open", "distcomm_nccl_close"]
    stub(tmp_path / FILE_NAME, functions, abi_version=native._ABI_VERSION)
    error = refused(tmp_path)
    assert "undefined symbol: distcomm_all_gatherv" in error
    assert "run `make build` again" in error


def test_a_library_of_something_else(tmp_path: Path) -> None:
    stub(tmp_path / FILE_NAME, ["something"])
    assert "undefined symbol: distcomm_abi_version" in refused(tmp_path)


def test_a_file_that_is_no_library(tmp_path: Path) -> None:
    path = tmp_path / FILE_NAME
    path.write_text("half a download")
    error = refused(tmp_path)
    assert error.startswith(f"{path} can't be used: ")
    assert "run `make build` again" in error


def reason(nccl_path: str) -> str:
    with pytest.raises(NativeLibraryError) as caught:
        NativeNccl(nccl_path)
    path, _, text = str(caught.value).partition(": ")
    assert path == nccl_path
    return text


def test_a_libnccl_that_does_not_exist(tmp_path: Path) -> None:
    path = str(tmp_path / "libnccl.so.2")
    assert reason(path) == f"{path}: cannot open shared object file: No such file or directory"


@pytest.mark.parametrize("missing", NCCL_FUNCTIONS)
def test_a_libnccl_without_a_function(tmp_path: Path, missing: str) -> None:
    present = [name for name in NCCL_FUNCTIONS if name != missing]
    path = stub(tmp_path / f"without_{missing}.so", present)
    assert reason(str(path)).endswith(f"undefined symbol: {missing}")


def test_a_libnccl_with_a_very_long_path(tmp_path: Path) -> None:
    """The reason is cut to the buffer that C++ writes it to."""
    path = str(tmp_path / "/".join(["x" * 200] * 15))
    text = reason(path)
    assert len(text) < native._ERROR_BYTES
    assert path.startswith(text) or text.startswith(path)


def is_mapped(path: Path) -> bool:
    return str(path) in Path("/proc/self/maps").read_text()


def test_the_libnccl_is_closed_with_the_object(tmp_path: Path) -> None:
    path = stub(tmp_path / "complete.so", NCCL_FUNCTIONS)
    first, second = (RaggedCollectives(NativeNccl(str(path))) for _ in range(2))
    del first
    assert is_mapped(path)
    del second
    assert not is_mapped(path)


def test_a_refused_libnccl_is_closed(tmp_path: Path) -> None:
    path = stub(tmp_path / "incomplete.so", NCCL_FUNCTIONS[:3])
    reason(str(path))
    assert not is_mapped(path)


NOTHING, START, SECOND_RANK, END = range(4)
CALL_RECORDER = """
#include <cstddef>
#include <cstring>

namespace {
char names[1024];
int failing = 0;
int record(const char* name, bool fails) {
  std::strcat(std::strcat(names, name), " ");
  return fails ? 5 : 0;
}
}  // namespace

#define RECORDED extern "C" __attribute__((visibility("default")))
RECORDED const char* calls() { return names; }
RECORDED void fail_in(int where) { names[0] = 0; failing = where; }
RECORDED int ncclGroupStart() { return record("start", failing == 1); }
RECORDED int ncclGroupEnd() { return record("end", failing == 3) ? 7 : 0; }
RECORDED int ncclBroadcast(const void*, void*, size_t, int, int root, void*, void*) {
  return record(root ? "b1" : "b0", failing == 2 && root);
}
RECORDED int ncclReduce(const void*, void*, size_t, int, int, int root, void*, void*) {
  return record(root ? "r1" : "r0", failing == 2 && root);
}
RECORDED int ncclSend(const void*, size_t, int, int peer, void*, void*) {
  return record(peer ? "s1" : "s0", failing == 2 && peer);
}
RECORDED int ncclRecv(void*, size_t, int, int peer, void*, void*) {
  return record(peer ? "v1" : "v0", false);
}
"""


def test_every_group_that_is_begun_is_ended(tmp_path: Path) -> None:
    """Also after a failure inside; the first error is the result."""
    path = str(compiled(tmp_path / "recorder.so", CALL_RECORDER))
    recorder, ragged = ctypes.CDLL(path), RaggedCollectives(NativeNccl(path))
    recorder.calls.restype = ctypes.c_char_p
    buffer = ctypes.addressof(memory := ctypes.create_string_buffer(64))
    collectives: dict[tuple[str, str], Callable[[], int]] = {
        ("b0 b1", ""): lambda: ragged.all_gatherv(0, buffer, buffer, [4, 4], 0),
        ("r0 r1", ""): lambda: ragged.reduce_scatterv(0, buffer, buffer, [1, 1], (4, 7, 0), 0),
        ("s0 v0 s1", " v1"): lambda: ragged.all_to_allv(0, buffer, [4, 4], buffer, [4, 4], 0),
    }

    def outcome(call: Callable[[], int], failing: int) -> tuple[int, str]:
        recorder.fail_in(failing)
        return call(), recorder.calls().decode().strip()

    for (until_failure, rest), call in collectives.items():
        assert outcome(call, NOTHING) == (0, f"start {until_failure}{rest} end")
        assert outcome(call, START) == (5, "start")
        assert outcome(call, SECOND_RANK) == (5, f"start {until_failure} end")
        assert outcome(call, END) == (7, f"start {until_failure}{rest} end")
    assert memory.raw == bytes(64)


def test_ranks_without_data_take_no_part(tmp_path: Path) -> None:
    path = str(compiled(tmp_path / "recorder.so", CALL_RECORDER))
    recorder, ragged = ctypes.CDLL(path), RaggedCollectives(NativeNccl(path))
    recorder.calls.restype = ctypes.c_char_p
    assert ragged.all_gatherv(0, 0, 0, [0, 4], 0) == 0
    assert ragged.reduce_scatterv(0, 0, 0, [3, 0], (4, 7, 0), 0) == 0
    assert ragged.all_to_allv(0, 0, [0, 4], 0, [4, 0], 0) == 0
    assert ragged.all_gatherv(0, 0, 0, [0, 0], 0) == 0
    assert recorder.calls() == b"start b1 end start r0 end start v0 s1 end start end "
