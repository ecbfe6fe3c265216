"""KV gathers that write into the peers' memory, without a GPU; see programs/direct_gathers.py."""

from __future__ import annotations

import pytest
import torch

from distcomm.context_parallel import methods

pytest.importorskip("triton")
from tests.cpu.triton_kernels import check_in_interpreter


@pytest.mark.parametrize("method", ["kernel", "copy_engine"])
def test_every_row_arrives_on_every_rank(method: str):
    check_in_interpreter("direct_gathers.py", method)


def test_the_stride_of_a_single_row_means_nothing():
    row = torch.zeros(8, 1, dtype=torch.bfloat16).t()
    assert (row.is_contiguous(), row.stride()) == (True, (1, 1))
    assert methods._pitch(row) == 16
    assert methods._pitch(torch.zeros(3, 16, dtype=torch.bfloat16)[:, :8]) == 32
