"""Addresses in the other ranks' memory, as NCCL's window structure gives them.

Only the arithmetic: the probe, which writes to the peers, needs CUDA streams; GPU tests have it.
"""

from __future__ import annotations

import struct

import pytest

from distcomm.memory.peer_memory import WindowLayout

BASE = 0x7000_0000_0000
STRIDE = 35 << 32


def raw(base: int = BASE, lsa_rank: int = 1, world_rank: int = 5, stride_4g: int = 35) -> bytes:
    """The head of `ncclWindow_vidmem`, and some of what follows it."""
    host = 0x1234_5678
    return struct.pack("<QQiiI", host, base, lsa_rank, world_rank, stride_4g) + b"\xff" * 12


def test_an_example():
    """Rank 5 is the second of its host's, so rank 4 is the first, and 6 two strides from that.

    A stride of 35 * 4 GiB is 0x23_0000_0000 bytes; two of them are 0x46_0000_0000.
    """
    layout = WindowLayout.from_bytes(raw(), 5)
    assert layout == WindowLayout(BASE, 0x23_0000_0000, 1, 5)
    assert layout.first_rank == 4
    assert layout.address(4, 0) == 0x7000_0000_0000
    assert layout.address(5, 0x20) == 0x7023_0000_0020
    assert layout.address(6, 0x10) == 0x7046_0000_0010


def test_where_all_ranks_are_within_reach():
    layout = WindowLayout.from_bytes(raw(lsa_rank=3, world_rank=3), 3)
    assert layout is not None
    assert layout.first_rank == 0
    assert [layout.address(rank, 7) for rank in range(4)] == [
        BASE + rank * STRIDE + 7 for rank in range(4)
    ]


def test_all_ranks_see_the_same_first_rank():
    layouts = [WindowLayout.from_bytes(raw(lsa_rank=i, world_rank=8 + i), 8 + i) for i in range(8)]
    assert {layout.first_rank for layout in layouts if layout is not None} == {8}
    assert None not in layouts


def test_a_rank_that_is_alone_has_no_stride():
    layout = WindowLayout.from_bytes(raw(lsa_rank=0, stride_4g=0), 5)
    assert layout is not None
    assert (layout.first_rank, layout.address(5, 3)) == (5, BASE + 3)


@pytest.mark.parametrize(
    "changed",
    [{"base": 0}, {"world_rank": 4}, {"world_rank": -1}, {"lsa_rank": -1}, {"lsa_rank": 6}],
)
def test_what_can_not_be_a_window_is_refused(changed: dict[str, int]):
    assert WindowLayout.from_bytes(raw(**changed), 5) is None


def test_bytes_of_something_else_are_refused():
    assert WindowLayout.from_bytes(bytes(64), 0) is None
    assert WindowLayout.from_bytes(b"\xff" * 64, 0) is None
    assert WindowLayout.from_bytes(bytes(range(64)), 0) is None
