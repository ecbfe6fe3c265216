// The segment heap behind a C ABI, and the two functions that torch's allocator calls.

#include <algorithm>
#include <array>
#include <atomic>
#include <memory>
#include <mutex>

#include "segment_heap.h"

namespace distcomm {
namespace {

constexpr int kMaxDevices = 64;

// One heap a device, because torch's allocator functions are given a device and nothing else.
// They live as long as the process: tensors may outlive everything that knows of the heap.
std::array<std::atomic<SegmentHeap*>, kMaxDevices> g_heaps{};
std::mutex g_making;  // held while one is made

SegmentHeap* heap_of(int device) {
  return device >= 0 && device < kMaxDevices ? g_heaps[device].load() : nullptr;
}

}  // namespace
}  // namespace distcomm

using namespace distcomm;

// A heap of its own, for distcomm_heap_close. `nccl` must outlive it. NULL if this libnccl has no
// functions for memory and windows.
DISTCOMM_EXPORT SegmentHeap* distcomm_heap_open(const NcclSymbols* nccl, int device,
                                                size_t chunk_bytes) {
  if (nccl->mem_alloc == nullptr || nccl->mem_free == nullptr ||
      nccl->window_register == nullptr || nccl->window_deregister == nullptr) {
    return nullptr;
  }
  return new SegmentHeap(*nccl, cuda_driver(), device, chunk_bytes);
}

DISTCOMM_EXPORT void distcomm_heap_close(SegmentHeap* heap) {
  heap->settle();
  heap->retire_all();
  delete heap;
}

// The heap of `device`, which torch's allocator uses; made at the first call, with its arguments.
// `nccl` must live as long as the process. NULL as above, or if there can't be such a device.
DISTCOMM_EXPORT SegmentHeap* distcomm_heap_of_device(const NcclSymbols* nccl, int device,
                                                     size_t chunk_bytes) {
  if (device < 0 || device >= kMaxDevices) return nullptr;
  const std::lock_guard<std::mutex> lock(g_making);
  SegmentHeap* heap = g_heaps[device].load();
  if (heap == nullptr) {
    heap = distcomm_heap_open(nccl, device, chunk_bytes);
    g_heaps[device].store(heap);
  }
  return heap;
}

// What the next segment of the device's heap is numbered; 0 if it has none yet.
DISTCOMM_EXPORT int64_t distcomm_next_ordinal_of_device(int device) {
  SegmentHeap* const heap = heap_of(device);
  return heap != nullptr ? heap->next_ordinal() : 0;
}

// For torch.cuda.memory.CUDAPluggableAllocator.

DISTCOMM_EXPORT void* distcomm_torch_alloc(ptrdiff_t size, int device, CudaStream stream) {
  SegmentHeap* const heap = heap_of(device);
  return heap != nullptr && size >= 0 ? heap->alloc(static_cast<size_t>(size), stream) : nullptr;
}

DISTCOMM_EXPORT void distcomm_torch_free(void* pointer, ptrdiff_t /*size*/, int device,
                                         CudaStream stream) {
  if (SegmentHeap* const heap = heap_of(device)) heap->free(pointer, stream);
}

// The rest are the methods of SegmentHeap; segment_heap.h says what they do.

DISTCOMM_EXPORT void* distcomm_heap_alloc(SegmentHeap* heap, size_t size, CudaStream stream) {
  return heap->alloc(size, stream);
}

DISTCOMM_EXPORT int distcomm_heap_free(SegmentHeap* heap, void* pointer, CudaStream stream) {
  return heap->free(pointer, stream);
}

DISTCOMM_EXPORT void* distcomm_heap_borrow(SegmentHeap* heap, size_t size) {
  return heap->borrow(size);
}

DISTCOMM_EXPORT void distcomm_heap_give_back_borrowed(SegmentHeap* heap, void* pointer) {
  heap->give_back_borrowed(pointer);
}

DISTCOMM_EXPORT void distcomm_heap_take_failure(SegmentHeap* heap, AllocationFailure* failure) {
  *failure = heap->take_failure();
}

DISTCOMM_EXPORT int distcomm_heap_reserve(SegmentHeap* heap, size_t size) {
  return heap->reserve(size);
}

