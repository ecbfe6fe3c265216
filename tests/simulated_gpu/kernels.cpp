// What waits for peers: the driver's flags, and distcomm's own kernel, whose Triton code can't run.

#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "device.h"

using namespace simulated;

namespace {

constexpr std::chrono::microseconds kPoll{20};
constexpr std::chrono::seconds kPatience{30};

uint32_t* word_at(uint64_t address) { return reinterpret_cast<uint32_t*>(address); }

void wait_for(uint32_t* flag, uint32_t value, const char* who) {
  const auto begin = std::chrono::steady_clock::now();
  bool told = false;
  while (__atomic_load_n(flag, __ATOMIC_ACQUIRE) != value) {
    std::this_thread::sleep_for(kPoll);
    if (told || std::chrono::steady_clock::now() - begin < kPatience) continue;
    told = true;
    std::fprintf(stderr, "simulated GPU: %s still waits for a flag\n", who);
  }
}

struct BatchMemOp {  // CUstreamBatchMemOpParams
  int operation;
  unsigned long long address;
  uint32_t value, value_high;
  unsigned flags;
  unsigned long long alias;
  uint64_t padding;
};

struct Memcpy2D {  // CUDA_MEMCPY2D
  size_t source_x, source_y;
  unsigned source_type;
  const void* source_host;
  unsigned long long source;
  void* source_array;
  size_t source_pitch;
  size_t dest_x, dest_y;
  unsigned dest_type;
  void* dest_host;
  unsigned long long dest;
  void* dest_array;
  size_t dest_pitch;
  size_t width, height;
};

// The kernel's arguments, see distcomm/kernels/push_rows.py.
struct Pushed {
  int64_t source, source_pitch, output, output_pitch;
  const int64_t* deltas;
  int64_t row_bytes;
};

struct Push {
  const void *rows_to, *slots;
  const int64_t* signals;
  int64_t num_rows, rank, world_size, num_blocks;
  int rows_to_is_wide, slots_are_wide, opens, closes;
  Pushed tensors[2];
};

int64_t entry(const void* table, int is_wide, int64_t index) {
  return is_wide ? static_cast<const int64_t*>(table)[index]
                 : static_cast<const int32_t*>(table)[index];
}

// All blocks at once, which a GPU runs beside each other.
void meet_peers(const Push& push, int closing) {
  const auto row = [&](int64_t block) { return (block * 2 + closing) * push.world_size; };
  for (int64_t block = 0; block < push.num_blocks; ++block) {
    for (int64_t peer = 0; peer < push.world_size; ++peer) {
      uint32_t* const flag = word_at(push.signals[peer] + (row(block) + push.rank) * 4);
      if (__atomic_exchange_n(flag, 1, __ATOMIC_ACQ_REL) != 0) {
        std::fprintf(stderr, "simulated GPU: push_rows set a flag twice\n");
        std::abort();
      }
    }
  }
  for (int64_t block = 0; block < push.num_blocks; ++block) {
    for (int64_t peer = 0; peer < push.world_size; ++peer) {
      uint32_t* const flag = word_at(push.signals[push.rank] + (row(block) + peer) * 4);
      wait_for(flag, 1, "push_rows");
      __atomic_store_n(flag, 0, __ATOMIC_RELEASE);
    }
  }
}

void push_rows(const Push& push) {
  if (push.opens) meet_peers(push, 0);
  for (const Pushed& tensor : push.tensors) {
    for (int64_t row = 0; tensor.row_bytes > 0 && row < push.num_rows; ++row) {
      int64_t to = entry(push.rows_to, push.rows_to_is_wide, row);
      if (to >= 0 && push.slots != nullptr) to = entry(push.slots, push.slots_are_wide, to);
      if (to < 0) continue;
      for (int64_t step = 1; step <= push.world_size; ++step) {
        const int64_t peer = (push.rank + step) % push.world_size;
        const int64_t output = tensor.output + (tensor.deltas ? tensor.deltas[peer] : 0);
        std::memcpy(reinterpret_cast<char*>(output + to * tensor.output_pitch),
                    reinterpret_cast<char*>(tensor.source + row * tensor.source_pitch),
                    static_cast<size_t>(tensor.row_bytes));
      }
    }
  }
  if (push.closes) meet_peers(push, 1);
}

}  // namespace

SIMULATED_API int cuStreamBatchMemOp_v2(void* stream, unsigned count, BatchMemOp* operations,
                                        unsigned) {
  constexpr int kWait = 1, kWrite = 2;
  const std::vector<BatchMemOp> copied(operations, operations + count);
  const auto work = [copied] {
    for (const BatchMemOp& each : copied) {
      uint32_t* const word = word_at(each.address);
      if (each.operation == kWait) wait_for(word, each.value, "a stream");
      if (each.operation == kWrite) __atomic_store_n(word, each.value, __ATOMIC_RELEASE);
    }
  };
  return stream_of(stream)->give(work, NodeType::kMemOps);
}

SIMULATED_API int cuMemcpy2DAsync_v2(const Memcpy2D* parameters, void* stream) {
  const Memcpy2D copied = *parameters;
  if (copied.width > copied.source_pitch || copied.width > copied.dest_pitch) {
    return cudaErrorInvalidValue;
  }
  const auto work = [copied] {
    for (size_t row = 0; row < copied.height; ++row) {
      copy(reinterpret_cast<void*>(copied.dest + row * copied.dest_pitch),
           reinterpret_cast<void*>(copied.source + row * copied.source_pitch), copied.width);
    }
  };
  return stream_of(stream)->give(work, NodeType::kMemcpy);
}

SIMULATED_API int simulated_push_rows(void* stream, const Push* push) {
  return stream_of(stream)->give([push = *push] { push_rows(push); }, NodeType::kKernel);
}
