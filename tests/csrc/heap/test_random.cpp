// Random sequences of steps against a model.

#include <algorithm>
#include <cstdint>
#include <iterator>
#include <optional>
#include <utility>
#include <vector>

#include "check.h"
#include "chooser.h"
#include "model.h"
#include "rig.h"

namespace distcomm::tests {
namespace {

// A heap and its model, taken through the same steps.
class Runner {
 public:
  explicit Runner(bool downwards) : rig_(kChunk, downwards) {
    for (NcclComm& comm : comms_) comm = rig_.fake.make_comm();
  }

  // Returns something that must be the same in every heap.
  std::pair<int64_t, int64_t> step(Op op) {
    rig_.fake.use();
    if (op.alloc_fails) rig_.fake.fail_nth(kAlloc, 1, op.code);
    if (op.free_fails) rig_.fake.fail_nth(kFree, 1, op.code);
    if (op.register_fails > 0) rig_.fake.fail_nth(kRegister, op.register_fails, op.code);
    if (op.failing_comm != kNone) rig_.fake.fail_deregister_of(comms_[op.failing_comm], op.code);
    rig_.fake.give_null_windows(op.null_windows);
    rig_.fake.fail_at(op.failing_step);
    const int num_waits = rig_.fake.num_waits() + waits(op);
    const std::pair<int64_t, int64_t> outcome = apply(op);
    CHECK_EQ(rig_.fake.num_waits(), num_waits);
    rig_.fake.clear_failures();
    compare();
    return outcome;
  }

  Model& model() { return model_; }

  void finish() {
    step(Op{Kind::kAlloc});  // which gives back what is pending
    for (int comm = 0; comm < kNumComms; ++comm) {
      Op op{Kind::kUnpin};
      op.comm = comm;
      step(op);
    }
    while (!model_.live.empty()) {
      Op op{Kind::kFree};
      op.index = model_.live.size() / 2;
      step(op);
    }
    step(Op{Kind::kRetireAll});
    step(Op{Kind::kTrim});
    rig_.check_all_gone();
  }

 private:
  using Outcome = std::pair<int64_t, int64_t>;

  Outcome apply(Op& op) {
    switch (op.kind) {
      case Kind::kAlloc: return alloc(op);
      case Kind::kFree: return free(op);
      case Kind::kBadFree: return bad_free(op);
      case Kind::kReserve: return reserve(op);
      case Kind::kRegister: return register_new(op);
      case Kind::kPin: return pin_new(op);
      case Kind::kUnpin:
        rig_.heap.unpin(comms_[op.comm]);
        model_.unpin(op.comm, op);
        return {0, 0};
      case Kind::kPassOver:
        rig_.heap.pass_over(comms_[op.comm], op.ordinals);
        for (const int64_t ordinal : op.ordinals) {
          if (model_.segment(ordinal) == nullptr) continue;
          model_.windows.insert({{ordinal, op.comm}, false});
        }
        return {0, 0};
      case Kind::kAbandon: return abandon(op);
      case Kind::kReleaseComm: return release_comm(op);
      case Kind::kFreeze:
        rig_.heap.freeze(op.flag);
        model_.frozen = op.flag;
        return {0, 0};
      case Kind::kTrim:
        rig_.heap.trim();
        model_.release_all_empty(op);
        return {0, 0};
      case Kind::kRetireAll:
        rig_.heap.retire_all();
        for (Model::Segment& segment : model_.segments) segment.retired = true;
        model_.release_all_empty(op);
        return {0, 0};
      case Kind::kRaise:
        rig_.heap.raise_ordinal(op.ordinal);
        model_.next_ordinal = std::max(model_.next_ordinal, op.ordinal);
        return {0, 0};
    }
    return {0, 0};
  }

  bool is_free(const Op& op) const { return op.kind == Kind::kFree || op.kind == Kind::kBadFree; }
  // Whether it waits for the device, in vain or not; and whether that succeeds.
  bool waits(const Op& op) const {
    if (op.stream != kPlainStream) return false;
    return is_free(op) || (op.kind == Kind::kAlloc && !model_.pending.empty());
  }
  bool idles(const Op& op) const { return waits(op) && op.failing_step == fake::kNoStep; }

  Model::Segment& add_segment(size_t size, bool slab) {
    char* const base = static_cast<char*>(rig_.fake.last_memory());
    CHECK_EQ(rig_.fake.size_of(base), size);
    ++model_.counters.segments_made;
    model_.segments.push_back({model_.next_ordinal++, size, base, slab, false});
    return model_.segments.back();
  }

