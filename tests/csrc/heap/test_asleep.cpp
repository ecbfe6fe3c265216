// Segments without memory: what stays, what is refused, and what a failure leaves.

#include <cstring>

#include "rig.h"

namespace distcomm::tests {
namespace {

struct Sleeper : Rig {
  Sleeper() : Rig(kChunk, false, Fake::mapping_driver()), comm(fake.make_comm()) {
    CHECK_EQ(heap.reserve(kChunk), kNcclSuccess);
    inside = alloc(kPage);
    large = alloc(2 * kChunk);
    CHECK_EQ(register_all(comm), kNcclSuccess);
  }
  NcclResult fall_asleep(int64_t expected_bytes) {
    int64_t bytes = -1;
    const NcclResult result = heap.fall_asleep(&bytes);
    CHECK_EQ(bytes, expected_bytes);
    return result;
  }
  NcclResult wake_up() {
    int64_t bytes = -1;
    const NcclResult result = heap.wake_up(&bytes);
    CHECK(result == kNcclSuccess || bytes == 0);
    return result;
  }
  void sleep() {
    CHECK_EQ(heap.release_comm(comm, true), kNcclSuccess);
    CHECK_EQ(fall_asleep(3 * kChunk), kNcclSuccess);
  }
  void check_works() {
    CHECK_EQ(register_all(comm), kNcclSuccess);
    CHECK(window(inside, comm) != nullptr && window(large, comm) != nullptr);
    CHECK(rig_free(inside) && rig_free(large));
    heap.retire_all();
    release_comm(comm);
    check_all_gone();
  }
  bool rig_free(void* pointer) { return free(pointer); }

