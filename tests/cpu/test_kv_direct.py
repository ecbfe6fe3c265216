"""KV gathers that write into the peers' memory, without a GPU; see programs/direct_gathers.py."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from distcomm.context_parallel import methods

ROOT = Path(__file__).parents[2]
PROGRAM = Path(__file__).with_name("programs") / "direct_gathers.py"
TIMEOUT_S = 100


@pytest.mark.parametrize("method", ["kernel", "copy_engine"])
def test_every_row_arrives_on_every_rank(method: str):
    result = subprocess.run(
        [sys.executable, PROGRAM, method],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert result.returncode == 0, result.stderr


def test_the_stride_of_a_single_row_means_nothing():
    row = torch.zeros(8, 1, dtype=torch.bfloat16).t()
    assert (row.is_contiguous(), row.stride()) == (True, (1, 1))
    assert methods._pitch(row) == 16
    assert methods._pitch(torch.zeros(3, 16, dtype=torch.bfloat16)[:, :8]) == 32
