// Allocation: sizes, segments, freezing, captures, and why an allocation failed.

#include <cstdint>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "check.h"
#include "rig.h"

namespace distcomm::tests {
namespace {

void alloc_rounds_and_aligns() {
  Rig rig;
  CHECK_EQ(rig.heap.device(), 3);
  char* const empty = rig.alloc(0);
  char* const one = rig.alloc(1);
  char* const page = rig.alloc(kPage);
  char* const more = rig.alloc(kPage + 1);
  char* const last = rig.alloc(kPage);
  CHECK_EQ(one - empty, static_cast<ptrdiff_t>(kPage));
  CHECK_EQ(page - one, static_cast<ptrdiff_t>(kPage));
  CHECK_EQ(more - page, static_cast<ptrdiff_t>(kPage));
  CHECK_EQ(last - more, static_cast<ptrdiff_t>(2 * kPage));
  for (const char* pointer : {empty, one, page, more, last}) {
    CHECK_EQ(reinterpret_cast<uintptr_t>(pointer) % kPage, 0u);
  }
  CHECK_EQ(rig.heap.stats().bytes_used, 6 * kPage);
  CHECK_EQ(rig.heap.stats().bytes_reserved, kChunk);
  CHECK_EQ(rig.heap.stats().largest_free, 2 * kPage);
  CHECK_EQ(rig.heap.stats().allocations, 5);
  CHECK_EQ(rig.fake.calls(), 1);
  for (char* pointer : {more, empty, last, one, page}) CHECK(rig.free(pointer));
  rig.check_all_gone();
}

void alloc_grows_by_chunks_or_more() {
  Rig rig(3 * kMiB);  // a chunk is rounded up too
  char* const small = rig.alloc(1);
  CHECK_EQ(rig.at(small).segment_bytes, 4 * kMiB);
  char* const large = rig.alloc(9 * kMiB);
  CHECK_EQ(rig.ordinal(large), 1);
  CHECK_EQ(rig.at(large).segment_bytes, 10 * kMiB);
  char* const rest = rig.alloc(1);
  CHECK_EQ(rig.ordinal(rest), 0);
  CHECK_EQ(rig.at(rest + 5).offset, kPage + 5);
  CHECK(!rig.known(large + 10 * kMiB));
  CHECK(!rig.known(nullptr));
  CHECK(rig.free(large));
  CHECK(!rig.known(large));
  CHECK_EQ(rig.fake.num_memory(), 1u);
  CHECK(rig.free(small) && rig.free(rest));
  rig.check_all_gone();
  CHECK_EQ(rig.heap.stats().segments_made, 2);
  CHECK_EQ(rig.heap.next_ordinal(), 2);
}

void slabs_stay_until_retired() {
  Rig rig;
  CHECK_EQ(rig.heap.reserve(5 * kMiB), kNcclSuccess);
  CHECK_EQ(rig.heap.reserve(0), kNcclSuccess);
  CHECK_EQ(rig.heap.stats().slabs, 2);
  CHECK_EQ(rig.heap.stats().bytes_reserved, 8 * kMiB);
  char* const first = rig.alloc(6 * kMiB);
  char* const second = rig.alloc(kPage);
  CHECK_EQ(rig.ordinal(second), 1);
  CHECK(rig.free(first));
  rig.heap.trim();
  CHECK_EQ(rig.fake.num_memory(), 2u);
  CHECK_EQ(rig.heap.stats().largest_free, 6 * kMiB);
  char* const grown = rig.alloc(8 * kMiB);
  rig.heap.retire_all();  // what is in use stays until it is empty
  CHECK_EQ(rig.fake.num_memory(), 2u);
  CHECK_EQ(rig.heap.stats().slabs, 1);
  CHECK_EQ(rig.heap.stats().retired_segments, 2);
  CHECK_EQ(rig.heap.stats().largest_free, 0);
  CHECK_EQ(rig.heap.num_new(rig.fake.make_comm()), 0u);
  char* const next = rig.alloc(kPage);
  CHECK_EQ(rig.ordinal(next), 3);
  for (char* pointer : {grown, second, next}) CHECK(rig.free(pointer));
  rig.check_all_gone();
}

void free_of_what_is_not_allocated() {
  Rig rig;
  char* const first = rig.alloc(2 * kPage);
  char* const second = rig.alloc(kPage);
  CHECK(!rig.free(nullptr));
  CHECK(!rig.free(first - 1));
  CHECK(!rig.free(first + 1));
  CHECK(!rig.free(first + kPage));
  CHECK(!rig.free(second + kPage));  // free already
  CHECK(!rig.free(first + kChunk));  // behind the segment
  CHECK(rig.free(first));
  CHECK(!rig.free(first));
  CHECK_EQ(rig.heap.stats().unknown_frees, 7);
  CHECK_EQ(rig.heap.stats().bytes_used, kPage);
  CHECK(rig.free(second));
  CHECK(!rig.free(second));  // its segment is gone
  CHECK_EQ(rig.heap.stats().unknown_frees, 8);
  rig.check_all_gone();
}

void frozen_heap_gives_ordinary_memory() {
  Rig rig;
  char* const inside = rig.alloc(kChunk - kPage);
  rig.heap.freeze(true);
  char* const fitting = rig.alloc(kPage);
  CHECK_EQ(rig.ordinal(fitting), 0);
  CHECK_EQ(rig.heap.stats().ordinary_allocations, 0);
  char* const ordinary = rig.alloc(kPage + 1);
  CHECK(ordinary != nullptr);
  CHECK(!rig.known(ordinary));
  CHECK_EQ(rig.fake.size_of(ordinary), 2 * kPage);
  // Also during a capture, which the driver refuses but in the relaxed mode.
  char* const captured = rig.alloc(1, kCapturingStream);
  CHECK(captured != nullptr && !rig.known(captured));
  CHECK_EQ(rig.fake.last_alloc_mode(), fake::kRelaxedCapture);
  CHECK_EQ(fake::t_capture_mode, fake::kGlobalCapture);
  CHECK_EQ(rig.heap.stats().segments, 1);
  CHECK_EQ(rig.heap.stats().segments_made, 1);
  CHECK_EQ(rig.heap.next_ordinal(), 1);
  CHECK_EQ(rig.heap.stats().ordinary_bytes, 3 * kPage);
  CHECK_EQ(rig.heap.stats().ordinary_allocations, 2);
  CHECK_EQ(rig.heap.stats().bytes_used, kChunk);
  CHECK(!rig.free(ordinary + kPage));
  CHECK(rig.free(ordinary));
  CHECK_EQ(rig.fake.size_of(ordinary), 0u);
  CHECK(!rig.free(ordinary));
  CHECK_EQ(rig.heap.stats().ordinary_bytes, kPage);
  CHECK_EQ(rig.heap.stats().ordinary_allocations, 2);
  rig.fake.fail_nth(kAlloc, 1, 5);
  CHECK(rig.alloc(kPage) == nullptr);
  CHECK_EQ(rig.heap.take_failure().code, 5);
  CHECK_EQ(fake::t_capture_mode, fake::kGlobalCapture);
  CHECK_EQ(rig.heap.stats().ordinary_allocations, 2);
  rig.heap.freeze(false);
  char* const grown = rig.alloc(kPage);
  CHECK_EQ(rig.ordinal(grown), 1);
  CHECK_EQ(rig.fake.last_alloc_mode(), fake::kGlobalCapture);
  for (char* pointer : {inside, fitting, captured, grown}) CHECK(rig.free(pointer));
  CHECK_EQ(rig.heap.stats().unknown_frees, 2);
  rig.check_all_gone();
}

void capturing_stream_makes_no_segment() {
  Rig rig;
  for (const CudaStream stream : {kCapturingStream, kBrokenStream}) {
    CHECK(rig.alloc(kPage + 1, stream) == nullptr);
    const AllocationFailure failure = rig.heap.take_failure();
    CHECK_EQ(static_cast<int>(failure.kind), static_cast<int>(FailureKind::kCapturing));
    CHECK_EQ(failure.bytes, 2 * kPage);
    CHECK(std::strlen(failure.text) > 0);
  }
  CHECK_EQ(rig.fake.calls(), 0);
  CHECK_EQ(rig.heap.stats().allocations, 2);
  CHECK_EQ(rig.heap.stats().failed_allocations, 2);
  CHECK_EQ(rig.heap.reserve(2 * kPage), kNcclSuccess);
  char* const first = rig.alloc(1, kCapturingStream);
  char* const second = rig.alloc(1, kBrokenStream);
  CHECK_EQ(rig.ordinal(first), 0);
  CHECK_EQ(second - first, static_cast<ptrdiff_t>(kPage));
  CHECK(rig.alloc(1, kCapturingStream) == nullptr);
  CHECK(rig.free(first) && rig.free(second));
  rig.heap.retire_all();
  rig.check_all_gone();
}

void failed_alloc_is_explained_to_its_thread() {
  Rig rig;
  rig.fake.fail_nth(kAlloc, 1, 2);
  CHECK(rig.alloc(3 * kMiB) == nullptr);
  std::thread([&] {
    CHECK_EQ(static_cast<int>(rig.heap.take_failure().kind), 0);
    rig.fake.fail_nth(kAlloc, 1, 4);
    CHECK_EQ(rig.heap.reserve(kPage), 4);
    const AllocationFailure failure = rig.heap.take_failure();
    CHECK_EQ(failure.code, 4);
    CHECK_EQ(failure.bytes, kPage);
  }).join();
  AllocationFailure failure = rig.heap.take_failure();
  CHECK_EQ(static_cast<int>(failure.kind), static_cast<int>(FailureKind::kNccl));
  CHECK_EQ(failure.code, 2);
  CHECK_EQ(failure.bytes, kChunk);
  CHECK_EQ(std::string(failure.text), "ncclMemAlloc returned 2 (fake error): fake details");
  failure = rig.heap.take_failure();
  CHECK_EQ(static_cast<int>(failure.kind), 0);
  CHECK_EQ(failure.code, 0);
  CHECK_EQ(failure.bytes, 0);
  CHECK_EQ(std::string(failure.text), "");
  // Success without memory is a failure too.
  rig.fake.give_null_memory(true);
  CHECK(rig.alloc(1) == nullptr);
  CHECK_EQ(rig.heap.take_failure().code, kNcclUnhandledCudaError);
  CHECK(rig.heap.reserve(1) != kNcclSuccess);
  rig.fake.give_null_memory(false);
  CHECK_EQ(rig.heap.next_ordinal(), 0);
  rig.check_all_gone();
  // What succeeds leaves no reason behind.
  rig.fake.fail_nth(kAlloc, 1, 2);
  CHECK(rig.alloc(1) == nullptr);
  char* const pointer = rig.alloc(1);
  failure = rig.heap.take_failure();
  const AllocationFailure none{};
  CHECK_EQ(std::memcmp(&failure, &none, sizeof(none)), 0);
  CHECK(rig.free(pointer));
  rig.check_all_gone();
}

void shut_down_heap_frees_nothing() {
  Rig rig;
  char* const first = rig.alloc(1);
  rig.heap.freeze(true);
  char* const second = rig.alloc(kChunk);
  CHECK(!rig.known(second));
  rig.heap.shut_down();
  const int num_calls = rig.fake.calls();
  CHECK(rig.free(first) && rig.free(second));
  CHECK_EQ(rig.fake.calls(), num_calls);
  CHECK_EQ(rig.fake.num_memory(), 2u);
}

// Rounding a huge size up doesn't make it a small one.
void huge_sizes_fail() {
  Rig rig;
  CHECK(rig.alloc(SIZE_MAX) == nullptr);
  CHECK(rig.heap.reserve(SIZE_MAX) != kNcclSuccess);
  CHECK_EQ(rig.heap.stats().bytes_used, 0);
  for (const size_t size : {SIZE_MAX, SIZE_MAX - kPage, SIZE_MAX / 2, SIZE_MAX / 2 - kPage}) {
    CHECK(rig.alloc(size) == nullptr);
    const AllocationFailure failure = rig.heap.take_failure();
    CHECK(failure.bytes > 0);  // and not a size that has wrapped around
    CHECK(static_cast<size_t>(failure.bytes) >= SIZE_MAX / 2 - 2 * kPage);
  }
  Rig huge_chunk(SIZE_MAX);
  CHECK(huge_chunk.alloc(1) == nullptr);
  rig.check_all_gone();
}

// What is borrowed and given back changes nothing, whatever is pending.
void borrowed_ranges_leave_no_trace() {
  Rig rig;
  CHECK(rig.heap.borrow(1) == nullptr);
  CHECK_EQ(rig.fake.calls(), 0);
  CHECK_EQ(rig.heap.reserve(kChunk), kNcclSuccess);
  char* const first = rig.alloc(kPage);
  char* const second = rig.alloc(kPage);
  rig.heap.defer_frees(true);
  CHECK(rig.free(first));
  const HeapStats before = rig.heap.stats();
  char* const borrowed = static_cast<char*>(rig.heap.borrow(kPage + 1));
  CHECK_EQ(borrowed - second, static_cast<ptrdiff_t>(kPage));
  CHECK(rig.heap.borrow(kChunk) == nullptr);  // not even what is pending
  CHECK_EQ(rig.fake.num_syncs(), 0);
  rig.heap.give_back_borrowed(borrowed);
  const HeapStats after = rig.heap.stats();
  CHECK_EQ(after.largest_free, before.largest_free);
  CHECK_EQ(after.bytes_used, before.bytes_used);
  CHECK_EQ(after.allocations, before.allocations);
  CHECK_EQ(rig.alloc(kPage) - second, static_cast<ptrdiff_t>(kPage));
  rig.heap.defer_frees(false);
  rig.heap.settle();
  CHECK(rig.free(second) && rig.free(second + kPage));
  rig.heap.retire_all();
  rig.check_all_gone();
}

}  // namespace

std::vector<Test> alloc_tests() {
  return {
      TEST(alloc_rounds_and_aligns), TEST(alloc_grows_by_chunks_or_more),
      TEST(slabs_stay_until_retired), TEST(free_of_what_is_not_allocated),
      TEST(frozen_heap_gives_ordinary_memory), TEST(capturing_stream_makes_no_segment),
      TEST(failed_alloc_is_explained_to_its_thread), TEST(shut_down_heap_frees_nothing),
      TEST(huge_sizes_fail),
      TEST(borrowed_ranges_leave_no_trace),
  };
}

}  // namespace distcomm::tests
