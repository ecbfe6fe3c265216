// The symmetric heap of one device: segments from ncclMemAlloc, ranges carved out of them, and
// the windows that communicators have of them.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <unordered_map>
#include <vector>

#include "cuda_driver.h"
#include "nccl_symbols.h"
#include "ordered_memory.h"
#include "range_allocator.h"

namespace distcomm {

enum class SegmentKind : int64_t {
  kSlab = 0,   // reserved: stays when it is empty
  kGrown = 1,  // made when nothing fitted: freed when it is empty
};

enum class FailureKind : int64_t {
  kNone = 0,
  kNccl = 1,       // ncclMemAlloc failed
  kCapturing = 2,  // a new segment would have been needed while a CUDA graph is captured
  kAsleep = 3,     // all segments are without memory
};

// Why the latest allocation of this thread failed.
struct AllocationFailure {
  FailureKind kind;
  int64_t bytes;
  int64_t code;  // ncclResult_t
  char text[512];
};

struct SegmentInfo {
  int64_t ordinal;
  int64_t bytes;
  int64_t address;
};

// Where a pointer lies.
struct Location {
  int64_t ordinal;
  int64_t offset;         // bytes from the segment's first
  int64_t segment_bytes;
  void* window;           // of the communicator asked for; NULL if it has none of this segment
};

struct HeapStats {
  int64_t segments;
  int64_t slabs;
  int64_t retired_segments;
  int64_t bytes_reserved;  // in all segments
  int64_t bytes_used;      // of these, carved out and not given back
  int64_t largest_free;    // the largest request that needs no new segment
  int64_t ordinary_bytes;  // now in use of memory made after freeze()
  int64_t ordinary_allocations;
  int64_t allocations;
  int64_t failed_allocations;
  int64_t segments_made;
  int64_t registrations;
  int64_t failed_releases;
  int64_t unknown_frees;
  int64_t out_of_order;  // memory that lies below older memory all the same
  int64_t not_mapped;    // memory at NCCL's own address, whose order isn't ensured
};

// Every method is thread-safe. Nothing but register_new() waits for other ranks, and that one
// holds no lock meanwhile.
class SegmentHeap {
 public:
  // `nccl` must have the functions for memory and windows, and outlive the heap.
  SegmentHeap(const NcclSymbols& nccl, const CudaDriver& driver, int device, size_t chunk_bytes);

  int device() const { return device_; }

  // `size` bytes, rounded up to kAlignment; NULL on failure, whose reason take_failure() tells.
  void* alloc(size_t size, CudaStream stream);
  // Gives back what alloc() returned. False if `pointer` is no such thing. Waits for the device
  // first, as cudaFree does: torch gives memory back that kernels may still be using. Where it
  // can't wait, because of a capture, the memory stays pending until a call that can.
  bool free(void* pointer, CudaStream stream);
  // While frees are deferred, free() doesn't wait: all that it is given stays pending until
  // settle(), or until an allocation finds no room without it. So torch, which may hold Python's
  // lock, never waits for the device.
  void defer_frees(bool deferred);
  // A range for a moment: NULL if none is free, and `give_back_borrowed` returns it at once. Neither
  // changes what later allocations get, whichever ranks do it.
  void* borrow(size_t size);
  void give_back_borrowed(void* pointer);
  // Why this thread's latest allocation or registration failed; cleared by asking.
  AllocationFailure take_failure();
  // Gives back what is pending; false if nothing is, or the device can't be waited for. What
  // another thread adds meanwhile stays: it may have been in use when the wait began.
  bool settle();

  // Makes a slab. Returns an ncclResult_t; on failure take_failure() has the text.
  NcclResult reserve(size_t size);
  // Retires every segment, slabs too: those that are empty are freed, the others once they are.
  // Those that are asleep stay so, and new ones may be made.
  void retire_all();
  // While frozen alloc() makes no segment: what doesn't fit is memory of its own, in none.
  void freeze(bool frozen);
  // Frees empty segments whose release has failed before.
  void trim();
  // The process is about to end: memory given back stays as it is.
  void shut_down();

  // Whether fall_asleep() can give back all segments; take_failure() says why not. Windows, which
  // end before, don't count.
  bool can_sleep();
  // Gives back the memory of all segments; their addresses stay, and what is carved out of them.
  // No communicator may have windows any more, and nothing may use the memory. What can't be given
  // back stays, with an error. In any case nothing can be allocated until wake_up(). `bytes`: how
  // many were given back by this call. Segments of before retire_all() are left as they are.
  NcclResult fall_asleep(int64_t* bytes);
  // Memory for all segments again, its content undefined. On an error all is as before. `bytes`: how
  // many were taken by this call.
  NcclResult wake_up(int64_t* bytes);

