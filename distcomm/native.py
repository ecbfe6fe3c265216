"""Binding to distcomm's C++ library, `distcomm/csrc`, through its C ABI.

The library is found beside this package: a wheel installs it there, `make build` puts it there
in a source tree.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence
from ctypes import POINTER, c_char_p, c_int, c_int64, c_size_t, c_uint8, c_uint64, c_void_p
from pathlib import Path

from .errors import NativeLibraryError

__all__ = ["NativeLibrary", "NativeNccl", "RaggedCollectives"]

_ABI_VERSION = 5
_FILE_NAME = "libdistcomm_native.so"
_ERROR_BYTES = 1024

_SIZES = POINTER(c_size_t)
_HEAP = c_void_p
_TAGS = POINTER(c_int64)

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
    # As NCCL's own, after the symbols.
    "distcomm_fenced_all_reduce": (
        c_int,
        [c_void_p, c_void_p, c_void_p, c_size_t, c_int, c_int, c_void_p, c_void_p],
    ),
    "distcomm_fenced_all_gather": (
        c_int,
        [c_void_p, c_void_p, c_void_p, c_size_t, c_int, c_void_p, c_void_p],
    ),
    "distcomm_fenced_reduce_scatter": (
        c_int,
        [c_void_p, c_void_p, c_void_p, c_size_t, c_int, c_int, c_void_p, c_void_p],
    ),
    "distcomm_has_cuda_driver": (c_int, []),
    "distcomm_fenced_group_end": (c_int, [c_void_p, c_void_p]),
    "distcomm_capture_id": (c_uint64, [c_void_p]),
    "distcomm_watch_capture": (c_int, [c_void_p]),
    "distcomm_take_ended_captures": (c_size_t, [POINTER(c_uint64), c_size_t]),
    # host, device, num_bytes
    "distcomm_read_device": (c_int, [c_void_p, c_uint64, c_size_t]),
    # to, from, num_bytes, stream
    "distcomm_copy_async": (c_int, [c_uint64, c_uint64, c_size_t, c_void_p]),
    # to, value, num_bytes, stream
    "distcomm_fill_async": (c_int, [c_uint64, c_uint8, c_size_t, c_void_p]),
    "distcomm_can_push": (c_int, []),
    # rank, world_size, signals, tensors, num_tensors, runs, num_runs, stream
    "distcomm_push_rows": (
        c_int,
        [c_int, c_int, c_void_p, c_void_p, c_size_t, c_void_p, c_size_t, c_void_p, c_void_p],
    ),
    # symbols, device, chunk_bytes
    "distcomm_heap_open": (c_void_p, [c_void_p, c_int, c_size_t]),
    "distcomm_heap_of_device": (c_void_p, [c_void_p, c_int, c_size_t]),
    "distcomm_heap_close": (None, [_HEAP]),
    "distcomm_heap_alloc": (c_void_p, [_HEAP, c_size_t, c_void_p]),
    "distcomm_heap_free": (c_int, [_HEAP, c_void_p, c_void_p]),
    "distcomm_heap_borrow": (c_void_p, [_HEAP, c_size_t]),
    "distcomm_heap_give_back_borrowed": (None, [_HEAP, c_void_p]),
    "distcomm_heap_take_failure": (None, [_HEAP, c_void_p]),
    "distcomm_heap_reserve": (c_int, [_HEAP, c_size_t]),
    "distcomm_heap_settle": (c_int, [_HEAP]),
    "distcomm_heap_defer_frees": (None, [_HEAP, c_int]),
    "distcomm_heap_retire_all": (None, [_HEAP]),
    "distcomm_next_ordinal_of_device": (c_int64, [c_int]),
    "distcomm_heap_freeze": (None, [_HEAP, c_int]),
    "distcomm_heap_trim": (None, [_HEAP]),
    "distcomm_heap_shut_down": (None, [_HEAP]),
    "distcomm_heap_num_new": (c_size_t, [_HEAP, c_void_p]),
    "distcomm_heap_pin_new": (c_size_t, [_HEAP, c_void_p, c_void_p, c_size_t]),
    "distcomm_heap_unpin": (None, [_HEAP, c_void_p]),
    "distcomm_heap_pass_over": (None, [_HEAP, c_void_p, POINTER(c_int64), c_size_t]),
    "distcomm_heap_cancel_registration": (None, [_HEAP, c_void_p]),
    "distcomm_heap_register_new": (c_int, [_HEAP, c_void_p, c_int64, POINTER(c_int64)]),
    "distcomm_heap_abandon": (c_int, [_HEAP, c_void_p, POINTER(c_int64), c_size_t]),
    "distcomm_heap_release_comm": (c_int, [_HEAP, c_void_p, c_int]),
    "distcomm_heap_find": (c_int, [_HEAP, c_void_p, c_void_p, c_void_p]),
    "distcomm_heap_num_windows": (c_size_t, [_HEAP, c_void_p]),
    "distcomm_heap_num_ordinary": (c_int64, [_HEAP]),
    "distcomm_heap_next_ordinal": (c_int64, [_HEAP]),
    "distcomm_heap_raise_ordinal": (None, [_HEAP, c_int64]),
    "distcomm_heap_stats": (None, [_HEAP, c_void_p]),
    "distcomm_heap_can_sleep": (c_int, [_HEAP]),
    "distcomm_heap_fall_asleep": (c_int, [_HEAP, POINTER(c_int64)]),
    "distcomm_heap_wake_up": (c_int, [_HEAP, POINTER(c_int64)]),
    "distcomm_can_sleep": (c_int, []),
    # device, chunk_bytes
    "distcomm_sleep_heap_open": (c_void_p, [c_int, c_size_t]),
    "distcomm_sleep_heap_of_device": (c_void_p, [c_int, c_size_t]),
    "distcomm_sleep_heap_close": (None, [_HEAP]),
    "distcomm_sleep_heap_select": (c_int64, [_HEAP, c_int64]),
    "distcomm_sleep_heap_new_tag": (c_int64, [_HEAP]),
    "distcomm_sleep_heap_alloc": (c_void_p, [_HEAP, c_size_t, c_void_p]),
    "distcomm_sleep_heap_free": (c_int, [_HEAP, c_void_p, c_void_p]),
    "distcomm_sleep_heap_settle": (None, [_HEAP]),
    "distcomm_sleep_heap_take_failure": (None, [_HEAP, c_void_p]),
    # heap, tags, num_tags
    "distcomm_sleep_heap_prepare": (c_int, [_HEAP, _TAGS, c_size_t]),
    "distcomm_sleep_heap_cancel": (None, [_HEAP, _TAGS, c_size_t]),
    # heap, tags, num_tags, num_offloaded, two streams, progress
    "distcomm_sleep_heap_sleep": (
        c_int,
        [_HEAP, _TAGS, c_size_t, c_size_t, c_void_p, c_void_p, c_void_p],
    ),
    # heap, tags, num_tags, two streams, progress
    "distcomm_sleep_heap_wake_up": (
        c_int,
        [_HEAP, _TAGS, c_size_t, c_void_p, c_void_p, c_void_p],
    ),
    "distcomm_sleep_heap_discard": (None, [_HEAP, _TAGS, c_size_t]),
    "distcomm_sleep_heap_trim_host": (c_size_t, [_HEAP]),
    "distcomm_sleep_heap_usage": (None, [_HEAP, c_int64, c_void_p]),
    "distcomm_sleep_heap_stats": (None, [_HEAP, c_void_p]),
    "distcomm_sleep_heap_shut_down": (None, [_HEAP]),
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


class NativeLibrary:
    """The C++ library.

    Attributes:
        functions: its functions, with typed prototypes.
        path: its file.

    Raises:
        NativeLibraryError: it isn't built, or doesn't match this code.
    """

    def __init__(self, *, directory: Path | None = None) -> None:
        directory = directory or Path(__file__).parent
        self.path = directory / _FILE_NAME
        self.functions = _open_native(directory)


class NativeNccl(NativeLibrary):
    """One libnccl as the C++ library calls it.

    Args:
        nccl_path: the libnccl to call; the same file that ctypes has loaded.

    Attributes:
        symbols: the C++ library's table of NCCL's functions, which most of its functions take
            first.

    Raises:
        NativeLibraryError: the C++ library isn't built, or can't use that libnccl.
    """

    def __init__(self, nccl_path: str, *, directory: Path | None = None) -> None:
        super().__init__(directory=directory)
        error = ctypes.create_string_buffer(_ERROR_BYTES)
        self.symbols: int = self.functions.distcomm_nccl_open(
            nccl_path.encode(), error, _ERROR_BYTES
        )
        if not self.symbols:
            raise NativeLibraryError(f"{nccl_path}: {error.value.decode(errors='replace')}")
        self._close = weakref.finalize(self, self.functions.distcomm_nccl_close, self.symbols)

    def keep(self) -> None:
        """Keeps the table for as long as the process lives."""
        self._close.detach()


class RaggedCollectives:
    """NCCL collectives with a different size per rank, one call each (csrc/ragged.cpp).

    Each method returns an `ncclResult_t`. Pointers and sizes are not checked here.
    """

    def __init__(self, nccl: NativeNccl) -> None:
        self._nccl = nccl
        self._native = nccl.functions
        self._symbols = nccl.symbols

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
