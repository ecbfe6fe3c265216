// Which bytes of which segment are in use: bookkeeping alone, no memory is touched.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>
#include <set>
#include <tuple>

namespace distcomm {

// A part of a numbered segment.
struct Range {
  int64_t ordinal;
  size_t offset;
};

// Best fit over all segments, ties going to the lowest segment and offset: the same sequence of
// calls gives the same ranges in every process. Neighbouring free ranges are merged at once.
class RangeAllocator {
 public:
  // A new segment, all free. `ordinal` must be unused.
  void add(int64_t ordinal, size_t size);
  // Forgets a segment that is all free.
  void remove(int64_t ordinal);
  // Nothing is taken from this segment any more; what is in use stays so.
  void retire(int64_t ordinal);

  std::optional<Range> take(size_t size);
  // The size of the range given back; 0 if no range in use begins there.
  size_t give_back(int64_t ordinal, size_t offset);

  bool all_free(int64_t ordinal) const;
  // The largest range that take() could give.
  size_t largest() const;

 private:
  struct Segment {
    size_t size;
    bool retired = false;
    std::map<size_t, size_t> free;  // offset -> size
    std::map<size_t, size_t> used;
  };

  void insert_free(int64_t ordinal, Segment& segment, size_t offset, size_t size);
  void erase_free(int64_t ordinal, Segment& segment, std::map<size_t, size_t>::iterator range);

  std::map<int64_t, Segment> segments_;
  std::set<std::tuple<size_t, int64_t, size_t>> by_size_;  // size, ordinal, offset
};

}  // namespace distcomm
