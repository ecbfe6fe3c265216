// Ranges: best fit, ties, merging, and segments that come and go.

#include <algorithm>
#include <optional>
#include <vector>

#include "check.h"
#include "range_allocator.h"

namespace distcomm::tests {
namespace {

void check_take(RangeAllocator& ranges, size_t size, int64_t ordinal, size_t offset) {
  const std::optional<Range> range = ranges.take(size);
  CHECK(range.has_value());
  CHECK_EQ(range->ordinal, ordinal);
  CHECK_EQ(range->offset, offset);
}

void ranges_best_fit() {
  RangeAllocator ranges;
  CHECK_EQ(ranges.largest(), 0u);
  CHECK(!ranges.take(1));
  ranges.add(0, 100);
  ranges.add(1, 30);
  ranges.add(2, 50);
  check_take(ranges, 25, 1, 0);   // of 100, 30 and 50
  check_take(ranges, 25, 2, 0);   // of 100, 5 and 50
  check_take(ranges, 25, 2, 25);  // of 100, 5 and 25: an exact fit
  check_take(ranges, 5, 1, 25);
  check_take(ranges, 60, 0, 0);
  CHECK_EQ(ranges.largest(), 40u);
  CHECK(!ranges.take(41));
  check_take(ranges, 40, 0, 60);
  CHECK_EQ(ranges.largest(), 0u);
  CHECK_EQ(ranges.give_back(0, 60), 40u);
  CHECK_EQ(ranges.give_back(0, 60), 0u);  // twice
  CHECK_EQ(ranges.give_back(0, 1), 0u);   // interior
}

void ranges_ties() {
  RangeAllocator ranges;
  ranges.add(7, 20);  // the lowest ordinal wins, not the first added
  ranges.add(3, 20);
  check_take(ranges, 10, 3, 0);
  check_take(ranges, 10, 3, 10);
  check_take(ranges, 10, 7, 0);
  check_take(ranges, 10, 7, 10);
  ranges.add(4, 50);
  for (size_t offset = 0; offset < 50; offset += 10) check_take(ranges, 10, 4, offset);
  // Two holes of one size in one segment: the lower, in whatever order they came to be.
  ranges.give_back(4, 30);
  ranges.give_back(4, 10);
  ranges.give_back(7, 10);
  check_take(ranges, 10, 4, 10);
  check_take(ranges, 10, 4, 30);
  check_take(ranges, 10, 7, 10);
}

void ranges_coalesce_in_every_order() {
  std::vector<size_t> order = {0, 1, 2, 3, 4};
  do {
    RangeAllocator ranges;
    ranges.add(0, 50);
    for (size_t i = 0; i < 5; ++i) check_take(ranges, 10, 0, 10 * i);
    std::vector<bool> free(5);
    for (size_t i = 0; i < 5; ++i) {
      CHECK(!ranges.all_free(0));
      CHECK_EQ(ranges.give_back(0, 10 * order[i]), 10u);
      free[order[i]] = true;
      size_t run = 0, longest = 0;
      for (const bool is_free : free) {
        run = is_free ? run + 10 : 0;
        longest = std::max(longest, run);
      }
      CHECK_EQ(ranges.largest(), longest);
    }
    CHECK(ranges.all_free(0));
    check_take(ranges, 50, 0, 0);
  } while (std::next_permutation(order.begin(), order.end()));
}

void ranges_retire_and_remove() {
  RangeAllocator ranges;
  ranges.add(0, 30);
  ranges.add(1, 40);
  check_take(ranges, 10, 0, 0);
  check_take(ranges, 10, 0, 10);
  ranges.retire(0);
  CHECK_EQ(ranges.largest(), 40u);
  check_take(ranges, 10, 1, 0);
  CHECK_EQ(ranges.give_back(0, 0), 10u);
  ranges.retire(0);
  CHECK_EQ(ranges.give_back(0, 10), 10u);
  CHECK(ranges.all_free(0));
  CHECK_EQ(ranges.largest(), 30u);
  ranges.remove(0);
  CHECK_EQ(ranges.give_back(1, 0), 10u);
  ranges.remove(1);
  CHECK_EQ(ranges.largest(), 0u);
  CHECK(!ranges.take(1));
}

}  // namespace

std::vector<Test> range_tests() {
  return {
      TEST(ranges_best_fit), TEST(ranges_ties), TEST(ranges_coalesce_in_every_order),
      TEST(ranges_retire_and_remove),
  };
}

}  // namespace distcomm::tests
