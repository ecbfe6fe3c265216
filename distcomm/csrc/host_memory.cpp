#include "host_memory.h"

namespace distcomm {

CudaResult HostMemory::prepare(const std::vector<size_t>& sizes) {
  std::multimap<size_t, void*> ready;  // of free_, what fits
  std::vector<size_t> missing;
  for (const size_t size : sizes) {
    const auto found = free_.find(size);
    if (found == free_.end()) {
      missing.push_back(size);
    } else {
      ready.insert(free_.extract(found));
    }
  }
  if (!missing.empty()) trim();
  free_.merge(ready);
  free_bytes_ = 0;
  for (const auto& [size, buffer] : free_) free_bytes_ += size;
  std::vector<std::multimap<size_t, void*>::iterator> made;
  for (const size_t size : missing) {
    void* buffer = nullptr;
    const CudaResult result = driver_.mem_host_alloc(&buffer, size, 0);
    if (result != kCudaSuccess) {
      for (const auto& each : made) free_one(each);
      return result;
    }
    made.push_back(free_.insert({size, buffer}));
    free_bytes_ += size;
  }
  return kCudaSuccess;
}

void* HostMemory::take(size_t size) {
  const auto found = free_.find(size);
  if (found == free_.end()) return nullptr;
  void* const buffer = found->second;
  free_.erase(found);
  free_bytes_ -= size;
  taken_bytes_ += size;
  return buffer;
}

void HostMemory::give_back(void* buffer, size_t size) {
  free_.insert({size, buffer});
  taken_bytes_ -= size;
  free_bytes_ += size;
}

size_t HostMemory::trim() {
  size_t trimmed = 0;
  while (!free_.empty()) {
    trimmed += free_.begin()->first;
    free_one(free_.begin());
  }
  free_bytes_ = 0;
  return trimmed;
}

void HostMemory::free_one(std::multimap<size_t, void*>::iterator buffer) {
  driver_.mem_free_host(buffer->second);
  free_bytes_ -= buffer->first;
  free_.erase(buffer);
}

}  // namespace distcomm
