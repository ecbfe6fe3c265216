// What happens in one thread while another is in the middle of a call, and many threads at once.

#include <array>
#include <atomic>
#include <chrono>
#include <future>
#include <random>
#include <thread>
#include <vector>

#include "rig.h"

namespace distcomm::tests {
namespace {

// Ends the process rather than waiting for ever.
template <typename What>
auto without_waiting(const What& what) {
  auto result = std::async(std::launch::async, what);
  CHECK(result.wait_for(std::chrono::seconds(20)) == std::future_status::ready);
  return result.get();
}

// Blocked in each of a transfer's waits, and between them.
void free_during_a_transfer() {
  for (const fake::Call call : {fake::kSync, fake::kCopy, fake::kSyncStream, fake::kUnmap}) {
    for (const bool wakes : {false, true}) {
      if (wakes && (call == fake::kSync || call == fake::kUnmap)) continue;
      Rig rig;
      const int64_t a = rig.heap->new_tag(), b = rig.heap->new_tag();
      const Block kept = rig.make(a, 3 * kChunk), freed = rig.make(a, 2 * kChunk);
      const Block other = rig.make(b, kChunk);
      if (wakes) CHECK_EQ(rig.sleep({a}, {a}), kCudaSuccess);
      rig.fake.block(call);
      std::future<CudaResult> transfer = std::async(std::launch::async, [&] {
        return wakes ? rig.wake_up({a}) : rig.sleep({a}, {a});
      });
      rig.fake.wait_until_blocked();
      CHECK(without_waiting([&] { return rig.free(freed) && rig.free(other); }));
      CHECK_EQ(rig.held().ranges, 2);  // what isn't moved has gone
      const bool is_busy = without_waiting([&] {
        rig.check_usage(b, 0, 0, 0, 0);
        rig.heap->stats();
        const Block more = rig.make(b, kChunk);  // of another tag
        CHECK(rig.free(more));
        return rig.alloc(a, kChunk) == nullptr;
      });
      CHECK(is_busy);
      const SleepProgress progress = rig.progress_now();
      CHECK(progress.done <= progress.total);
      rig.fake.unblock();
      CHECK_EQ(transfer.get(), kCudaSuccess);
      CHECK_EQ(rig.held().ranges, 1);
      rig.check_usage(b, 0, 0, 0, 0);
      if (!wakes) CHECK_EQ(rig.wake_up({a}), kCudaSuccess);
      CHECK(kept.holds());
      CHECK_EQ(rig.heap->stats().unknown_frees, 0);
      CHECK(rig.free(kept));
      rig.check_all_gone();
    }
  }
}

// Nothing is done yet when the first wait begins.
void progress_during_a_transfer() {
  Rig rig;
  const int64_t tag = rig.heap->new_tag();
  rig.make(tag, 4 * kChunk);
  rig.fake.block(fake::kSyncStream);
  std::future<CudaResult> transfer =
      std::async(std::launch::async, [&] { return rig.sleep({tag}, {tag}); });
  rig.fake.wait_until_blocked();
  CHECK_EQ(rig.progress_now().done, 0);
  CHECK_EQ(rig.progress_now().total, 4 * kChunk);
  rig.fake.unblock();
  CHECK_EQ(transfer.get(), kCudaSuccess);
}

// Each thread has a tag of its own, and gives some blocks to the others to free.
void threads() {
  constexpr int kNumThreads = 3, kNumSteps = 250;
  Rig rig;
  SleepHeap& heap = *rig.heap;
  rig.fake.set_jitter(true);
  std::atomic<int> num_running{kNumThreads};
  std::array<std::atomic<char*>, 4> given{};
  const int64_t shared = heap.new_tag();
  std::vector<std::thread> all;
  for (int i = 0; i < kNumThreads; ++i) {
    all.emplace_back([&, i] {
      std::mt19937_64 random(g_seed * 100 + i);
      const CudaStream streams[2] = {reinterpret_cast<CudaStream>(0x100 + 2 * i),
                                     reinterpret_cast<CudaStream>(0x101 + 2 * i)};
      const int64_t tag = heap.new_tag();
      CHECK_EQ(heap.select(tag), 0);
      SleepProgress progress{};
      std::vector<Block> live;
      for (int step = 0; step < kNumSteps || !live.empty(); ++step) {
        const CudaStream stream = random() % 8 == 0 ? kCapturingStream : kPlainStream;
        if (step < kNumSteps && live.size() < 4) {
          const size_t size = (1 + random() % 10) * kGranularity;
          char* const pointer = static_cast<char*>(heap.alloc(size, kPlainStream));
          CHECK(pointer != nullptr);
          live.push_back({pointer, size, random()});
          fake::fill(pointer, size, live.back().seed);
        } else if (random() % 2 == 0) {
          CHECK_EQ(heap.sleep({tag}, {tag}, streams, &progress), kCudaSuccess);
          CHECK_EQ(heap.usage(tag).mapped_bytes, 0);
          CHECK_EQ(heap.wake_up({tag}, streams, &progress), kCudaSuccess);
        } else {
          const size_t which = random() % live.size();
          CHECK(live[which].holds());
          char* pointer = live[which].pointer;
          if (random() % 2 == 0) pointer = given[random() % given.size()].exchange(pointer);
          if (pointer != nullptr) CHECK(heap.free(pointer, stream));
          live.erase(live.begin() + which);
        }
        for (const Block& block : live) CHECK(block.holds(0, kGranularity));
        if (random() % 8 == 0) heap.settle();
      }
      heap.select(0);
      --num_running;
    });
  }
  all.emplace_back([&] {
    heap.select(shared);
    while (num_running > 0) {
      void* const pointer = heap.alloc(kChunk, kPlainStream);
      std::this_thread::yield();  // none while the tag's memory is moved
      if (pointer != nullptr) CHECK(heap.free(pointer, kPlainStream));
    }
  });
  all.emplace_back([&] {
    SleepProgress progress{};
    while (num_running > 0) {
      CHECK_EQ(heap.prepare({shared}), kCudaSuccess);
      CHECK_EQ(heap.sleep({shared}, {shared}, kStreams, &progress), kCudaSuccess);
      heap.cancel({shared});
      CHECK_EQ(heap.wake_up({shared}, kStreams, &progress), kCudaSuccess);
    }
  });
  all.emplace_back([&] {
    while (num_running > 0) {
      const SleepStats stats = heap.stats();
      CHECK(stats.free_host_bytes <= stats.host_bytes);
      heap.trim_host();
      std::this_thread::sleep_for(std::chrono::microseconds(20));
    }
  });
  for (std::thread& thread : all) thread.join();
  for (std::atomic<char*>& pointer : given) {
    if (pointer != nullptr) CHECK(heap.free(pointer, kPlainStream));
  }
  rig.check_all_gone();
  CHECK_EQ(heap.stats().unknown_frees, 0);
  CHECK_EQ(heap.stats().failed_releases, 0);
}

}  // namespace

std::vector<Test> concurrent_tests() {
  return {
      TEST(free_during_a_transfer),
      TEST(progress_during_a_transfer),
      TEST(threads),
  };
}

}  // namespace distcomm::tests
