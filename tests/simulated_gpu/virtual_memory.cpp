// Virtual memory: physical memory is a file. torch's expandable segments are made of it, and
// NCCL's memory is mapped a second time.

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <map>

#include "device.h"

using namespace simulated;

namespace {

struct Physical {
  int file;
  size_t size;
  int references;
  uintptr_t of_nccl;  // NCCL's address, whose bytes NCCL counts; 0 for memory of the driver
};

struct Mapping {
  size_t size;
  Physical* physical;
};

struct NcclMemory {
  size_t size;
  int file;
};

std::map<uintptr_t, NcclMemory>& nccl_memories() {
  static auto* const memories = new std::map<uintptr_t, NcclMemory>;
  return *memories;
}

std::map<uintptr_t, Mapping>& mappings() {
  static auto* const mappings = new std::map<uintptr_t, Mapping>;
  return *mappings;
}

void release(Physical* physical) {
  if (--physical->references > 0) return;
  close(physical->file);
  if (physical->of_nccl == 0) give_back_bytes(physical->size);
  delete physical;
}

bool is_inside(const std::pair<const uintptr_t, Mapping>& entry, uintptr_t start, size_t size) {
  return entry.first >= start && entry.first + entry.second.size <= start + size;
}

// The driver refuses a range that isn't made of whole mappings.
bool is_mapped(uintptr_t start, size_t size) {
  size_t covered = 0;
  for (const auto& entry : mappings()) {
    if (is_inside(entry, start, size)) covered += entry.second.size;
  }
  return covered == size;
}

}  // namespace

SIMULATED_API void simulated_note_nccl_memory(void* memory, size_t size, int file) {
  const Lock lock(mutex());
  nccl_memories()[reinterpret_cast<uintptr_t>(memory)] = {size, file};
}

SIMULATED_API void simulated_forget_nccl_memory(void* memory) {
  const Lock lock(mutex());
  nccl_memories().erase(reinterpret_cast<uintptr_t>(memory));
}

SIMULATED_API void* simulated_nccl_address(const void* pointer) {
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  const Lock lock(mutex());
  auto after = mappings().upper_bound(address);
  if (after != mappings().begin()) {
    const auto& [begin, mapping] = *--after;
    const uintptr_t first = mapping.physical->of_nccl;
    if (first != 0 && address < begin + mapping.size) {
      return reinterpret_cast<void*>(first + (address - begin));
    }
  }
  return const_cast<void*>(pointer);
}

SIMULATED_API int cuMemGetAddressRange_v2(unsigned long long* base, size_t* size,
                                          unsigned long long pointer) {
  const Lock lock(mutex());
  const auto found = nccl_memories().find(pointer);
  if (found == nccl_memories().end()) return cudaErrorInvalidValue;
  *base = found->first;
  *size = found->second.size;
  return cudaSuccess;
}

SIMULATED_API int cuMemRetainAllocationHandle(unsigned long long* handle, void* memory) {
  const Lock lock(mutex());
  const auto found = nccl_memories().find(reinterpret_cast<uintptr_t>(memory));
  if (found == nccl_memories().end()) return cudaErrorInvalidValue;
  const auto& [address, of_nccl] = *found;
  *handle = reinterpret_cast<uintptr_t>(
      new Physical{dup(of_nccl.file), of_nccl.size, 1, address});
  return cudaSuccess;
}

SIMULATED_API int cuMemGetAllocationGranularity(size_t* granularity, const void*, int) {
  *granularity = kGranularity;
  return cudaSuccess;
}

SIMULATED_API int cuMemAddressReserve(unsigned long long* pointer, size_t size, size_t alignment,
                                      unsigned long long, unsigned long long) {
  *pointer = reserved_space(size, std::max(alignment, kGranularity), PROT_NONE);
  return *pointer == 0 ? cudaErrorMemoryAllocation : cudaSuccess;
}

SIMULATED_API int cuMemAddressFree(unsigned long long start, size_t size) {
  const Lock lock(mutex());
  for (const auto& entry : mappings()) {
    if (is_inside(entry, start, size)) return cudaErrorInvalidValue;
  }
  return munmap(reinterpret_cast<void*>(start), size) == 0 ? cudaSuccess : cudaErrorInvalidValue;
}

SIMULATED_API int cuMemCreate(unsigned long long* handle, size_t size, const void*,
                              unsigned long long) {
  if (size % kGranularity != 0) return cudaErrorInvalidValue;
  if (is_forbidden()) return cudaErrorStreamCaptureUnsupported;
  if (!take_bytes(size)) return cudaErrorMemoryAllocation;
  const int file = memfd_create("simulated physical memory", 0);
  if (file < 0 || ftruncate(file, static_cast<off_t>(size)) != 0) {
    give_back_bytes(size);
    return cudaErrorMemoryAllocation;
  }
  *handle = reinterpret_cast<uintptr_t>(new Physical{file, size, 1, 0});
  return cudaSuccess;
}

SIMULATED_API int cuMemRelease(unsigned long long handle) {
  const Lock lock(mutex());
  release(reinterpret_cast<Physical*>(handle));
  return cudaSuccess;
}

SIMULATED_API int cuMemMap(unsigned long long start, size_t size, size_t offset,
                           unsigned long long handle, unsigned long long) {
  auto* const physical = reinterpret_cast<Physical*>(handle);
  const Lock lock(mutex());
  if (offset != 0 || size != physical->size) return cudaErrorInvalidValue;
  for (const auto& [address, mapping] : mappings()) {
    if (address < start + size && start < address + mapping.size) return cudaErrorInvalidValue;
  }
  void* const mapped = mmap(reinterpret_cast<void*>(start), size, PROT_NONE,
                            MAP_SHARED | MAP_FIXED, physical->file, 0);
  if (mapped == MAP_FAILED) return cudaErrorMemoryAllocation;
  ++physical->references;
  mappings()[start] = {size, physical};
  return cudaSuccess;
}

SIMULATED_API int cuMemSetAccess(unsigned long long start, size_t size, const void*, size_t) {
  const Lock lock(mutex());
  if (!is_mapped(start, size)) return cudaErrorInvalidValue;
  void* const pointer = reinterpret_cast<void*>(start);
  return mprotect(pointer, size, PROT_READ | PROT_WRITE) == 0 ? cudaSuccess
                                                              : cudaErrorInvalidValue;
}

SIMULATED_API int cuMemUnmap(unsigned long long start, size_t size) {
  if (is_forbidden()) return cudaErrorStreamCaptureUnsupported;
  for (Stream* const stream : streams_of(current_device())) stream->drain();
  const Lock lock(mutex());
  if (!is_mapped(start, size)) return cudaErrorInvalidValue;
  for (auto entry = mappings().begin(); entry != mappings().end();) {
    if (is_inside(*entry, start, size)) {
      release(entry->second.physical);
      entry = mappings().erase(entry);
    } else {
      ++entry;
    }
  }
  // The address space stays reserved.
  void* const left = mmap(reinterpret_cast<void*>(start), size, PROT_NONE,
                          MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
  return left == MAP_FAILED ? cudaErrorMemoryAllocation : cudaSuccess;
}
