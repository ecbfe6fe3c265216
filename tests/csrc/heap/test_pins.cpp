// Segments that are pinned or passed over, and registrations that nobody waits for any more.

#include <future>
#include <vector>

#include "check.h"
#include "rig.h"

namespace distcomm::tests {
namespace {

void pinned_segments_stay_until_unpin() {
  Rig rig;
  const NcclComm comm = rig.fake.make_comm(), other = rig.fake.make_comm();
  char* const first = rig.alloc(kChunk);
  CHECK_EQ(rig.heap.reserve(kPage), kNcclSuccess);
  char* const second = rig.alloc(kChunk);
  const std::vector<SegmentInfo> infos = rig.heap.pin_new(comm);
  CHECK_EQ(infos.size(), 3u);
  CHECK_EQ(infos[2].ordinal, 2);
  CHECK_EQ(infos[2].bytes, kChunk);
  CHECK_EQ(infos[2].address, reinterpret_cast<intptr_t>(second));
  CHECK_EQ(rig.heap.num_new(comm), 3u);  // pinned isn't seen
  char* const later = rig.alloc(kChunk);
  CHECK(rig.free(later));  // not pinned
  CHECK_EQ(rig.fake.num_memory(), 3u);
  CHECK_EQ(rig.register_all(other), kNcclSuccess);
  CHECK(rig.free(first));
  rig.heap.trim();
  rig.heap.retire_all();
  CHECK_EQ(rig.fake.num_memory(), 3u);
  CHECK_EQ(rig.fake.calls(kDeregister), 0);
  CHECK_EQ(rig.heap.num_windows(other), 3u);
  rig.heap.unpin(other);  // which has no pins
  CHECK_EQ(rig.fake.num_memory(), 3u);
  rig.heap.unpin(comm);
  CHECK_EQ(rig.fake.calls(kDeregister), 2);
  CHECK_EQ(rig.fake.num_memory(), 1u);
  CHECK_EQ(rig.ordinal(second), 2);
  rig.heap.unpin(comm);
  CHECK(rig.free(second));
  rig.check_all_gone();
}

void pinned_segments_are_used_again() {
  Rig rig;
  const NcclComm comm = rig.fake.make_comm();
  char* const first = rig.alloc(kChunk);
  rig.heap.pin_new(comm);
  CHECK(rig.free(first));
  CHECK(rig.alloc(kChunk) == first);
  rig.heap.unpin(comm);
  CHECK_EQ(rig.fake.num_memory(), 1u);
  CHECK(rig.free(first));
  rig.check_all_gone();
}

void pins_nest() {
  Rig rig;
  const NcclComm a = rig.fake.make_comm(), b = rig.fake.make_comm();
  char* const pointer = rig.alloc(kChunk);
  rig.heap.pin_new(a);
  rig.heap.pin_new(a);
  rig.heap.pin_new(b);
  rig.fake.block_registration(1);
  std::future<NcclResult> registration =
      std::async(std::launch::async, [&] { return rig.register_all(a); });
  rig.fake.wait_until_blocked();
  CHECK(rig.free(pointer));
  rig.heap.unpin(a);
  rig.heap.unpin(b);
  CHECK_EQ(rig.fake.num_memory(), 1u);  // pinned by the registration
  rig.heap.pin_new(a);
  rig.fake.unblock();
  CHECK_EQ(registration.get(), kNcclSuccess);
  CHECK_EQ(rig.fake.num_memory(), 1u);
  CHECK_EQ(rig.heap.num_windows(a), 1u);
  CHECK_EQ(rig.heap.pin_new(a).size(), 0u);  // nothing new, and nothing let go
  CHECK_EQ(rig.heap.pin_new(b).size(), 1u);
  rig.heap.unpin(a);
  CHECK_EQ(rig.fake.num_memory(), 1u);
  CHECK_EQ(rig.fake.num_windows(), 1u);
  rig.heap.unpin(b);
  rig.check_all_gone();
}

void abandoned_while_pinned() {
  Rig rig;
  const NcclComm comm = rig.fake.make_comm(), other = rig.fake.make_comm();
  CHECK_EQ(rig.heap.reserve(kPage), kNcclSuccess);
  rig.heap.pin_new(comm);
  CHECK_EQ(rig.heap.abandon(other, {0}), kNcclSuccess);
  CHECK_EQ(rig.fake.num_memory(), 1u);
  CHECK_EQ(rig.heap.stats().retired_segments, 1);
  CHECK_EQ(rig.heap.pin_new(other).size(), 0u);
  rig.heap.unpin(comm);
  rig.check_all_gone();
}

void release_comm_unpins() {
  for (const bool deregister : {false, true}) {
    Rig rig;
    const NcclComm comm = rig.fake.make_comm(), other = rig.fake.make_comm();
    char* const first = rig.alloc(kChunk);
    char* const second = rig.alloc(kChunk);
    CHECK_EQ(rig.register_through(comm, 0), kNcclSuccess);
    CHECK_EQ(rig.register_all(other), kNcclSuccess);
    CHECK_EQ(rig.heap.pin_new(comm).size(), 1u);
    CHECK(rig.free(second));
    CHECK_EQ(rig.fake.num_memory(), 2u);
    CHECK_EQ(rig.heap.release_comm(comm, deregister), kNcclSuccess);
    CHECK_EQ(rig.fake.num_memory(), 1u);
    CHECK_EQ(rig.heap.num_windows(other), 1u);
    rig.fake.destroy_comm(comm);
    CHECK(rig.free(first));
    rig.check_all_gone();
  }
}

void passed_over_is_seen() {
  Rig rig;
  const NcclComm comm = rig.fake.make_comm(), other = rig.fake.make_comm();
  char* const first = rig.alloc(kChunk);
  char* const second = rig.alloc(kChunk);
  char* const third = rig.alloc(kChunk);
  CHECK_EQ(rig.register_through(comm, 0), kNcclSuccess);
  rig.heap.pass_over(comm, {});
  rig.heap.pass_over(comm, {0, 1, 77, kNone});
  CHECK_EQ(rig.heap.num_new(comm), 1u);
  CHECK_EQ(rig.new_segments(comm).at(0).ordinal, 2);
  CHECK_EQ(rig.heap.num_new(other), 3u);
  CHECK_EQ(rig.register_all(comm), kNcclSuccess);
  CHECK_EQ(rig.fake.calls(kRegister), 2);
  CHECK_EQ(rig.heap.num_new(comm), 0u);
  CHECK_EQ(rig.heap.num_windows(comm), 2u);
  CHECK(rig.window(first, comm) == rig.fake.window_of(comm, first));  // it had one already
  CHECK(rig.window(first, comm) != nullptr);
  CHECK(rig.window(second, comm) == nullptr);
  CHECK_EQ(rig.register_all(other), kNcclSuccess);
  CHECK_EQ(rig.heap.num_windows(other), 3u);
  CHECK(rig.window(second, other) != nullptr);
  // What lies before it is new still.
  const NcclComm third_comm = rig.fake.make_comm();
  rig.heap.pass_over(third_comm, {1});
  CHECK_EQ(rig.heap.num_new(third_comm), 2u);
  CHECK_EQ(rig.new_segments(third_comm).at(0).ordinal, 0);
  // A later segment may have the number that was unknown.
  rig.heap.raise_ordinal(77);
  char* const fourth = rig.alloc(kChunk);
  CHECK_EQ(rig.ordinal(fourth), 77);
  CHECK_EQ(rig.heap.num_new(comm), 1u);
  rig.heap.pass_over(comm, {77});
  CHECK_EQ(rig.heap.num_new(comm), 0u);
  // Its memory goes, with nothing to deregister; and so does what is known of it.
  CHECK(rig.free(fourth));
  CHECK_EQ(rig.fake.calls(kDeregister), 0);
  for (char* pointer : {first, second, third}) CHECK(rig.free(pointer));
  CHECK_EQ(rig.fake.calls(kDeregister), 5);
  rig.check_all_gone();
}

void cancelled_registration_is_undone() {
  Rig rig;
  const NcclComm comm = rig.fake.make_comm(), other = rig.fake.make_comm();
  char* pointers[4];
  for (char*& pointer : pointers) pointer = rig.alloc(kChunk);
  CHECK_EQ(rig.register_through(comm, 0), kNcclSuccess);
  rig.fake.block_registration(2);
  std::future<NcclResult> registration =
      std::async(std::launch::async, [&] { return rig.register_all(comm); });
  rig.fake.wait_until_blocked();
  rig.heap.cancel_registration(comm);
  CHECK_EQ(rig.register_through(other, 2), kNcclSuccess);
  CHECK(rig.free(pointers[3]));
  CHECK_EQ(rig.fake.num_memory(), 4u);
  const int num_calls = rig.fake.calls(kRegister);
  rig.fake.unblock();
  registration.get();
  CHECK_EQ(rig.fake.calls(kRegister), num_calls);  // none of the last segment
  CHECK_EQ(rig.fake.num_memory(), 3u);             // nor is that pinned any more
  // What it got has ended, and is new still. What the communicator had before stays.
  CHECK_EQ(rig.fake.calls(kDeregister), 2);
  CHECK_EQ(rig.heap.num_windows(comm), 1u);
  CHECK_EQ(rig.fake.num_windows(), 4u);
  CHECK_EQ(rig.heap.num_windows(other), 3u);
  CHECK(rig.window(pointers[0], comm) != nullptr);
  CHECK(rig.window(pointers[1], comm) == nullptr);
  CHECK_EQ(rig.heap.num_new(comm), 2u);
  // The next communicator at this address has nothing to do with that.
  rig.release_comm(comm);
  rig.fake.make_comm_at(comm);
  CHECK_EQ(rig.register_all(comm), kNcclSuccess);
  CHECK_EQ(rig.heap.num_windows(comm), 3u);
  CHECK_EQ(rig.heap.num_new(comm), 0u);
  for (int i = 0; i < 3; ++i) CHECK(rig.free(pointers[i]));
  rig.check_all_gone();
}

void cancelled_registration_of_all_there_is() {
  Rig rig;
  const NcclComm comm = rig.fake.make_comm();
  char* const pointer = rig.alloc(kChunk);
  rig.fake.block_registration(1);
  std::future<NcclResult> registration =
      std::async(std::launch::async, [&] { return rig.register_all(comm); });
  rig.fake.wait_until_blocked();
  rig.heap.cancel_registration(comm);
  rig.fake.unblock();
  registration.get();
  CHECK_EQ(rig.heap.num_new(comm), 1u);
  CHECK_EQ(rig.heap.num_windows(comm), 0u);
  CHECK_EQ(rig.fake.num_windows(), 0u);
  CHECK(rig.free(pointer));
  rig.check_all_gone();
}

void cancelled_registration_that_fails() {
  Rig rig;
  const NcclComm comm = rig.fake.make_comm();
  char* const first = rig.alloc(kChunk);
  char* const second = rig.alloc(kChunk);
  rig.fake.block_registration(2);
  rig.fake.fail_nth(kRegister, 2, 3);
  std::future<NcclResult> registration =
      std::async(std::launch::async, [&] { return rig.register_all(comm); });
  rig.fake.wait_until_blocked();
  rig.heap.cancel_registration(comm);
  CHECK(rig.free(second));
  rig.fake.unblock();
  CHECK_EQ(registration.get(), 3);
  CHECK_EQ(rig.fake.num_windows(), 0u);
  CHECK_EQ(rig.heap.num_windows(comm), 0u);
  CHECK_EQ(rig.fake.num_memory(), 1u);
  CHECK(rig.free(first));
  rig.check_all_gone();
}

}  // namespace

std::vector<Test> pin_tests() {
  return {
      TEST(pinned_segments_stay_until_unpin), TEST(pinned_segments_are_used_again),
      TEST(pins_nest), TEST(abandoned_while_pinned), TEST(release_comm_unpins),
      TEST(passed_over_is_seen), TEST(cancelled_registration_is_undone),
      TEST(cancelled_registration_of_all_there_is), TEST(cancelled_registration_that_fails),
  };
}

}  // namespace distcomm::tests
