// Device memory, host memory and copies.

#include <sys/mman.h>

#include <atomic>
#include <cstring>
#include <map>

#include "device.h"

namespace simulated {
namespace {

std::atomic<size_t> used_bytes{0};

using Blocks = std::map<uintptr_t, size_t>;  // address and size

Blocks& device_blocks() {
  static auto* const blocks = new Blocks;
  return *blocks;
}

Blocks& pinned_blocks() {
  static auto* const blocks = new Blocks;
  return *blocks;
}

bool contains(const Blocks& blocks, const void* pointer) {
  const Lock lock(mutex());
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  auto after = blocks.upper_bound(address);
  if (after == blocks.begin()) return false;
  --after;
  return address < after->first + after->second;
}

// In the order of the stream, as CUDA does it for each kind of host memory.
cudaError_t copy_async(void* to, const void* from, size_t num_bytes, cudaMemcpyKind kind,
                       Stream* stream) {
  if (kind == cudaMemcpyHostToDevice && !contains(pinned_blocks(), from)) {
    const auto* const bytes = static_cast<const char*>(from);
    const auto staged = std::make_shared<std::vector<char>>(bytes, bytes + num_bytes);
    return stream->give([=] { copy(to, staged->data(), num_bytes); }, NodeType::kMemcpy);
  }
  const bool blocks = kind == cudaMemcpyDeviceToHost && !contains(pinned_blocks(), to);
  if (blocks) {
    const Lock lock(mutex());
    if (stream->capture) {
      stream->capture->invalid = true;
      return failed(cudaErrorStreamCaptureUnsupported, __func__);
    }
  }
  const cudaError_t error =
      stream->give([=] { copy(to, from, num_bytes); }, NodeType::kMemcpy);
  if (blocks && error == cudaSuccess) stream->drain();
  return error;
}

}  // namespace

size_t rounded_up(size_t num_bytes, size_t step) { return (num_bytes + step - 1) / step * step; }

uintptr_t reserved_space(size_t num_bytes, size_t alignment, int protection) {
  void* const space = mmap(nullptr, num_bytes + alignment, protection,
                           MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  return space == MAP_FAILED ? 0 : rounded_up(reinterpret_cast<uintptr_t>(space), alignment);
}

bool take_bytes(size_t num_bytes) {
  if (num_bytes > free_bytes()) return false;
  used_bytes += num_bytes;
  return true;
}

void give_back_bytes(size_t num_bytes) { used_bytes -= num_bytes; }

size_t free_bytes() { return kTotalBytes - used_bytes; }

void copy(void* to, const void* from, size_t num_bytes) {
  if (num_bytes == sizeof(uint32_t)) {
    const auto value = *static_cast<const volatile uint32_t*>(from);
    __atomic_store_n(static_cast<uint32_t*>(to), value, __ATOMIC_RELEASE);
  } else {
    std::memmove(to, from, num_bytes);
  }
}

}  // namespace simulated

using namespace simulated;

SIMULATED_API int simulated_take_bytes(size_t num_bytes) { return take_bytes(num_bytes); }

SIMULATED_API void simulated_give_back_bytes(size_t num_bytes) { give_back_bytes(num_bytes); }

// ---- The runtime's memory.

SIMULATED_API cudaError_t cudaMalloc(void** pointer, size_t num_bytes) {
  *pointer = nullptr;
  if (is_forbidden()) return failed(cudaErrorStreamCaptureUnsupported, __func__);
  const size_t size = rounded_up(num_bytes, kGranularity);
  if (!take_bytes(size)) return failed(cudaErrorMemoryAllocation, __func__);
  const uintptr_t address = reserved_space(size, kGranularity, PROT_READ | PROT_WRITE);
  if (address == 0) {
    give_back_bytes(size);
    return failed(cudaErrorMemoryAllocation, __func__);
  }
  const Lock lock(mutex());
  device_blocks()[address] = size;
  *pointer = reinterpret_cast<void*>(address);
  return cudaSuccess;
}

SIMULATED_API cudaError_t cudaFree(void* pointer) {
  if (pointer == nullptr) return cudaSuccess;
  if (is_forbidden()) return failed(cudaErrorStreamCaptureUnsupported, __func__);
  size_t size = 0;
  {
    const Lock lock(mutex());
    const auto found = device_blocks().find(reinterpret_cast<uintptr_t>(pointer));
    if (found == device_blocks().end()) return failed(cudaErrorInvalidValue, __func__);
    size = found->second;
    device_blocks().erase(found);
  }
  for (Stream* const stream : streams_of(current_device())) stream->drain();
  munmap(pointer, size);
  give_back_bytes(size);
  return cudaSuccess;
}

SIMULATED_API cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
  *free = free_bytes();
  *total = kTotalBytes;
  return cudaSuccess;
}

