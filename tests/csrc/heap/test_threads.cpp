// Threads that allocate, register, look up and free at once.

#include <atomic>
#include <chrono>
#include <random>
#include <thread>
#include <vector>

#include "check.h"
#include "rig.h"

namespace distcomm::tests {
namespace {

void threads() {
  constexpr int kNumSteps = 1500;
  Rig rig;
  SegmentHeap& heap = rig.heap;
  rig.fake.set_jitter(true);
  CHECK_EQ(heap.reserve(kChunk), kNcclSuccess);
  std::atomic<int> num_allocating{4};
  std::vector<std::thread> all;
  for (int i = 0; i < 4; ++i) {
    all.emplace_back([&, i] {
      std::mt19937_64 random(g_seed * 100 + i);
      std::vector<char*> live;
      for (int step = 0; step < kNumSteps || !live.empty(); ++step) {
        if (step < kNumSteps && (live.size() < 3 || random() % 2 == 0)) {
          const CudaStream stream = random() % 8 == 0 ? kCapturingStream : kPlainStream;
          char* const pointer = rig.alloc(random() % (12 * kMiB), stream);
          if (pointer == nullptr) {
            CHECK_EQ(static_cast<int>(heap.take_failure().kind),
                     static_cast<int>(FailureKind::kCapturing));
            continue;
          }
          Location location{};
          CHECK(heap.find(nullptr, pointer, &location));
          live.push_back(pointer);
        } else {
          const size_t which = random() % live.size();
          CHECK(rig.free(live[which], random() % 8 == 0 ? kCapturingStream : kPlainStream));
          live.erase(live.begin() + which);
        }
        if (step % 16 == 0) std::this_thread::yield();
      }
      --num_allocating;
    });
  }
  const NcclComm shared = rig.fake.make_comm();
  all.emplace_back([&] {
    std::mt19937_64 random(g_seed * 100 + 50);
    for (int round = 0; num_allocating > 0; ++round) {
      const NcclComm comm = rig.fake.make_comm();
      if (round % 2 == 0) heap.pin_new(comm);
      if (round % 4 == 2) heap.pass_over(comm, {heap.next_ordinal() - 1});
      for (int i = 0; i < 5; ++i) {
        if (random() % 8 == 0) rig.fake.fail_nth(kRegister, 1 + random() % 3, 3);
        rig.register_all(random() % 2 == 0 ? comm : shared);
        if (random() % 8 == 0) heap.abandon(comm, {heap.next_ordinal() - 1});
        std::this_thread::sleep_for(std::chrono::microseconds(50));
      }
      if (round % 8 == 3) heap.retire_all();
      if (round % 8 == 5) CHECK_EQ(heap.reserve(kPage), kNcclSuccess);
      heap.freeze(false);
      heap.raise_ordinal(round);
      const bool deregister = round % 3 != 0;
      if (!deregister) rig.fake.doom_comm(comm);
      CHECK_EQ(heap.release_comm(comm, deregister), kNcclSuccess);
      rig.fake.destroy_comm(comm);
    }
  });
  all.emplace_back([&] {
    std::mt19937_64 random(g_seed * 100 + 60);
    while (num_allocating > 0) {
      Location location{};
      char* const base = static_cast<char*>(rig.fake.last_memory());
      if (heap.find(shared, base + random() % (2 * kChunk), &location)) {
        CHECK(location.ordinal >= 0 && location.offset < location.segment_bytes);
      }
      const HeapStats stats = heap.stats();
      CHECK(stats.bytes_used <= stats.bytes_reserved);
      CHECK(stats.largest_free <= stats.bytes_reserved - stats.bytes_used);
      CHECK(heap.num_new(shared) <= static_cast<size_t>(stats.segments_made) + 64);
      rig.new_segments(shared);
      heap.num_windows(shared);
      if (random() % 16 == 0) heap.trim();
      std::this_thread::yield();
    }
  });
  for (std::thread& thread : all) thread.join();
  char* const last = rig.alloc(1);
  CHECK(rig.free(last));  // and with it what is pending
  CHECK_EQ(heap.stats().bytes_used, 0);
  CHECK_EQ(heap.stats().unknown_frees, 0);
  rig.release_comm(shared);
  heap.retire_all();
  heap.trim();
  rig.check_all_gone();
  CHECK_EQ(heap.stats().failed_releases, 0);
}

}  // namespace

std::vector<Test> thread_tests() {
  return {TEST(threads)};
}

}  // namespace distcomm::tests
