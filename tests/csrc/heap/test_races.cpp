// What happens in one thread while another is in the middle of a call.

#include <future>
#include <vector>

#include "check.h"
#include "rig.h"

namespace distcomm::tests {
namespace {

// What is freed during a capture while a call waits for the device has not been waited for.
void freed_while_alloc_waits() {
  Rig rig;
  CHECK_EQ(rig.heap.reserve(4 * kPage), kNcclSuccess);
  char* const first = rig.alloc(kPage);
  char* const second = rig.alloc(kPage);
  CHECK(rig.free(first, kCapturingStream));
  rig.fake.block_wait();
  std::future<char*> got = std::async(std::launch::async, [&] { return rig.alloc(2 * kPage); });
  rig.fake.wait_until_blocked();
  CHECK(rig.free(second, kCapturingStream));
  rig.fake.unblock();
  CHECK(got.get() == second + kPage);  // not the two, of which one is still in use
  CHECK_EQ(rig.heap.stats().bytes_used, 3 * kPage);
}

void freed_while_free_waits() {
  Rig rig;
  CHECK_EQ(rig.heap.reserve(4 * kPage), kNcclSuccess);
  char* const first = rig.alloc(kPage);
  char* const second = rig.alloc(kPage);
  rig.fake.block_wait();
  std::future<bool> freed = std::async(std::launch::async, [&] { return rig.free(first); });
  rig.fake.wait_until_blocked();
  CHECK(rig.free(second, kCapturingStream));
  rig.fake.unblock();
  CHECK(freed.get());
  CHECK_EQ(rig.heap.stats().bytes_used, kPage);
}

// A communicator that is gone when its cancelled registration returns isn't given to NCCL again.
void cancelled_registration_of_a_released_comm() {
  Rig rig;
  const NcclComm comm = rig.fake.make_comm();
  char* const first = rig.alloc(kChunk);
  char* const second = rig.alloc(kChunk);
  rig.fake.block_registration(2);
  std::future<NcclResult> registration =
      std::async(std::launch::async, [&] { return rig.register_all(comm); });
  rig.fake.wait_until_blocked();
  rig.heap.cancel_registration(comm);
  CHECK_EQ(rig.heap.release_comm(comm, false), kNcclSuccess);
  rig.fake.destroy_comm(comm);
  rig.fake.unblock();
  CHECK_EQ(registration.get(), fake::kAborted);
  rig.check_violations();
  CHECK_EQ(rig.fake.calls(kDeregister), 0);
  CHECK(rig.free(first) && rig.free(second));
}

void alloc_after_shut_down_gives_nothing_back() {
  Rig rig;
  char* const first = rig.alloc(kChunk);
  CHECK(rig.free(first, kCapturingStream));
  rig.heap.shut_down();
  rig.alloc(1);
  CHECK_EQ(rig.fake.calls(kFree), 0);
}

}  // namespace

std::vector<Test> race_tests() {
  return {
      TEST(freed_while_alloc_waits),
      TEST(freed_while_free_waits),
      TEST(cancelled_registration_of_a_released_comm),
      TEST(alloc_after_shut_down_gives_nothing_back),
  };
}

}  // namespace distcomm::tests