DISTCOMM_EXPORT int distcomm_heap_settle(SegmentHeap* heap) { return heap->settle(); }

DISTCOMM_EXPORT void distcomm_heap_defer_frees(SegmentHeap* heap, int deferred) {
  heap->defer_frees(deferred != 0);
}

DISTCOMM_EXPORT void distcomm_heap_retire_all(SegmentHeap* heap) { heap->retire_all(); }

DISTCOMM_EXPORT void distcomm_heap_freeze(SegmentHeap* heap, int frozen) {
  heap->freeze(frozen != 0);
}

DISTCOMM_EXPORT void distcomm_heap_trim(SegmentHeap* heap) { heap->trim(); }

DISTCOMM_EXPORT void distcomm_heap_shut_down(SegmentHeap* heap) { heap->shut_down(); }

DISTCOMM_EXPORT int distcomm_heap_can_sleep(SegmentHeap* heap) { return heap->can_sleep(); }

DISTCOMM_EXPORT int distcomm_heap_fall_asleep(SegmentHeap* heap, int64_t* bytes) {
  return heap->fall_asleep(bytes);
}

DISTCOMM_EXPORT int distcomm_heap_wake_up(SegmentHeap* heap, int64_t* bytes) {
  return heap->wake_up(bytes);
}

DISTCOMM_EXPORT size_t distcomm_heap_num_new(SegmentHeap* heap, NcclComm comm) {
  return heap->num_new(comm);
}

// Writes at most `capacity` entries; returns how many there are.
DISTCOMM_EXPORT size_t distcomm_heap_pin_new(SegmentHeap* heap, NcclComm comm,
                                             SegmentInfo* infos, size_t capacity) {
  const std::vector<SegmentInfo> all = heap->pin_new(comm);
  std::copy_n(all.begin(), std::min(all.size(), capacity), infos);
  return all.size();
}

DISTCOMM_EXPORT void distcomm_heap_unpin(SegmentHeap* heap, NcclComm comm) { heap->unpin(comm); }

DISTCOMM_EXPORT void distcomm_heap_pass_over(SegmentHeap* heap, NcclComm comm,
                                             const int64_t* ordinals, size_t count) {
  heap->pass_over(comm, std::vector<int64_t>(ordinals, ordinals + count));
}

DISTCOMM_EXPORT void distcomm_heap_cancel_registration(SegmentHeap* heap, NcclComm comm) {
  heap->cancel_registration(comm);
}

DISTCOMM_EXPORT int distcomm_heap_register_new(SegmentHeap* heap, NcclComm comm, int64_t through,
                                               int64_t* null_windows) {
  return heap->register_new(comm, through, null_windows);
}

DISTCOMM_EXPORT int distcomm_heap_abandon(SegmentHeap* heap, NcclComm comm,
                                          const int64_t* ordinals, size_t count) {
  return heap->abandon(comm, std::vector<int64_t>(ordinals, ordinals + count));
}

DISTCOMM_EXPORT int distcomm_heap_release_comm(SegmentHeap* heap, NcclComm comm, int deregister) {
  return heap->release_comm(comm, deregister != 0);
}

DISTCOMM_EXPORT int distcomm_heap_find(SegmentHeap* heap, NcclComm comm, const void* pointer,
                                       Location* location) {
  return heap->find(comm, pointer, location);
}

DISTCOMM_EXPORT size_t distcomm_heap_num_windows(SegmentHeap* heap, NcclComm comm) {
  return heap->num_windows(comm);
}

DISTCOMM_EXPORT int64_t distcomm_heap_num_ordinary(SegmentHeap* heap) {
  return heap->num_ordinary();
}

DISTCOMM_EXPORT int64_t distcomm_heap_next_ordinal(SegmentHeap* heap) {
  return heap->next_ordinal();
}

DISTCOMM_EXPORT void distcomm_heap_raise_ordinal(SegmentHeap* heap, int64_t ordinal) {
  heap->raise_ordinal(ordinal);
}

DISTCOMM_EXPORT void distcomm_heap_stats(SegmentHeap* heap, HeapStats* stats) {
  *stats = heap->stats();
}
