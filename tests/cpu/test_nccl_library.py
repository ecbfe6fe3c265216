"""`NcclLibrary` on the real libnccl of the nvidia-nccl wheel, which works without a GPU, and on
the stand-in where the real one can't be made to fail.

A libnccl stays mapped in the process that has loaded it, so most tests run in a fresh one.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import itertools
import json
import logging
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from ctypes import POINTER, c_char_p, c_int, c_size_t, c_uint64, c_void_p
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

import pytest
import torch

from distcomm.errors import NcclError, NcclLibraryError
from distcomm.nccl import NcclLibrary, libnccl
from distcomm.nccl.dtypes import REDUCE_OPS, REDUCTION_CODES
from distcomm.nccl.libnccl import UniqueId, mapped_nccl_libraries
from tests.fake_nccl import fake_nccl_path
from tests.worker_pool import WorkerError, WorkerPool

T = TypeVar("T")

FEATURES = {
    "mem_alloc": ["ncclMemAlloc", "ncclMemFree"],
    "window_register": ["ncclCommWindowRegister", "ncclCommWindowDeregister"],
    "comm_shrink": ["ncclCommShrink"],
    "peer_pointer": ["ncclGetPeerDevicePointer"],
    "comm_suspend": ["ncclCommSuspend", "ncclCommResume", "ncclCommMemStats"],
}


def wheel_folder() -> Path:
    spec = importlib.util.find_spec("nvidia.nccl")
    if spec is None or not spec.submodule_search_locations:
        pytest.fail("no nvidia-nccl wheel is installed: `make setup`")
    return Path(next(iter(spec.submodule_search_locations)))


def wheel_path() -> str:
    return str((wheel_folder() / "lib" / "libnccl.so.2").resolve())


@pytest.fixture(scope="module")
def real() -> NcclLibrary:
    return NcclLibrary(wheel_path())


class FreshProcess:
    """Runs functions in a process that has no libnccl yet, and no choice of one."""

    def __init__(self, pool: WorkerPool) -> None:
        self.pool = pool

    def run(self, function: Callable[..., T], *args: object, **env: str) -> T:
        environment = {"DISTCOMM_NCCL_SO": None, "FAKE_NCCL_VERSION": None, **env}
        result: T
        (result,) = self.pool.run(as_rank, function, args, env=environment)
        return result


def as_rank(_rank: int, _world_size: int, function: Callable[..., T], args: tuple[Any, ...]) -> T:
    return function(*args)


@pytest.fixture
def fresh_process() -> Iterator[FreshProcess]:
    with WorkerPool(1) as pool:
        yield FreshProcess(pool)


def needs_torch_without_nccl() -> None:
    if torch.version.cuda is not None:
        pytest.skip("this torch brings a libnccl of its own")


def copied(folder: Path, name: str = "libnccl.so.2") -> str:
    """The stand-in under a name that counts as libnccl."""
    folder.mkdir(exist_ok=True)
    return str(shutil.copy(fake_nccl_path(), folder / name))


# What runs in the fresh process


def load(path: str | None = None) -> tuple[str, str, str, list[str]]:
    """Path, source and version of what is loaded, and the warnings about it."""
    records: list[logging.LogRecord] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = records.append  # type: ignore[method-assign]
    libnccl.logger.addHandler(handler)
    try:
        nccl = NcclLibrary(path)
    finally:
        libnccl.logger.removeHandler(handler)
    return nccl.path, nccl.source, nccl.version_text, [each.getMessage() for each in records]


def load_beside(other: str, path: str | None) -> tuple[str, str, str, list[str]]:
    """`load` while `other` is mapped."""
    ctypes.CDLL(other)
    return load(path)


def load_without_wheel() -> tuple[str, str, str, list[str]]:
    with mock.patch.object(importlib.util, "find_spec", return_value=None):
        return load()


def error_without_wheel(raised: type[Exception] | None = None) -> str:
    how = {"side_effect": raised} if raised else {"return_value": None}
    with (
        mock.patch.object(importlib.util, "find_spec", **how),
        pytest.raises(NcclLibraryError) as caught,
    ):
        NcclLibrary()
    return str(caught.value)


def error_of(path: str | None) -> str:
    with pytest.raises(NcclLibraryError) as caught:
        NcclLibrary(path)
    return str(caught.value)


def features_of(path: str) -> tuple[dict[str, bool], dict[str, str]]:
    """Which features are supported, and per function of the others the error of its lookup."""
    nccl = NcclLibrary(path)
    supported = {feature: nccl.supports(feature) for feature in FEATURES}
    errors = {}
    for feature, functions in FEATURES.items():
        for function in functions:
            if supported[feature]:
                assert callable(getattr(nccl, function))
            else:
                with pytest.raises(NcclLibraryError) as caught:
                    getattr(nccl, function)
                errors[function] = str(caught.value)
    return supported, errors


# Which file is loaded


def test_the_wheel_is_found(fresh_process: FreshProcess) -> None:
    needs_torch_without_nccl()
    path, source, version, warnings = fresh_process.run(load)
    assert (path, source, warnings) == (wheel_path(), "wheel", [])
    assert version == importlib.metadata.version("nvidia-nccl-cu12")


def test_an_argument_is_loaded_whatever_else_there_is(
    fresh_process: FreshProcess, tmp_path: Path
) -> None:
    mapped, chosen = copied(tmp_path / "mapped"), copied(tmp_path / "chosen", "mine.so")
    path, source, version, _ = fresh_process.run(
        load_beside, mapped, chosen, DISTCOMM_NCCL_SO=wheel_path()
    )
    assert (path, source, version) == (chosen, "argument", "2.28.9")


def test_the_variable_comes_before_what_is_mapped(
    fresh_process: FreshProcess, tmp_path: Path
) -> None:
    mapped, chosen = copied(tmp_path / "mapped"), copied(tmp_path / "chosen")
    path, source, _, _ = fresh_process.run(load_beside, mapped, None, DISTCOMM_NCCL_SO=chosen)
    assert (path, source) == (chosen, "DISTCOMM_NCCL_SO")


def test_what_is_mapped_comes_before_the_wheel(fresh_process: FreshProcess, tmp_path: Path) -> None:
    needs_torch_without_nccl()
    mapped = copied(tmp_path)
    path, source, _, warnings = fresh_process.run(load_beside, mapped, None, DISTCOMM_NCCL_SO="")
    assert (path, source, warnings) == (mapped, "mapped", [])


def test_the_system_library_comes_last_and_is_named_by_its_path(tmp_path: Path) -> None:
    """Also where the working directory has a file of the same name, which the loader ignores."""
    needs_torch_without_nccl()
    installed, cwd = copied(tmp_path / "lib"), tmp_path / "cwd"
    cwd.mkdir()
    (cwd / "libnccl.so.2").write_text("not this one")
    code = (
        "import json\n"
        "from tests.cpu.test_nccl_library import load_without_wheel\n"
        "print(json.dumps(load_without_wheel()))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "DISTCOMM_NCCL_SO"}
    environment["LD_LIBRARY_PATH"] = str(tmp_path / "lib")
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)[:2] == [installed, "system"]


@pytest.mark.parametrize("source", ["argument", "DISTCOMM_NCCL_SO"])
def test_a_chosen_file_is_the_only_one_tried(
    fresh_process: FreshProcess, tmp_path: Path, source: str
) -> None:
    missing = str(tmp_path / "nowhere" / "libnccl.so.2")
    if source == "argument":
        error = fresh_process.run(error_of, missing)
    else:
        error = fresh_process.run(error_of, None, DISTCOMM_NCCL_SO=missing)
    assert f"{missing} ({source})" in error
    assert "No such file" in error
    assert len(re.findall(r"^  .* \(.*\): ", error, re.MULTILINE)) == 1


@pytest.mark.parametrize("raised", [None, ModuleNotFoundError])
def test_the_error_lists_what_was_tried_and_what_to_do(
    fresh_process: FreshProcess, raised: type[Exception] | None
) -> None:
    needs_torch_without_nccl()
    error = fresh_process.run(error_without_wheel, raised)
    assert "libnccl.so.2 (system): " in error
    assert "distcomm[cu12]" in error
    assert "DISTCOMM_NCCL_SO" in error


def test_a_file_that_is_no_library(fresh_process: FreshProcess, tmp_path: Path) -> None:
    text = tmp_path / "libnccl.so.2"
    text.write_text("not a library")
    assert f"{text} (argument): " in fresh_process.run(error_of, str(text))


def test_a_library_that_is_no_libnccl(fresh_process: FreshProcess) -> None:
    error = fresh_process.run(error_of, "libm.so.6")
    assert re.search(r"/libm\S* has no ncclGetVersion: it is no libnccl, or an old one", error)


def test_an_error_while_the_version_is_asked(fresh_process: FreshProcess) -> None:
    with pytest.raises(WorkerError) as caught:
        fresh_process.run(load, str(fake_nccl_path()), FAKE_NCCL_FAIL="ncclGetVersion")
    failure = caught.value.exceptions[0]
    assert failure.type_name == "distcomm.errors.NcclError"
    assert failure.message.startswith("ncclGetVersion returned 2 (unhandled system error)")


# Two of them in one process


def test_two_mapped_libraries_give_one_warning(fresh_process: FreshProcess, tmp_path: Path) -> None:
    other = copied(tmp_path)
    path, source, version, warnings = fresh_process.run(load_beside, other, wheel_path())
    assert (path, source) == (wheel_path(), "argument")
    (warning,) = warnings
    assert warning.startswith("2 libnccl files are mapped into this process: ")
    assert other in warning
    assert f"distcomm uses {path} (version {version}, found by: argument)" in warning
    assert "DISTCOMM_NCCL_SO" in warning


def test_a_link_to_the_mapped_file_is_no_second_one(
    fresh_process: FreshProcess, tmp_path: Path
) -> None:
    file = copied(tmp_path / "file", "libnccl.so.2.28.9")
    link = tmp_path / "libnccl.so.2"
    link.symlink_to(file)
    assert fresh_process.run(load_beside, file, str(link)) == (file, "argument", "2.28.9", [])


def mapped_beside(*paths: str) -> list[str]:
    for path in paths:
        ctypes.CDLL(path)
    return mapped_nccl_libraries()


def test_only_libnccl_counts_as_mapped(fresh_process: FreshProcess, tmp_path: Path) -> None:
    needs_torch_without_nccl()
    first = copied(tmp_path / "with a space", "libnccl.so")
    second = copied(tmp_path / "second", "libnccl.so.2.30.1")
    plugin = copied(tmp_path, "libnccl-net.so")
    assert set(fresh_process.run(mapped_beside, plugin, first, second)) == {first, second}


# Versions and features


def test_version(real: NcclLibrary) -> None:
    code = c_int()
    assert ctypes.CDLL(wheel_path()).ncclGetVersion(ctypes.byref(code)) == 0
    assert real.version == code.value
    assert real.version_text == importlib.metadata.version("nvidia-nccl-cu12")


@pytest.mark.parametrize(("code", "text"), [(22907, "2.29.7"), (21805, "2.18.5"), (30001, "3.0.1")])
def test_version_text(fresh_process: FreshProcess, code: int, text: str) -> None:
    loaded = fresh_process.run(load, str(fake_nccl_path()), FAKE_NCCL_VERSION=str(code))
    assert loaded[2] == text


def test_the_wheel_offers_every_feature(real: NcclLibrary) -> None:
    assert real.version >= 22907, "the newest of the features"
    for feature, functions in FEATURES.items():
        assert real.supports(feature)
        assert all(callable(getattr(real, function)) for function in functions)


def test_an_unknown_feature(real: NcclLibrary) -> None:
    with pytest.raises(NcclLibraryError, match="unknown feature 'windows'; known: ") as caught:
        real.supports("windows")
    assert all(feature in str(caught.value) for feature in FEATURES)


def test_an_unknown_attribute(real: NcclLibrary) -> None:
    with pytest.raises(AttributeError, match="ncclNothing"):
        real.ncclNothing()
    assert not hasattr(real, "ncclCommSplit"), "a function that distcomm doesn't declare"


def test_a_feature_needs_its_functions_whatever_the_version(fresh_process: FreshProcess) -> None:
    path = str(fake_nccl_path())
    supported, errors = fresh_process.run(features_of, path, FAKE_NCCL_VERSION="23203")
    offered = {feature for feature in FEATURES if supported[feature]}
    assert offered == {"mem_alloc", "window_register", "peer_pointer", "comm_suspend"}
    assert errors["ncclCommShrink"] == (
        "ncclCommShrink belongs to 'comm_shrink', which NCCL has since 22703; "
        f"{path}, version 23203, doesn't offer it"
    )


@pytest.mark.parametrize(
    ("feature", "since"),
    [
        ("mem_alloc", 21900),
        ("window_register", 22700),
        ("peer_pointer", 22902),
        ("comm_suspend", 22907),
    ],
)
def test_a_feature_needs_its_version(fresh_process: FreshProcess, feature: str, since: int) -> None:
    path = str(fake_nccl_path())
    for version, supported in ((since - 1, False), (since, True)):
        features, errors = fresh_process.run(features_of, path, FAKE_NCCL_VERSION=str(version))
        assert features[feature] == supported
        assert (FEATURES[feature][0] in errors) != supported


# Calls of the real library


def test_unique_ids(real: NcclLibrary) -> None:
    ids = {real.new_unique_id() for _ in range(4)}
    assert len(ids) == 4
    assert {len(each) for each in ids} == {128}
    assert all(bytes(UniqueId.from_bytes(each)) == each for each in ids)


def test_a_call_that_needs_a_gpu_fails_cleanly(real: NcclLibrary) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    pointer = c_void_p()
    code = real.ncclMemAlloc(ctypes.byref(pointer), 4096)
    with pytest.raises(NcclError) as caught:
        real.check("ncclMemAlloc", code)
    error = caught.value
    assert (error.call, error.code, error.member) == ("ncclMemAlloc", 1, None)
    assert "Cuda failure" in error.last_error
    assert str(error).startswith("ncclMemAlloc returned 1 (unhandled cuda error")
    assert error.last_error in str(error)
    assert real.check("ncclMemAlloc", 0) is None


# Prototypes, against the headers of the wheel

PARAMETER_KINDS = {
    "void*": c_void_p,
    "const void*": c_void_p,
    "void**": POINTER(c_void_p),
    "int": c_int,
    "int*": POINTER(c_int),
    "size_t": c_size_t,
    "uint64_t*": POINTER(c_uint64),
    "cudaStream_t": c_void_p,
    "ncclComm_t": c_void_p,
    "const ncclComm_t": c_void_p,
    "ncclComm_t*": POINTER(c_void_p),
    "ncclWindow_t": c_void_p,
    "ncclWindow_t*": POINTER(c_void_p),
    "ncclConfig_t*": c_void_p,
    "ncclCommMemStat_t": c_int,
    "ncclDataType_t": c_int,
    "ncclRedOp_t": c_int,
    "ncclResult_t": c_int,
    "ncclResult_t*": POINTER(c_int),
    "ncclUniqueId": UniqueId,
    "ncclUniqueId*": POINTER(UniqueId),
}
RETURN_KINDS = {"ncclResult_t": c_int, "const char*": c_char_p}


def header() -> str:
    names = ("nccl.h", "nccl_device/host.h")
    text = "\n".join((wheel_folder() / "include" / name).read_text() for name in names)
    return re.sub(r"/\*.*?\*/|//[^\n]*", " ", text, flags=re.DOTALL)


def declarations() -> dict[str, tuple[str, list[str]]]:
    """Return type and parameter types of every function in the headers."""
    found = {}
    pattern = r"(ncclResult_t|const char\s*\*)\s+(nccl\w+)\s*\(([^()]*)\)\s*;"
    for returns, name, parameters in re.findall(pattern, header()):
        types = [re.sub(r"\w+$", "", each.strip()).strip() for each in parameters.split(",")]
        found[name] = (
            re.sub(r"\s+\*", "*", returns),
            [re.sub(r"\s*\*", "*", each) for each in types if each],
        )
    return found


def enumerators(prefix: str) -> dict[str, int]:
    """Names and values that the headers give to an enum's members, e.g. of ``ncclInt8 = 0``."""
    return {
        name: int(value) for name, value in re.findall(rf"({prefix}\w+)\s*=\s*(\d+)\b", header())
    }


