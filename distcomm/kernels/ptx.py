"""The PTX instructions that Triton has no function for, one small function each.

Each works on a tensor of which **every thread of the block holds exactly one element**, that is,
one of num_warps * 32 elements: Triton keeps a smaller tensor several times over, and a flag that
two threads wait for and clear would keep one of them waiting for good. Threads that have nothing
to do are left out by a predicate inside the PTX.

A vector is 16 bytes, four 32-bit words: a tensor of vectors is four int32 tensors, one for each
word, so that a vector is in the registers of one thread. Of vectors a thread may have several.

They need sm_70 or later, and don't run in Triton's interpreter.
"""

# ruff: noqa: N803, N806, PLR0913
# mypy: disallow-untyped-decorators=False

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

__all__ = [
    "EMPTY",
    "fence",
    "load_vectors",
    "poll_vectors",
    "set_flag",
    "store_vectors",
    "wait_and_clear_flag",
]

# A word that nothing has been stored to: of any dtype with a sign bit, a NaN.
EMPTY = tl.constexpr(-1)


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
def wait_and_clear_flag(address: tl.tensor, active: tl.tensor, ACQUIRES: tl.constexpr) -> None:
    """Waits until the uint32 flag at `address` is set and sets it back to 0, where `active`.

    All threads poll at the same time. What the flag's setter had written before is there for the
    kernels that follow. For this kernel's own reads, after a block barrier, only if it `ACQUIRES`:
    else caches are left alone.

    Args:
        address: int64, one a thread; this rank's memory.
        active: bool, one a thread.
    """
    ORDER: tl.constexpr = "acquire" if ACQUIRES else "relaxed"
    tl.inline_asm_elementwise(
        """
        {
            .reg .pred %active, %unset;
            .reg .u32 %flag;
            setp.ne.s32 %active, $2, 0;
            @!%active bra done;
        poll:
            ld."""
        + ORDER
        + """.sys.global.u32 %flag, [$1];
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


@triton.jit
def load_vectors(address: tl.tensor, active: tl.tensor) -> Any:
    """The vectors at `address`, which nobody writes to meanwhile.

    Args:
        address: int64, one a thread; multiples of 16.
        active: bool, one a thread; the others' vectors are zeros.

    Returns:
        The four words.
    """
    return tl.inline_asm_elementwise(
        """
        {
            .reg .pred %active;
            setp.ne.s32 %active, $5, 0;
            mov.u32 $0, 0;
            mov.u32 $1, 0;
            mov.u32 $2, 0;
            mov.u32 $3, 0;
            @%active ld.global.v4.b32 {$0, $1, $2, $3}, [$4];
        }
        """,
        "=&r,=&r,=&r,=&r,l,r",
        [address, active.to(tl.int32)],
        dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
        is_pure=False,
        pack=1,
    )


@triton.jit
def store_vectors(
    address: tl.tensor,
    word_0: tl.tensor, word_1: tl.tensor, word_2: tl.tensor, word_3: tl.tensor,
    active: tl.tensor,
) -> None:  # fmt: skip
    """Stores vectors to this or other ranks' memory, where words turn up one by one; doesn't wait.

    Args:
        address: int64, one a thread; multiples of 16.
        active: bool, one a thread.
    """
    tl.inline_asm_elementwise(
        """
        {
            .reg .pred %active;
            setp.ne.s32 %active, $6, 0;
            @%active st.relaxed.sys.global.v4.b32 [$1], {$2, $3, $4, $5};
            mov.u32 $0, 0;
        }
        """,
        "=r,l,r,r,r,r,r",
        [address, word_0, word_1, word_2, word_3, active.to(tl.int32)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.constexpr_function
def _poll_ptx(num_slots: int, slot_bytes: int, flags: tuple[int, ...]) -> str:
    """Loads the vectors of all slots but `own` until each of their flag words isn't `EMPTY`."""
    words = 4 * num_slots
    address, active, own = f"${words}", f"${words + 1}", f"${words + 2}"
    lines = [
        f".reg .pred %active, %empty, %other<{num_slots}>;",
        f"setp.ne.s32 %active, {active}, 0;",
        *(f"setp.ne.s32 %other{slot}, {own}, {slot};" for slot in range(num_slots)),
        *(f"mov.u32 ${word}, ${words + 3 + word % 4};" for word in range(words)),
        "@!%active bra done;",
        "poll:",
    ]
    for slot in range(num_slots):
        vector = ", ".join(f"${4 * slot + word}" for word in range(4))
        place = f"[{address} + {slot * slot_bytes}]"
        lines.append(f"@%other{slot} ld.relaxed.sys.global.v4.b32 {{{vector}}}, {place};")
    lines.append("setp.ne.s32 %empty, 0, 0;")
    lines += [
        f"setp.eq.or.s32 %empty, ${4 * slot + word}, {EMPTY.value}, %empty;"
        for slot in range(num_slots)
        for word in flags
    ]
    lines += ["@%empty bra poll;", "done:"]
    return "{\n" + "\n".join(lines) + "\n}"


@triton.constexpr_function
def _poll_constraints(num_slots: int) -> str:
    return ",".join(["=&r"] * (4 * num_slots) + ["l", "r", "r", "r", "r", "r", "r"])


@triton.constexpr_function
def _words(num_slots: int) -> tuple[tl.dtype, ...]:
    return (tl.int32,) * (4 * num_slots)


@triton.jit
def poll_vectors(
    address: tl.tensor, active: tl.tensor, own: tl.tensor,
    word_0: tl.tensor, word_1: tl.tensor, word_2: tl.tensor, word_3: tl.tensor,
    NUM_SLOTS: tl.constexpr, SLOT_BYTES: tl.constexpr, FLAGS: tl.constexpr,
) -> Any:  # fmt: skip
    """Waits until a vector has arrived at `address` in each of NUM_SLOTS slots, and returns them.

    All slots are polled together, and each thread waits for its own. Nothing arrives in slot
    `own`: its vector is the given one, of which no flag may be `EMPTY`.

    Args:
        address: int64, multiples of 16: in the first slot; the others' are SLOT_BYTES apart.
        active: bool, which of them to wait for; the others' are what is given.
        FLAGS: the words of a vector that say by being other than `EMPTY` that it has arrived.

    Returns:
        4 * NUM_SLOTS int32 tensors, slot by slot.
    """
    return tl.inline_asm_elementwise(
        _poll_ptx(NUM_SLOTS, SLOT_BYTES, FLAGS),
        _poll_constraints(NUM_SLOTS),
        [address, active.to(tl.int32), own, word_0, word_1, word_2, word_3],
        dtype=_words(NUM_SLOTS),
        is_pure=False,
        pack=1,
    )


@triton.jit
def fence(thread: tl.tensor) -> None:
    """What a thread has stored and seen before comes before what it stores after, for all ranks.

    Waits until its stores have arrived.

    Args:
        thread: int32, one a thread; any.
    """
    tl.inline_asm_elementwise(
        "fence.acq_rel.sys; mov.u32 $0, $1;", "=r,r", [thread],
        dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip
