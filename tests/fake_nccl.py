"""The NCCL stand-in of the CPU tests (csrc/fake_nccl.cpp)."""

from pathlib import Path

from .native_build import built_library

__all__ = ["fake_nccl_path"]


def fake_nccl_path() -> Path:
    """Path of libfake_nccl.so; see `built_library`."""
    return built_library("fake_nccl", "libfake_nccl.so")
