"""The PTX instructions that Triton has no function for, one small function each.

Each works on a tensor of which **every thread of the block holds exactly one element**, that is,
one of num_warps * 32 elements: Triton keeps a smaller tensor several times over, and a flag that
two threads wait for and clear would keep one of them waiting for good. Threads that have nothing
to do are left out by a predicate inside the PTX.

They need sm_70 or later, and don't run in Triton's interpreter.
"""

# ruff: noqa: N803, N806
# mypy: disallow-untyped-decorators=False

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["set_flag", "wait_and_clear_flag"]


@triton.jit
def set_flag(address: tl.tensor, active: tl.tensor, RELEASES: tl.constexpr) -> None:
    """Sets the uint32 flag at `address` to 1 where `active`; doesn't wait.

    Whoever sees the flag sees all that was done on this stream before the kernel. If it
    `RELEASES`, also all that this thread has written or known to be written before: after a block
    barrier, all that the block has. That waits until those writes have arrived.

    Args:
        address: int64, one a thread; this or another rank's memory.
        active: bool, one a thread.
    """
    ORDER: tl.constexpr = "release" if RELEASES else "relaxed"
    tl.inline_asm_elementwise(
        """
        {
            .reg .pred %active;
            setp.ne.s32 %active, $2, 0;
            @%active st."""
        + ORDER
        + """.sys.global.u32 [$1], 1;
            mov.u32 $0, 0;
        }
        """,
        "=r,l,r",
        [address, active.to(tl.int32)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def wait_and_clear_flag(address: tl.tensor, active: tl.tensor) -> None:
    """Waits until the uint32 flag at `address` is set and sets it back to 0, where `active`.

    All threads poll at the same time. What the flag's setter had written before is there for the
    kernels that follow, but not for reads of this one, whose caches it leaves alone.

    Args:
        address: int64, one a thread; this rank's memory.
        active: bool, one a thread.
    """
    tl.inline_asm_elementwise(
        """
        {
            .reg .pred %active, %unset;
            .reg .u32 %flag;
            setp.ne.s32 %active, $2, 0;
            @!%active bra done;
        poll:
            ld.relaxed.sys.global.u32 %flag, [$1];
            setp.eq.u32 %unset, %flag, 0;
            @%unset bra poll;
            st.relaxed.sys.global.u32 [$1], 0;
        done:
            mov.u32 $0, 0;
        }
        """,
        "=r,l,r",
        [address, active.to(tl.int32)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
