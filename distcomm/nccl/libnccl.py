"""Finding libnccl and calling it: one ctypes prototype per function, optional ones by version.

Sources: nccl.h of NCCL 2.27 to 2.32 for signatures, release notes for the first versions.
"""

from __future__ import annotations

import ctypes
import importlib.util
import logging
import os
import re
from collections.abc import Callable, Iterator
from ctypes import POINTER, c_char_p, c_int, c_size_t, c_uint64, c_void_p
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import env
from ..errors import GroupMember, NcclError, NcclLibraryError

__all__ = ["NcclLibrary", "UniqueId", "mapped_nccl_libraries"]

logger = logging.getLogger(__name__)

_LIBRARY_NAME = re.compile(r"libnccl\.so(\.\d+)*")
_SYSTEM_NAME = "libnccl.so.2"


class UniqueId(ctypes.Structure):
    """`ncclUniqueId`: 128 opaque bytes that the ranks of one communicator share."""

    _fields_ = [("internal", ctypes.c_byte * 128)]

    @classmethod
    def from_bytes(cls, raw: bytes) -> UniqueId:
        return cls.from_buffer_copy(raw)


_COMM, _POINTER, _STREAM, _ENUM = c_void_p, c_void_p, c_void_p, c_int

# Every function returns ncclResult_t, except those in _RETURNS_TEXT.
_REQUIRED: dict[str, list[Any]] = {
    "ncclGetVersion": [POINTER(c_int)],
    "ncclGetErrorString": [c_int],
    "ncclGetLastError": [_COMM],
    "ncclGetUniqueId": [POINTER(UniqueId)],
    "ncclCommInitRank": [POINTER(_COMM), c_int, UniqueId, c_int],
    "ncclCommDestroy": [_COMM],
    "ncclCommAbort": [_COMM],
    "ncclCommGetAsyncError": [_COMM, POINTER(c_int)],
    "ncclCommCount": [_COMM, POINTER(c_int)],
    "ncclCommUserRank": [_COMM, POINTER(c_int)],
    "ncclAllReduce": [_POINTER, _POINTER, c_size_t, _ENUM, _ENUM, _COMM, _STREAM],
    "ncclAllGather": [_POINTER, _POINTER, c_size_t, _ENUM, _COMM, _STREAM],
    "ncclReduceScatter": [_POINTER, _POINTER, c_size_t, _ENUM, _ENUM, _COMM, _STREAM],
    "ncclBroadcast": [_POINTER, _POINTER, c_size_t, _ENUM, c_int, _COMM, _STREAM],
    "ncclReduce": [_POINTER, _POINTER, c_size_t, _ENUM, _ENUM, c_int, _COMM, _STREAM],
    "ncclSend": [_POINTER, c_size_t, _ENUM, c_int, _COMM, _STREAM],
    "ncclRecv": [_POINTER, c_size_t, _ENUM, c_int, _COMM, _STREAM],
    "ncclGroupStart": [],
    "ncclGroupEnd": [],
}
_RETURNS_TEXT = {"ncclGetErrorString", "ncclGetLastError"}


@dataclass(frozen=True)
class _Feature:
    since: int  # NCCL_VERSION_CODE of the first release that has it
    functions: dict[str, list[Any]]


_FEATURES = {
    "mem_alloc": _Feature(
        21900, {"ncclMemAlloc": [POINTER(_POINTER), c_size_t], "ncclMemFree": [_POINTER]}
    ),
    "window_register": _Feature(
        22700,
        {
            "ncclCommWindowRegister": [_COMM, _POINTER, c_size_t, POINTER(c_void_p), c_int],
            "ncclCommWindowDeregister": [_COMM, c_void_p],
        },
    ),
    "comm_shrink": _Feature(
        22703,
        {"ncclCommShrink": [_COMM, POINTER(c_int), c_int, POINTER(_COMM), c_void_p, c_int]},
    ),
    "peer_pointer": _Feature(
        22902, {"ncclGetPeerDevicePointer": [c_void_p, c_size_t, c_int, POINTER(c_void_p)]}
    ),
    "comm_suspend": _Feature(
        22907,
        {
            "ncclCommSuspend": [_COMM, c_int],
            "ncclCommResume": [_COMM],
            "ncclCommMemStats": [_COMM, _ENUM, POINTER(c_uint64)],
        },
    ),
}


def mapped_nccl_libraries() -> list[str]:
    """Real paths of all libnccl files that this process has mapped, each once."""
    paths: dict[str, None] = {}
    for line in Path("/proc/self/maps").read_text().splitlines():
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and _LIBRARY_NAME.fullmatch(Path(fields[5]).name):
            paths[str(Path(fields[5]).resolve())] = None
    return list(paths)


class _LinkMap(ctypes.Structure):
    """The head of the loader's ``struct link_map`` (link.h)."""

    _fields_ = [("l_addr", c_size_t), ("l_name", c_char_p)]


_RTLD_DI_LINKMAP = 2  # dlfcn.h


def _path_of(library: ctypes.CDLL) -> str:
    """Real path of a loaded library, which the loader may have found anywhere."""
    link_map = POINTER(_LinkMap)()
    handle = c_void_p(library._handle)
    if ctypes.CDLL(None).dlinfo(handle, _RTLD_DI_LINKMAP, ctypes.byref(link_map)) != 0:
        return library._name
    return str(Path(os.fsdecode(link_map.contents.l_name)).resolve())


