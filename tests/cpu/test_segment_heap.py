"""The binding to the symmetric heap, on the NCCL stand-in, whose memory is the host's."""

from __future__ import annotations

import ctypes
import gc
import itertools
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distcomm.errors import NativeLibraryError
from distcomm.memory.segment_heap import (
    ALIGNMENT,
    AllocationFailure,
    HeapLocation,
    Segment,
    SegmentHeap,
    next_ordinal_of_device,
)
from distcomm.native import NativeNccl
from tests.cpu.test_native import NCCL_FUNCTIONS, is_mapped, stub
from tests.fake_nccl import fake_nccl_path

MIB = 1 << 20
CHUNK = 16 * MIB
COMM, OTHER_COMM = 1, 2  # handles that no NCCL function is given
OUT_OF_MEMORY = 1  # ncclUnhandledCudaError


@pytest.fixture(scope="module")
def nccl() -> NativeNccl:
    return NativeNccl(str(fake_nccl_path()))


def num_live_bytes() -> int:
    library = ctypes.CDLL(str(fake_nccl_path()))
    library.fake_nccl_live_bytes.restype = ctypes.c_long
    count: int = library.fake_nccl_live_bytes()
    return count


@pytest.fixture
def heap(nccl: NativeNccl) -> Iterator[SegmentHeap]:
    """A heap that gives all its memory back."""
    heap = SegmentHeap(nccl, 0, chunk_bytes=CHUNK, shared=False)
    before = num_live_bytes()
    yield heap
    heap.retire_all()
    assert heap.stats()["segments"] == 0, "the test has kept memory"
    assert num_live_bytes() == before


def place(heap: SegmentHeap, address: int) -> tuple[int, int]:
    found = heap.find(COMM, address)
    assert found is not None
    return found.ordinal, found.offset


# Memory


def test_ranges_are_carved_out_of_segments(heap: SegmentHeap) -> None:
    """Of three ranges, two of a byte and one larger than a chunk, the last needs its own."""
    first, second, large = heap.alloc(1), heap.alloc(ALIGNMENT + 1), heap.alloc(CHUNK + 1)
    assert all(address % ALIGNMENT == 0 for address in (first, second, large))
    assert [place(heap, address) for address in (first, second, large)] == [
        (0, 0),
        (0, ALIGNMENT),
        (1, 0),
    ]
    assert heap.next_ordinal() == 2
    ctypes.memset(large, 1, CHUNK + 1)
    stats = heap.stats()
    assert (stats["segments"], stats["slabs"], stats["segments_made"]) == (2, 0, 2)
    assert stats["bytes_reserved"] == num_live_bytes() == 2 * CHUNK + ALIGNMENT
    assert stats["bytes_used"] == 3 * ALIGNMENT + CHUNK + ALIGNMENT
    assert stats["largest_free"] == CHUNK - 3 * ALIGNMENT
    assert (stats["allocations"], stats["failed_allocations"]) == (3, 0)
    for address in (first, second, large):
        assert heap.free(address)


def test_find(heap: SegmentHeap) -> None:
    heap.alloc(1)
    address = heap.alloc(1)
    assert heap.find(COMM, address + 5) == HeapLocation(0, ALIGNMENT + 5, CHUNK, window=0)
    base = address - ALIGNMENT
    assert heap.find(COMM, base + CHUNK - 1) is not None
    assert heap.find(COMM, base + CHUNK) is None
    assert heap.find(COMM, base - 1) is None
    assert heap.find(COMM, 0) is None
    assert heap.free(base)
    assert heap.free(address)
    assert heap.find(COMM, address) is None


def test_an_address_is_freed_once(heap: SegmentHeap) -> None:
    address, other = heap.alloc(1), heap.alloc(1)
    assert not heap.free(address + 1)
    assert heap.free(address)
    assert not heap.free(address)
    assert not heap.free(0)
    assert heap.stats()["unknown_frees"] == 3
    assert heap.alloc(1) == address, "the lowest free range is taken again"
    assert heap.free(address)
    assert heap.free(other)
    assert num_live_bytes() == 0, "a segment that was made by growing goes when it is empty"


