// Random sequences of steps against a model, and transfers of which many calls fail.

#include <algorithm>
#include <cstdint>
#include <random>
#include <vector>

#include "rig.h"

namespace distcomm::tests {
namespace {

constexpr int kNumTags = 3;

struct Part {
  size_t begin, end;
  bool is_awake = true;
  bool is_offloaded = false;
  bool is_known = true;  // whether it has the block's content, here or in host memory
};
struct ModelBlock {
  Block block;
  int64_t tag;
  std::vector<Part> parts;
};

bool has(const Tags& tags, int64_t tag) {
  return std::find(tags.begin(), tags.end(), tag) != tags.end();
}

// A heap and its model, taken through the same steps.
class Runner {
 public:
  explicit Runner(unsigned long seed) : random_(seed) {
    for (int64_t& tag : tags_) tag = rig_.heap->new_tag();
  }

  void step() {
    // The calls of one operation, of which at most one fails.
    const size_t dice = below(100);
    if (below(3) == 0) rig_.fake.fail_nth_of_any(1 + below(below(4) == 0 ? 80 : 12), 2 + below(9));
    failed_before_ = num_failed();
    if (dice < 30 && blocks_.size() < 8) {
      alloc();
    } else if (dice < 45 && !blocks_.empty()) {
      free(below(blocks_.size()));
    } else if (dice < 65) {
      sleep();
    } else if (dice < 90) {
      wake_up();
    } else if (dice < 94) {
      rig_.heap->prepare(some_tags());
    } else if (dice < 96) {
      rig_.heap->cancel(some_tags());
    } else if (dice < 98) {
      rig_.heap->trim_host();
    } else {
      rig_.set_others(below(3) * kCapacity / 3);
    }
    rig_.fake.clear_failures();
    compare();
  }

  void finish() {
    rig_.set_others(0);
    for (int i = 0; i < kNumTags; ++i) rig_.heap->settle();
    CHECK_EQ(rig_.wake_up(Tags(tags_, tags_ + kNumTags)), kCudaSuccess);
    wake_parts(Tags(tags_, tags_ + kNumTags));
    compare();
    while (!blocks_.empty()) free(blocks_.size() - 1);
    rig_.check_all_gone();
    CHECK_EQ(rig_.heap->stats().unknown_frees, 0);
  }

 private:
  size_t below(size_t limit) { return random_() % limit; }
  size_t num_failed() const {
    size_t all = 0;
    for (int call = 0; call < fake::kNumCalls; ++call) {
      all += rig_.fake.failed(static_cast<fake::Call>(call));
    }
    return all;
  }
  Tags some_tags() {
    Tags some;
    for (const int64_t tag : tags_) {
      if (below(2) == 0) some.push_back(tag);
    }
    return some;
  }

  void alloc() {
    const size_t size = (1 + below(13)) * kGranularity;
    const int64_t tag = tags_[below(kNumTags)];
    const Block block{static_cast<char*>(rig_.alloc(tag, size)), size, random_()};
    if (block.pointer == nullptr) {
      CHECK(num_failed() > failed_before_ || rig_.free_bytes() < size);
      return;
    }
    fake::fill(block.pointer, size, block.seed);
    blocks_.push_back({block, tag, {}});
    for (size_t begin = 0; begin < size; begin += kChunk) {
      blocks_.back().parts.push_back({begin, std::min(begin + kChunk, size)});
    }
  }

  void free(size_t which) {
    CHECK(rig_.free(blocks_[which].block, below(4) == 0 ? kCapturingStream : kPlainStream));
    blocks_.erase(blocks_.begin() + which);
    has_pending_ = true;
  }

  void sleep() {
    const Tags tags = some_tags();
    Tags offloaded;
    for (const int64_t tag : tags) {
      if (below(2) == 0) offloaded.push_back(tag);
    }
    const bool succeeded = rig_.sleep(tags, offloaded) == kCudaSuccess;
    CHECK(succeeded || num_failed() > failed_before_);
    size_t num_saved = 0, num_kept = 0, num_discarded = 0;
    for (ModelBlock& each : blocks_) {
      if (!has(tags, each.tag)) continue;
      for (Part& part : each.parts) {
        if (!part.is_awake) continue;
        part.is_offloaded = has(offloaded, each.tag);
        part.is_awake =
            !succeeded && rig_.is_accessible(each.block, part.begin, part.end);
        (part.is_awake ? num_kept : part.is_offloaded ? num_saved : num_discarded) += 1;
        if (part.is_awake && !part.is_offloaded) --num_kept;
        part.is_known = part.is_known && (part.is_awake || part.is_offloaded);
        part.is_offloaded = part.is_offloaded && !part.is_awake;
      }
    }
    // Nothing has been discarded, and all is as before, unless all has been saved.
    CHECK(num_kept == 0 || num_saved + num_discarded == 0);
  }

