// What goes to sleep comes back: addresses, and the content of what was offloaded.

#include <cstdint>
#include <vector>

#include "rig.h"

namespace distcomm::tests {
namespace {

void offloaded_content_comes_back() {
  Rig rig;
  const int64_t tag = rig.heap->new_tag();
  const std::vector<Block> blocks = {rig.make(tag, 5 * kChunk + kGranularity),
                                     rig.make(tag, kGranularity), rig.make(tag, 2 * kChunk)};
  const size_t all = 7 * kChunk + 2 * kGranularity;
  for (int cycle = 0; cycle < 3; ++cycle) {
    CHECK_EQ(rig.sleep({tag}, {tag}), kCudaSuccess);
    CHECK(rig.held() == (Held{3, 0, 0, 0, all}));
    rig.check_usage(tag, 3, 0, all, all);
    CHECK_EQ(rig.wake_up({tag}), kCudaSuccess);
    rig.check_usage(tag, 3, all, 0, 0);
    CHECK_EQ(rig.heap->stats().free_host_bytes, all);
    for (const Block& block : blocks) CHECK(block.holds());
  }
  for (const Block& block : blocks) CHECK(rig.free(block));
  rig.check_all_gone();
}

void discarded_content_takes_no_host_memory() {
  Rig rig;
  const int64_t tag = rig.heap->new_tag();
  const Block block = rig.make(tag, 3 * kChunk);
  CHECK_EQ(rig.sleep({tag}, {}), kCudaSuccess);
  CHECK(rig.held() == (Held{1, 0, 0, 0, 0}));
  rig.check_usage(tag, 1, 0, 3 * kChunk, 0);
  CHECK_EQ(rig.wake_up({tag}), kCudaSuccess);
  rig.check_usage(tag, 1, 3 * kChunk, 0, 0);
  CHECK(rig.is_accessible(block));
  CHECK_EQ(rig.fake.calls(fake::kHostAlloc) + rig.fake.calls(fake::kCopy), 0);
  fake::fill(block.pointer, block.size, block.seed);
  CHECK(block.holds());
  CHECK(rig.free(block));
  rig.check_all_gone();
}

// Work that is under way writes what is then offloaded.
void sleep_waits_for_the_device() {
  for (const bool offloaded : {true, false}) {
    Rig rig;
    const int64_t tag = rig.heap->new_tag();
    Block block = rig.make(tag, 2 * kChunk);
    for (int i = 0; i < 8; ++i) {
      rig.fake.device([&](Device& device) {
        return device.write(reinterpret_cast<uintptr_t>(block.pointer), block.size, 77,
                            kPlainStream);
      });
    }
    block.seed = 77;
    CHECK_EQ(rig.sleep({tag}, offloaded ? Tags{tag} : Tags{}), kCudaSuccess);
    CHECK_EQ(rig.wake_up({tag}), kCudaSuccess);
    CHECK(!offloaded || block.holds());
  }
}

void tags_sleep_one_by_one() {
  Rig rig;
  const int64_t a = rig.heap->new_tag(), b = rig.heap->new_tag(), c = rig.heap->new_tag();
  const Block of_a = rig.make(a, 2 * kChunk), of_b = rig.make(b, 3 * kChunk);
  const Block of_c = rig.make(c, kChunk);
  CHECK_EQ(rig.sleep({a}, {a}), kCudaSuccess);
  CHECK(!rig.is_accessible(of_a) && of_b.holds() && of_c.holds());
  CHECK_EQ(rig.sleep({b}, {}), kCudaSuccess);
  rig.check_usage(a, 1, 0, 2 * kChunk, 2 * kChunk);
  rig.check_usage(b, 1, 0, 3 * kChunk, 0);
  rig.check_usage(c, 1, kChunk, 0, 0);
  CHECK_EQ(rig.held().host, 2 * kChunk);
  CHECK_EQ(rig.wake_up({b}), kCudaSuccess);
  CHECK(rig.is_accessible(of_b) && !rig.is_accessible(of_a) && of_c.holds());
  CHECK_EQ(rig.held().host, 2 * kChunk);
  CHECK_EQ(rig.wake_up({a, b, c}), kCudaSuccess);
  CHECK(of_a.holds() && of_c.holds());
}

void both_kinds_in_one_call() {
  Rig rig;
  const int64_t a = rig.heap->new_tag(), b = rig.heap->new_tag();
  const Block of_a = rig.make(a, 2 * kChunk + kGranularity), of_b = rig.make(b, 3 * kChunk);
  CHECK_EQ(rig.sleep({b, a}, {a}), kCudaSuccess);
  CHECK(rig.held() == (Held{2, 0, 0, 0, 2 * kChunk + kGranularity}));
  CHECK_EQ(rig.wake_up({b, a}), kCudaSuccess);
  CHECK(of_a.holds() && rig.is_accessible(of_b));
  CHECK(rig.free(of_a) && rig.free(of_b));
  rig.check_all_gone();
}

// Also without the offloaded tag: what is kept already stays so.
void repeated_calls_change_nothing() {
  Rig rig;
  const int64_t tag = rig.heap->new_tag(), none = rig.heap->new_tag();
  const Block block = rig.make(tag, 3 * kChunk);
  CHECK_EQ(rig.wake_up({tag, none}), kCudaSuccess);
  CHECK_EQ(rig.sleep({tag, none}, {tag, none}), kCudaSuccess);
  const Held asleep = rig.held();
  CHECK_EQ(rig.sleep({tag}, {tag}), kCudaSuccess);
  CHECK_EQ(rig.sleep({tag}, {}), kCudaSuccess);
  rig.heap->cancel({tag, none});
  CHECK(rig.held() == asleep);
  rig.check_usage(tag, 1, 0, block.size, block.size);
  CHECK_EQ(rig.heap->stats().free_host_bytes, 0);
  CHECK_EQ(rig.wake_up({tag, tag}), kCudaSuccess);
  CHECK_EQ(rig.wake_up({tag}), kCudaSuccess);
  CHECK(block.holds());
  CHECK_EQ(rig.fake.calls(fake::kCopy), 6);
}

void blocks_made_while_others_sleep() {
  Rig rig;
  const int64_t tag = rig.heap->new_tag();
  const Block first = rig.make(tag, 2 * kChunk);
  CHECK_EQ(rig.sleep({tag}, {tag}), kCudaSuccess);
  const Block second = rig.make(tag, kChunk);
  rig.check_usage(tag, 2, kChunk, 2 * kChunk, 2 * kChunk);
  CHECK_EQ(rig.sleep({tag}, {tag}), kCudaSuccess);
  rig.check_usage(tag, 2, 0, 3 * kChunk, 3 * kChunk);
  CHECK_EQ(rig.wake_up({tag}), kCudaSuccess);
  CHECK(first.holds() && second.holds());
}

// As if it hadn't been offloaded; what is awake under the tag stays as it is.
void discarded_while_asleep() {
  Rig rig;
  const int64_t a = rig.heap->new_tag(), b = rig.heap->new_tag();
  const Block of_a = rig.make(a, 2 * kChunk), of_b = rig.make(b, kChunk);
  CHECK_EQ(rig.sleep({a, b}, {a, b}), kCudaSuccess);
  const Block awake = rig.make(a, kChunk);
  CHECK_EQ(rig.heap->prepare({a}), kCudaSuccess);
  rig.heap->discard({a});
  rig.check_usage(a, 2, kChunk, 2 * kChunk, 0);
  rig.check_usage(b, 1, 0, kChunk, kChunk);
  CHECK_EQ(rig.heap->stats().free_host_bytes, 2 * kChunk);
  CHECK_EQ(rig.wake_up({a, b}), kCudaSuccess);
  CHECK(awake.holds() && of_b.holds() && rig.is_accessible(of_a));
}

// Nothing can be using it: that doesn't wait for the device.
void freed_while_asleep() {
  Rig rig;
  const int64_t a = rig.heap->new_tag(), b = rig.heap->new_tag();
  const Block of_a = rig.make(a, 2 * kChunk), of_b = rig.make(b, kChunk);
  const Block rest = rig.make(a, kChunk);
  CHECK_EQ(rig.sleep({a, b}, {a}), kCudaSuccess);
  const int num_waits = rig.fake.calls(fake::kSync);
  CHECK(rig.free(of_a) && rig.free(of_b));
  CHECK_EQ(rig.fake.calls(fake::kSync), num_waits);
  CHECK(rig.held() == (Held{1, 0, 0, 0, 3 * kChunk}));
  CHECK_EQ(rig.heap->stats().free_host_bytes, 2 * kChunk);
  CHECK_EQ(rig.wake_up({a, b}), kCudaSuccess);
  CHECK(rest.holds());
  CHECK_EQ(rig.held().mappings, 1);
  CHECK(rig.free(rest));
  rig.check_all_gone();
}

void progress_counts_what_is_copied() {
  Rig rig;
  const int64_t a = rig.heap->new_tag(), b = rig.heap->new_tag();
  rig.make(a, 3 * kChunk);
  rig.make(b, 2 * kChunk);
  const auto check_all = [&](size_t bytes) {
    CHECK_EQ(rig.progress_now().done, bytes);
    CHECK_EQ(rig.progress_now().total, bytes);
  };
  CHECK_EQ(rig.sleep({a, b}, {a}), kCudaSuccess);
  check_all(3 * kChunk);
  CHECK_EQ(rig.wake_up({b}), kCudaSuccess);
  check_all(0);
  CHECK_EQ(rig.wake_up({a}), kCudaSuccess);
  check_all(3 * kChunk);
}

}  // namespace

std::vector<Test> sleep_tests() {
  return {
      TEST(offloaded_content_comes_back),
      TEST(discarded_content_takes_no_host_memory),
      TEST(sleep_waits_for_the_device),
      TEST(tags_sleep_one_by_one),
      TEST(both_kinds_in_one_call),
      TEST(repeated_calls_change_nothing),
      TEST(blocks_made_while_others_sleep),
      TEST(discarded_while_asleep),
      TEST(freed_while_asleep),
      TEST(progress_counts_what_is_copied),
  };
}

}  // namespace distcomm::tests
