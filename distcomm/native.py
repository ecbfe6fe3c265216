"""Binding to distcomm's C++ library, `distcomm/csrc`, through its C ABI.

The library is found beside this package: a wheel installs it there, `make build` puts it there
in a source tree.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence
from ctypes import POINTER, c_char_p, c_int, c_size_t, c_void_p
from pathlib import Path

from .errors import NativeLibraryError

__all__ = ["RaggedCollectives", "check_native_library"]

_ABI_VERSION = 1
_FILE_NAME = "libdistcomm_native.so"
_ERROR_BYTES = 1024

_SIZES = POINTER(c_size_t)

_PROTOTYPES: dict[str, tuple[object, list[object]]] = {
    "distcomm_nccl_open": (c_void_p, [c_char_p, c_char_p, c_size_t]),
    "distcomm_nccl_close": (None, [c_void_p]),
    # symbols, comm, send, recv, num_bytes, world_size, stream
    "distcomm_all_gatherv": (
        c_int,
        [c_void_p, c_void_p, c_void_p, c_void_p, _SIZES, c_int, c_void_p],
    ),
    # symbols, comm, send, recv, counts, world_size, element_bytes, data_type, op, stream
    "distcomm_reduce_scatterv": (
        c_int,
        [c_void_p, c_void_p, c_void_p, c_void_p, _SIZES, c_int, c_size_t, c_int, c_int, c_void_p],
    ),
    # symbols, comm, send, send_bytes, recv, recv_bytes, world_size, stream
    "distcomm_all_to_allv": (
        c_int,
        [c_void_p, c_void_p, c_void_p, _SIZES, c_void_p, _SIZES, c_int, c_void_p],
    ),
}


def _open_native(directory: Path) -> ctypes.CDLL:
    path = directory / _FILE_NAME
    if not path.exists():
        raise NativeLibraryError(
            f"{path} doesn't exist: run `make build` in the source tree, or install the wheel"
        )
    try:
        library = ctypes.CDLL(str(path))
        version = library.distcomm_abi_version()
        if version != _ABI_VERSION:
            raise NativeLibraryError(
                f"{path} has ABI version {version}, this code needs {_ABI_VERSION}: "
                "run `make build` again, or reinstall"
            )
        for name, (restype, argtypes) in _PROTOTYPES.items():
            function = getattr(library, name)
            function.restype, function.argtypes = restype, argtypes
    except (OSError, AttributeError) as error:
        raise NativeLibraryError(
            f"{path} can't be used: {error}; run `make build` again, or reinstall"
        ) from error
    return library


def check_native_library(directory: Path | None = None) -> None:
    """Raises `NativeLibraryError` unless the C++ library is there and fits this code."""
    _open_native(directory or Path(__file__).parent)


class RaggedCollectives:
    """NCCL collectives with a different size per rank, one call each (csrc/ragged.cpp).

    Each method returns an `ncclResult_t`. Pointers and sizes are not checked here.

    Args:
        nccl_path: the libnccl to call; the same file that ctypes has loaded.

    Raises:
        NativeLibraryError: the C++ library isn't built, or can't use that libnccl.
    """

    def __init__(self, nccl_path: str, *, directory: Path | None = None) -> None:
        native = _open_native(directory or Path(__file__).parent)
        error = ctypes.create_string_buffer(_ERROR_BYTES)
        symbols = native.distcomm_nccl_open(nccl_path.encode(), error, _ERROR_BYTES)
        if not symbols:
            raise NativeLibraryError(f"{nccl_path}: {error.value.decode(errors='replace')}")
        self._native = native
        self._symbols = symbols
        weakref.finalize(self, native.distcomm_nccl_close, symbols)

    def all_gatherv(
        self, comm: int, send: int, recv: int, num_bytes: Sequence[int], stream: int
    ) -> int:
        sizes = (c_size_t * len(num_bytes))(*num_bytes)
        result: int = self._native.distcomm_all_gatherv(
            self._symbols, comm, send, recv, sizes, len(num_bytes), stream
        )
        return result

    def reduce_scatterv(
        self,
        comm: int,
        send: int,
        recv: int,
        counts: Sequence[int],
        element: tuple[int, c_int, c_int],
        stream: int,
    ) -> int:
        """`element` is (bytes of one element, ncclDataType_t, ncclRedOp_t)."""
        sizes = (c_size_t * len(counts))(*counts)
        result: int = self._native.distcomm_reduce_scatterv(
            self._symbols, comm, send, recv, sizes, len(counts), *element, stream
        )
        return result

    def all_to_allv(
        self,
        comm: int,
        send: int,
        send_bytes: Sequence[int],
        recv: int,
        recv_bytes: Sequence[int],
        stream: int,
    ) -> int:
        world_size = len(send_bytes)
        array = c_size_t * world_size
        result: int = self._native.distcomm_all_to_allv(
            self._symbols,
            comm,
            send,
            array(*send_bytes),
            recv,
            array(*recv_bytes),
            world_size,
            stream,
        )
        return result
