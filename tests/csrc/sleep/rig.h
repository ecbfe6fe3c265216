// What the tests of the heap share: a heap on a fake driver, its sizes, and content.
#pragma once

#include <cstddef>
#include <cstdint>
#include <iostream>
#include <memory>
#include <string>
#include <vector>

#include "../heap/check.h"
#include "fake_driver.h"
#include "sleep_heap.h"

namespace distcomm::tests {

using fake::Device;
using fake::Fake;
using fake::kBrokenStream;
using fake::kCapturingStream;
using fake::kGranularity;
using fake::kPlainStream;

inline constexpr size_t kChunk = 4 * kGranularity;
inline constexpr size_t kCapacity = 64 * kChunk;
inline const CudaStream kStreams[2] = {reinterpret_cast<CudaStream>(0x51),
                                       reinterpret_cast<CudaStream>(0x52)};
using Tags = std::vector<int64_t>;

// The tests of each file, in the order in which they run.
std::vector<Test> block_tests();
std::vector<Test> sleep_tests();
std::vector<Test> host_tests();
std::vector<Test> failing_call_tests();
std::vector<Test> shortage_tests();
std::vector<Test> concurrent_tests();
std::vector<Test> random_sleep_tests();

// A block and the number of what is written in it.
struct Block {
  char* pointer;
  size_t size;
  uint64_t seed;

  // Only the memory that is there.
  bool holds(size_t begin, size_t end) const {
    for (size_t i = begin / sizeof(uint64_t); i < end / sizeof(uint64_t); ++i) {
      if (reinterpret_cast<const uint64_t*>(pointer)[i] != fake::word(seed, i)) return false;
    }
    return true;
  }
  bool holds() const { return holds(0, size); }
};

// What is held of everything.
struct Held {
  size_t ranges, handles, mappings, used, host;
  bool operator==(const Held& other) const {
    return ranges == other.ranges && handles == other.handles && mappings == other.mappings &&
           used == other.used && host == other.host;
  }
};

// A heap, and the fake it calls.
struct Rig {
  explicit Rig(size_t capacity = kCapacity)
      : fake(capacity), driver(Fake::driver()),
        heap(std::make_unique<SleepHeap>(driver, fake::kDevice, kChunk)) {}
  ~Rig() {
    heap.reset();
    check_violations();
  }

  void* alloc(int64_t tag, size_t size, CudaStream stream = kPlainStream) {
    const int64_t former = heap->select(tag);
    void* const pointer = heap->alloc(size, stream);
    CHECK_EQ(heap->select(former), tag);
    return pointer;
  }
  // With content in all of it.
  Block make(int64_t tag, size_t size) {
    const Block block{static_cast<char*>(alloc(tag, size)), size, ++last_seed};
    CHECK(block.pointer != nullptr);
    fake::fill(block.pointer, size, block.seed);
    return block;
  }
  bool free(const Block& block, CudaStream stream = kPlainStream) {
    return heap->free(block.pointer, stream);
  }
  CudaResult sleep(const Tags& tags, const Tags& offloaded) {
    return heap->sleep(tags, offloaded, kStreams, &progress);
  }
  CudaResult wake_up(const Tags& tags) { return heap->wake_up(tags, kStreams, &progress); }
  // Of the transfer under way, or the latest one.
  SleepProgress progress_now() {
    return {__atomic_load_n(&progress.done, __ATOMIC_RELAXED),
            __atomic_load_n(&progress.total, __ATOMIC_RELAXED)};
  }

  bool is_accessible(const Block& block) { return is_accessible(block, 0, block.size); }
  bool is_accessible(const Block& block, size_t begin, size_t end) {
    return fake.device([&](Device& device) {
      const auto address = reinterpret_cast<uintptr_t>(block.pointer);
      return device.is_accessible(address + begin, end - begin);
    });
  }
  Held held() {
    return fake.device([](Device& device) {
      return Held{device.num_ranges(), device.num_handles(), device.num_mappings(),
                  device.used_bytes(), device.host_bytes()};
    });
  }
  size_t free_bytes() {
    return fake.device([](Device& device) { return device.free_bytes(); });
  }
  void set_others(size_t bytes) {
    fake.device([&](Device& device) { return device.set_others(bytes), 0; });
  }
  void set_host_capacity(size_t bytes) {
    fake.device([&](Device& device) { return device.set_host_capacity(bytes), 0; });
  }
  void check_usage(int64_t tag, size_t blocks, size_t mapped, size_t asleep, size_t offloaded) {
    const SleepUsage usage = heap->usage(tag);
    CHECK_EQ(usage.blocks, blocks);
    CHECK_EQ(usage.mapped_bytes, mapped);
    CHECK_EQ(usage.asleep_bytes, asleep);
    CHECK_EQ(usage.offloaded_bytes, offloaded);
  }
  void check_violations() {
    CHECK(fake::t_context == nullptr);
    CHECK_EQ(fake::t_capture_mode, fake::kGlobalCapture);
    for (const std::string& violation : fake.violations()) std::cerr << violation << std::endl;
    CHECK(fake.violations().empty());
  }
  // But what the driver has refused to take and can't be given again.
  void check_all_gone() {
    heap->settle();
    heap->trim_host();
    CHECK_EQ(heap->stats().host_bytes, 0);
    const Held left = held();
    CHECK_EQ(left.ranges, 0);
    CHECK_EQ(left.mappings, 0);
    CHECK_EQ(left.handles, fake.failed(fake::kRelease));
    CHECK_EQ(fake.device([](Device& device) { return device.num_host(); }), 0);
    if (left.handles == 0) CHECK_EQ(left.used, 0);
    check_violations();
  }

  SleepProgress progress{};
  Fake fake;
  CudaDriver driver;
  std::unique_ptr<SleepHeap> heap;
  uint64_t last_seed = 0;
};

}  // namespace distcomm::tests
