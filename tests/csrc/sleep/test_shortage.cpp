// Memory of the device, or of the host, that can't be had.

#include <cstdint>
#include <cstring>
#include <vector>

#include "rig.h"

namespace distcomm::tests {
namespace {

bool says(const SleepFailure& failure, const char* part) {
  return std::strstr(failure.text, part) != nullptr;
}

void check_shortage(Rig& rig, size_t needed, size_t num_free) {
  const SleepFailure failure = rig.heap->take_failure();
  CHECK_EQ(failure.code, fake::kNoMemory);
  CHECK_EQ(failure.needed_bytes, needed);
  CHECK_EQ(failure.free_bytes, num_free);
}

// Both numbers are of the whole block, and of what there is once its part has been undone.
void alloc_without_memory() {
  Rig rig;
  const int64_t tag = rig.heap->new_tag();
  const Block block = rig.make(tag, kChunk);
  rig.set_others(kCapacity - 4 * kChunk);
  const Held before = rig.held();
  CHECK(rig.alloc(tag, 5 * kChunk) == nullptr);
  CHECK(rig.held() == before);
  check_shortage(rig, 5 * kChunk, 3 * kChunk);
  rig.check_usage(tag, 1, kChunk, 0, 0);
  CHECK(rig.alloc(tag, 3 * kChunk) != nullptr);
  CHECK(block.holds());
}

void wake_up_without_memory() {
  Rig rig;
  const int64_t a = rig.heap->new_tag(), b = rig.heap->new_tag(), c = rig.heap->new_tag();
  const Block of_a = rig.make(a, 3 * kChunk), of_b = rig.make(b, 2 * kChunk);
  const Block of_c = rig.make(c, kChunk);
  CHECK_EQ(rig.sleep({a, b}, {a}), kCudaSuccess);
  const Held asleep = rig.held();
  rig.set_others(kCapacity - kChunk - 4 * kChunk);  // and c's
  const int num_made = rig.fake.calls(fake::kCreate);
  for (int i = 0; i < 2; ++i) {
    CHECK_EQ(rig.wake_up({a, b, c}), fake::kNoMemory);
    check_shortage(rig, 5 * kChunk, 4 * kChunk);
    CHECK(rig.held() == asleep);
    rig.check_usage(a, 1, 0, 3 * kChunk, 3 * kChunk);
    rig.check_usage(b, 1, 0, 2 * kChunk, 0);
    CHECK(of_c.holds());
    CHECK_EQ(rig.fake.calls(fake::kCreate), num_made);  // nothing is copied in vain
  }
  CHECK_EQ(rig.wake_up({a}), kCudaSuccess);  // which fits
  CHECK(of_a.holds());
  rig.set_others(0);
  CHECK_EQ(rig.wake_up({a, b, c}), kCudaSuccess);
  CHECK(of_a.holds() && of_c.holds() && rig.is_accessible(of_b));
  CHECK_EQ(rig.heap->take_failure().text[0], 0);
}

// The driver may have less than it has said: chunks that are back already go again.
void wake_up_with_less_memory_than_said() {
  Rig rig;
  const int64_t a = rig.heap->new_tag(), b = rig.heap->new_tag();
  const Block of_a = rig.make(a, 3 * kChunk);
  rig.make(b, 3 * kChunk);
  CHECK_EQ(rig.sleep({a, b}, {a}), kCudaSuccess);
  const Held asleep = rig.held();
  rig.set_others(kCapacity - 5 * kChunk);
  rig.fake.fail_nth(fake::kInfo, 1, 3);
  CHECK_EQ(rig.wake_up({a, b}), fake::kNoMemory);
  check_shortage(rig, 6 * kChunk, 5 * kChunk);
  CHECK(rig.held() == asleep);
  rig.check_usage(a, 1, 0, 3 * kChunk, 3 * kChunk);
  rig.check_usage(b, 1, 0, 3 * kChunk, 0);
  rig.set_others(0);
  CHECK_EQ(rig.wake_up({a, b}), kCudaSuccess);
  CHECK(of_a.holds());
}

void sleep_without_host_memory() {
  Rig rig;
  const int64_t a = rig.heap->new_tag(), b = rig.heap->new_tag();
  const Block of_a = rig.make(a, 3 * kChunk), of_b = rig.make(b, 2 * kChunk);
  rig.set_host_capacity(2 * kChunk);
  const Held awake = rig.held();
  for (const bool sleeps : {false, true}) {
    CHECK_EQ(sleeps ? rig.sleep({a, b}, {a}) : rig.heap->prepare({a}), fake::kNoMemory);
    const SleepFailure failure = rig.heap->take_failure();
    CHECK(says(failure, "cuMemHostAlloc") && says(failure, "2"));
    CHECK_EQ(failure.code, fake::kNoMemory);
    CHECK_EQ(failure.needed_bytes, 3 * kChunk);
    CHECK_EQ(failure.free_bytes, -1);  // of the device: not what is missing
    CHECK(rig.held() == awake);
    rig.check_usage(a, 1, 3 * kChunk, 0, 0);
    rig.check_usage(b, 1, 2 * kChunk, 0, 0);
    CHECK(of_a.holds() && of_b.holds());
    CHECK_EQ(rig.heap->stats().host_bytes, 0);
  }
  CHECK_EQ(rig.sleep({a, b}, {b}), kCudaSuccess);  // which fits
  CHECK_EQ(rig.wake_up({a, b}), kCudaSuccess);
  CHECK(of_b.holds());
}

// Memory that was had before, and is in use, stays so.
void no_more_host_memory() {
  Rig rig;
  const int64_t a = rig.heap->new_tag(), b = rig.heap->new_tag(), c = rig.heap->new_tag();
  const Block of_a = rig.make(a, kChunk), of_b = rig.make(b, kChunk), of_c = rig.make(c, kChunk);
  const Block more = rig.make(c, 3 * kGranularity);
  CHECK_EQ(rig.sleep({a}, {a}), kCudaSuccess);
  CHECK_EQ(rig.heap->prepare({b}), kCudaSuccess);
  rig.set_host_capacity(3 * kChunk);
  const size_t held = rig.held().host;
  CHECK_EQ(rig.sleep({c}, {c}), fake::kNoMemory);
  CHECK_EQ(rig.heap->take_failure().needed_bytes, kChunk + 3 * kGranularity);
  CHECK(rig.held().host <= held);
  CHECK_EQ(rig.heap->stats().host_bytes, rig.held().host);
  CHECK_EQ(rig.sleep({b}, {b}), kCudaSuccess);
  CHECK(of_c.holds() && more.holds());
  CHECK_EQ(rig.wake_up({a, b}), kCudaSuccess);
  CHECK(of_a.holds() && of_b.holds());
}

// A sleep is undone, but another process has taken the memory: what is offloaded stays asleep.
void undone_without_memory() {
  Rig rig;
  const int64_t tag = rig.heap->new_tag();
  const Block block = rig.make(tag, 5 * kChunk);
  rig.fake.fail_nth(fake::kCopy, 4, 700);
  rig.set_others(kCapacity - 5 * kChunk + kGranularity);
  CHECK_EQ(rig.sleep({tag}, {tag}), 700);
  CHECK(says(rig.heap->take_failure(), "cuMemcpyAsync"));
  const SleepUsage usage = rig.heap->usage(tag);
  CHECK(usage.asleep_bytes > 0 && usage.mapped_bytes > 0);
  CHECK_EQ(usage.asleep_bytes, usage.offloaded_bytes);
  CHECK(!rig.is_accessible(block, 0, usage.asleep_bytes));
  CHECK(block.holds(usage.asleep_bytes, block.size));
  CHECK_EQ(rig.heap->stats().host_bytes - rig.heap->stats().free_host_bytes, usage.asleep_bytes);
  rig.heap->trim_host();  // into which nothing is copied any more
  rig.set_others(0);
  CHECK_EQ(rig.wake_up({tag}), kCudaSuccess);
  CHECK(block.holds());
}

}  // namespace

std::vector<Test> shortage_tests() {
  return {
      TEST(alloc_without_memory),
      TEST(wake_up_without_memory),
      TEST(wake_up_with_less_memory_than_said),
      TEST(sleep_without_host_memory),
      TEST(no_more_host_memory),
      TEST(undone_without_memory),
  };
}

}  // namespace distcomm::tests