  void wake_up() {
    const Tags tags = some_tags();
    const bool succeeded = rig_.wake_up(tags) == kCudaSuccess;
    if (succeeded) return wake_parts(tags);
    if (num_failed() > failed_before_) return;
    const SleepFailure failure = rig_.heap->take_failure();
    CHECK(failure.needed_bytes > failure.free_bytes);
    CHECK(failure.free_bytes >= 0);
  }

  void wake_parts(const Tags& tags) {
    for (ModelBlock& each : blocks_) {
      if (!has(tags, each.tag)) continue;
      bool is_known = true;
      for (Part& part : each.parts) {
        part.is_awake = true;
        part.is_offloaded = false;
        is_known = is_known && part.is_known;
        if (part.is_known) CHECK(each.block.holds(part.begin, part.end));
      }
      if (is_known) continue;
      each.block.seed = random_();
      fake::fill(each.block.pointer, each.block.size, each.block.seed);
      for (Part& part : each.parts) part.is_known = true;
    }
  }

  void compare() {
    rig_.check_violations();
    // What is freed counts until it is given back.
    if (has_pending_ && below(2) == 0) {
      rig_.heap->settle();
      has_pending_ = false;
    }
    std::vector<SleepUsage> usages(kNumTags + 1);
    for (const ModelBlock& each : blocks_) {
      SleepUsage& usage = usages.at(each.tag);
      ++usage.blocks;
      for (const Part& part : each.parts) {
        const size_t size = part.end - part.begin;
        (part.is_awake ? usage.mapped_bytes : usage.asleep_bytes) += size;
        if (part.is_offloaded) usage.offloaded_bytes += size;
        CHECK_EQ(rig_.is_accessible(each.block, part.begin, part.end), part.is_awake);
        if (part.is_awake && part.is_known) CHECK(each.block.holds(part.begin, part.end));
      }
    }
    if (has_pending_) return;
    size_t mapped = 0;
    for (const int64_t tag : tags_) {
      const SleepUsage& usage = usages.at(tag);
      rig_.check_usage(tag, usage.blocks, usage.mapped_bytes, usage.asleep_bytes,
                       usage.offloaded_bytes);
      mapped += usage.mapped_bytes;
    }
    CHECK_EQ(rig_.held().ranges, blocks_.size());
    if (rig_.fake.failed(fake::kRelease) > 0) return;
    CHECK_EQ(rig_.held().used, mapped);
    CHECK_EQ(rig_.held().host, rig_.heap->stats().host_bytes);
  }

  Rig rig_;
  int64_t tags_[kNumTags];
  std::mt19937_64 random_;
  std::vector<ModelBlock> blocks_;
  size_t failed_before_ = 0;
  bool has_pending_ = false;
};

void random_sequences() {
  constexpr unsigned long kNumSeeds = 100;
  constexpr int kNumSteps = 120;
  for (unsigned long i = 0; i < kNumSeeds; ++i) {
    g_case = g_seed * kNumSeeds + i;
    Runner runner(g_case);
    for (int step = 0; step < kNumSteps; ++step) runner.step();
    runner.finish();
  }
}

// Also where a call fails that undoes another one: content that is kept is never lost.
void many_failures() {
  constexpr unsigned long kNumSeeds = 500;
  for (unsigned long i = 0; i < kNumSeeds; ++i) {
    g_case = g_seed * kNumSeeds + i;
    std::mt19937_64 random(g_case);
    Rig rig;
    const int64_t tag = rig.heap->new_tag();
    const std::vector<Block> blocks = {rig.make(tag, 3 * kChunk), rig.make(tag, kGranularity),
                                       rig.make(tag, 2 * kChunk + kGranularity)};
    for (int step = 0; step < 12; ++step) {
      rig.fake.fail_one_in(2 + static_cast<int>(random() % 8),
                           {fake::kSync, fake::kCopy, fake::kCreate, fake::kRelease, fake::kMap,
                            fake::kUnmap, fake::kHostAlloc, fake::kSyncStream, fake::kAccess},
                           700, random());
      random() % 2 == 0 ? rig.sleep({tag}, {tag}) : rig.wake_up({tag});
      rig.fake.clear_failures();
      if (random() % 2 == 0) rig.heap->trim_host();
      rig.check_violations();
      if (random() % 2 == 0) continue;
      CHECK_EQ(rig.wake_up({tag}), kCudaSuccess);
      if (random() % 2 == 0) rig.heap->cancel({tag});
      for (const Block& block : blocks) CHECK(block.holds());
    }
    for (const Block& block : blocks) CHECK(rig.free(block));
    rig.check_all_gone();
  }
}

}  // namespace

std::vector<Test> random_sleep_tests() {
  return {TEST(random_sequences), TEST(many_failures)};
}

}  // namespace distcomm::tests
