// An all-gather by copy engines: each rank pushes its rows straight into their final places in
// every rank's output. distcomm launches no kernel for it: flags are set by copies too, and it is the
// stream that waits for them.

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "cuda_driver.h"

namespace distcomm {

// Rows of the source that lie one after another: the i-th goes to row output_row + i *
// output_stride of the output.
struct RowRun {
  uint64_t source_row;
  uint64_t output_row;
  uint64_t num_rows;
  uint64_t output_stride;
};

// One tensor; all sizes in bytes.
struct PushedRows {
  DevicePointer source;          // the first local row
  uint64_t row_bytes;            // what is copied of each row
  uint64_t source_pitch;         // from one local row to the next
  uint64_t output_pitch;         // from one output row to the next
  const DevicePointer* outputs;  // by rank: the first row of its output
};

namespace {

constexpr CudaResult kNotSupported = 801;   // CUDA_ERROR_NOT_SUPPORTED
constexpr int kWaitValue32 = 1;             // CU_STREAM_MEM_OP_WAIT_VALUE_32
constexpr int kWriteValue32 = 2;            // CU_STREAM_MEM_OP_WRITE_VALUE_32
constexpr unsigned kWaitEqual = 1;          // CU_STREAM_WAIT_VALUE_EQ
constexpr unsigned kWriteDefault = 0;       // CU_STREAM_WRITE_VALUE_DEFAULT
constexpr unsigned kDeviceMemory = 2;       // CU_MEMORYTYPE_DEVICE
constexpr int kMostPeersPerBatch = 127;     // two operations each; the driver takes fewer than 256
constexpr uint32_t kSet = 1, kUnset = 0;    // values of a flag
constexpr size_t kFlagBytes = sizeof(uint32_t);

// Flags of a signal area, which consists of 32-bit words: ready[W], arrived[W], and a word that
// holds kSet for good. Word r of either array is set by rank r, which copies that last word of its
// own area there, and is waited for and reset by the area's owner.
enum class Flag { kReady, kArrived };

// One rank's part of the all-gather, given to a stream.
//
// Rank r tells every peer that its outputs may be written (ready), waits for the same from every
// peer, copies, tells every peer that all of its rows are there (arrived), and waits for the same.
// A stream runs its copies one after another, so that a flag never overtakes the rows.
//
// The flags need no count of the calls, so that a captured call can be replayed: each is set once
// and reset once per call, in turns. Nobody sets ready[r] before its owner has reset it: rank r
// sets it in call n + 1 after it has waited for the owner's arrived of call n, which the owner
// sends after its reset of ready. Nor arrived[r]: rank r sets it in call n + 1 after it has waited
// for the owner's ready of call n + 1, which the owner sends after it has reset arrived of call n.
// Both need that the calls which share a signal area follow one another on each device.
class Push {
 public:
  Push(const CudaDriver& driver, int rank, int world_size, const DevicePointer* signals,
       CudaStream stream, CudaStream own_stream)
      : driver_(driver),
        rank_(rank),
        world_size_(world_size),
        signals_(signals),
        stream_(stream),
        own_stream_(own_stream) {}

  // Stops at the first error.
  CudaResult run(const PushedRows* tensors, size_t num_tensors, const RowRun* runs,
                 size_t num_runs) {
    if (const CudaResult result = meet(Flag::kReady); result != kCudaSuccess) return result;
    for (int step = 0; step < world_size_; ++step) {
      for (size_t tensor = 0; tensor < num_tensors; ++tensor) {
        for (size_t run = 0; run < num_runs; ++run) {
          const CudaResult result = copy(tensors[tensor], runs[run], ring_rank(step));
          if (result != kCudaSuccess) return result;
        }
      }
    }
    return meet(Flag::kArrived);
  }

 private:
  // This rank at step 0, then its peers. At any step, each rank has another one to copy to.
  int ring_rank(int step) const { return (rank_ + step) % world_size_; }

