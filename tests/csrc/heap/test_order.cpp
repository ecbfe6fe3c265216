// Memory at rising addresses, wherever NCCL puts it.

#include "rig.h"

namespace distcomm::tests {
namespace {

constexpr size_t kRange = 8 * kChunk;

struct Memory {
  Fake fake{true};  // each address of NCCL's lies below the one before
  NcclSymbols symbols = Fake::symbols();
  CudaDriver driver = Fake::mapping_driver();
  OrderedMemory memory{symbols, driver, fake::kDevice, kRange};

  char* alloc(size_t size = kChunk) {
    NcclResult result = kNcclSuccess;
    char* const pointer = static_cast<char*>(memory.alloc(size, &result));
    CHECK_EQ(pointer == nullptr, result != kNcclSuccess);
    return pointer;
  }
  ~Memory() {
    CHECK(fake.violations().empty());
    CHECK_EQ(fake.num_memory(), 0u);
    CHECK_EQ(fake.num_mappings(), 0u);
    CHECK_EQ(fake.num_handles(), 0u);
  }
};

bool is_second(const void* pointer) {
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  return address >= Fake::kSecond && address < Fake::kSecond + kRange;
}

void each_lies_above_those_that_live() {
  Memory m;
  char* const first = m.alloc();
  char* const second = m.alloc(3 * kPage);
  char* const third = m.alloc();
  CHECK_EQ(reinterpret_cast<uintptr_t>(first), Fake::kSecond);
  CHECK_EQ(second, first + kChunk);
  CHECK_EQ(third, second + 3 * kPage);
  CHECK_EQ(m.memory.free(second), kNcclSuccess);
  char* const fourth = m.alloc(kPage);  // not into the gap
  CHECK_EQ(fourth, third + kChunk);
  for (char* const pointer : {third, fourth}) CHECK_EQ(m.memory.free(pointer), kNcclSuccess);
  CHECK_EQ(m.alloc(), second);  // above all that live, which is only the first
  for (char* const pointer : {first, second}) CHECK_EQ(m.memory.free(pointer), kNcclSuccess);
}

void where_it_cannot_be_mapped_it_stays() {
  for (const auto step : {fake::kRetain, fake::kPush, fake::kReserve, fake::kRange, fake::kHandle,
                          fake::kMap, fake::kAccess}) {
    Memory m;
    m.fake.fail_at(step);
    char* const pointer = m.alloc();
    CHECK_EQ(static_cast<void*>(pointer), m.fake.last_memory());
    CHECK_EQ(m.fake.num_handles(), 0u);
    CHECK_EQ(m.fake.num_mappings(), 0u);
    m.fake.fail_at(fake::kNoStep);
    char* const next = m.alloc();
    CHECK_EQ(is_second(next), step != fake::kReserve);  // which is tried once
    for (char* const each : {pointer, next}) CHECK_EQ(m.memory.free(each), kNcclSuccess);
  }
}

void a_full_range_is_no_failure() {
  Memory m;
  char* const most = m.alloc(kRange - kPage);
  char* const too_large = m.alloc(2 * kPage);
  char* const last = m.alloc(kPage);
  CHECK(is_second(most) && !is_second(too_large) && is_second(last));
  for (char* const pointer : {too_large, last, most}) {
    CHECK_EQ(m.memory.free(pointer), kNcclSuccess);
  }
}

void what_fails_to_go_can_be_tried_again() {
  Memory m;
  char* const pointer = m.alloc();
  m.fake.fail_nth(fake::kFree, 1, 1);
  CHECK_EQ(m.memory.free(pointer), 1);
  CHECK_EQ(m.fake.num_mappings(), 1u);
  CHECK_EQ(m.fake.num_memory(), 1u);
  m.fake.fail_at(fake::kUnmap);
  CHECK_EQ(m.memory.free(pointer), kNcclUnhandledCudaError);
  CHECK_EQ(m.fake.num_memory(), 0u);
  CHECK_EQ(m.alloc(kPage), pointer + kChunk);  // what is still mapped is in the way
  m.fake.fail_at(fake::kNoStep);
  CHECK_EQ(m.memory.free(pointer), kNcclSuccess);
  CHECK_EQ(m.memory.free(pointer + kChunk), kNcclSuccess);
}

void segments_and_ordinary_memory_are_in_order() {
  Rig rig(kChunk, true, Fake::mapping_driver());
  const NcclComm comm = rig.fake.make_comm();
  std::vector<char*> pointers;
  for (int i = 0; i < 3; ++i) pointers.push_back(rig.alloc(kChunk));
  CHECK_EQ(rig.register_all(comm), kNcclSuccess);
  for (char* const pointer : pointers) CHECK(rig.window(pointer + kPage, comm) != nullptr);
  CHECK(rig.free(pointers[1]));
  CHECK_EQ(rig.fake.num_windows(), 2u);
  pointers[1] = rig.alloc(kChunk);
  CHECK(pointers[0] < pointers[2] && pointers[2] < pointers[1]);
  rig.heap.freeze(true);
  pointers.push_back(rig.alloc(kChunk));
  CHECK(!rig.known(pointers.back()) && pointers.back() > pointers[1]);
  CHECK_EQ(rig.heap.stats().out_of_order, 0);
  CHECK_EQ(rig.heap.stats().not_mapped, 0);
  for (char* const pointer : pointers) CHECK(rig.free(pointer));
  rig.release_comm(comm);
  rig.check_all_gone();
}

void disorder_is_counted() {
  Rig rig(kChunk, true);
  char* const first = rig.alloc(kChunk);
  char* const second = rig.alloc(kChunk);
  CHECK(second < first);
  CHECK_EQ(rig.heap.stats().out_of_order, 1);
  CHECK_EQ(rig.heap.stats().not_mapped, 2);
  CHECK(rig.free(first) && rig.free(second));
  rig.check_all_gone();
}

}  // namespace

std::vector<Test> order_tests() {
  return {
      TEST(each_lies_above_those_that_live),
      TEST(where_it_cannot_be_mapped_it_stays),
      TEST(a_full_range_is_no_failure),
      TEST(what_fails_to_go_can_be_tried_again),
      TEST(segments_and_ordinary_memory_are_in_order),
      TEST(disorder_is_counted),
  };
}

}  // namespace distcomm::tests
