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

// How far a transfer is: bytes copied so far, and all to be copied. Written while it is under way.
struct SleepProgress {
  int64_t done;
  int64_t total;
};

// Blocks of one device's memory, each with a tag. A block is one range of addresses, backed by
// chunks of physical memory, so that copies overlap with mapping and unmapping.
//
// Every method is thread-safe. Only prepare(), cancel(), sleep(), wake_up(), discard() and
// trim_host() wait for one another; the others never wait for a transfer, nor does torch, which
// calls alloc() and free() with its own lock held. But free() waits for the device.
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
  // graph's memory must not be given to anyone else. Nor while the tag's memory is moved.
  void* alloc(size_t size, CudaStream stream);
  // Gives a block back, awake or asleep. Waits for the device if it is awake, as cudaFree does.
  // While a graph is captured, or the block is moved, it stays pending until the next call of this
  // or settle(). False if `pointer` is no block.
  bool free(void* pointer, CudaStream stream);
  // Gives back what is pending.
  void settle();
  SleepFailure take_failure();

  // Has host memory ready for all that is awake under these tags. On failure all is as before.
  CudaResult prepare(const std::vector<int64_t>& tags);
  // Gives back what prepare() has made ready under these tags.
  void cancel(const std::vector<int64_t>& tags);
  // Releases the physical memory under `tags`; the content of those that are also in `offloaded`
  // goes to host memory. Waits for the device first. On failure the content of `offloaded` is still
  // there, awake as far as the driver lets it. That of the others is lost at the earliest when all
  // of `offloaded` has been saved.
  CudaResult sleep(const std::vector<int64_t>& tags, const std::vector<int64_t>& offloaded,
                   const CudaStream (&streams)[kNumStreams], SleepProgress* progress);
  // Maps what is asleep under `tags`, at the same addresses, with the content that was offloaded.
  // On failure all that was asleep still is.
  CudaResult wake_up(const std::vector<int64_t>& tags, const CudaStream (&streams)[kNumStreams],
                     SleepProgress* progress);
  // Forgets the content of what is asleep under these tags.
  void discard(const std::vector<int64_t>& tags);
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
  // While one lives, blocks with its tags are neither freed nor made: their chunks are those of the
  // transfer, which alone changes them, and takes the lock for that.
  class Move;
  using Tags = std::vector<int64_t>;
  using Chunks = std::vector<Chunk*>;

  void* try_alloc(size_t size, int64_t tag);
  bool has_pending();
  // Of what is pending, what is no block.
  std::vector<void*> give_back_pending();

  // During a Move.
  CudaResult pin(const Chunks& chunks);
  CudaResult offload(const Chunks& chunks, const CudaStream (&streams)[kNumStreams],
                     SleepProgress* progress);
  CudaResult put_to_sleep(const Chunks& chunks);
  CudaResult restore(const Chunks& chunks, const CudaStream (&streams)[kNumStreams],
                     SleepProgress* progress);
  CudaResult map_anew(Chunk& chunk);
  CudaResult put_to_sleep(Chunk& chunk, bool is_offloaded);
  CudaResult wait_for(const CudaStream (&streams)[kNumStreams]);
  void drop_host(const Chunks& chunks);

  // With the lock held.
  CudaResult reserve(size_t size, DevicePointer* address, Block* block);
  bool release(DevicePointer address, Block& block);
  void drop_host(Chunk& chunk);
  bool is_moving(int64_t tag) const;

  // `memory` is what the address has, before and after.
  CudaResult map(DevicePointer address, size_t size, CudaMemory* memory);
  CudaResult unmap(DevicePointer address, size_t size, CudaMemory* memory);
  CudaResult fail(const char* call, CudaResult code, size_t needed = 0);
  void note(const std::string& text, size_t needed);
  // To what there is once a failed call has been undone.
  void update_free_bytes();
  CudaMemProp properties() const;

  const CudaDriver& driver_;
  const int device_;
  const size_t chunk_bytes_;
  std::atomic<bool> shut_down_{false};
  HostMemory host_;

  std::mutex move_mutex_;  // one transfer at a time; taken first
  std::mutex mutex_;       // guards all below; never held while the device is waited for
  std::map<DevicePointer, Block> blocks_;
  Tags moving_;
  int64_t last_tag_ = 0;
  size_t granularity_ = 0;  // 0: not asked for yet
  SleepStats counters_{};

  std::mutex pending_mutex_;  // guards the next; taken last
  std::vector<void*> pending_;
};

}  // namespace distcomm
