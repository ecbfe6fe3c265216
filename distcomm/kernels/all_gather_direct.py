"""All-gather of large tensors: every rank stores what it has into all ranks' outputs.

Each byte is read once and stored W times; the outputs are symmetric, and nothing lies in between.

Shapes: W group size.
"""

# ruff: noqa: N803, PLR0913
# mypy: disallow-untyped-decorators=False

from __future__ import annotations

import triton
import triton.language as tl

from ..errors import ArgumentError
from .flags import MAX_BLOCKS, PeerTensors, flags_of
from .launch import KernelLauncher
from .ptx import load_vectors, set_flag, store_vectors, wait_and_clear_flag
from .vectors import VECTOR_BYTES

__all__ = ["all_gather_direct"]

_NUM_WARPS = 16
_THREADS = _NUM_WARPS * 32
_VECTORS_PER_THREAD = 4


@triton.jit(do_not_specialize=[
    "signals", "x", "output", "stride", "rank", "num_vectors",
])  # fmt: skip
def _all_gather_direct_kernel(
    signals: tl.tensor, x: tl.int64, output: tl.int64, stride: tl.int64,
    rank: tl.int32, num_vectors: tl.int32,
    W: tl.constexpr, THREADS: tl.constexpr, TILE: tl.constexpr,
) -> None:  # fmt: skip
    """This rank's `x` to its place in all ranks' outputs, of which `output` is rank 0's.

    Opening: what peers' streams did before this kernel, comes before all that a block stores. So a
    peer's output is written only after all that used it before has ended.
    Closing: all that block b of the peers has stored, comes before the end of this block.
    """
    their_flags, own_flags, has_peer = flags_of(signals, rank, W, THREADS)
    set_flag(their_flags, has_peer, False)
    wait_and_clear_flag(own_flags, has_peer, False)
    tl.debug_barrier()  # the flags come before all stores of the block
    to = output + rank * num_vectors.to(tl.int64) * 16
    for first in range(tl.program_id(0) * TILE, num_vectors, tl.num_programs(0) * TILE):
        vector = first + tl.arange(0, TILE)
        active = vector < num_vectors
        at = vector.to(tl.int64) * 16
        a, b, c, d = load_vectors(x + at, active)
        for step in tl.static_range(1, W + 1):  # ranks begin with different peers
            peer = (rank + step) % W
            store_vectors(to + peer * stride + at, a, b, c, d, active)
    tl.debug_barrier()  # all stores of the block come before its flags
    set_flag(their_flags + W * 4, has_peer, True)
    wait_and_clear_flag(own_flags + W * 4, has_peer, False)


_launcher = KernelLauncher(_all_gather_direct_kernel)


def all_gather_direct(x: int, output: int, num_bytes: int, peers: PeerTensors) -> None:
    """Each rank's output becomes all ranks' `x`, one after another, bit for bit.

    Args:
        x: address of this rank's; its part of its output, or other memory.
        output: address of rank 0's symmetric output, as this rank reaches it.
        num_bytes: of `x`, in whole vectors.
        peers: the group's.

    Collective. Asynchronous, on the current stream of the current device. Calls of a group come in
    the same order on all ranks, and one after another on the GPU. May be captured in a CUDA graph.

    Raises:
        ArgumentError: an argument doesn't fit; nothing was launched.
    """
    for name, value in (("x", x), ("output", output), ("num_bytes", num_bytes)):
        if value % VECTOR_BYTES:
            requirement = f"a multiple of {VECTOR_BYTES}"
            raise ArgumentError(name, requirement, value, call="all_gather_direct")
    num_vectors = num_bytes // VECTOR_BYTES
    tile = _THREADS * _VECTORS_PER_THREAD
    _launcher.launch(
        max(1, min(MAX_BLOCKS, -(-num_vectors // tile))),
        (peers.signals, x, output, peers.stride, peers.rank, num_vectors),
        (peers.world_size, _THREADS, tile),
        types=(),
        device=peers.signals.device,
        num_warps=_NUM_WARPS,
    )