def test_the_header_is_understood() -> None:
    declared = declarations()
    assert len(declared) > 40
    assert declared["ncclGroupStart"] == ("ncclResult_t", [])
    assert declared["ncclGetLastError"] == ("const char*", ["ncclComm_t"])
    assert declared["ncclMemAlloc"] == ("ncclResult_t", ["void**", "size_t"])
    assert declared["ncclSend"] == (
        "ncclResult_t",
        ["const void*", "size_t", "ncclDataType_t", "int", "ncclComm_t", "cudaStream_t"],
    )


def declared_functions() -> dict[str, list[Any]]:
    """Every function that distcomm has a prototype of."""
    optional = [feature.functions for feature in libnccl._FEATURES.values()]
    return dict(itertools.chain(libnccl._REQUIRED.items(), *(each.items() for each in optional)))


def test_the_features_are_those_tested_here() -> None:
    assert {name: [*each.functions] for name, each in libnccl._FEATURES.items()} == FEATURES


@pytest.mark.parametrize("name", declared_functions())
def test_prototype(real: NcclLibrary, name: str) -> None:
    returns, parameters = declarations()[name]
    function = getattr(real, name)
    assert function.restype is RETURN_KINDS[returns]
    assert list(function.argtypes) == [PARAMETER_KINDS[each] for each in parameters], parameters