SIMULATED_API cudaError_t cudaHostAlloc(void** pointer, size_t num_bytes, unsigned) {
  constexpr size_t kPage = 4096;
  *pointer = std::aligned_alloc(kPage, rounded_up(num_bytes, kPage));
  if (*pointer == nullptr) return failed(cudaErrorMemoryAllocation, __func__);
  return cudaHostRegister(*pointer, num_bytes, 0);
}

SIMULATED_API cudaError_t cudaFreeHost(void* pointer) {
  cudaHostUnregister(pointer);
  std::free(pointer);
  return cudaSuccess;
}

SIMULATED_API cudaError_t cudaHostRegister(void* pointer, size_t num_bytes, unsigned) {
  const Lock lock(mutex());
  pinned_blocks()[reinterpret_cast<uintptr_t>(pointer)] = num_bytes;
  return cudaSuccess;
}

SIMULATED_API cudaError_t cudaHostUnregister(void* pointer) {
  const Lock lock(mutex());
  pinned_blocks().erase(reinterpret_cast<uintptr_t>(pointer));
  return cudaSuccess;
}

SIMULATED_API cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes,
                                                   const void* pointer) {
  *attributes = {};
  attributes->device = current_device();
  attributes->devicePointer = const_cast<void*>(pointer);
  attributes->type = contains(device_blocks(), pointer)   ? cudaMemoryTypeDevice
                     : contains(pinned_blocks(), pointer) ? cudaMemoryTypeHost
                                                          : cudaMemoryTypeUnregistered;
  return cudaSuccess;
}

// ---- Copies.

SIMULATED_API cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t num_bytes,
                                          cudaMemcpyKind kind, cudaStream_t stream) {
  return copy_async(to, from, num_bytes, kind, stream_of(stream));
}

SIMULATED_API cudaError_t cudaMemcpyPeerAsync(void* to, int, const void* from, int,
                                              size_t num_bytes, cudaStream_t stream) {
  return copy_async(to, from, num_bytes, cudaMemcpyDeviceToDevice, stream_of(stream));
}

SIMULATED_API cudaError_t cudaMemcpy(void* to, const void* from, size_t num_bytes,
                                     cudaMemcpyKind kind) {
  if (is_forbidden()) return failed(cudaErrorStreamCaptureUnsupported, __func__);
  const cudaError_t error = copy_async(to, from, num_bytes, kind, stream_of(nullptr));
  stream_of(nullptr)->drain();
  return error;
}

SIMULATED_API cudaError_t cudaMemsetAsync(void* pointer, int value, size_t num_bytes,
                                          cudaStream_t stream) {
  return stream_of(stream)->give([=] { std::memset(pointer, value, num_bytes); },
                                 NodeType::kMemset);
}

SIMULATED_API cudaError_t cudaMemset(void* pointer, int value, size_t num_bytes) {
  const cudaError_t error = cudaMemsetAsync(pointer, value, num_bytes, nullptr);
  stream_of(nullptr)->drain();
  return error;
}

SIMULATED_API int cuMemcpyDtoH_v2(void* to, unsigned long long from, size_t num_bytes) {
  return cudaMemcpy(to, reinterpret_cast<void*>(from), num_bytes, cudaMemcpyDeviceToHost);
}

SIMULATED_API int cuMemcpyAsync(unsigned long long to, unsigned long long from, size_t num_bytes,
                                void* stream) {
  const auto work = [=] {
    copy(reinterpret_cast<void*>(to), reinterpret_cast<void*>(from), num_bytes);
  };
  return stream_of(stream)->give(work, NodeType::kMemcpy);
}

SIMULATED_API int cuMemGetInfo_v2(size_t* free, size_t* total) {
  return cudaMemGetInfo(free, total);
}

SIMULATED_API int cuMemHostAlloc(void** pointer, size_t num_bytes, unsigned) {
  return cudaHostAlloc(pointer, num_bytes, 0);
}

SIMULATED_API int cuMemFreeHost(void* pointer) { return cudaFreeHost(pointer); }

SIMULATED_API int cuStreamSynchronize(void* stream) {
  return cudaStreamSynchronize(static_cast<cudaStream_t>(stream));
}

SIMULATED_API int cuMemsetD8Async(unsigned long long pointer, unsigned char value,
                                  size_t num_bytes, void* stream) {
  return cudaMemsetAsync(reinterpret_cast<void*>(pointer), value, num_bytes,
                         static_cast<cudaStream_t>(stream));
}
