// Calls of NCCL that fail: a release, and every call of a long scenario in turn.

#include <vector>

#include "check.h"
#include "rig.h"

namespace distcomm::tests {
namespace {

void failed_release_is_tried_again() {
  for (const fake::Call call : {kFree, kDeregister}) {
    for (const bool is_slab : {false, true}) {
      Rig rig;
      const NcclComm a = rig.fake.make_comm(), b = rig.fake.make_comm();
      if (is_slab) CHECK_EQ(rig.heap.reserve(kChunk), kNcclSuccess);
      char* const pointer = rig.alloc(1);
      CHECK_EQ(rig.register_all(a), kNcclSuccess);
      CHECK_EQ(rig.register_all(b), kNcclSuccess);
      rig.fake.fail_nth(call, 1, 3);
      CHECK(rig.free(pointer));
      if (is_slab) rig.heap.retire_all();
      CHECK_EQ(rig.fake.num_memory(), 1u);
      CHECK_EQ(rig.fake.num_windows(), call == kFree ? 0u : 1u);
      CHECK_EQ(rig.heap.num_windows(a) + rig.heap.num_windows(b), rig.fake.num_windows());
      HeapStats stats = rig.heap.stats();
      CHECK_EQ(stats.segments, 1);
      CHECK_EQ(stats.retired_segments, 1);
      CHECK_EQ(stats.failed_releases, 1);
      CHECK_EQ(stats.bytes_used, 0);
      CHECK_EQ(stats.bytes_reserved, kChunk);
      CHECK_EQ(stats.largest_free, 0);
      CHECK_EQ(rig.heap.num_new(a) + rig.heap.num_new(b), 0u);
      char* const next = rig.alloc(1);
      CHECK_EQ(rig.ordinal(next), 1);
      rig.heap.trim();
      CHECK_EQ(rig.fake.num_memory(), 1u);
      CHECK_EQ(rig.heap.stats().failed_releases, 1);
      CHECK(rig.free(next));
      rig.check_all_gone();
    }
  }
}

// Tries `what` until it succeeds; it may fail once.
template <typename What>
void retry(const What& what) {
  if (!what()) CHECK(what());
}

void scenario(Rig& rig, bool comms_first) {
  SegmentHeap& heap = rig.heap;
  const NcclComm a = rig.fake.make_comm(), b = rig.fake.make_comm();
  std::vector<char*> live;
  const auto alloc = [&](size_t size) {
    retry([&] {
      char* const pointer = rig.alloc(size);
      if (pointer != nullptr) live.push_back(pointer);
      return pointer != nullptr;
    });
  };
  const auto free_one = [&](size_t i) {
    CHECK(rig.free(live.at(i)));
    live.erase(live.begin() + i);
  };
  const auto register_all = [&](NcclComm comm) {
    retry([&] { return rig.register_all(comm) == kNcclSuccess; });
    CHECK_EQ(heap.num_new(comm), 0u);
  };
  retry([&] { return heap.reserve(4 * kPage) == kNcclSuccess; });
  for (const size_t pages : {2, 1, 3, 8, 4}) alloc(pages * kPage);
  register_all(a);
  register_all(b);
  free_one(3);  // of its own segment, with two windows
  alloc(12 * kPage);
  register_all(a);
  heap.abandon(a, {1, 99});
  alloc(5 * kPage);
  register_all(a);
  register_all(b);
  free_one(0);
  free_one(0);
  heap.freeze(true);
  alloc(kPage);
  heap.freeze(false);
  heap.trim();
  if (comms_first) {
    rig.release_comm(a);
    rig.release_comm(b);
  }
  while (!live.empty()) free_one(live.size() / 2);
  heap.retire_all();
  if (!comms_first) {
    rig.release_comm(a);
    rig.release_comm(b);
  }
  heap.trim();
}

void failure_at_every_call() {
  for (const bool comms_first : {false, true}) {
    int num_calls = 0;
    {
      Rig rig;
      scenario(rig, comms_first);
      rig.check_all_gone();
      num_calls = rig.fake.calls();
    }
    CHECK(num_calls > 20);
    for (int k = 1; k <= num_calls; ++k) {
      g_case = k;
      Rig rig;
      rig.fake.fail_nth_of_any(k, 3);
      scenario(rig, comms_first);
      rig.check_all_gone();
    }
  }
}

}  // namespace

std::vector<Test> failure_tests() {
  return {TEST(failed_release_is_tried_again), TEST(failure_at_every_call)};
}

}  // namespace distcomm::tests
