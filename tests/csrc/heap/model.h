// Steps that a heap can be taken through, and a model of what it should be after them.
#pragma once

#include <algorithm>
#include <map>
#include <optional>
#include <utility>
#include <vector>

#include "check.h"
#include "rig.h"

namespace distcomm::tests {

enum class Kind {
  kAlloc, kFree, kBadFree, kReserve, kRegister, kPin, kUnpin, kPassOver, kAbandon,
  kReleaseComm, kFreeze, kTrim, kRetireAll, kRaise
};

struct Op {
  Kind kind;
  size_t size = 0;
  size_t index = 0;    // of what is allocated
  int comm = 0;
  int64_t ordinal = 0;  // or how far to register
  std::vector<int64_t> ordinals = {};
  CudaStream stream = kPlainStream;
  bool flag = false;
  // What goes wrong; 0 is nothing.
  NcclResult code = 0;
  bool alloc_fails = false;
  bool free_fails = false;  // the first
  int register_fails = 0;   // the n-th
  int failing_comm = kNone;  // its deregistrations
  bool null_windows = false;
  fake::Step failing_step = fake::kNoStep;
};

constexpr int kNumComms = 3;
constexpr int64_t kUnknown = -2;

// What the heap should be, by linear search through lists.
struct Model {
  struct Used {
    size_t offset, size;
  };
  struct Segment {
    int64_t ordinal;
    size_t size;
    char* base;
    bool slab;
    bool retired;
    std::vector<Used> used = {};
    int num_pins = 0;
  };
  struct Live {
    char* pointer;
    int64_t ordinal;  // kNone for ordinary memory, kUnknown for what was never allocated
    size_t offset, size;
  };
  struct Gap {
    Segment* segment;
    size_t offset, size;
  };

  std::vector<Segment> segments;
  std::vector<Live> live;
  std::vector<Live> pending;  // freed, and not given back yet
  std::vector<int64_t> pinned[kNumComms];
  std::map<std::pair<int64_t, int>, bool> windows;  // ordinal and communicator; false for NULL
  int64_t next_ordinal = 0;
  bool frozen = false;
  HeapStats counters{};

  std::vector<Gap> gaps() {
    std::vector<Gap> all;
    for (Segment& segment : segments) {
      if (segment.retired) continue;
      std::sort(segment.used.begin(), segment.used.end(),
                [](const Used& a, const Used& b) { return a.offset < b.offset; });
      size_t end = 0;
      for (const Used& used : segment.used) {
        if (used.offset > end) all.push_back({&segment, end, used.offset - end});
        CHECK(used.offset >= end);  // no overlap
        end = used.offset + used.size;
      }
      CHECK(end <= segment.size);
      if (end < segment.size) all.push_back({&segment, end, segment.size - end});
    }
    return all;
  }
  std::optional<Gap> best_fit(size_t size) {
    std::optional<Gap> best;
    for (const Gap& gap : gaps()) {
      if (gap.size >= size && (!best || gap.size < best->size)) best = gap;
    }
    return best;
  }
  Segment* segment(int64_t ordinal) {
    for (Segment& segment : segments) {
      if (segment.ordinal == ordinal) return &segment;
    }
    return nullptr;
  }
  std::vector<int64_t> unseen(int comm, int64_t through) {
    std::vector<int64_t> ordinals;
    for (const Segment& segment : segments) {
      if (segment.ordinal <= through && !segment.retired &&
          windows.count({segment.ordinal, comm}) == 0) {
        ordinals.push_back(segment.ordinal);
      }
    }
    return ordinals;
  }
  bool end_window(int64_t ordinal, int comm, const Op& op) {
    const auto found = windows.find({ordinal, comm});
    if (found == windows.end()) return true;
    if (found->second && op.failing_comm == comm) return false;
    windows.erase(found);
    return true;
  }
  void release_if_empty(int64_t ordinal, Op& op) {
    Segment* const found = segment(ordinal);
    if (found == nullptr || !found->used.empty() || (found->slab && !found->retired)) return;
    if (found->num_pins > 0) return;
    bool ok = true;
    for (int comm = 0; comm < kNumComms; ++comm) ok = end_window(ordinal, comm, op) && ok;
    if (ok && op.free_fails) ok = op.free_fails = false;
    if (!ok) {
      ++counters.failed_releases;
      found->retired = true;
      return;
    }
    segments.erase(segments.begin() + (found - segments.data()));
  }
  void release_all_empty(Op& op) {
    std::vector<int64_t> ordinals;
    for (const Segment& segment : segments) ordinals.push_back(segment.ordinal);
    for (const int64_t ordinal : ordinals) release_if_empty(ordinal, op);
  }
  void unpin(int comm, Op& op) {
    std::vector<int64_t> ordinals;
    std::swap(ordinals, pinned[comm]);
    for (const int64_t ordinal : ordinals) {
      --segment(ordinal)->num_pins;
      release_if_empty(ordinal, op);
    }
  }
  void give_back(const Live& one, Op& op) {
    if (one.ordinal == kUnknown) ++counters.unknown_frees;
    if (one.ordinal < 0) return;
    std::vector<Used>& used = segment(one.ordinal)->used;
    used.erase(std::find_if(used.begin(), used.end(),
                            [&](const auto& range) { return range.offset == one.offset; }));
    release_if_empty(one.ordinal, op);
  }
  void give_back_pending(Op& op) {
    for (const Live& one : pending) give_back(one, op);
    pending.clear();
  }
  // Memory of its own, freed or not.
  std::vector<Live> ordinary() const {
    std::vector<Live> all;
    for (const std::vector<Live>* list : {&live, &pending}) {
      for (const Live& one : *list) {
        if (one.ordinal == kNone) all.push_back(one);
      }
    }
    return all;
  }
  HeapStats stats() {
    HeapStats stats = counters;
    for (const Segment& segment : segments) {
      ++stats.segments;
      stats.slabs += segment.slab;
      stats.retired_segments += segment.retired;
      stats.bytes_reserved += segment.size;
      for (const Used& used : segment.used) stats.bytes_used += used.size;
    }
    for (const Gap& gap : gaps()) {
      stats.largest_free = std::max<int64_t>(stats.largest_free, gap.size);
    }
    for (const Live& one : ordinary()) stats.ordinary_bytes += one.size;
    return stats;
  }
};

}  // namespace distcomm::tests
