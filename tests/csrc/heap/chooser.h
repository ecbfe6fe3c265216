// What a random sequence does next.
#pragma once

#include <cstdint>
#include <random>

#include "model.h"
#include "rig.h"

namespace distcomm::tests {

class Chooser {
 public:
  explicit Chooser(unsigned long seed) : engine_(seed) {}
  size_t below(size_t limit) { return engine_() % limit; }
  bool one_in(size_t n) { return below(n) == 0; }

  Op choose(Model& model) {
    const size_t dice = below(100);
    const int64_t newest = model.next_ordinal - 1;
    Op op{Kind::kAlloc};
    op.comm = static_cast<int>(below(kNumComms));
    op.index = model.live.empty() ? 0 : below(model.live.size());
    if (dice < 40 || model.live.empty()) {
      op.size = size();
      op.stream = stream();
    } else if (dice < 74) {
      op.kind = Kind::kFree;
      op.stream = stream();
    } else if (dice < 76) {
      op.kind = Kind::kBadFree;
      op.stream = stream();
      op.flag = one_in(2);
      op.size = below(size_t{1} << 40);
    } else if (dice < 79) {
      op.kind = model.frozen ? Kind::kTrim : Kind::kReserve;
      op.size = size();
    } else if (dice < 87) {
      op.kind = Kind::kRegister;
      op.ordinal = one_in(4) ? static_cast<int64_t>(below(newest + 2)) - 1 : newest;
    } else if (dice < 91) {
      op.kind = one_in(2) ? Kind::kPin : Kind::kUnpin;
    } else if (dice < 93) {
      op.kind = one_in(2) ? Kind::kPassOver : Kind::kAbandon;
      for (size_t i = below(3); i < 3; ++i) {
        op.ordinals.push_back(one_in(4) || model.segments.empty()
                                  ? static_cast<int64_t>(below(newest + 4)) - 1
                                  : model.segments[below(model.segments.size())].ordinal);
      }
    } else if (dice < 95) {
      op.kind = Kind::kReleaseComm;
      op.flag = one_in(2);
    } else if (dice < 97) {
      op.kind = Kind::kFreeze;
      op.flag = !model.frozen && one_in(3);
    } else if (dice < 99) {
      op.kind = one_in(8) ? Kind::kRetireAll : Kind::kTrim;
    } else {
      op.kind = Kind::kRaise;
      op.ordinal = model.next_ordinal + static_cast<int64_t>(below(4)) - 1;
    }
    if (one_in(8)) {
      op.code = 1 + static_cast<NcclResult>(below(6));
      op.alloc_fails = one_in(2);
      // Ordinary memory that NCCL doesn't take back is lost, and there is nothing to model.
      op.free_fails = one_in(2) && model.ordinary().empty();
      op.register_fails = static_cast<int>(below(4));
      op.failing_comm = static_cast<int>(below(kNumComms + 1)) - 1;
    }
    op.null_windows = one_in(10);
    if (one_in(10)) op.failing_step = static_cast<fake::Step>(1 + below(3));
    return op;
  }

 private:
  CudaStream stream() {
    const size_t which = below(12);
    return which == 0 ? kCapturingStream : which == 1 ? kBrokenStream : kPlainStream;
  }
  size_t size() {
    switch (below(8)) {
      case 0: return below(3);
      case 1: return kPage - 1 + below(3);
      case 2: return kChunk + below(kChunk);
      default: return below(8 * kMiB);
    }
  }
  std::mt19937_64 engine_;
};

}  // namespace distcomm::tests
