#include "range_allocator.h"

#include <iterator>

namespace distcomm {

void RangeAllocator::add(int64_t ordinal, size_t size) {
  Segment& segment = segments_[ordinal];
  segment.size = size;
  insert_free(ordinal, segment, 0, size);
}

void RangeAllocator::remove(int64_t ordinal) {
  retire(ordinal);
  segments_.erase(ordinal);
}

void RangeAllocator::retire(int64_t ordinal) {
  Segment& segment = segments_.at(ordinal);
  segment.retired = true;
  for (const auto& [offset, size] : segment.free) by_size_.erase({size, ordinal, offset});
}

std::optional<Range> RangeAllocator::take(size_t size) {
  const auto best = by_size_.lower_bound({size, INT64_MIN, 0});
  if (best == by_size_.end()) return std::nullopt;
  const auto [free_size, ordinal, offset] = *best;
  Segment& segment = segments_.at(ordinal);
  erase_free(ordinal, segment, segment.free.find(offset));
  if (free_size > size) insert_free(ordinal, segment, offset + size, free_size - size);
  segment.used[offset] = size;
  return Range{ordinal, offset};
}

size_t RangeAllocator::give_back(int64_t ordinal, size_t offset) {
  Segment& segment = segments_.at(ordinal);
  const auto used = segment.used.find(offset);
  if (used == segment.used.end()) return 0;
  const size_t given = used->second;
  segment.used.erase(used);
  size_t begin = offset, end = offset + given;
  const auto after = segment.free.find(end);
  if (after != segment.free.end()) {
    end += after->second;
    erase_free(ordinal, segment, after);
  }
  const auto next = segment.free.lower_bound(begin);
  if (next != segment.free.begin()) {
    const auto before = std::prev(next);
    if (before->first + before->second == begin) {
      begin = before->first;
      erase_free(ordinal, segment, before);
    }
  }
  insert_free(ordinal, segment, begin, end - begin);
  return given;
}

bool RangeAllocator::all_free(int64_t ordinal) const {
  return segments_.at(ordinal).used.empty();
}

size_t RangeAllocator::largest() const {
  return by_size_.empty() ? 0 : std::get<0>(*by_size_.rbegin());
}

void RangeAllocator::insert_free(int64_t ordinal, Segment& segment, size_t offset, size_t size) {
  segment.free[offset] = size;
  if (!segment.retired) by_size_.insert({size, ordinal, offset});
}

void RangeAllocator::erase_free(int64_t ordinal, Segment& segment,
                                std::map<size_t, size_t>::iterator range) {
  by_size_.erase({range->second, ordinal, range->first});
  segment.free.erase(range);
}

}  // namespace distcomm
