#include "ordered_memory.h"

namespace distcomm {
namespace {

constexpr int kDevice = 1;     // CU_MEM_LOCATION_TYPE_DEVICE
constexpr int kReadWrite = 3;  // CU_MEM_ACCESS_FLAGS_PROT_READWRITE

DevicePointer device_pointer(void* pointer) { return reinterpret_cast<uintptr_t>(pointer); }

}  // namespace

OrderedMemory::OrderedMemory(const NcclSymbols& nccl, const CudaDriver& driver, int device,
                             size_t range_bytes)
    : nccl_(nccl), driver_(driver), device_(device), range_bytes_(range_bytes) {}

void* OrderedMemory::alloc(size_t size, NcclResult* result) {
  void* memory = nullptr;
  *result = nccl_.mem_alloc(&memory, size);
  if (*result == kNcclSuccess && memory == nullptr) *result = kNcclUnhandledCudaError;
  // What a failed call has written to `memory` means nothing.
  if (*result != kNcclSuccess) return nullptr;
  void* const second = mapped(memory);
  return second == nullptr ? memory : second;
}

NcclResult OrderedMemory::free(void* pointer) {
  const auto found = mappings_.find(device_pointer(pointer));
  if (found == mappings_.end()) return nccl_.mem_free(pointer);
  const NcclResult result = give_back(pointer);
  if (result == kNcclSuccess) mappings_.erase(found);
  return result;
}

NcclResult OrderedMemory::give_back(void* pointer) {
  const auto found = mappings_.find(device_pointer(pointer));
  if (found == mappings_.end()) return kNcclUnhandledCudaError;
  Mapping& mapping = found->second;
  if (mapping.memory != nullptr) {  // unless a call before this one got that far
    const NcclResult result = nccl_.mem_free(mapping.memory);
    if (result != kNcclSuccess) return result;
    mapping.memory = nullptr;
  }
  if (!mapping.has_memory) return kNcclSuccess;
  // With this, its last mapping, the memory goes.
  const CudaContext context(driver_, device_);
  if (driver_.mem_unmap(found->first, mapping.size) != kCudaSuccess) {
    return kNcclUnhandledCudaError;
  }
  mapping.has_memory = false;
  return kNcclSuccess;
}

NcclResult OrderedMemory::take_again(void* pointer) {
  const auto found = mappings_.find(device_pointer(pointer));
  if (found == mappings_.end()) return kNcclUnhandledCudaError;
  Mapping& mapping = found->second;
  if (mapping.has_memory) return kNcclSuccess;
  void* memory = nullptr;
  NcclResult result = nccl_.mem_alloc(&memory, mapping.size);
  if (result != kNcclSuccess || memory == nullptr) {
    return result != kNcclSuccess ? result : kNcclUnhandledCudaError;
  }
  const CudaContext context(driver_, device_);
  if (mapped_size(memory) != mapping.size ||
      map(found->first, mapping.size, memory) != kCudaSuccess) {
    nccl_.mem_free(memory);
    return kNcclUnhandledCudaError;
  }
  mapping.memory = memory;
  mapping.has_memory = true;
  return kNcclSuccess;
}

bool OrderedMemory::has_memory(void* pointer) const {
  const auto found = mappings_.find(device_pointer(pointer));
  return found == mappings_.end() || found->second.has_memory;
}

bool OrderedMemory::is_mapped(void* pointer) const {
  return mappings_.count(device_pointer(pointer)) > 0;
}

void* OrderedMemory::mapped(void* memory) {
  if (!reserve_range()) return nullptr;
  const CudaContext context(driver_, device_);
  if (!context.is_current()) return nullptr;
  const size_t size = mapped_size(memory);
  if (size == 0) return nullptr;
  DevicePointer address = range_;
  if (!mappings_.empty()) {
    const auto& [last, mapping] = *mappings_.rbegin();
    address = (last + mapping.size + kAlignment - 1) / kAlignment * kAlignment;
  }
  if (address + size > range_ + range_bytes_) return nullptr;
  if (map(address, size, memory) != kCudaSuccess) return nullptr;
  mappings_[address] = {memory, size};
  return reinterpret_cast<void*>(static_cast<uintptr_t>(address));
}

size_t OrderedMemory::mapped_size(void* memory) {
  DevicePointer base = 0;
  size_t size = 0;
  const DevicePointer first = device_pointer(memory);
  const CudaResult result = driver_.mem_get_address_range(&base, &size, first);
  return result == kCudaSuccess && base == first ? size : 0;
}

bool OrderedMemory::reserve_range() {
  if (tried_to_reserve_ || !driver_.can_map()) return range_ != 0;
  tried_to_reserve_ = true;
  if (driver_.mem_address_reserve(&range_, range_bytes_, kAlignment, 0, 0) != kCudaSuccess) {
    range_ = 0;
  }
  return range_ != 0;
}

CudaResult OrderedMemory::map(DevicePointer address, size_t size, void* memory) {
  CudaMemory handle = 0;
  CudaResult result = driver_.mem_retain_allocation_handle(&handle, memory);
  if (result != kCudaSuccess) return result;
  result = driver_.mem_map(address, size, 0, handle, 0);
  if (result == kCudaSuccess) {
    const CudaMemAccess access = {kDevice, device_, kReadWrite};
    result = driver_.mem_set_access(address, size, &access, 1);
    if (result != kCudaSuccess) driver_.mem_unmap(address, size);
  }
  driver_.mem_release(handle);  // the mapping holds on to the memory
  return result;
}

}  // namespace distcomm
