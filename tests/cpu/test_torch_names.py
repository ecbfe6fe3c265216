"""What distcomm uses of torch's private parts is there in this torch."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch

import distcomm

PACKAGE = Path(distcomm.__file__).parent
# In builds without CUDA some of torch._C is missing, but its declarations have all of it.
DECLARATIONS = Path(torch.__file__).parent / "_C" / "__init__.pyi"
# Where there are several ways, for several versions of torch: one of each.
EITHER = {"_accelerator_setAllocatorSettings", "_accelerator_getAllocatorSettings"}


def private_names(module: Path) -> set[str]:
    """Attributes of torch._C, also those that `getattr` is asked for."""
    names = set()
    for node in ast.walk(ast.parse(module.read_text())):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "torch._C":
            names.add(node.attr)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "getattr":
            owner, name, *_ = node.args
            if ast.unparse(owner) == "torch._C" and isinstance(name, ast.Constant):
                names.add(str(name.value))
    return names


def declared_names() -> set[str]:
    tree = ast.parse(DECLARATIONS.read_text())
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}


def test_the_names_are_found() -> None:
    memory = PACKAGE / "memory"
    assert private_names(memory / "pool_routing.py") == {"_cuda_getCurrentRawStream"}
    assert private_names(memory / "torch_pools.py") >= {
        "_cuda_beginAllocateCurrentThreadToPool",
        "_cuda_checkPoolLiveAllocations",
        "_cuda_emptyCache",
        "_cuda_endAllocateToPool",
        "_cuda_releasePool",
    }
    assert private_names(memory / "alloc_conf.py") == EITHER


@pytest.mark.parametrize(
    "module",
    [path for path in sorted(PACKAGE.rglob("*.py")) if private_names(path)],
    ids=lambda path: str(path.relative_to(PACKAGE)),
)
def test_names_of_torch_are_there(module: Path) -> None:
    """In a build with CUDA all of them; in others those that are missing are declared."""
    missing = {name for name in private_names(module) if not hasattr(torch._C, name)}
    if torch.version.cuda is None:
        missing -= declared_names()
    assert not missing - {"_distributed_c10d"}


def test_allocator_settings_can_be_set_in_some_way() -> None:
    modern = {name for name in EITHER if hasattr(torch._C, name)}
    assert modern == EITHER or callable(torch.cuda.memory._set_allocator_settings)
    assert callable(torch.cuda.memory.CUDAPluggableAllocator.allocator)
    assert callable(torch.cuda.MemPool)