def test_a_reserved_slab_stays(heap: SegmentHeap) -> None:
    assert heap.reserve(CHUNK + 1)
    address = heap.alloc(CHUNK)
    assert place(heap, address) == (0, 0)
    assert heap.free(address)
    stats = heap.stats()
    assert (stats["segments"], stats["slabs"], stats["bytes_used"]) == (1, 1, 0)
    assert stats["largest_free"] == CHUNK + ALIGNMENT
    heap.trim()
    assert heap.stats()["segments"] == 1


@pytest.mark.parametrize("call", ["alloc", "reserve"])
def test_a_failure_has_the_text_of_nccl(
    heap: SegmentHeap, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    kept = heap.alloc(1)
    assert heap.take_failure() is None
    monkeypatch.setenv("FAKE_NCCL_MEMORY_BYTES", str(CHUNK + ALIGNMENT))
    assert not getattr(heap, call)(2 * CHUNK)
    failure = heap.take_failure()
    assert isinstance(failure, AllocationFailure)
    assert (failure.kind, failure.num_bytes, failure.code) == ("nccl", 2 * CHUNK, OUT_OF_MEMORY)
    assert failure.text.startswith("ncclMemAlloc returned 1 (unhandled cuda error): ")
    assert f"ncclMemAlloc: out of memory: {2 * CHUNK} bytes" in failure.text
    assert heap.take_failure() is None
    assert heap.stats()["failed_allocations"] == 1
    assert heap.next_ordinal() == 1, "what was not made has no number"
    assert heap.free(kept)


def test_a_failure_is_the_threads_own(heap: SegmentHeap, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_NCCL_FAIL", "ncclMemAlloc:code=3")
    assert heap.alloc(1) == 0
    with ThreadPoolExecutor(1) as other:
        assert other.submit(heap.take_failure).result() is None
    monkeypatch.delenv("FAKE_NCCL_FAIL")
    address = heap.alloc(1)
    assert heap.take_failure() is None, "a later allocation has succeeded"
    assert heap.free(address)


def test_while_frozen_nothing_grows(heap: SegmentHeap) -> None:
    assert heap.reserve(2 * ALIGNMENT)
    heap.freeze(True)
    inside, outside = heap.alloc(ALIGNMENT), heap.alloc(2 * ALIGNMENT)
    assert place(heap, inside) == (0, 0)
    assert outside
    assert heap.find(COMM, outside) is None
    stats = heap.stats()
    assert (stats["segments"], stats["ordinary_allocations"]) == (1, 1)
    assert stats["ordinary_bytes"] == 2 * ALIGNMENT
    assert heap.free(outside)
    assert heap.stats()["ordinary_bytes"] == 0
    assert not heap.free(outside)
    heap.freeze(False)
    grown = heap.alloc(2 * ALIGNMENT)
    assert place(heap, grown) == (1, 0)
    assert heap.free(inside)
    assert heap.free(grown)


def test_retired_segments_go_when_they_are_empty(heap: SegmentHeap) -> None:
    assert heap.reserve(ALIGNMENT)
    assert heap.reserve(2 * ALIGNMENT)
    used = heap.alloc(1)
    heap.retire_all()
    stats = heap.stats()
    assert (stats["segments"], stats["retired_segments"]) == (1, 1)
    assert num_live_bytes() == stats["bytes_reserved"]
    assert stats["largest_free"] == 0
    later = heap.alloc(1)
    assert place(heap, later) == (2, 0)
    assert heap.free(used)
    assert heap.stats()["retired_segments"] == 0
    assert num_live_bytes() == CHUNK
    assert heap.free(later)


def test_a_release_that_failed_is_tried_again(
    heap: SegmentHeap, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = heap.alloc(1)
    monkeypatch.setenv("FAKE_NCCL_FAIL", "ncclMemFree")
    assert heap.free(address)
    stats = heap.stats()
    assert (stats["failed_releases"], stats["retired_segments"]) == (1, 1)
    monkeypatch.delenv("FAKE_NCCL_FAIL")
    heap.trim()
    assert heap.stats()["segments"] == 0


def test_after_shut_down_memory_stays(nccl: NativeNccl) -> None:
    heap = SegmentHeap(nccl, 0, chunk_bytes=ALIGNMENT, shared=False)
    address = heap.alloc(1)
    heap.shut_down()
    assert heap.free(address)
    assert num_live_bytes() == ALIGNMENT
    assert ctypes.CDLL(str(fake_nccl_path())).ncclMemFree(ctypes.c_void_p(address)) == 0


# Segments and communicators


def new_segments(heap: SegmentHeap, comm: int) -> list[Segment]:
    with heap.pinned_new(comm) as segments:
        return segments


def test_new_segments_are_those_a_communicator_has_not_seen(heap: SegmentHeap) -> None:
    assert (heap.num_new(COMM), new_segments(heap, COMM)) == (0, [])
    assert heap.reserve(ALIGNMENT)
    heap.raise_ordinal(7)
    heap.raise_ordinal(3)
    assert heap.reserve(2 * ALIGNMENT)
    small, large = heap.alloc(1), heap.alloc(2 * ALIGNMENT)
    expected = [Segment(0, ALIGNMENT, small), Segment(7, 2 * ALIGNMENT, large)]
    for comm in (COMM, OTHER_COMM):
        assert heap.num_new(comm) == 2
        assert new_segments(heap, comm) == expected
    assert heap.next_ordinal() == 8
    heap.abandon(COMM, [0, 5])
    assert new_segments(heap, COMM) == new_segments(heap, OTHER_COMM) == expected[1:]
    assert heap.stats()["retired_segments"] == 1
    assert (heap.num_windows(COMM), heap.release_comm(COMM)) == (0, 0)
    assert heap.free(small)
    assert heap.free(large)


def test_a_segment_that_is_gone_is_not_new(heap: SegmentHeap) -> None:
    assert heap.free(heap.alloc(1))
    assert heap.next_ordinal() == 1
    assert (heap.num_new(COMM), new_segments(heap, COMM)) == (0, [])


def test_pinned_segments_stay_although_they_are_empty(heap: SegmentHeap) -> None:
    address = heap.alloc(1)
    with heap.pinned_new(COMM) as segments:
        assert heap.free(address)
        assert segments == [Segment(0, CHUNK, address)]
        assert (heap.stats()["segments"], num_live_bytes()) == (1, CHUNK)
        with heap.pinned_new(OTHER_COMM) as others:
            assert others == segments
    assert (heap.stats()["segments"], num_live_bytes()) == (0, 0)
    assert heap.num_new(COMM) == 0


def test_segments_are_not_pinned_after_an_error(heap: SegmentHeap) -> None:
    address = heap.alloc(1)
    pinned = heap.pinned_new(COMM)
    pinned.__enter__()
    assert heap.free(address)
    assert num_live_bytes() == CHUNK
    assert not pinned.__exit__(LookupError, LookupError(), None)
    assert num_live_bytes() == 0


def test_a_communicator_that_is_released_pins_nothing(heap: SegmentHeap) -> None:
    address = heap.alloc(1)
    with heap.pinned_new(COMM), heap.pinned_new(OTHER_COMM):
        assert heap.free(address)
        assert heap.release_comm(COMM) == 0
        assert num_live_bytes() == CHUNK, "the other one's registration is under way"
    assert num_live_bytes() == 0


def test_segments_passed_over_are_not_new_but_in_use(heap: SegmentHeap) -> None:
    assert heap.reserve(ALIGNMENT)
    assert heap.reserve(2 * ALIGNMENT)
    heap.pass_over(COMM, [1, 7])
    assert [each.ordinal for each in new_segments(heap, COMM)] == [0]
    assert [each.ordinal for each in new_segments(heap, OTHER_COMM)] == [0, 1]
    assert (heap.num_new(COMM), heap.num_new(OTHER_COMM), heap.num_windows(COMM)) == (1, 2, 0)
    heap.pass_over(COMM, [0])
    heap.pass_over(COMM, [])
    assert (heap.num_new(COMM), heap.stats()["retired_segments"]) == (0, 0)
    address = heap.alloc(2 * ALIGNMENT)
    assert heap.find(COMM, address) == HeapLocation(1, 0, 2 * ALIGNMENT, window=0)
    assert heap.free(address)


def test_a_heap_that_is_dropped_gives_its_slabs_back(nccl: NativeNccl) -> None:
    before = num_live_bytes()
    heap = SegmentHeap(nccl, 0, chunk_bytes=CHUNK, shared=False)
    assert heap.reserve(ALIGNMENT)
    assert heap.free(heap.alloc(2 * ALIGNMENT))
    assert num_live_bytes() == before + ALIGNMENT
    del heap
    gc.collect()
    assert num_live_bytes() == before


# The heap of a device


def test_a_device_has_one_shared_heap(nccl: NativeNccl) -> None:
    assert next_ordinal_of_device(nccl, 61) == 0
    first = SegmentHeap(nccl, 61, chunk_bytes=CHUNK, shared=True)
    again = SegmentHeap(NativeNccl(str(fake_nccl_path())), 61, shared=True)
    other = SegmentHeap(nccl, 62, chunk_bytes=CHUNK, shared=True)
    assert first.handle == again.handle != other.handle
    address = first.alloc(1)
    assert place(again, address) == (0, 0)
    assert again.stats()["bytes_reserved"] == CHUNK, "the chunk size of the first call"
    assert (next_ordinal_of_device(nccl, 61), next_ordinal_of_device(nccl, 62)) == (1, 0)
    del first
    assert again.free(address)
    assert next_ordinal_of_device(nccl, 61) == 1


def test_the_libnccl_of_a_shared_heap_stays(tmp_path: Path) -> None:
    """Tensors may outlive everything that knows of the heap."""
    path = Path(shutil.copy(fake_nccl_path(), tmp_path / "own.so"))
    address = SegmentHeap(NativeNccl(str(path)), 59, chunk_bytes=CHUNK, shared=True).alloc(1)
    gc.collect()
    assert is_mapped(path)
    ctypes.memset(address, 1, CHUNK)


def test_heaps_that_are_not_shared_are_their_own(nccl: NativeNccl) -> None:
    first, second = (SegmentHeap(nccl, 63, chunk_bytes=CHUNK, shared=False) for _ in range(2))
    assert first.handle != second.handle
    address = first.alloc(1)
    assert second.find(COMM, address) is None
    assert not second.free(address)
    assert first.free(address)
    assert next_ordinal_of_device(nccl, 63) == 0


@pytest.mark.parametrize("shared", [False, True])
def test_a_libnccl_without_windows(tmp_path: Path, shared: bool) -> None:
    functions = [*NCCL_FUNCTIONS, "ncclMemAlloc", "ncclMemFree", "ncclCommWindowDeregister"]
    old = NativeNccl(str(stub(tmp_path / "old.so", functions)))
    with pytest.raises(NativeLibraryError, match="device 60: this libnccl has no windows"):
        SegmentHeap(old, 60, shared=shared)


# Random sequences

# Bytes to allocate; or, if negative, which of the ranges in use to free.
STEPS = st.lists(
    st.one_of(
        st.integers(min_value=0, max_value=3 * CHUNK), st.integers(min_value=-20, max_value=-1)
    ),
    max_size=60,
)


@settings(deadline=None, max_examples=60)
@given(STEPS)
def test_ranges_are_disjoint_and_at_the_same_place_on_all_ranks(steps: list[int]) -> None:
    """Two heaps pose as two ranks that allocate the same."""
    nccl = NativeNccl(str(fake_nccl_path()))
    heaps = [SegmentHeap(nccl, 0, chunk_bytes=CHUNK, shared=False) for _ in range(2)]
    used: list[tuple[tuple[int, int], int]] = []  # the addresses, and the bytes asked for
    for step in steps:
        if step < 0 and used:
            addresses, _ = used.pop(step % len(used))
            assert all(heap.free(at) for heap, at in zip(heaps, addresses, strict=True))
        elif step >= 0:
            first, second = (heap.alloc(step) for heap in heaps)
            assert place(heaps[0], first) == place(heaps[1], second)
            used.append(((first, second), step))
    for rank, heap in enumerate(heaps):
        ranges = sorted((addresses[rank], num_bytes) for addresses, num_bytes in used)
        assert all(start % ALIGNMENT == 0 for start, _ in ranges)
        for (start, num_bytes), (following, _) in itertools.pairwise(ranges):
            assert start + max(num_bytes, 1) <= following
        for start, num_bytes in ranges:
            found = heap.find(COMM, start)
            assert found is not None
            assert found.offset + num_bytes <= found.segment_bytes
        rounded = sum(max(-(-num_bytes // ALIGNMENT), 1) * ALIGNMENT for _, num_bytes in ranges)
        assert heap.stats()["bytes_used"] == rounded
        assert all(heap.free(start) for start, _ in ranges)
        assert heap.stats()["segments"] == 0
