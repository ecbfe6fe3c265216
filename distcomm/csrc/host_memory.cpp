#include "host_memory.h"

namespace distcomm {
namespace {

using Lock = std::lock_guard<std::mutex>;

}  // namespace

CudaResult HostMemory::prepare(const std::vector<size_t>& sizes) {
  Buffers ready, rest;  // of what is free, what fits, and what doesn't
  std::vector<size_t> missing;
  {
    const Lock lock(mutex_);
    std::swap(rest, free_);
    free_bytes_ = 0;
  }
  for (const size_t size : sizes) {
    const auto found = rest.find(size);
    if (found == rest.end()) {
      missing.push_back(size);
    } else {
      ready.insert(rest.extract(found));
    }
  }
  put(ready);
  if (missing.empty()) {
    put(rest);
  } else {
    free_all(std::move(rest));
  }
  Buffers made;
  CudaResult result = kCudaSuccess;
  for (auto size = missing.begin(); size != missing.end() && result == kCudaSuccess; ++size) {
    void* buffer = nullptr;
    result = driver_.mem_host_alloc(&buffer, *size, 0);
    if (result == kCudaSuccess) made.insert({*size, buffer});
  }
  if (result == kCudaSuccess) {
    put(made);
  } else {
    free_all(std::move(made));
  }
  return result;
}

void* HostMemory::take(size_t size) {
  const Lock lock(mutex_);
  const auto found = free_.find(size);
  if (found == free_.end()) return nullptr;
  void* const buffer = found->second;
  free_.erase(found);
  free_bytes_ -= size;
  taken_bytes_ += size;
  return buffer;
}

void HostMemory::give_back(void* buffer, size_t size) {
  const Lock lock(mutex_);
  free_.insert({size, buffer});
  taken_bytes_ -= size;
  free_bytes_ += size;
}

size_t HostMemory::trim() {
  Buffers all;
  {
    const Lock lock(mutex_);
    std::swap(all, free_);
    free_bytes_ = 0;
  }
  return free_all(std::move(all));
}

size_t HostMemory::bytes() const {
  const Lock lock(mutex_);
  return free_bytes_ + taken_bytes_;
}

size_t HostMemory::free_bytes() const {
  const Lock lock(mutex_);
  return free_bytes_;
}

size_t HostMemory::free_all(Buffers buffers) {
  size_t freed = 0;
  for (auto buffer = buffers.begin(); buffer != buffers.end();) {
    if (driver_.mem_free_host(buffer->second) == kCudaSuccess) {
      freed += buffer->first;
      buffer = buffers.erase(buffer);
    } else {
      ++buffer;
    }
  }
  put(buffers);
  return freed;
}

void HostMemory::put(const Buffers& buffers) {
  const Lock lock(mutex_);
  for (const auto& [size, buffer] : buffers) {
    free_.insert({size, buffer});
    free_bytes_ += size;
  }
}

}  // namespace distcomm
