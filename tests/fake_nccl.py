"""Finds, and builds where needed, the NCCL stand-in of the CPU tests (csrc/fake_nccl.cpp)."""

import fcntl
import subprocess
from pathlib import Path

__all__ = ["fake_nccl_path"]

_SOURCE_DIR = Path(__file__).resolve().parent / "csrc"
_BUILD_DIR = _SOURCE_DIR.parents[1] / "build" / "tests"


def fake_nccl_path() -> Path:
    """Path of libfake_nccl.so, built first if it is missing or older than its source.

    Safe to call from several processes at once. Raises RuntimeError with the compiler's output
    if the build fails.
    """
    library = _BUILD_DIR / "libfake_nccl.so"
    sources = (_SOURCE_DIR / "fake_nccl.cpp", _SOURCE_DIR / "CMakeLists.txt")
    _BUILD_DIR.mkdir(parents=True, exist_ok=True)
    with (_BUILD_DIR / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        newest = max(source.stat().st_mtime for source in sources)
        if not library.exists() or library.stat().st_mtime < newest:
            _run("cmake", "-S", str(_SOURCE_DIR), "-B", str(_BUILD_DIR))
            _run("cmake", "--build", str(_BUILD_DIR), "--target", "fake_nccl")
            library.touch()
    return library


def _run(*command: str) -> None:
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed:\n{result.stdout}{result.stderr}")
