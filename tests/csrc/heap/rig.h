// What the tests of the heap share: a heap on a fake NCCL, and its sizes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <iostream>
#include <string>
#include <vector>

#include "check.h"
#include "fake_symbols.h"
#include "segment_heap.h"

namespace distcomm::tests {

using fake::Fake;
using fake::kAlloc;
using fake::kBrokenStream;
using fake::kCapturingStream;
using fake::kDeregister;
using fake::kFree;
using fake::kPlainStream;
using fake::kRegister;

inline constexpr size_t kMiB = size_t{1} << 20;
inline constexpr size_t kPage = 2 * kMiB;
inline constexpr size_t kChunk = 16 * kMiB;
inline constexpr int64_t kNone = -1;

// A heap, and the fake it calls.
struct Rig {
  explicit Rig(size_t chunk = kChunk, bool downwards = false,
               const CudaDriver& driver = Fake::driver())
      : fake(downwards), symbols(Fake::symbols()), driver(driver),
        heap(symbols, this->driver, fake::kDevice, chunk) {}
  ~Rig() { check_violations(); }

  char* alloc(size_t size, CudaStream stream = kPlainStream) {
    return static_cast<char*>(heap.alloc(size, stream));
  }
  bool free(void* pointer, CudaStream stream = kPlainStream) {
    return heap.free(pointer, stream);
  }
  // What `comm` hasn't seen; nothing stays pinned.
  std::vector<SegmentInfo> new_segments(NcclComm comm) {
    std::vector<SegmentInfo> infos = heap.pin_new(comm);
    heap.unpin(comm);
    return infos;
  }
  NcclResult register_through(NcclComm comm, int64_t through) {
    int64_t null_windows = 0;
    return heap.register_new(comm, through, &null_windows);
  }
  NcclResult register_all(NcclComm comm) {
    return register_through(comm, heap.next_ordinal() - 1);
  }
  Location at(const void* pointer, NcclComm comm = nullptr) {
    Location location{};
    CHECK(heap.find(comm, pointer, &location));
    return location;
  }
  bool known(const void* pointer) {
    Location location{};
    return heap.find(nullptr, pointer, &location);
  }
  int64_t ordinal(const void* pointer) { return at(pointer).ordinal; }
  NcclWindow window(const void* pointer, NcclComm comm) { return at(pointer, comm).window; }
  void release_comm(NcclComm comm, bool deregister = true) {
    heap.release_comm(comm, deregister);
    fake.destroy_comm(comm);
  }
  void check_violations() {
    CHECK(fake::t_context == nullptr);
    for (const std::string& violation : fake.violations()) std::cerr << violation << std::endl;
    CHECK(fake.violations().empty());
  }
  void check_all_gone() {
    CHECK_EQ(fake.num_memory(), 0u);
    CHECK_EQ(fake.num_mappings(), 0u);
    CHECK_EQ(fake.num_handles(), 0u);
    CHECK_EQ(fake.num_windows(), 0u);
    const HeapStats stats = heap.stats();
    CHECK_EQ(stats.segments, 0);
    CHECK_EQ(stats.slabs, 0);
    CHECK_EQ(stats.retired_segments, 0);
    CHECK_EQ(stats.bytes_reserved, 0);
    CHECK_EQ(stats.bytes_used, 0);
    CHECK_EQ(stats.largest_free, 0);
    CHECK_EQ(stats.ordinary_bytes, 0);
    check_violations();
  }

  Fake fake;
  NcclSymbols symbols;
  CudaDriver driver;
  SegmentHeap heap;
};

}  // namespace distcomm::tests