  // How many segments `comm` hasn't seen: one lock and one compare if there are none.
  size_t num_new(NcclComm comm);
  // Those segments. They aren't freed before unpin(), so that all ranks register the same.
  std::vector<SegmentInfo> pin_new(NcclComm comm);
  void unpin(NcclComm comm);
  // Segments that other ranks of `comm` don't have: it counts them as seen, and has no window.
  void pass_over(NcclComm comm, const std::vector<int64_t>& ordinals);
  // Registers the segments up to ordinal `through` that `comm` hasn't seen, in order. Collective.
  // Stops at the first error; what was registered stays known, and another call goes on from
  // there. `null_windows` counts those for which NCCL gave no window.
  NcclResult register_new(NcclComm comm, int64_t through, int64_t* null_windows);
  // Nobody waits for the registration under way any more: what it still gets is undone.
  void cancel_registration(NcclComm comm);
  // Gives up segments on which the ranks of `comm` differ: its windows of them end, and nothing
  // more is carved out of them. Unknown ordinals are passed over.
  NcclResult abandon(NcclComm comm, const std::vector<int64_t>& ordinals);
  // Forgets a communicator; ends its windows first if `deregister`.
  NcclResult release_comm(NcclComm comm, bool deregister);

  // Where `pointer` lies, in O(log n). False if in no segment.
  bool find(NcclComm comm, const void* pointer, Location* location);
  size_t num_windows(NcclComm comm);
  int64_t num_ordinary();  // allocations made while frozen that fitted into no segment
  int64_t next_ordinal();
  // The next segment gets this ordinal, or a larger one if that is used already.
  void raise_ordinal(int64_t ordinal);
  HeapStats stats();

 private:
  struct Segment {
    char* base;
    size_t size;
    SegmentKind kind;
    bool retired = false;  // nothing more is carved out of it, and it gets no new window
    bool of_the_past = false;  // retired by retire_all(): neither sleeps nor wakes up
    int num_pins = 0;  // registrations under way
  };
  struct Comm {
    int64_t seen = 0;  // all segments below this ordinal are registered, or never will be
    bool registering = false;
    std::atomic<bool> cancelled{false};
    std::vector<int64_t> pinned;  // by pin_new()
    std::map<int64_t, NcclWindow> windows;  // by ordinal; NULL where NCCL gave none
  };

  struct Pending {
    int64_t ordinal;
    char* base;
    size_t size;
    NcclWindow window;
  };

  bool defers_frees();
  std::optional<Range> take(size_t size);

  // All of these need the lock.
  void* make_memory(size_t size);
  bool make_segment(size_t size, SegmentKind kind);
  void* alloc_ordinary(size_t size);
  bool free_ordinary(void* pointer);
  bool give_back(void* pointer);
  void give_back_or_keep(const std::vector<void*>& pending, bool idle);
  Comm& comm_record(NcclComm comm);
  void unpin_all(const std::vector<int64_t>& pinned);
  std::vector<int64_t> ordinals() const;
  void retire(int64_t ordinal);
  void release_if_empty(int64_t ordinal);
  NcclResult end_window(NcclComm comm, Comm& record, int64_t ordinal);
  void fail(FailureKind kind, size_t size, NcclResult code, const std::string& text);
  std::string nccl_text(const char* call, NcclResult code) const;
  std::vector<int64_t> unseen(const Comm& comm, int64_t through) const;
  void take_back(const Range& range);
  // Why a segment can't be given back; NULL if it can.
  const char* why_awake(const Segment& segment) const;
  bool has_windows(int64_t ordinal) const;
  std::optional<int64_t> ordinal_at(const void* pointer) const;

  const NcclSymbols& nccl_;
  const CudaDriver& driver_;
  const int device_;
  const size_t chunk_bytes_;

  std::mutex mutex_;  // guards all below
  bool frozen_ = false;
  bool asleep_ = false;
  bool shut_down_ = false;
  bool defers_frees_ = false;
  int64_t next_ordinal_ = 0;
  OrderedMemory memory_;
  RangeAllocator ranges_;
  std::map<int64_t, Segment> segments_;
  std::map<const char*, int64_t> by_base_;
  std::map<void*, size_t> ordinary_;            // made while frozen
  std::vector<void*> pending_;                  // freed, but not waited for yet
  std::unordered_map<NcclComm, std::shared_ptr<Comm>> comms_;
  HeapStats counters_{};
};

}  // namespace distcomm
