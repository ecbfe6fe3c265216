// Windows: what is registered, and what goes on during a registration.

#include <cstdint>
#include <cstring>
#include <future>
#include <vector>

#include "check.h"
#include "rig.h"

namespace distcomm::tests {
namespace {

void register_only_what_is_new() {
  Rig rig;
  const NcclComm a = rig.fake.make_comm(), b = rig.fake.make_comm();
  CHECK_EQ(rig.heap.num_new(a), 0u);
  char* const first = rig.alloc(1);
  CHECK_EQ(rig.heap.reserve(kPage), kNcclSuccess);
  CHECK_EQ(rig.heap.num_new(a), 2u);
  const std::vector<SegmentInfo> infos = rig.new_segments(a);
  CHECK_EQ(infos.size(), 2u);
  CHECK_EQ(infos[0].ordinal, 0);
  CHECK_EQ(infos[0].bytes, kChunk);
  CHECK_EQ(infos[1].ordinal, 1);
  CHECK_EQ(infos[1].bytes, kPage);
  int64_t null_windows = 7;
  CHECK_EQ(rig.heap.register_new(a, 0, &null_windows), kNcclSuccess);  // bounded
  CHECK_EQ(null_windows, 0);
  CHECK_EQ(rig.fake.calls(kRegister), 1);
  CHECK_EQ(rig.heap.num_new(a), 1u);
  CHECK_EQ(rig.new_segments(a).at(0).ordinal, 1);
  CHECK_EQ(rig.heap.register_new(a, kNone, &null_windows), kNcclSuccess);
  CHECK_EQ(rig.fake.calls(kRegister), 1);
  CHECK_EQ(rig.register_all(a), kNcclSuccess);
  CHECK_EQ(rig.fake.calls(kRegister), 2);
  CHECK_EQ(rig.heap.num_new(a), 0u);
  CHECK(rig.new_segments(a).empty());
  CHECK_EQ(rig.register_all(a), kNcclSuccess);
  CHECK_EQ(rig.heap.register_new(a, 0, &null_windows), kNcclSuccess);
  CHECK_EQ(rig.heap.num_new(a), 0u);
  CHECK_EQ(rig.fake.calls(kRegister), 2);
  CHECK_EQ(rig.heap.num_windows(a), 2u);
  CHECK_EQ(rig.heap.num_windows(b), 0u);
  CHECK(rig.window(first, b) == nullptr);
  CHECK_EQ(rig.new_segments(b).size(), 2u);
  CHECK_EQ(rig.heap.num_new(b), 2u);
  CHECK_EQ(rig.register_all(b), kNcclSuccess);
  CHECK(rig.window(first, a) == rig.fake.window_of(a, first));
  CHECK(rig.window(first + kPage, b) == rig.fake.window_of(b, first));
  CHECK(rig.window(first, a) != nullptr && rig.window(first, b) != nullptr);
  CHECK(rig.window(first, nullptr) == nullptr);
  CHECK_EQ(rig.heap.stats().registrations, 4);
  // The newest segment comes and goes: nothing is new again.
  char* const large = rig.alloc(2 * kChunk);
  CHECK_EQ(rig.heap.num_new(a), 1u);
  CHECK(rig.free(large));
  CHECK_EQ(rig.heap.num_new(a), 0u);
  CHECK_EQ(rig.heap.num_new(a), 0u);
  CHECK_EQ(rig.fake.calls(kRegister), 4);
  CHECK(rig.free(first));
  CHECK_EQ(rig.fake.num_windows(), 2u);
  CHECK_EQ(rig.heap.num_windows(a), 1u);
  rig.heap.retire_all();
  rig.check_all_gone();
}

void register_goes_on_after_a_failure() {
  Rig rig;
  const NcclComm comm = rig.fake.make_comm();
  for (int i = 0; i < 4; ++i) CHECK_EQ(rig.heap.reserve(kPage * (i + 1)), kNcclSuccess);
  rig.fake.fail_nth(kRegister, 3, 3);
  int64_t null_windows = 7;
  CHECK_EQ(rig.heap.register_new(comm, 3, &null_windows), 3);
  const AllocationFailure failure = rig.heap.take_failure();
  CHECK_EQ(failure.code, 3);
  CHECK_EQ(failure.bytes, 3 * kPage);
  CHECK(std::strstr(failure.text, "ncclCommWindowRegister returned 3") != nullptr);
  CHECK_EQ(rig.heap.stats().failed_allocations, 0);
  CHECK_EQ(rig.fake.calls(kRegister), 3);
  CHECK_EQ(rig.heap.num_windows(comm), 2u);
  CHECK_EQ(rig.heap.stats().registrations, 2);
  CHECK_EQ(rig.heap.num_new(comm), 2u);
  CHECK_EQ(rig.new_segments(comm).at(0).ordinal, 2);
  CHECK_EQ(rig.register_all(comm), kNcclSuccess);
  CHECK_EQ(rig.fake.calls(kRegister), 5);
  CHECK_EQ(rig.heap.num_windows(comm), 4u);
  CHECK_EQ(rig.heap.num_new(comm), 0u);
  // Nothing is pinned any more.
  rig.heap.retire_all();
  rig.check_all_gone();
}

void null_windows_are_counted() {
  Rig rig;
  const NcclComm comm = rig.fake.make_comm();
  char* const pointer = rig.alloc(1);
  CHECK_EQ(rig.heap.reserve(kPage), kNcclSuccess);
  rig.fake.give_null_windows(true);
  int64_t null_windows = 0;
  CHECK_EQ(rig.heap.register_new(comm, 1, &null_windows), kNcclSuccess);
  rig.fake.give_null_windows(false);
  CHECK_EQ(null_windows, 2);
  CHECK_EQ(rig.heap.num_windows(comm), 0u);
  CHECK_EQ(rig.heap.num_new(comm), 0u);
  CHECK(rig.window(pointer, comm) == nullptr);
  CHECK_EQ(rig.register_all(comm), kNcclSuccess);
  CHECK_EQ(rig.fake.calls(kRegister), 2);
  CHECK(rig.free(pointer));
  CHECK_EQ(rig.heap.abandon(comm, {1}), kNcclSuccess);
  CHECK_EQ(rig.fake.calls(kDeregister), 0);
  rig.check_all_gone();
}

void others_go_on_during_a_registration() {
  Rig rig;
  const NcclComm comm = rig.fake.make_comm(), other = rig.fake.make_comm();
  char* const first = rig.alloc(kChunk);
  char* const second = rig.alloc(kChunk);
  CHECK_EQ(rig.register_all(other), kNcclSuccess);
  rig.fake.block_registration(2);
  std::future<NcclResult> registration =
      std::async(std::launch::async, [&] { return rig.register_through(comm, 1); });
  rig.fake.wait_until_blocked();
  // A second one with this communicator fails, one with another doesn't.
  int64_t null_windows = 0;
  const int num_calls = rig.fake.calls();
  CHECK(rig.heap.register_new(comm, 1, &null_windows) != kNcclSuccess);
  CHECK(std::strlen(rig.heap.take_failure().text) > 0);
  CHECK_EQ(rig.fake.calls(), num_calls);
  CHECK_EQ(rig.register_all(other), kNcclSuccess);
  // Both segments are registered by now or soon: neither is freed, nor any of its windows ended.
  CHECK(rig.free(first) && rig.free(second));
  rig.heap.trim();
  CHECK_EQ(rig.fake.num_memory(), 2u);
  CHECK_EQ(rig.heap.stats().segments, 2);
  CHECK_EQ(rig.heap.stats().bytes_used, 0);
  CHECK_EQ(rig.fake.calls(kDeregister), 0);
  // They can be used again, and others come and go.
  char* const again = rig.alloc(kChunk);
  CHECK(again == first);
  char* const third = rig.alloc(2 * kChunk);
  CHECK_EQ(rig.ordinal(third), 2);
  CHECK_EQ(rig.heap.num_new(other), 1u);
  CHECK_EQ(rig.register_all(other), kNcclSuccess);
  CHECK(rig.window(third, other) != nullptr);
  CHECK(rig.heap.num_new(comm) > 0);
  CHECK(rig.free(third));
  CHECK(!rig.known(third));
  rig.fake.unblock();
  CHECK_EQ(registration.get(), kNcclSuccess);
  CHECK_EQ(rig.heap.num_new(comm), 0u);
  CHECK_EQ(rig.fake.num_memory(), 1u);
  CHECK_EQ(rig.heap.num_windows(comm), 1u);
  CHECK(rig.window(first, comm) == rig.fake.window_of(comm, first));
  CHECK(rig.free(again));
  rig.check_all_gone();
}

// A segment made while a registration is blocked isn't passed over, however far it was to go.
void segment_made_during_a_registration_is_new() {
  Rig rig;
  const NcclComm comm = rig.fake.make_comm();
  char* const first = rig.alloc(kChunk);
  rig.fake.block_registration(1);
  std::future<NcclResult> registration =
      std::async(std::launch::async, [&] { return rig.register_through(comm, 1000); });
  rig.fake.wait_until_blocked();
  char* const second = rig.alloc(kChunk);
  rig.fake.unblock();
  CHECK_EQ(registration.get(), kNcclSuccess);
  CHECK_EQ(rig.heap.num_new(comm), 1u);
  CHECK_EQ(rig.register_all(comm), kNcclSuccess);
  CHECK(rig.window(second, comm) != nullptr);
  CHECK(rig.free(first) && rig.free(second));
}

void pins_end_with_a_failed_registration() {
  Rig rig;
  const NcclComm comm = rig.fake.make_comm();
  char* pointers[3];
  for (char*& pointer : pointers) pointer = rig.alloc(kChunk);
  rig.fake.block_registration(2);
  rig.fake.fail_nth(kRegister, 2, 3);
  std::future<NcclResult> registration =
      std::async(std::launch::async, [&] { return rig.register_all(comm); });
  rig.fake.wait_until_blocked();
  for (char* pointer : pointers) CHECK(rig.free(pointer));
  CHECK_EQ(rig.fake.num_memory(), 3u);
  rig.fake.unblock();
  CHECK_EQ(registration.get(), 3);
  rig.check_all_gone();
  CHECK_EQ(rig.fake.calls(kDeregister), 1);
}

void pins_of_two_registrations() {
  Rig rig;
  const NcclComm a = rig.fake.make_comm(), b = rig.fake.make_comm();
  char* const pointer = rig.alloc(kChunk);
  rig.fake.block_registration(1);
  std::future<NcclResult> registration =
      std::async(std::launch::async, [&] { return rig.register_all(a); });
  rig.fake.wait_until_blocked();
  // It is pinned once more, freed, and let go by one of the two.
  CHECK_EQ(rig.register_all(b), kNcclSuccess);
  CHECK(rig.free(pointer));
  CHECK_EQ(rig.register_all(b), kNcclSuccess);
  CHECK_EQ(rig.fake.num_memory(), 1u);
  CHECK_EQ(rig.fake.num_windows(), 1u);
  rig.fake.unblock();
  CHECK_EQ(registration.get(), kNcclSuccess);
  rig.check_all_gone();
}

void comm_aborted_during_its_registration() {
  Rig rig;
  const NcclComm comm = rig.fake.make_comm();
  char* const first = rig.alloc(kChunk);
  char* const second = rig.alloc(kChunk);
  rig.fake.block_registration(2);
  std::future<NcclResult> registration =
      std::async(std::launch::async, [&] { return rig.register_all(comm); });
  rig.fake.wait_until_blocked();
  CHECK_EQ(rig.heap.release_comm(comm, false), kNcclSuccess);
  rig.fake.destroy_comm(comm);
  rig.fake.unblock();
  CHECK_EQ(registration.get(), fake::kAborted);
  rig.fake.make_comm_at(comm);
  CHECK_EQ(rig.heap.num_windows(comm), 0u);
  CHECK_EQ(rig.heap.num_new(comm), 2u);
  CHECK_EQ(rig.register_all(comm), kNcclSuccess);
  CHECK_EQ(rig.heap.num_windows(comm), 2u);
  CHECK(rig.free(first) && rig.free(second));
  rig.check_all_gone();
}

void ordinals_are_raised() {
  Rig rig;
  const NcclComm comm = rig.fake.make_comm();
  char* const first = rig.alloc(kChunk);
  rig.heap.raise_ordinal(10);
  rig.heap.raise_ordinal(4);
  CHECK_EQ(rig.heap.next_ordinal(), 10);
  CHECK_EQ(rig.heap.num_new(comm), 1u);
  CHECK_EQ(rig.register_all(comm), kNcclSuccess);
  CHECK_EQ(rig.heap.num_new(comm), 0u);
  char* const second = rig.alloc(kChunk);
  CHECK_EQ(rig.ordinal(second), 10);
  CHECK_EQ(rig.heap.num_new(comm), 1u);
  CHECK_EQ(rig.register_all(comm), kNcclSuccess);
  CHECK_EQ(rig.heap.num_windows(comm), 2u);
  CHECK(rig.free(first) && rig.free(second));
  rig.heap.raise_ordinal(20);
  CHECK_EQ(rig.heap.num_new(comm), 0u);
  rig.check_all_gone();
}

// `through` may be as large as can be.
void register_through_the_largest_ordinal() {
  Rig rig;
  const NcclComm comm = rig.fake.make_comm();
  char* const pointer = rig.alloc(1);
  CHECK_EQ(rig.register_through(comm, INT64_MAX), kNcclSuccess);
  CHECK_EQ(rig.heap.num_new(comm), 0u);
  CHECK(rig.free(pointer));
}

}  // namespace

std::vector<Test> window_tests() {
  return {
      TEST(register_only_what_is_new), TEST(register_goes_on_after_a_failure),
      TEST(null_windows_are_counted), TEST(others_go_on_during_a_registration),
      TEST(segment_made_during_a_registration_is_new), TEST(pins_end_with_a_failed_registration),
      TEST(pins_of_two_registrations), TEST(comm_aborted_during_its_registration),
      TEST(ordinals_are_raised), TEST(register_through_the_largest_ordinal),
  };
}

}  // namespace distcomm::tests