  Outcome alloc(Op& op) {
    char* const pointer = rig_.alloc(op.size, op.stream);
    if (idles(op)) model_.give_back_pending(op);
    const size_t size = std::max((op.size + kPage - 1) / kPage * kPage, kPage);
    ++model_.counters.allocations;
    std::optional<Model::Gap> gap = model_.best_fit(size);
    const bool native = !gap && (model_.frozen || op.stream == kPlainStream);
    if (!gap && (!native || op.alloc_fails)) {
      CHECK(pointer == nullptr);
      ++model_.counters.failed_allocations;
      const AllocationFailure failure = rig_.heap.take_failure();
      CHECK_EQ(static_cast<int>(failure.kind),
               static_cast<int>(native ? FailureKind::kNccl : FailureKind::kCapturing));
      CHECK_EQ(failure.code, native ? op.code : kNcclSuccess);
      return {kNone, failure.bytes};
    }
    CHECK(pointer != nullptr);
    if (!gap && model_.frozen) {
      ++model_.counters.ordinary_allocations;
      CHECK_EQ(rig_.fake.size_of(pointer), size);
      model_.live.push_back({pointer, kNone, 0, size});
      return {kNone, 0};
    }
    if (!gap) gap = Model::Gap{&add_segment(std::max(size, kChunk), false), 0, 0};
    CHECK(pointer == gap->segment->base + gap->offset);
    const Location location = rig_.at(pointer);
    CHECK_EQ(location.ordinal, gap->segment->ordinal);
    CHECK_EQ(location.offset, gap->offset);
    gap->segment->used.push_back({gap->offset, size});
    model_.live.push_back({pointer, location.ordinal, gap->offset, size});
    return {location.ordinal, location.offset};
  }

  Outcome free(Op& op) {
    const Model::Live one = model_.live.at(op.index);
    model_.live.erase(model_.live.begin() + op.index);
    CHECK(rig_.heap.free(one.pointer, op.stream));
    give_back(one, op);
    if (one.ordinal == kNone) CHECK_EQ(rig_.fake.size_of(one.pointer), idles(op) ? 0 : one.size);
    return {one.ordinal, one.offset};
  }

  Outcome bad_free(Op& op) {
    char* pointer = reinterpret_cast<char*>(op.size);
    if (op.flag) pointer = model_.live.at(op.index).pointer + 1 + op.size % (kPage - 1);
    const bool idle = idles(op);
    CHECK_EQ(rig_.heap.free(pointer, op.stream), !idle);
    give_back({pointer, kUnknown, 0, 0}, op);
    return {idle, 0};
  }

  void give_back(const Model::Live& one, Op& op) {
    if (!idles(op)) {
      model_.pending.push_back(one);
      return;
    }
    model_.give_back_pending(op);
    model_.give_back(one, op);
  }

  Outcome reserve(const Op& op) {
    const NcclResult result = rig_.heap.reserve(op.size);
    CHECK_EQ(result, op.alloc_fails ? op.code : kNcclSuccess);
    if (result == kNcclSuccess) {
      add_segment(std::max((op.size + kPage - 1) / kPage * kPage, kPage), true);
    } else {
      ++model_.counters.failed_allocations;
    }
    return {result, 0};
  }

  Outcome register_new(const Op& op) {
    const int num_calls = rig_.fake.calls(kRegister);
    int64_t null_windows = 0;
    const NcclResult result = rig_.heap.register_new(comms_[op.comm], op.ordinal, &null_windows);
    const std::vector<int64_t> unseen = model_.unseen(op.comm, op.ordinal);
    size_t num_done = unseen.size();
    const bool fails = op.register_fails > 0 && op.register_fails <= static_cast<int>(num_done);
    if (fails) num_done = op.register_fails - 1;
    CHECK_EQ(result, fails ? op.code : kNcclSuccess);
    CHECK_EQ(rig_.fake.calls(kRegister) - num_calls, num_done + fails);
    CHECK_EQ(null_windows, op.null_windows ? num_done : 0);
    for (size_t i = 0; i < num_done; ++i) {
      model_.windows[{unseen[i], op.comm}] = !op.null_windows;
    }
    model_.counters.registrations += num_done;
    return {result, num_done};
  }

  Outcome pin_new(const Op& op) {
    const std::vector<SegmentInfo> infos = rig_.heap.pin_new(comms_[op.comm]);
    check_new(op.comm, infos);
    for (const SegmentInfo& info : infos) {
      ++model_.segment(info.ordinal)->num_pins;
      model_.pinned[op.comm].push_back(info.ordinal);
    }
    return {infos.size(), 0};
  }

  void check_new(int comm, const std::vector<SegmentInfo>& infos) {
    const std::vector<int64_t> unseen = model_.unseen(comm, model_.next_ordinal);
    CHECK_EQ(infos.size(), unseen.size());
    for (size_t i = 0; i < unseen.size(); ++i) {
      CHECK_EQ(infos[i].ordinal, unseen[i]);
      CHECK_EQ(infos[i].bytes, model_.segment(unseen[i])->size);
      CHECK_EQ(infos[i].address, reinterpret_cast<intptr_t>(model_.segment(unseen[i])->base));
    }
  }

  Outcome abandon(Op& op) {
    const NcclResult result = rig_.heap.abandon(comms_[op.comm], op.ordinals);
    NcclResult expected = kNcclSuccess;
    for (const int64_t ordinal : op.ordinals) {
      Model::Segment* const segment = model_.segment(ordinal);
      if (segment == nullptr) continue;
      segment->retired = true;
      if (!model_.end_window(ordinal, op.comm, op)) expected = op.code;
      model_.release_if_empty(ordinal, op);
    }
    CHECK_EQ(result, expected);
    return {result, 0};
  }