def test_codes_of_dtypes_and_ops() -> None:
    codes = enumerators("nccl")
    names = {
        torch.int8: "ncclInt8",
        torch.uint8: "ncclUint8",
        torch.int32: "ncclInt32",
        torch.int64: "ncclInt64",
        torch.float16: "ncclFloat16",
        torch.float32: "ncclFloat32",
        torch.float64: "ncclFloat64",
        torch.bfloat16: "ncclBfloat16",
        torch.float8_e4m3fn: "ncclFloat8e4m3",
        torch.float8_e5m2: "ncclFloat8e5m2",
    }
    assert {dtype for dtype, _ in REDUCTION_CODES} == names.keys()
    for (dtype, op), (dtype_code, op_code) in REDUCTION_CODES.items():
        assert dtype_code.value == codes[names[dtype]]
        assert op_code.value == codes[f"nccl{op.capitalize()}"]
    integers = {dtype for dtype in names if not dtype.is_floating_point}
    assert {dtype for dtype, op in REDUCTION_CODES if op == "avg"} == names.keys() - integers
    assert {*REDUCE_OPS} == {op for _, op in REDUCTION_CODES}


def test_size_of_a_unique_id() -> None:
    assert ctypes.sizeof(UniqueId) == int(
        re.search(r"NCCL_UNIQUE_ID_BYTES\s+(\d+)", header()).group(1)  # type: ignore[union-attr]
    )
