// The heap of memory that can sleep behind a C ABI, and the two functions that torch's allocator
// calls.

#include <array>
#include <atomic>
#include <mutex>
#include <vector>

#include "sleep_heap.h"

namespace distcomm {
namespace {

constexpr int kMaxDevices = 64;

// One heap a device, because torch's allocator functions are given a device and nothing else.
// They live as long as the process: tensors may outlive everything that knows of the heap.
std::array<std::atomic<SleepHeap*>, kMaxDevices> g_heaps{};
std::mutex g_making;  // held while one is made

SleepHeap* heap_of(int device) {
  return device >= 0 && device < kMaxDevices ? g_heaps[device].load() : nullptr;
}

std::vector<int64_t> list(const int64_t* tags, size_t count) { return {tags, tags + count}; }

}  // namespace
}  // namespace distcomm

using namespace distcomm;

// Whether there is a driver, with all that memory which can sleep is made of.
DISTCOMM_EXPORT int distcomm_can_sleep() { return cuda_driver().can_sleep(); }

// A heap of its own, for distcomm_sleep_heap_close. NULL if there is no driver that can map memory.
DISTCOMM_EXPORT SleepHeap* distcomm_sleep_heap_open(int device, size_t chunk_bytes) {
  if (!cuda_driver().can_sleep()) return nullptr;
  return new SleepHeap(cuda_driver(), device, chunk_bytes);
}

DISTCOMM_EXPORT void distcomm_sleep_heap_close(SleepHeap* heap) { delete heap; }

// The heap of `device`, which torch's allocator uses; made at the first call, with its arguments.
DISTCOMM_EXPORT SleepHeap* distcomm_sleep_heap_of_device(int device, size_t chunk_bytes) {
  if (device < 0 || device >= kMaxDevices) return nullptr;
  const std::lock_guard<std::mutex> lock(g_making);
  SleepHeap* heap = g_heaps[device].load();
  if (heap == nullptr) {
    heap = distcomm_sleep_heap_open(device, chunk_bytes);
    g_heaps[device].store(heap);
  }
  return heap;
}

// For torch.cuda.memory.CUDAPluggableAllocator.

DISTCOMM_EXPORT void* distcomm_sleep_torch_alloc(ptrdiff_t size, int device, CudaStream stream) {
  SleepHeap* const heap = heap_of(device);
  return heap != nullptr && size >= 0 ? heap->alloc(static_cast<size_t>(size), stream) : nullptr;
}

DISTCOMM_EXPORT void distcomm_sleep_torch_free(void* pointer, ptrdiff_t /*size*/, int device,
                                               CudaStream stream) {
  if (SleepHeap* const heap = heap_of(device)) heap->free(pointer, stream);
}

// The rest are the methods of SleepHeap; sleep_heap.h says what they do.

DISTCOMM_EXPORT int64_t distcomm_sleep_heap_select(SleepHeap* heap, int64_t tag) {
  return heap->select(tag);
}

DISTCOMM_EXPORT int64_t distcomm_sleep_heap_new_tag(SleepHeap* heap) { return heap->new_tag(); }

DISTCOMM_EXPORT void* distcomm_sleep_heap_alloc(SleepHeap* heap, size_t size, CudaStream stream) {
  return heap->alloc(size, stream);
}

DISTCOMM_EXPORT int distcomm_sleep_heap_free(SleepHeap* heap, void* pointer, CudaStream stream) {
  return heap->free(pointer, stream);
}

DISTCOMM_EXPORT void distcomm_sleep_heap_settle(SleepHeap* heap) { heap->settle(); }

DISTCOMM_EXPORT void distcomm_sleep_heap_take_failure(SleepHeap* heap, SleepFailure* failure) {
  *failure = heap->take_failure();
}

DISTCOMM_EXPORT int distcomm_sleep_heap_prepare(SleepHeap* heap, const int64_t* tags,
                                                size_t count) {
  return heap->prepare(list(tags, count));
}

DISTCOMM_EXPORT void distcomm_sleep_heap_cancel(SleepHeap* heap, const int64_t* tags,
                                                size_t count) {
  heap->cancel(list(tags, count));
}

DISTCOMM_EXPORT void distcomm_sleep_heap_discard(SleepHeap* heap, const int64_t* tags,
                                                 size_t count) {
  heap->discard(list(tags, count));
}

// The first `num_offloaded` of `tags` are offloaded.
DISTCOMM_EXPORT int distcomm_sleep_heap_sleep(SleepHeap* heap, const int64_t* tags, size_t count,
                                              size_t num_offloaded, CudaStream first,
                                              CudaStream second, SleepProgress* progress) {
  return heap->sleep(list(tags, count), list(tags, num_offloaded), {first, second}, progress);
}

DISTCOMM_EXPORT int distcomm_sleep_heap_wake_up(SleepHeap* heap, const int64_t* tags, size_t count,
                                                CudaStream first, CudaStream second,
                                                SleepProgress* progress) {
  return heap->wake_up(list(tags, count), {first, second}, progress);
}

DISTCOMM_EXPORT size_t distcomm_sleep_heap_trim_host(SleepHeap* heap) { return heap->trim_host(); }

DISTCOMM_EXPORT void distcomm_sleep_heap_usage(SleepHeap* heap, int64_t tag, SleepUsage* usage) {
  *usage = heap->usage(tag);
}

DISTCOMM_EXPORT void distcomm_sleep_heap_stats(SleepHeap* heap, SleepStats* stats) {
  *stats = heap->stats();
}

DISTCOMM_EXPORT void distcomm_sleep_heap_shut_down(SleepHeap* heap) { heap->shut_down(); }
