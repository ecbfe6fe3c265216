// What is freed while the device can't be waited for, and the waiting.

#include <future>
#include <vector>

#include "check.h"
#include "rig.h"

namespace distcomm::tests {
namespace {

void free_waits_for_the_device() {
  Rig rig;
  char* const first = rig.alloc(1);
  char* const second = rig.alloc(1);
  CHECK_EQ(rig.fake.num_waits(), 0);
  CHECK(rig.free(first));
  CHECK_EQ(rig.fake.num_waits(), 1);
  CHECK_EQ(rig.fake.num_syncs(), 1);
  CHECK(!rig.free(first));
  CHECK_EQ(rig.fake.num_syncs(), 2);
  CHECK(rig.alloc(1) == first);  // which waits for nothing
  CHECK_EQ(rig.fake.num_waits(), 2);
  CHECK(rig.free(first) && rig.free(second));
  CHECK_EQ(rig.fake.num_syncs(), 4);
  rig.check_all_gone();
}

void free_without_a_driver() {
  Rig rig;
  const CudaDriver driver;
  SegmentHeap heap(rig.symbols, driver, fake::kDevice, kChunk);
  void* const pointer = heap.alloc(1, kCapturingStream);
  CHECK(pointer != nullptr);
  CHECK(heap.free(pointer, kCapturingStream));
  CHECK_EQ(heap.stats().bytes_used, 0);
  rig.check_all_gone();
}

void free_waits_without_the_lock() {
  Rig rig;
  CHECK_EQ(rig.heap.reserve(4 * kPage), kNcclSuccess);
  char* const first = rig.alloc(2 * kPage);
  rig.fake.block_wait();
  std::future<bool> freed = std::async(std::launch::async, [&] { return rig.free(first); });
  rig.fake.wait_until_blocked();
  // Not given back yet, and nobody else waits.
  CHECK_EQ(rig.heap.stats().bytes_used, 2 * kPage);
  char* const second = rig.alloc(2 * kPage);
  CHECK_EQ(second - first, static_cast<ptrdiff_t>(2 * kPage));
  CHECK_EQ(rig.fake.num_waits(), 1);
  CHECK(rig.free(second));
  CHECK_EQ(rig.heap.stats().bytes_used, 2 * kPage);
  rig.fake.unblock();
  CHECK(freed.get());
  CHECK_EQ(rig.heap.stats().bytes_used, 0);
  CHECK_EQ(rig.heap.stats().largest_free, 4 * kPage);
  rig.heap.retire_all();
  rig.check_all_gone();
}

void alloc_waits_without_the_lock() {
  Rig rig;
  CHECK_EQ(rig.heap.reserve(4 * kPage), kNcclSuccess);
  char* const first = rig.alloc(2 * kPage);
  CHECK(rig.free(first, kCapturingStream));
  rig.fake.block_wait();
  std::future<char*> got = std::async(std::launch::async, [&] { return rig.alloc(2 * kPage); });
  rig.fake.wait_until_blocked();
  CHECK_EQ(rig.heap.stats().bytes_used, 2 * kPage);
  char* const second = rig.alloc(2 * kPage, kCapturingStream);
  CHECK_EQ(second - first, static_cast<ptrdiff_t>(2 * kPage));
  rig.fake.unblock();
  CHECK(got.get() == first);
  CHECK_EQ(rig.fake.num_waits(), 1);
  CHECK(rig.free(first) && rig.free(second));
  rig.heap.retire_all();
  rig.check_all_gone();
}

void deferred_frees_wait_for_nothing() {
  Rig rig;
  CHECK_EQ(rig.heap.reserve(4 * kPage), kNcclSuccess);
  rig.heap.defer_frees(true);
  char* const first = rig.alloc(2 * kPage);
  rig.fake.fail_at(fake::kSync);
  CHECK(rig.free(first));
  char* const second = rig.alloc(kPage);  // there is room without it
  CHECK_EQ(second - first, static_cast<ptrdiff_t>(2 * kPage));
  CHECK_EQ(rig.fake.num_waits(), 0);
  CHECK(rig.alloc(2 * kPage, kCapturingStream) == nullptr);
  CHECK_EQ(rig.fake.num_waits(), 0);
  CHECK(!rig.heap.settle());
  CHECK_EQ(rig.heap.stats().bytes_used, 3 * kPage);
  rig.fake.fail_at(fake::kNoStep);
  CHECK(rig.alloc(2 * kPage) == first);  // there is none
  CHECK_EQ(rig.fake.num_waits(), 2);
  CHECK_EQ(rig.heap.stats().segments_made, 1);
  CHECK(rig.free(first) && rig.free(second));
  CHECK_EQ(rig.heap.stats().bytes_used, 3 * kPage);
  CHECK(rig.heap.settle());
  CHECK(!rig.heap.settle());
  CHECK_EQ(rig.heap.stats().bytes_used, 0);
  CHECK_EQ(rig.fake.num_waits(), 3);
  rig.heap.defer_frees(false);
  rig.heap.retire_all();
  rig.check_all_gone();
}

void freed_during_a_capture_is_used_later() {
  for (const CudaStream stream : {kCapturingStream, kBrokenStream}) {
    Rig rig;
    CHECK_EQ(rig.heap.reserve(4 * kPage), kNcclSuccess);
    char* const first = rig.alloc(2 * kPage);
    CHECK(rig.free(first, stream));
    CHECK_EQ(rig.heap.stats().bytes_used, 2 * kPage);
    CHECK_EQ(rig.heap.stats().largest_free, 2 * kPage);
    rig.heap.trim();
    char* const second = rig.alloc(2 * kPage, stream);
    CHECK_EQ(second - first, static_cast<ptrdiff_t>(2 * kPage));
    CHECK(rig.alloc(kPage, stream) == nullptr);  // there is no room
    CHECK_EQ(rig.heap.stats().bytes_used, 4 * kPage);
    CHECK_EQ(rig.fake.num_waits(), 0);
    CHECK(rig.alloc(kPage) == first);
    CHECK_EQ(rig.fake.num_waits(), 1);
    CHECK_EQ(rig.heap.stats().bytes_used, 3 * kPage);
    CHECK(rig.alloc(kPage) == first + kPage);  // nothing is pending any more
    CHECK_EQ(rig.fake.num_waits(), 1);
    // Another free() brings it back too.
    CHECK(rig.free(first, stream) && rig.free(first + kPage, stream));
    CHECK_EQ(rig.heap.stats().bytes_used, 4 * kPage);
    CHECK(rig.free(second));
    CHECK_EQ(rig.heap.stats().bytes_used, 0);
    CHECK_EQ(rig.heap.stats().largest_free, 4 * kPage);
    CHECK_EQ(rig.fake.num_waits(), 2);
    CHECK_EQ(rig.heap.stats().unknown_frees, 0);
    rig.heap.retire_all();
    rig.check_all_gone();
  }
}

void freed_in_a_failed_wait_is_used_later() {
  for (const fake::Step step : {fake::kRetain, fake::kPush, fake::kSync}) {
    Rig rig;
    char* const first = rig.alloc(kChunk);
    char* const second = rig.alloc(kChunk);
    rig.fake.fail_at(step);
    CHECK(rig.free(first));
    CHECK_EQ(rig.heap.stats().bytes_used, 2 * kChunk);
    CHECK_EQ(rig.fake.calls(kFree), 0);
    char* const third = rig.alloc(kChunk);
    CHECK(third != first);
    CHECK_EQ(rig.fake.num_waits(), 2);
    CHECK(rig.free(third));
    CHECK_EQ(rig.fake.num_syncs(), step == fake::kSync ? 3 : 0);
    CHECK_EQ(rig.fake.calls(kFree), 0);
    CHECK_EQ(rig.heap.stats().bytes_used, 3 * kChunk);
    rig.fake.fail_at(fake::kNoStep);
    CHECK(rig.free(second));
    CHECK_EQ(rig.heap.stats().unknown_frees, 0);
    rig.check_all_gone();
  }
}

void pending_memory_stays_as_it_is() {
  Rig rig;
  const NcclComm comm = rig.fake.make_comm();
  char* const grown = rig.alloc(kChunk);
  CHECK_EQ(rig.register_all(comm), kNcclSuccess);
  rig.heap.freeze(true);
  char* const ordinary = rig.alloc(kChunk);
  const int num_calls = rig.fake.calls();
  CHECK(rig.free(grown, kCapturingStream) && rig.free(ordinary, kCapturingStream));
  rig.heap.trim();
  rig.heap.retire_all();
  CHECK_EQ(rig.fake.calls(), num_calls);
  CHECK_EQ(rig.heap.num_windows(comm), 1u);
  CHECK_EQ(rig.ordinal(grown), 0);
  CHECK_EQ(rig.heap.stats().ordinary_bytes, kChunk);
  rig.heap.freeze(false);
  char* const next = rig.alloc(1);
  CHECK_EQ(rig.fake.calls(kDeregister), 1);
  CHECK_EQ(rig.fake.calls(kFree), 2);
  CHECK_EQ(rig.fake.num_memory(), 1u);
  CHECK_EQ(rig.heap.stats().ordinary_bytes, 0);
  CHECK(rig.free(next));
  rig.check_all_gone();
}

void pending_unknown_pointers_are_counted_later() {
  Rig rig;
  char* const first = rig.alloc(kPage);
  char* const second = rig.alloc(kPage);
  for (int i = 0; i < 3; ++i) CHECK(rig.free(first, kCapturingStream));
  CHECK(rig.free(second + kPage, kCapturingStream));
  CHECK(rig.free(nullptr, kCapturingStream));
  CHECK_EQ(rig.heap.stats().unknown_frees, 0);
  CHECK(!rig.free(first + 1));  // and gives back the others
  CHECK_EQ(rig.heap.stats().unknown_frees, 5);
  CHECK_EQ(rig.heap.stats().bytes_used, kPage);
  CHECK(rig.free(second));
  rig.check_all_gone();
}

void pending_at_shut_down_stays() {
  Rig rig;
  char* const first = rig.alloc(kChunk);
  char* const second = rig.alloc(kChunk);
  CHECK(rig.free(first, kCapturingStream));
  rig.heap.shut_down();
  CHECK(rig.free(second));
  CHECK(rig.free(second, kCapturingStream));
  CHECK_EQ(rig.fake.num_memory(), 2u);
  CHECK_EQ(rig.fake.calls(kFree), 0);
}

}  // namespace

std::vector<Test> pending_tests() {
  return {
      TEST(free_waits_for_the_device), TEST(free_without_a_driver),
      TEST(free_waits_without_the_lock), TEST(alloc_waits_without_the_lock),
      TEST(deferred_frees_wait_for_nothing),
      TEST(freed_during_a_capture_is_used_later), TEST(freed_in_a_failed_wait_is_used_later),
      TEST(pending_memory_stays_as_it_is), TEST(pending_unknown_pointers_are_counted_later),
      TEST(pending_at_shut_down_stays),
  };
}

}  // namespace distcomm::tests
