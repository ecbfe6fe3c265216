// Device memory that can be given back while its addresses stay: for weights and KV caches of an
// engine that sleeps.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <map>
#include <mutex>
#include <string>
#include <vector>

#include "cuda_driver.h"
#include "host_memory.h"

namespace distcomm {

// Why the latest call of this thread failed.
struct SleepFailure {
  int64_t code;          // CUresult; 0 where no driver call has failed
  int64_t needed_bytes;  // of the kind that is missing
  int64_t free_bytes;    // of the device, by the driver; -1 where that is not what is missing
  char text[512];
};

struct SleepUsage {
  int64_t blocks;
  int64_t mapped_bytes;     // physical memory
  int64_t asleep_bytes;     // addresses without
  int64_t offloaded_bytes;  // of these, kept in host memory
};

struct SleepStats {
  int64_t allocations;
  int64_t failed_allocations;
  int64_t failed_releases;  // blocks that the driver refused to take back; tried again later
  int64_t unknown_frees;
  int64_t host_bytes;       // pinned, in use or not
  int64_t free_host_bytes;  // of these, not in use
};

// Blocks of one device's memory, each with a tag. A block is one range of addresses, backed by
// chunks of physical memory, so that copies overlap with mapping and unmapping.
//
// Every method is thread-safe. free() never waits for another method's transfer.
class SleepHeap {
 public:
  static constexpr int kNumStreams = 2;

  // `driver` must have what can_sleep() asks for, and outlive the heap.
  SleepHeap(const CudaDriver& driver, int device, size_t chunk_bytes);
  // Frees all blocks, in use or not.
  ~SleepHeap();

  // A tag of its own, > 0.
  int64_t new_tag();
  // From now on this thread allocates here with `tag`, 0 for none; the former one.
  int64_t select(int64_t tag);

  // At least `size` bytes; NULL on failure, with nothing left behind. Not during a capture: a
  // graph's memory must not be given to anyone else.
  void* alloc(size_t size, CudaStream stream);
  // Gives a block back, awake or asleep. Waits for the device if it is awake, as cudaFree does.
  // While a graph is captured or memory is transferred it stays pending. False if `pointer` is no
  // block.
  bool free(void* pointer, CudaStream stream);
  // Gives back what is pending.
  void settle();
  SleepFailure take_failure();

  // Has host memory ready for all that is awake under these tags. On failure all is as before.
  CudaResult prepare(const std::vector<int64_t>& tags);
  // Gives back what prepare() has made ready under these tags.
  void cancel(const std::vector<int64_t>& tags);
  // Releases the physical memory under `tags`; the content of those that are also in `offloaded`
  // goes to host memory. Waits for the device first. On failure all content is still there, and
  // what could not be mapped again is asleep.
  CudaResult sleep(const std::vector<int64_t>& tags, const std::vector<int64_t>& offloaded,
                   const CudaStream (&streams)[kNumStreams]);
  // Maps what is asleep under `tags`, at the same addresses, with the content that was offloaded.
  // On failure all that was asleep still is.
  CudaResult wake_up(const std::vector<int64_t>& tags, const CudaStream (&streams)[kNumStreams]);
  // Forgets the content of what is asleep under these tags.
  void discard(const std::vector<int64_t>& tags);
  // Of the transfer under way, or the latest one: the bytes copied so far, and all. Takes no lock.
  void progress(int64_t* done, int64_t* total) const;
  // Frees host memory that is not in use; how many bytes.
  size_t trim_host();

  SleepUsage usage(int64_t tag);
  SleepStats stats();
  // The process is about to end: memory given back stays as it is.
  void shut_down() { shut_down_ = true; }

 private:
  struct Chunk {
    DevicePointer address;
    size_t size;
    CudaMemory memory = 0;      // 0: none
    void* host = nullptr;       // a buffer of its size
    bool is_asleep = false;     // also if the driver has refused to take the memory back
    bool is_offloaded = false;  // whether `host` has its content
  };
  struct Block {
    size_t size;
    int64_t tag;
    std::vector<Chunk> chunks;
  };

  // All of these need the lock, and the device's context.
  CudaResult reserve(size_t size, DevicePointer* address, Block* block);
  CudaResult map(Chunk& chunk);
  CudaResult unmap(Chunk& chunk);
  bool release(DevicePointer address, Block& block);
  // What of it is no block.
  std::vector<void*> release_pending();
  std::vector<Chunk*> chunks_of(const std::vector<int64_t>& tags, bool asleep);
  CudaResult prepare_locked(const std::vector<int64_t>& tags);
  void drop_host(Chunk& chunk);
  CudaResult offload(const std::vector<Chunk*>& chunks, const CudaStream (&streams)[kNumStreams]);
  CudaResult restore(const std::vector<Chunk*>& chunks, const CudaStream (&streams)[kNumStreams]);
  CudaResult wait_for(const CudaStream (&streams)[kNumStreams]);

  CudaResult fail(const char* call, CudaResult code, size_t needed = 0);
  void note(const std::string& text, size_t needed);
  // To what there is once a failed call has been undone.
  void update_free_bytes();
  CudaMemProp properties() const;

  const CudaDriver& driver_;
  const int device_;
  const size_t chunk_bytes_;
  std::atomic<bool> shut_down_{false};
  std::atomic<int64_t> copied_bytes_{0}, bytes_to_copy_{0};

  std::mutex pending_mutex_;  // taken last
  std::vector<void*> pending_;

  std::mutex mutex_;  // guards all below
  HostMemory host_;
  std::map<DevicePointer, Block> blocks_;
  int64_t last_tag_ = 0;
  size_t granularity_ = 0;  // 0: not asked for yet
  SleepStats counters_{};
};

}  // namespace distcomm