def _wheel_nccl_libraries() -> list[str]:
    try:
        spec = importlib.util.find_spec("nvidia.nccl")
    except ModuleNotFoundError:
        return []
    locations = spec.submodule_search_locations if spec else None
    return [
        str(path) for root in locations or () for path in sorted(Path(root).glob("lib/libnccl.so*"))
    ]


def _candidates(path: str | None) -> Iterator[tuple[str, str]]:
    """(source, path) in the order they are tried; an explicit choice is the only candidate."""
    if path is not None:
        yield "argument", path
        return
    chosen = env.nccl_library_path()
    if chosen is not None:
        yield "DISTCOMM_NCCL_SO", chosen
        return
    for mapped in mapped_nccl_libraries():
        yield "mapped", mapped
    for wheel in _wheel_nccl_libraries():
        yield "wheel", wheel
    yield "system", _SYSTEM_NAME


class NcclLibrary:
    """One loaded libnccl; its functions are attributes with typed prototypes.

    Looked for in this order: `path`, ``DISTCOMM_NCCL_SO``, the file that torch has mapped, the
    ``nvidia.nccl`` wheel, the system's. A file named by one of the first two is the only one
    tried.

    Args:
        path: the libnccl to load.

    Attributes:
        path: real path of the loaded file.
        source: where it was found: ``argument``, ``DISTCOMM_NCCL_SO``, ``mapped`` (by torch, as
            a rule), ``wheel`` or ``system``.
        version: NCCL_VERSION_CODE, e.g. 22809.

    Raises:
        NcclLibraryError: nothing could be loaded, or a function that distcomm needs is missing.
    """

    def __init__(self, path: str | None = None) -> None:
        self._library, self.source, self.path = self._load(path)
        for name, argtypes in _REQUIRED.items():
            setattr(self, name, self._prototype(name, argtypes))
        code = c_int()
        self.check("ncclGetVersion", self.ncclGetVersion(ctypes.byref(code)))
        self.version = code.value
        self._features = frozenset(name for name in _FEATURES if self._bind_feature(name))
        self._warn_if_mapped_twice()

    # The prototypes are bound from tables above.
    def __getattr__(self, name: str) -> Callable[..., Any]:
        for feature, details in _FEATURES.items():
            if name in details.functions:
                raise NcclLibraryError(
                    f"{name} belongs to '{feature}', which NCCL has since {details.since}; "
                    f"{self.path}, version {self.version}, doesn't offer it"
                )
        raise AttributeError(name)

    def supports(self, feature: str) -> bool:
        """Whether this libnccl has an optional feature: ``mem_alloc``, ``window_register``,
        ``comm_shrink``, ``peer_pointer`` or ``comm_suspend``.

        Raises:
            NcclLibraryError: no such feature is known.
        """
        if feature not in _FEATURES:
            raise NcclLibraryError(f"unknown feature '{feature}'; known: {', '.join(_FEATURES)}")
        return feature in self._features

    @property
    def version_text(self) -> str:
        """The version as NCCL writes it, e.g. ``"2.28.9"``."""
        return f"{self.version // 10000}.{self.version // 100 % 100}.{self.version % 100}"

    def new_unique_id(self) -> bytes:
        """A fresh unique id, 128 bytes, for one rank to share with its group."""
        unique_id = UniqueId()
        self.check("ncclGetUniqueId", self.ncclGetUniqueId(ctypes.byref(unique_id)))
        return bytes(unique_id)

    def check(
        self, call: str, code: int, *, comm: int | None = None, member: GroupMember | None = None
    ) -> None:
        """Raises `NcclError` unless `code` is ncclSuccess."""
        if code == 0:
            return
        meaning = self.ncclGetErrorString(code).decode(errors="replace")
        last_error = (self.ncclGetLastError(comm) or b"").decode(errors="replace")
        raise NcclError(call, code, meaning, last_error, member=member)

    def _load(self, path: str | None) -> tuple[ctypes.CDLL, str, str]:
        failures = []
        for source, candidate in _candidates(path):
            try:
                library = ctypes.CDLL(candidate)
            except OSError as error:
                failures.append(f"{candidate} ({source}): {error}")
                continue
            return library, source, _path_of(library)
        tried = "\n  ".join(failures)
        raise NcclLibraryError(
            "no libnccl could be loaded; install distcomm[cu12] or distcomm[cu13], or name a "
            f"file in DISTCOMM_NCCL_SO. Tried:\n  {tried}"
        )

    def _prototype(self, name: str, argtypes: list[Any]) -> Callable[..., Any]:
        try:
            function = getattr(self._library, name)
        except AttributeError:
            raise NcclLibraryError(
                f"{self.path} has no {name}: it is no libnccl, or an old one; "
                "distcomm needs NCCL 2.18 or newer"
            ) from None
        function.argtypes = argtypes
        function.restype = c_char_p if name in _RETURNS_TEXT else c_int
        bound: Callable[..., Any] = function
        return bound

    def _bind_feature(self, feature: str) -> bool:
        details = _FEATURES[feature]
        # The version alone doesn't tell: vendors build libnccl without some functions.
        if self.version < details.since or not all(
            hasattr(self._library, name) for name in details.functions
        ):
            return False
        for name, argtypes in details.functions.items():
            setattr(self, name, self._prototype(name, argtypes))
        return True

    def _warn_if_mapped_twice(self) -> None:
        mapped = mapped_nccl_libraries()
        if len(mapped) > 1:
            logger.warning(
                "%d libnccl files are mapped into this process: %s. distcomm uses %s (version "
                "%s, found by: %s). Uninstall all but one, or name one in DISTCOMM_NCCL_SO.",
                len(mapped),
                ", ".join(mapped),
                self.path,
                self.version_text,
                self.source,
            )