  DevicePointer flag_address(int owner, Flag flag, int writer) const {
    const int word = flag == Flag::kReady ? writer : world_size_ + writer;
    return signals_[owner] + static_cast<DevicePointer>(word) * kFlagBytes;
  }

  // Sets this rank's flag with all peers, waits for all peers' flags, and resets them.
  CudaResult meet(Flag flag) {
    // The word after the last flag.
    const DevicePointer constant = flag_address(rank_, Flag::kArrived, world_size_);
    for (int step = 1; step < world_size_; ++step) {
      const DevicePointer to = flag_address(ring_rank(step), flag, rank_);
      const CudaResult result = driver_.memcpy_async(to, constant, kFlagBytes, stream_);
      if (result != kCudaSuccess) return result;
    }
    CudaBatchMemOp operations[2 * kMostPeersPerBatch];
    for (int step = 1; step < world_size_;) {
      const int end = std::min(step + kMostPeersPerBatch, world_size_);
      unsigned count = 0;
      for (; step < end; ++step) {
        const DevicePointer address = flag_address(rank_, flag, ring_rank(step));
        operations[count++] = {kWaitValue32, address, kSet, 0, kWaitEqual, 0, 0};
        operations[count++] = {kWriteValue32, address, kUnset, 0, kWriteDefault, 0, 0};
      }
      const CudaResult result = driver_.stream_batch_mem_op(stream_, count, operations, 0);
      if (result != kCudaSuccess) return result;
    }
    return kCudaSuccess;
  }

  CudaResult copy(const PushedRows& rows, const RowRun& run, int to) {
    if (run.num_rows == 0 || rows.row_bytes == 0) return kCudaSuccess;
    const DevicePointer source = rows.source + run.source_row * rows.source_pitch;
    const DevicePointer dest = rows.outputs[to] + run.output_row * rows.output_pitch;
    const uint64_t dest_pitch = run.output_stride * rows.output_pitch;
    const bool single = run.num_rows == 1;
    // The source is a part of the output, already in place.
    if (source == dest && (single || rows.source_pitch == dest_pitch)) return kCudaSuccess;
    const CudaStream stream = to == rank_ ? own_stream_ : stream_;
    if (single || (rows.source_pitch == rows.row_bytes && dest_pitch == rows.row_bytes)) {
      return driver_.memcpy_async(dest, source, run.num_rows * rows.row_bytes, stream);
    }
    CudaMemcpy2D copied = {};
    copied.source_memory_type = kDeviceMemory;
    copied.source_device = source;
    copied.source_pitch = rows.source_pitch;
    copied.dest_memory_type = kDeviceMemory;
    copied.dest_device = dest;
    copied.dest_pitch = dest_pitch;
    copied.width_bytes = rows.row_bytes;
    copied.height = run.num_rows;
    return driver_.memcpy_2d_async(&copied, stream);
  }

  const CudaDriver& driver_;
  const int rank_;
  const int world_size_;
  const DevicePointer* const signals_;
  const CudaStream stream_;
  const CudaStream own_stream_;
};

}  // namespace
}  // namespace distcomm

using namespace distcomm;

// Whether the driver has all that distcomm_push_rows needs.
DISTCOMM_EXPORT int distcomm_can_push() { return cuda_driver().can_push(); }

// Gives this rank's part of an all-gather to `stream`, and the rows that it keeps to `own_stream`,
// which may be the same; all ranks call it alike. `signals` and each
// tensor's `outputs` hold, by rank, addresses that this rank can write to. All runs apply to all
// tensors. Returns a CUresult; after an error the signal areas can't be used again.
DISTCOMM_EXPORT int distcomm_push_rows(int rank, int world_size, const DevicePointer* signals,
                                       const PushedRows* tensors, size_t num_tensors,
                                       const RowRun* runs, size_t num_runs, CudaStream stream,
                                       CudaStream own_stream) {
  const CudaDriver& driver = cuda_driver();
  if (!driver.can_push()) return kNotSupported;
  return Push(driver, rank, world_size, signals, stream, own_stream)
      .run(tensors, num_tensors, runs, num_runs);
}
