// Memory that is awake: given, taken back at once or later, and refused.

#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

#include "rig.h"

namespace distcomm::tests {
namespace {

void blocks_are_mapped_in_chunks() {
  Rig rig;
  const int64_t tag = rig.heap->new_tag();
  CHECK(tag > 0);
  const Block block = rig.make(tag, 2 * kChunk + 100);
  CHECK(block.holds());
  CHECK(rig.held() == (Held{1, 3, 3, 2 * kChunk + kGranularity, 0}));
  rig.check_usage(tag, 1, 2 * kChunk + kGranularity, 0, 0);
  CHECK_EQ(rig.heap->stats().allocations, 1);
  CHECK_EQ(rig.heap->take_failure().text[0], 0);
  CHECK(rig.free(block));
  rig.check_usage(tag, 0, 0, 0, 0);
  rig.check_all_gone();
}

void no_size_is_a_block_too() {
  Rig rig;
  const int64_t tag = rig.heap->new_tag();
  void* const first = rig.alloc(tag, 0);
  void* const second = rig.alloc(tag, 0);
  CHECK(first != nullptr && second != nullptr && first != second);
  rig.check_usage(tag, 2, 2 * kGranularity, 0, 0);
  CHECK(rig.heap->free(first, kPlainStream) && rig.heap->free(second, kPlainStream));
  rig.check_all_gone();
}

// Neither wraps around to something small.
void sizes_that_no_memory_has() {
  Rig rig;
  const int64_t tag = rig.heap->new_tag();
  for (const size_t size : {SIZE_MAX, SIZE_MAX / 2, size_t{1} << 62, (size_t{1} << 40) + 1}) {
    CHECK(rig.alloc(tag, size) == nullptr);
    const SleepFailure failure = rig.heap->take_failure();
    CHECK_EQ(failure.code, fake::kNoMemory);
    CHECK(failure.needed_bytes >= static_cast<int64_t>(size_t{1} << 40));
  }
  CHECK_EQ(rig.heap->stats().failed_allocations, 4);
  rig.check_all_gone();
}

void memory_is_of_this_device_and_for_network_cards() {
  Rig rig;
  const int64_t tag = rig.heap->new_tag();
  const Block block = rig.make(tag, 1);
  CHECK_EQ(rig.fake.last_prop().gpu_direct_rdma_capable, 1);
  CHECK_EQ(rig.fake.last_mode(), fake::kRelaxedCapture);
  CHECK(rig.free(block));
}

void refused_without_a_tag() {
  Rig rig;
  CHECK(rig.heap->alloc(1, kPlainStream) == nullptr);
  const SleepFailure failure = rig.heap->take_failure();
  CHECK_EQ(failure.code, 0);
  CHECK_EQ(failure.needed_bytes, 1);
  CHECK_EQ(failure.free_bytes, -1);
  CHECK(std::strstr(failure.text, "tag") != nullptr);
  CHECK_EQ(rig.heap->take_failure().text[0], 0);
  CHECK_EQ(rig.heap->stats().failed_allocations, 1);
  rig.check_all_gone();
}

void refused_in_a_capture() {
  Rig rig;
  const int64_t tag = rig.heap->new_tag();
  for (const CudaStream stream : {kCapturingStream, kBrokenStream}) {
    CHECK(rig.alloc(tag, 1, stream) == nullptr);
    const SleepFailure failure = rig.heap->take_failure();
    CHECK_EQ(failure.code, 0);
    CHECK(std::strstr(failure.text, "graph") != nullptr);
  }
  CHECK_EQ(rig.fake.calls(fake::kReserve), 0);
  CHECK_EQ(rig.heap->stats().failed_allocations, 2);
}

void tags_are_selected_per_thread_and_heap() {
  Rig rig;
  SleepHeap other(rig.driver, fake::kDevice, kChunk);
  const int64_t first = rig.heap->new_tag(), second = rig.heap->new_tag();
  CHECK(first != second);
  CHECK_EQ(rig.heap->select(first), 0);
  std::thread([&] {
    CHECK_EQ(rig.heap->select(second), 0);
    CHECK(rig.heap->alloc(1, kPlainStream) != nullptr);
    CHECK_EQ(rig.heap->select(0), second);
    CHECK(rig.heap->alloc(1, kPlainStream) == nullptr);
  }).join();
  CHECK_EQ(rig.heap->take_failure().text[0], 0);  // of the other thread
  CHECK_EQ(other.select(0), 0);
  CHECK(other.alloc(1, kPlainStream) == nullptr);
  CHECK(rig.heap->alloc(kChunk, kPlainStream) != nullptr);
  CHECK_EQ(rig.heap->select(0), first);
  rig.check_usage(first, 1, kChunk, 0, 0);
  rig.check_usage(second, 1, kGranularity, 0, 0);
}

void frees_in_a_capture_wait() {
  for (const CudaStream stream : {kCapturingStream, kBrokenStream}) {
    Rig rig;
    const int64_t tag = rig.heap->new_tag();
    const Block block = rig.make(tag, kChunk);
    CHECK(rig.free(block, stream));
    CHECK_EQ(rig.held().mappings, 1);
    CHECK(block.holds());
    rig.heap->settle();
    rig.check_all_gone();
    CHECK_EQ(rig.heap->stats().unknown_frees, 0);
  }
}

// Whatever comes next gives back what was freed in a capture.
void frees_wait_for_the_next_call() {
  for (int call = 0; call < 5; ++call) {
    Rig rig;
    const int64_t tag = rig.heap->new_tag();
    const Block other = rig.make(tag, kGranularity);
    CHECK(rig.free(rig.make(tag, kChunk), kCapturingStream));
    if (call == 0) CHECK(rig.free(rig.make(tag, 1)));
    if (call == 1) CHECK(rig.free(other));
    if (call == 2) CHECK_EQ(rig.heap->prepare({tag}), kCudaSuccess);
    if (call == 3) CHECK_EQ(rig.sleep({tag}, {}), kCudaSuccess);
    if (call == 4) CHECK_EQ(rig.wake_up({tag}), kCudaSuccess);
    CHECK_EQ(rig.held().ranges, call == 1 ? 0 : 1);
  }
}

void work_ends_before_memory_goes() {
  for (const bool sync_fails : {false, true}) {
    Rig rig;
    const int64_t tag = rig.heap->new_tag();
    const Block block = rig.make(tag, 2 * kChunk);
    for (int i = 0; i < 8; ++i) {
      rig.fake.device([&](Device& device) {
        return device.write(reinterpret_cast<uintptr_t>(block.pointer), block.size, 7,
                            kPlainStream);
      });
    }
    if (sync_fails) rig.fake.fail_nth(fake::kSync, 1, 700);
    CHECK(rig.free(block));
    CHECK_EQ(rig.held().mappings, sync_fails ? 2 : 0);
    rig.check_all_gone();
  }
}

void unknown_frees_are_counted() {
  Rig rig;
  const int64_t tag = rig.heap->new_tag();
  const Block block = rig.make(tag, kChunk);
  CHECK(!rig.heap->free(block.pointer + 1, kPlainStream));
  CHECK(!rig.heap->free(nullptr, kPlainStream));
  CHECK(rig.heap->free(nullptr, kCapturingStream));
  CHECK_EQ(rig.heap->stats().unknown_frees, 2);
  CHECK(rig.free(block));  // which is known, although what was pending is not
  CHECK_EQ(rig.heap->stats().unknown_frees, 3);
  CHECK(!rig.free(block));
  CHECK_EQ(rig.heap->stats().unknown_frees, 4);
  rig.check_all_gone();
}

void heap_frees_all_at_its_end() {
  Rig rig;
  const int64_t a = rig.heap->new_tag(), b = rig.heap->new_tag(), c = rig.heap->new_tag();
  rig.make(a, 2 * kChunk);
  rig.make(b, kChunk);
  const Block busy = rig.make(c, kChunk);
  CHECK_EQ(rig.sleep({a, b}, {a}), kCudaSuccess);
  CHECK_EQ(rig.heap->prepare({c}), kCudaSuccess);
  rig.fake.device([&](Device& device) {
    return device.write(reinterpret_cast<uintptr_t>(busy.pointer), kChunk, 7, kPlainStream);
  });
  rig.heap.reset();
  CHECK(rig.held() == (Held{0, 0, 0, 0, 0}));
}

void shut_down_gives_nothing_back() {
  Rig rig;
  const int64_t tag = rig.heap->new_tag();
  const Block first = rig.make(tag, kChunk), second = rig.make(tag, kChunk);
  CHECK(rig.free(first, kCapturingStream));
  rig.heap->shut_down();
  CHECK(rig.free(second));
  rig.heap->settle();
  CHECK(rig.alloc(tag, 1) != nullptr);
  CHECK_EQ(rig.fake.calls(fake::kUnmap), 0);
}

}  // namespace

std::vector<Test> block_tests() {
  return {
      TEST(blocks_are_mapped_in_chunks),
      TEST(no_size_is_a_block_too),
      TEST(sizes_that_no_memory_has),
      TEST(memory_is_of_this_device_and_for_network_cards),
      TEST(refused_without_a_tag),
      TEST(refused_in_a_capture),
      TEST(tags_are_selected_per_thread_and_heap),
      TEST(frees_in_a_capture_wait),
      TEST(frees_wait_for_the_next_call),
      TEST(work_ends_before_memory_goes),
      TEST(unknown_frees_are_counted),
      TEST(heap_frees_all_at_its_end),
      TEST(shut_down_gives_nothing_back),
  };
}

}  // namespace distcomm::tests
