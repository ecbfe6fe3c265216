"""A meeting of the group's ranks on their streams."""

# ruff: noqa: N803
# mypy: disallow-untyped-decorators=False

from __future__ import annotations

import triton
import triton.language as tl

from .flags import PeerTensors, flags_of
from .launch import KernelLauncher
from .ptx import set_flag, wait_and_clear_flag

__all__ = ["meet"]

_NUM_WARPS = 1
_THREADS = _NUM_WARPS * 32


@triton.jit(do_not_specialize=["signals", "rank"])
def _meet_kernel(
    signals: tl.tensor, rank: tl.int32, W: tl.constexpr, THREADS: tl.constexpr
) -> None:
    """The second round of flags is there so that the first one's are clear in the next meeting."""
    their_flags, own_flags, has_peer = flags_of(signals, rank, W, THREADS)
    set_flag(their_flags, has_peer, True)
    wait_and_clear_flag(own_flags, has_peer, True)
    tl.debug_barrier()
    set_flag(their_flags + W * 4, has_peer, False)
    wait_and_clear_flag(own_flags + W * 4, has_peer, False)


_launcher = KernelLauncher(_meet_kernel)


def meet(peers: PeerTensors) -> None:
    """What any rank's stream did before, comes before all that this one's does after.

    Collective, among up to 32 ranks. Asynchronous, on the current stream of the current device.
    Calls of a group come in the same order on all ranks, and one after another on the GPU. May be
    captured in a CUDA graph.
    """
    _launcher.launch(
        1,
        (peers.signals, peers.rank),
        (peers.world_size, _THREADS),
        types=(),
        device=peers.signals.device,
        num_warps=_NUM_WARPS,
    )
