"""Finds, and builds where needed, the libraries that the CPU tests put in place of real ones."""

import fcntl
import subprocess
from pathlib import Path

__all__ = ["built_library"]

_SOURCE_DIR = Path(__file__).resolve().parent / "csrc"
_BUILD_DIR = _SOURCE_DIR.parents[1] / "build" / "tests"


def built_library(target: str, file_name: str) -> Path:
    """Path of csrc/`target`.cpp's library, built first if it is missing or older than its source.

    `file_name` is relative to the build folder. Safe to call from several processes at once.
    Raises RuntimeError with the compiler's output if the build fails.
    """
    library = _BUILD_DIR / file_name
    sources = (_SOURCE_DIR / f"{target}.cpp", _SOURCE_DIR / "CMakeLists.txt")
    _BUILD_DIR.mkdir(parents=True, exist_ok=True)
    with (_BUILD_DIR / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        newest = max(source.stat().st_mtime for source in sources)
        if not library.exists() or library.stat().st_mtime < newest:
            _run("cmake", "-S", str(_SOURCE_DIR), "-B", str(_BUILD_DIR))
            _run("cmake", "--build", str(_BUILD_DIR), "--target", target)
            library.touch()
    return library


def _run(*command: str) -> None:
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed:\n{result.stdout}{result.stderr}")
