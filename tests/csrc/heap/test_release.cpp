// The end of windows: communicators released, segments abandoned.

#include <future>
#include <vector>

#include "check.h"
#include "rig.h"

namespace distcomm::tests {
namespace {

void release_comm_forgets_it() {
  for (const bool deregister : {true, false}) {
    Rig rig;
    const NcclComm comm = rig.fake.make_comm(), other = rig.fake.make_comm();
    CHECK_EQ(rig.heap.release_comm(comm, deregister), kNcclSuccess);
    char* const pointer = rig.alloc(1);
    CHECK_EQ(rig.register_all(comm), kNcclSuccess);
    CHECK_EQ(rig.register_all(other), kNcclSuccess);
    CHECK_EQ(rig.heap.release_comm(comm, deregister), kNcclSuccess);
    CHECK_EQ(rig.fake.calls(kDeregister), deregister ? 1 : 0);
    CHECK_EQ(rig.fake.num_windows(), deregister ? 1u : 2u);
    rig.fake.destroy_comm(comm);
    CHECK_EQ(rig.heap.num_windows(comm), 0u);
    CHECK_EQ(rig.heap.num_windows(other), 1u);
    CHECK(rig.window(pointer, comm) == nullptr);
    // The next one at this address knows nothing of it.
    rig.fake.make_comm_at(comm);
    CHECK_EQ(rig.heap.num_new(comm), 1u);
    CHECK_EQ(rig.register_all(comm), kNcclSuccess);
    CHECK_EQ(rig.heap.num_windows(comm), 1u);
    CHECK(rig.free(pointer));
    rig.check_all_gone();
  }
}

void release_comm_tells_of_a_failure() {
  Rig rig;
  const NcclComm comm = rig.fake.make_comm();
  for (int i = 0; i < 3; ++i) CHECK_EQ(rig.heap.reserve(kPage), kNcclSuccess);
  CHECK_EQ(rig.register_all(comm), kNcclSuccess);
  rig.fake.fail_nth(kDeregister, 2, 4);
  CHECK_EQ(rig.heap.release_comm(comm, true), 4);
  CHECK_EQ(rig.fake.calls(kDeregister), 3);  // the others end all the same
  CHECK_EQ(rig.heap.num_windows(comm), 0u);
  rig.fake.destroy_comm(comm);
  rig.heap.retire_all();
  rig.check_all_gone();
}

void abandon_retires() {
  Rig rig;
  const NcclComm comm = rig.fake.make_comm(), other = rig.fake.make_comm();
  const NcclComm unknown = rig.fake.make_comm();
  CHECK_EQ(rig.heap.reserve(4 * kPage), kNcclSuccess);
  CHECK_EQ(rig.heap.reserve(4 * kPage), kNcclSuccess);
  CHECK_EQ(rig.heap.reserve(4 * kPage), kNcclSuccess);
  char* const pointer = rig.alloc(kPage);
  CHECK_EQ(rig.ordinal(pointer), 0);
  CHECK_EQ(rig.register_through(comm, 1), kNcclSuccess);
  CHECK_EQ(rig.register_through(other, 1), kNcclSuccess);
  CHECK_EQ(rig.heap.abandon(comm, {0, 17, kNone}), kNcclSuccess);
  CHECK(rig.window(pointer, comm) == nullptr);
  CHECK(rig.window(pointer, other) != nullptr);
  CHECK_EQ(rig.heap.num_windows(comm), 1u);
  CHECK_EQ(rig.heap.num_windows(other), 2u);
  CHECK_EQ(rig.heap.stats().retired_segments, 1);
  CHECK_EQ(rig.heap.stats().largest_free, 4 * kPage);
  char* const next = rig.alloc(kPage);
  CHECK_EQ(rig.ordinal(next), 1);
  // Not registered again, and one abandoned before it was registered never is.
  CHECK_EQ(rig.heap.abandon(unknown, {2}), kNcclSuccess);
  CHECK_EQ(rig.fake.num_memory(), 2u);  // empty, so freed at once, slab or not
  CHECK_EQ(rig.heap.num_new(comm), 0u);
  CHECK_EQ(rig.new_segments(unknown).size(), 1u);
  CHECK_EQ(rig.register_all(comm), kNcclSuccess);
  CHECK_EQ(rig.fake.calls(kRegister), 4);
  CHECK(rig.free(pointer));  // the other's window ends with the memory
  CHECK(!rig.known(pointer));
  CHECK_EQ(rig.heap.num_windows(other), 1u);
  CHECK(rig.free(next));
  // A failure is told, and what is left of the window ends later.
  rig.fake.fail_deregister_of(comm, 4);
  char* const last = rig.alloc(kPage);
  CHECK_EQ(rig.heap.abandon(comm, {1}), 4);
  CHECK(rig.window(last, comm) != nullptr);
  rig.fake.clear_failures();
  CHECK(rig.free(last));
  rig.check_all_gone();
}

void abandon_during_anothers_registration() {
  Rig rig;
  const NcclComm comm = rig.fake.make_comm(), other = rig.fake.make_comm();
  CHECK_EQ(rig.heap.reserve(kPage), kNcclSuccess);
  CHECK_EQ(rig.register_all(other), kNcclSuccess);
  rig.fake.block_registration(1);
  std::future<NcclResult> registration =
      std::async(std::launch::async, [&] { return rig.register_all(comm); });
  rig.fake.wait_until_blocked();
  CHECK_EQ(rig.heap.abandon(other, {0}), kNcclSuccess);
  CHECK_EQ(rig.fake.num_memory(), 1u);
  CHECK_EQ(rig.heap.stats().retired_segments, 1);
  rig.fake.unblock();
  CHECK_EQ(registration.get(), kNcclSuccess);
  rig.check_all_gone();
}

}  // namespace

std::vector<Test> release_tests() {
  return {
      TEST(release_comm_forgets_it), TEST(release_comm_tells_of_a_failure), TEST(abandon_retires),
      TEST(abandon_during_anothers_registration),
  };
}

}  // namespace distcomm::tests
