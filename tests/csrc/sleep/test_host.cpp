// Host memory: had in advance, given up, and used again.

#include <algorithm>
#include <cstdint>
#include <vector>

#include "host_memory.h"
#include "rig.h"

namespace distcomm::tests {
namespace {

void sleep_uses_what_is_prepared() {
  Rig rig;
  const int64_t tag = rig.heap->new_tag();
  const Block block = rig.make(tag, 2 * kChunk + kGranularity);
  CHECK_EQ(rig.heap->prepare({tag}), kCudaSuccess);
  CHECK_EQ(rig.heap->prepare({tag}), kCudaSuccess);
  CHECK_EQ(rig.held().host, block.size);
  CHECK_EQ(rig.heap->stats().host_bytes, block.size);
  CHECK_EQ(rig.heap->stats().free_host_bytes, 0);
  CHECK(block.holds());
  CHECK_EQ(rig.heap->trim_host(), 0);
  CHECK_EQ(rig.sleep({tag}, {tag}), kCudaSuccess);
  CHECK_EQ(rig.fake.calls(fake::kHostAlloc), 3);
  CHECK_EQ(rig.wake_up({tag}), kCudaSuccess);
  CHECK(block.holds());
}

void cancel_gives_back_what_is_not_used() {
  Rig rig;
  const int64_t a = rig.heap->new_tag(), b = rig.heap->new_tag();
  const Block of_a = rig.make(a, kChunk), of_b = rig.make(b, 2 * kChunk);
  CHECK_EQ(rig.heap->prepare({a, b}), kCudaSuccess);
  CHECK_EQ(rig.sleep({a}, {a}), kCudaSuccess);
  CHECK_EQ(rig.heap->stats().free_host_bytes, 0);
  rig.heap->cancel({a});
  CHECK_EQ(rig.heap->stats().free_host_bytes, 0);
  rig.heap->cancel({a, b});
  CHECK_EQ(rig.heap->stats().host_bytes, 3 * kChunk);
  CHECK_EQ(rig.heap->stats().free_host_bytes, 2 * kChunk);
  CHECK_EQ(rig.heap->trim_host(), 2 * kChunk);
  CHECK_EQ(rig.heap->trim_host(), 0);
  CHECK_EQ(rig.held().host, kChunk);
  CHECK_EQ(rig.wake_up({a}), kCudaSuccess);
  CHECK(of_a.holds() && of_b.holds());
  CHECK(rig.free(of_a) && rig.free(of_b));
  rig.check_all_gone();
}

void freed_or_discarded_although_prepared() {
  Rig rig;
  const int64_t a = rig.heap->new_tag(), b = rig.heap->new_tag();
  const Block of_a = rig.make(a, 2 * kChunk);
  rig.make(b, kChunk);
  CHECK_EQ(rig.heap->prepare({a, b}), kCudaSuccess);
  CHECK(rig.free(of_a));
  CHECK_EQ(rig.heap->stats().free_host_bytes, 2 * kChunk);
  CHECK_EQ(rig.sleep({b}, {}), kCudaSuccess);
  CHECK_EQ(rig.heap->stats().free_host_bytes, 3 * kChunk);
}

// Of every cycle, nothing but the first one's grows.
void cycles_use_host_memory_again() {
  Rig rig;
  const int64_t tag = rig.heap->new_tag();
  const std::vector<Block> blocks = {rig.make(tag, 2 * kChunk + kGranularity),
                                     rig.make(tag, 3 * kGranularity), rig.make(tag, kChunk)};
  CHECK_EQ(rig.sleep({tag}, {tag}), kCudaSuccess);
  const Held asleep = rig.held();
  CHECK_EQ(rig.wake_up({tag}), kCudaSuccess);
  const Held awake = rig.held();
  const int num_made = rig.fake.calls(fake::kHostAlloc);
  for (int cycle = 0; cycle < 50; ++cycle) {
    g_case = cycle;
    CHECK_EQ(rig.sleep({tag}, {tag}), kCudaSuccess);
    CHECK(rig.held() == asleep);
    CHECK_EQ(rig.wake_up({tag}), kCudaSuccess);
    CHECK(rig.held() == awake);
    for (const Block& block : blocks) CHECK(block.holds());
  }
  CHECK_EQ(rig.fake.calls(fake::kHostAlloc), num_made);
}

// Requests of other sizes each time: never more than the largest set of them.
void host_memory_is_bounded() {
  Rig rig;
  const int64_t a = rig.heap->new_tag(), b = rig.heap->new_tag(), c = rig.heap->new_tag();
  const Block of_a = rig.make(a, 2 * kChunk + kGranularity);
  const Block of_b = rig.make(b, kChunk + 3 * kGranularity);
  const Block of_c = rig.make(c, 2 * kGranularity);
  const size_t largest = of_a.size;
  for (int cycle = 0; cycle < 50; ++cycle) {
    g_case = cycle;
    for (const auto& [tag, block] : {std::pair{a, of_a}, std::pair{b, of_b}, std::pair{c, of_c}}) {
      CHECK_EQ(rig.sleep({tag}, {tag}), kCudaSuccess);
      CHECK(rig.held().host <= largest);
      CHECK_EQ(rig.heap->stats().host_bytes, rig.held().host);
      CHECK_EQ(rig.heap->stats().host_bytes - rig.heap->stats().free_host_bytes, block.size);
      CHECK_EQ(rig.wake_up({tag}), kCudaSuccess);
      CHECK(block.holds());
    }
  }
}

// What the heap has of it, without a heap.
void host_memory_by_itself() {
  Rig rig;
  const CudaContext context(rig.driver, fake::kDevice);
  HostMemory host(rig.driver);
  CHECK(host.take(64) == nullptr);
  CHECK_EQ(host.prepare({64, 64, 128}), kCudaSuccess);
  CHECK_EQ(host.bytes(), 256u);
  void* const first = host.take(64);
  void* const second = host.take(64);
  CHECK(first != nullptr && second != nullptr && first != second);
  CHECK(host.take(64) == nullptr);
  CHECK_EQ(host.free_bytes(), 128u);
  // The 128 are no use, and go before more is had.
  CHECK_EQ(host.prepare({32}), kCudaSuccess);
  CHECK_EQ(host.bytes(), 160u);
  host.give_back(first, 64);
  // What fits stays.
  CHECK_EQ(host.prepare({64, 16}), kCudaSuccess);
  CHECK(host.take(64) == first);
  CHECK_EQ(host.bytes(), 144u);
  host.give_back(first, 64);
  host.give_back(second, 64);
  CHECK_EQ(host.free_bytes(), 144u);
  CHECK_EQ(host.prepare({16}), kCudaSuccess);  // nothing is missing
  CHECK_EQ(host.bytes(), 144u);
  rig.fake.fail_nth(fake::kHostAlloc, 2, 2);
  CHECK_EQ(host.prepare({64, 8, 8}), 2);
  CHECK_EQ(host.bytes(), 64u);
  CHECK_EQ(host.trim(), 64u);
  CHECK_EQ(host.bytes(), 0u);
}

}  // namespace

std::vector<Test> host_tests() {
  return {
      TEST(sleep_uses_what_is_prepared),
      TEST(cancel_gives_back_what_is_not_used),
      TEST(freed_or_discarded_although_prepared),
      TEST(cycles_use_host_memory_again),
      TEST(host_memory_is_bounded),
      TEST(host_memory_by_itself),
  };
}

}  // namespace distcomm::tests