  NcclComm comm;
  char* inside;
  char* large;
};

void memory_goes_and_addresses_stay() {
  Sleeper rig;
  const int64_t ordinal = rig.ordinal(rig.large);
  rig.sleep();
  CHECK_EQ(rig.fake.num_memory(), 0u);
  CHECK_EQ(rig.fake.num_mappings(), 0u);
  CHECK_EQ(rig.fake.num_windows(), 0u);
  CHECK_EQ(rig.heap.stats().segments, 2);
  CHECK_EQ(rig.ordinal(rig.large), ordinal);
  CHECK_EQ(rig.fall_asleep(0), kNcclSuccess);  // once more does nothing
  CHECK_EQ(rig.wake_up(), kNcclSuccess);
  CHECK_EQ(rig.wake_up(), kNcclSuccess);
  CHECK_EQ(rig.fake.num_memory(), 2u);
  CHECK_EQ(rig.fake.num_mappings(), 2u);
  CHECK_EQ(rig.ordinal(rig.large), ordinal);
  rig.check_works();
}

void nothing_is_allocated_meanwhile() {
  Sleeper rig;
  rig.sleep();
  for (const size_t size : {kPage, 4 * kChunk}) {  // in a free range, and in a new segment
    CHECK(rig.alloc(size) == nullptr);
    CHECK_EQ(static_cast<int>(rig.heap.take_failure().kind), static_cast<int>(FailureKind::kAsleep));
  }
  CHECK(rig.heap.reserve(kChunk) != kNcclSuccess);
  CHECK(rig.heap.borrow(kPage) == nullptr);
  const int64_t used = rig.heap.stats().bytes_used;
  CHECK_EQ(rig.wake_up(), kNcclSuccess);
  CHECK_EQ(rig.heap.stats().bytes_used, used);
  char* const pointer = rig.alloc(kPage);
  CHECK_EQ(pointer, rig.inside + kPage);
  CHECK(rig.free(pointer));
  rig.check_works();
}

void what_is_freed_asleep_needs_no_memory() {
  Sleeper rig;
  rig.sleep();
  CHECK(rig.free(rig.large));  // a segment of its own
  CHECK_EQ(rig.heap.stats().segments, 1);
  CHECK_EQ(rig.wake_up(), kNcclSuccess);
  CHECK_EQ(rig.fake.num_memory(), 1u);
  CHECK(rig.free(rig.inside));
  rig.heap.retire_all();
  rig.check_all_gone();
}

void after_the_end_there_may_be_new_segments() {
  Sleeper rig;
  rig.sleep();
  rig.heap.retire_all();  // tensors still lie in them
  char* const next = rig.alloc(kPage);
  CHECK(next != nullptr);
  CHECK_EQ(rig.fake.num_memory(), 1u);
  for (char* const pointer : {rig.inside, rig.large, next}) CHECK(rig.free(pointer));
  rig.check_all_gone();
}

void windows_and_registrations_keep_it_awake() {
  Sleeper rig;
  CHECK(rig.heap.can_sleep());  // once its windows have ended
  CHECK(rig.fall_asleep(0) != kNcclSuccess);
  CHECK(std::strstr(rig.heap.take_failure().text, "segment 0 still has windows") != nullptr);
  CHECK_EQ(rig.wake_up(), kNcclSuccess);
  CHECK_EQ(rig.heap.release_comm(rig.comm, true), kNcclSuccess);
  rig.heap.pin_new(rig.comm);
  CHECK(!rig.heap.can_sleep());
  CHECK(rig.fall_asleep(0) != kNcclSuccess);
  CHECK(std::strstr(rig.heap.take_failure().text, "is being registered") != nullptr);
  rig.heap.unpin(rig.comm);
  CHECK(rig.alloc(kPage) == nullptr);
  CHECK_EQ(rig.wake_up(), kNcclSuccess);
  char* const more = rig.alloc(kPage);
  CHECK(more != nullptr && rig.free(more));
  rig.check_works();
}

void one_segment_without_an_address_of_its_own_keeps_its_memory() {
  Sleeper rig;
  rig.fake.fail_at(fake::kMap);
  char* const unmapped = rig.alloc(4 * kChunk);
  rig.fake.fail_at(fake::kNoStep);
  CHECK(!rig.heap.can_sleep());
  CHECK(std::strstr(rig.heap.take_failure().text, "NCCL's own address") != nullptr);
  CHECK_EQ(rig.heap.release_comm(rig.comm, true), kNcclSuccess);
  CHECK(rig.fall_asleep(3 * kChunk) != kNcclSuccess);
  CHECK_EQ(rig.fake.num_memory(), 1u);
  rig.fake.fail_nth(fake::kAlloc, 2, 1);
  CHECK_EQ(rig.wake_up(), 1);  // only what this call took goes back
  CHECK_EQ(rig.fake.num_memory(), 1u);
  CHECK_EQ(rig.wake_up(), kNcclSuccess);
  CHECK_EQ(rig.fake.num_memory(), 3u);
  CHECK(rig.free(unmapped));
  rig.check_works();
}

void what_outlives_its_pool_is_left_alone() {
  Sleeper rig;
  rig.sleep();
  rig.heap.retire_all();  // with tensors asleep
  char* const awake = rig.alloc(kChunk);
  rig.heap.retire_all();  // and one awake
  char* const next = rig.alloc(kChunk);
  CHECK_EQ(rig.fall_asleep(kChunk), kNcclSuccess);
  CHECK_EQ(rig.fake.num_memory(), 1u);
  CHECK_EQ(rig.wake_up(), kNcclSuccess);
  CHECK_EQ(rig.fake.num_memory(), 2u);
  for (char* const pointer : {rig.inside, rig.large, awake, next}) CHECK(rig.free(pointer));
  rig.check_all_gone();
}

void what_does_not_go_is_tried_again() {
  for (const bool by_nccl : {true, false}) {
    Sleeper rig;
    CHECK_EQ(rig.heap.release_comm(rig.comm, true), kNcclSuccess);
    if (by_nccl) rig.fake.fail_nth(fake::kFree, 1, 3);
    if (!by_nccl) rig.fake.fail_at(fake::kUnmap);
    CHECK(rig.fall_asleep(by_nccl ? 2 * kChunk : 0) != kNcclSuccess);
    CHECK(std::strstr(rig.heap.take_failure().text, "ncclMemFree") != nullptr);
    CHECK(rig.alloc(kPage) == nullptr);  // whatever has memory still
    rig.fake.fail_at(fake::kNoStep);
    CHECK_EQ(rig.fall_asleep(by_nccl ? kChunk : 3 * kChunk), kNcclSuccess);
    CHECK_EQ(rig.wake_up(), kNcclSuccess);
    rig.check_works();
  }
}

void all_wakes_up_or_nothing() {
  Sleeper rig;
  rig.sleep();
  rig.fake.fail_nth(fake::kAlloc, 2, 1);
  CHECK_EQ(rig.wake_up(), 1);
  const AllocationFailure failure = rig.heap.take_failure();
  CHECK(std::strstr(failure.text, "ncclMemAlloc returned 1") != nullptr);
  CHECK_EQ(failure.bytes, 2 * kChunk);
  CHECK_EQ(rig.fake.num_memory(), 0u);
  CHECK_EQ(rig.fake.num_mappings(), 0u);
  for (const auto step : {fake::kRange, fake::kHandle, fake::kMap, fake::kAccess}) {
    rig.fake.fail_at(step);
    CHECK(rig.wake_up() != kNcclSuccess);
    CHECK_EQ(rig.fake.num_memory(), 0u);
    CHECK_EQ(rig.fake.num_mappings(), 0u);
    CHECK_EQ(rig.fake.num_handles(), 0u);
  }
  rig.fake.fail_at(fake::kNoStep);
  CHECK_EQ(rig.wake_up(), kNcclSuccess);
  rig.check_works();
}

}  // namespace

std::vector<Test> asleep_tests() {
  return {
      TEST(memory_goes_and_addresses_stay),
      TEST(nothing_is_allocated_meanwhile),
      TEST(what_is_freed_asleep_needs_no_memory),
      TEST(after_the_end_there_may_be_new_segments),
      TEST(windows_and_registrations_keep_it_awake),
      TEST(one_segment_without_an_address_of_its_own_keeps_its_memory),
      TEST(what_outlives_its_pool_is_left_alone),
      TEST(what_does_not_go_is_tried_again),
      TEST(all_wakes_up_or_nothing),
  };
}

}  // namespace distcomm::tests