  Outcome release_comm(Op& op) {
    // Its windows may outlive memory that was pinned by it.
    if (!op.flag || op.failing_comm == op.comm) rig_.fake.doom_comm(comms_[op.comm]);
    const NcclResult result = rig_.heap.release_comm(comms_[op.comm], op.flag);
    bool has_window = false;
    for (auto it = model_.windows.begin(); it != model_.windows.end();) {
      const bool ours = it->first.second == op.comm;
      has_window |= ours && it->second;
      Model::Segment* const segment = ours ? model_.segment(it->first.first) : nullptr;
      if (segment != nullptr) {  // stays until its window has ended
        ++segment->num_pins;
        model_.pinned[op.comm].push_back(segment->ordinal);
      }
      it = ours ? model_.windows.erase(it) : std::next(it);
    }
    CHECK_EQ(result, op.flag && has_window && op.failing_comm == op.comm ? op.code : 0);
    model_.unpin(op.comm, op);
    rig_.fake.destroy_comm(comms_[op.comm]);
    rig_.fake.make_comm_at(comms_[op.comm]);  // the next one, at the same address
    return {result, 0};
  }

  void compare() {
    rig_.check_violations();
    SegmentHeap& heap = rig_.heap;
    const HeapStats actual = heap.stats(), expected = model_.stats();
    CHECK_EQ(actual.segments, expected.segments);
    CHECK_EQ(actual.slabs, expected.slabs);
    CHECK_EQ(actual.retired_segments, expected.retired_segments);
    CHECK_EQ(actual.bytes_reserved, expected.bytes_reserved);
    CHECK_EQ(actual.bytes_used, expected.bytes_used);
    CHECK_EQ(actual.largest_free, expected.largest_free);
    CHECK_EQ(actual.ordinary_bytes, expected.ordinary_bytes);
    CHECK_EQ(actual.ordinary_allocations, expected.ordinary_allocations);
    CHECK_EQ(actual.allocations, expected.allocations);
    CHECK_EQ(actual.failed_allocations, expected.failed_allocations);
    CHECK_EQ(actual.segments_made, expected.segments_made);
    CHECK_EQ(actual.registrations, expected.registrations);
    CHECK_EQ(actual.failed_releases, expected.failed_releases);
    CHECK_EQ(actual.unknown_frees, expected.unknown_frees);
    CHECK_EQ(heap.num_ordinary(), expected.ordinary_allocations);
    CHECK_EQ(heap.next_ordinal(), model_.next_ordinal);
    const std::vector<Model::Live> ordinary = model_.ordinary();
    for (const Model::Live& one : ordinary) CHECK(!rig_.known(one.pointer));
    CHECK_EQ(rig_.fake.num_memory(), model_.segments.size() + ordinary.size());
    size_t num_windows = 0;
    for (int comm = 0; comm < kNumComms; ++comm) {
      size_t num_of_comm = 0;
      for (const Model::Segment& segment : model_.segments) {
        const auto found = model_.windows.find({segment.ordinal, comm});
        const bool has = found != model_.windows.end() && found->second;
        num_of_comm += has;
        const Location location = rig_.at(segment.base + segment.size - 1, comms_[comm]);
        CHECK_EQ(location.ordinal, segment.ordinal);
        CHECK_EQ(location.offset, segment.size - 1);
        CHECK_EQ(location.segment_bytes, segment.size);
        CHECK_EQ(location.window != nullptr, has);
        CHECK(location.window == rig_.fake.window_of(comms_[comm], segment.base));
      }
      CHECK_EQ(heap.num_windows(comms_[comm]), num_of_comm);
      num_windows += num_of_comm;
      // Asking moves the mark of what has been seen: with and without that.
      if (++num_compared_ % 4 != 0) continue;
      if (model_.pinned[comm].empty()) check_new(comm, rig_.new_segments(comms_[comm]));
      CHECK_EQ(heap.num_new(comms_[comm]), model_.unseen(comm, model_.next_ordinal).size());
    }
    CHECK_EQ(rig_.fake.num_windows(), num_windows);
  }

  Rig rig_;
  Model model_;
  NcclComm comms_[kNumComms];
  unsigned num_compared_ = 0;
};

void random_sequences() {
  constexpr unsigned long kNumSeeds = 200;
  constexpr int kNumSteps = 400;
  for (unsigned long i = 0; i < kNumSeeds; ++i) {
    g_case = g_seed * kNumSeeds + i;
    Chooser chooser(g_case);
    Runner upwards(false), downwards(true);
    for (int step = 0; step < kNumSteps; ++step) {
      const Op op = chooser.choose(upwards.model());
      CHECK(upwards.step(op) == downwards.step(op));
    }
    upwards.finish();
    downwards.finish();
  }
}

}  // namespace

std::vector<Test> random_tests() {
  return {TEST(random_sequences)};
}

}  // namespace distcomm::tests
