// The memory of a strict stand-in for a CUDA device: real pages, at addresses that are refused to
// everybody while nothing is mapped there. Not thread-safe; fake_driver.h is what the heap calls.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "cuda_driver.h"

namespace distcomm::fake {

constexpr size_t kGranularity = size_t{4} << 10;
constexpr CudaResult kInvalid = 1;
constexpr CudaResult kNoMemory = 2;

// What is written at an offset of content number `seed`.
inline uint64_t word(uint64_t seed, size_t offset) {
  return (seed * 0x9e3779b97f4a7c15 + offset) * 0xbf58476d1ce4e5b9 + 1;
}
inline void fill(void* memory, size_t size, uint64_t seed) {
  uint64_t* const words = static_cast<uint64_t*>(memory);
  for (size_t i = 0; i < size / sizeof(uint64_t); ++i) words[i] = word(seed, i);
}

class Device {
 public:
  explicit Device(size_t capacity) : capacity_(capacity) {}
  ~Device() {
    for (const auto& [address, size] : ranges_) ::munmap(pointer(address), size);
    for (const auto& [handle, memory] : memory_) ::close(memory.file);
  }
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;

  // ---- What there is.
  size_t num_ranges() const { return ranges_.size(); }
  size_t num_handles() const { return num_handles_; }
  size_t num_mappings() const { return mappings_.size(); }
  size_t num_host() const { return host_.size(); }
  size_t host_bytes() const { return host_bytes_; }
  size_t used_bytes() const { return used_; }
  size_t free_bytes() const { return capacity_ - std::min(capacity_, used_ + others_); }
  size_t capacity() const { return capacity_; }
  // Of other processes.
  void set_others(size_t bytes) { others_ = bytes; }
  void set_host_capacity(size_t bytes) { host_capacity_ = bytes; }
  bool is_accessible(DevicePointer address, size_t size) const {
    while (size > 0) {
      const auto found = mapping_at(address);
      if (found == mappings_.end() || !found->second.has_access) return false;
      const size_t step = std::min<size_t>(size, found->first + found->second.size - address);
      address += step;
      size -= step;
    }
    return true;
  }
  std::vector<std::string> violations;

  // ---- Addresses and memory.
  CudaResult reserve(DevicePointer* address, size_t size) {
    if (!is_even(size)) return refuse("a range of an odd size");
    if (size > size_t{1} << 40) return kNoMemory;
    void* const base = ::mmap(nullptr, size, PROT_NONE, kAnonymous, -1, 0);
    if (base == MAP_FAILED) return kNoMemory;
    *address = reinterpret_cast<uintptr_t>(base);
    ranges_[*address] = size;
    return kCudaSuccess;
  }
  CudaResult free_range(DevicePointer address, size_t size) {
    const auto found = ranges_.find(address);
    if (found == ranges_.end() || found->second != size) return refuse("no such range to free");
    if (overlaps_mapping(address, size)) return refuse("free of a range that has mappings");
    ::munmap(pointer(address), size);
    ranges_.erase(found);
    return kCudaSuccess;
  }
  CudaResult create(CudaMemory* handle, size_t size) {
    if (!is_even(size)) return refuse("memory of an odd size");
    if (size > free_bytes()) return kNoMemory;
    const int file = ::memfd_create("fake device memory", 0);
    if (file < 0 || ::ftruncate(file, static_cast<off_t>(size)) != 0) return refuse("no file");
    *handle = ++last_handle_;
    memory_[*handle] = {file, size, true, false};
    ++num_handles_;
    used_ += size;
    return kCudaSuccess;
  }
  CudaResult release(CudaMemory handle) {
    const auto found = memory_.find(handle);
    if (found == memory_.end() || !found->second.has_handle) return refuse("released twice");
    found->second.has_handle = false;
    --num_handles_;
    drop_if_unused(found);
    return kCudaSuccess;
  }
  CudaResult map(DevicePointer address, size_t size, size_t offset, CudaMemory handle) {
    const auto memory = memory_.find(handle);
    if (memory == memory_.end() || !memory->second.has_handle) return refuse("no such handle");
    if (memory->second.is_mapped) return refuse("memory mapped twice");
    if (offset != 0 || size != memory->second.size) return refuse("a part of memory mapped");
    const auto range = ranges_.upper_bound(address);
    if (range == ranges_.begin()) return refuse("a mapping outside of all ranges");
    const auto& [base, range_size] = *std::prev(range);
    if (address + size > base + range_size) return refuse("a mapping outside of its range");
    if (!is_even(address - base + kGranularity)) return refuse("a mapping at an odd address");
    if (overlaps_mapping(address, size)) return refuse("a mapping over a mapping");
    ::mmap(pointer(address), size, PROT_NONE, MAP_SHARED | MAP_FIXED, memory->second.file, 0);
    memory->second.is_mapped = true;
    mappings_[address] = {size, handle, false};
    return kCudaSuccess;
  }
  CudaResult set_access(DevicePointer address, size_t size) {
    const auto found = mappings_.find(address);
    if (found == mappings_.end() || found->second.size != size) return refuse("access to nothing");
    ::mprotect(pointer(address), size, PROT_READ | PROT_WRITE);
    found->second.has_access = true;
    return kCudaSuccess;
  }
  CudaResult unmap(DevicePointer address, size_t size) {
    const auto found = mappings_.find(address);
    if (found == mappings_.end()) return refuse("unmapping of what is not mapped");
    if (found->second.size != size) return refuse("unmapping of a part");
    if (is_busy(address, size)) return refuse("unmapping under work that is still under way");
    ::mmap(pointer(address), size, PROT_NONE, kAnonymous | MAP_FIXED, -1, 0);
    const auto memory = memory_.find(found->second.handle);
    mappings_.erase(found);
    memory->second.is_mapped = false;
    drop_if_unused(memory);
    return kCudaSuccess;
  }
  CudaResult host_alloc(void** buffer, size_t size) {
    if (size > host_capacity_ - std::min(host_capacity_, host_bytes_)) return kNoMemory;
    auto bytes = std::make_unique<char[]>(size);
    *buffer = bytes.get();
    host_[reinterpret_cast<uintptr_t>(*buffer)] = {std::move(bytes), size};
    host_bytes_ += size;
    return kCudaSuccess;
  }
  CudaResult host_free(void* buffer) {
    const auto found = host_.find(reinterpret_cast<uintptr_t>(buffer));
    if (found == host_.end()) return refuse("no such host memory to free");
    if (is_busy(found->first, found->second.size)) return refuse("free of host memory in use");
    host_bytes_ -= found->second.size;
    host_.erase(found);
    return kCudaSuccess;
  }

  // ---- Work, which runs when it is waited for, or at random earlier.
  CudaResult copy(DevicePointer to, DevicePointer from, size_t size, CudaStream stream) {
    return enqueue({to, from, size, 0}, stream);
  }
  // A kernel that writes content number `seed`.
  CudaResult write(DevicePointer to, size_t size, uint64_t seed, CudaStream stream) {
    return enqueue({to, 0, size, seed}, stream);
  }
  void run(CudaStream stream) {
    for (; !work_[stream].empty(); work_[stream].pop_front()) run(work_[stream].front());
  }
  void run_all() {
    for (const auto& [stream, work] : work_) run(stream);
  }

 private:
  struct Memory {
    int file;
    size_t size;
    bool has_handle;
    bool is_mapped;
  };
  struct Mapping {
    size_t size;
    CudaMemory handle;
    bool has_access;
  };
  struct Host {
    std::unique_ptr<char[]> bytes;
    size_t size;
  };
  struct Work {
    DevicePointer to, from;
    size_t size;
    uint64_t seed;
  };
  static constexpr int kAnonymous = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;

  static void* pointer(DevicePointer address) {
    return reinterpret_cast<void*>(static_cast<uintptr_t>(address));
  }
  static bool is_even(size_t size) { return size > 0 && size % kGranularity == 0; }
  static bool overlap(DevicePointer a, size_t a_size, DevicePointer b, size_t b_size) {
    return a < b + b_size && b < a + a_size;
  }
  CudaResult refuse(const char* what) {
    violations.push_back(what);
    return kInvalid;
  }
  void drop_if_unused(std::map<CudaMemory, Memory>::iterator memory) {
    if (memory->second.has_handle || memory->second.is_mapped) return;
    ::close(memory->second.file);
    used_ -= memory->second.size;
    memory_.erase(memory);
  }
  std::map<DevicePointer, Mapping>::const_iterator mapping_at(DevicePointer address) const {
    const auto next = mappings_.upper_bound(address);
    if (next == mappings_.begin()) return mappings_.end();
    const auto found = std::prev(next);
    return address < found->first + found->second.size ? found : mappings_.end();
  }
  bool overlaps_mapping(DevicePointer address, size_t size) const {
    return std::any_of(mappings_.begin(), mappings_.end(), [&](const auto& each) {
      return overlap(each.first, each.second.size, address, size);
    });
  }
  bool is_usable(DevicePointer address, size_t size) const {
    const auto next = host_.upper_bound(address);
    if (next != host_.begin()) {
      const auto& [base, host] = *std::prev(next);
      if (address < base + host.size) return address + size <= base + host.size;
    }
    return is_accessible(address, size);
  }
  static bool uses(const Work& work, DevicePointer address, size_t size) {
    return overlap(work.to, work.size, address, size) ||
           (work.from != 0 && overlap(work.from, work.size, address, size));
  }
  bool is_busy(DevicePointer address, size_t size) const {
    for (const auto& [stream, work] : work_) {
      for (const Work& each : work) {
        if (uses(each, address, size)) return true;
      }
    }
    return false;
  }
  CudaResult enqueue(const Work& work, CudaStream stream) {
    if (!check(work)) return kInvalid;
    for (const auto& [other, queue] : work_) {
      for (const Work& each : queue) {
        if (other == stream) continue;
        const bool races = uses(each, work.to, work.size) ||
                           (work.from != 0 && overlap(each.to, each.size, work.from, work.size));
        if (races) return refuse("work that nothing orders after that of another stream");
      }
    }
    work_[stream].push_back(work);
    std::deque<Work>& queue = std::next(work_.begin(), random_() % work_.size())->second;
    if (!queue.empty() && random_() % 4 == 0) {
      run(queue.front());
      queue.pop_front();
    }
    return kCudaSuccess;
  }
  bool check(const Work& work) {
    if (is_usable(work.to, work.size) && (work.from == 0 || is_usable(work.from, work.size))) {
      return true;
    }
    violations.push_back("work on memory that can't be used");
    return false;
  }
  void run(const Work& work) {
    if (!check(work)) return;
    if (work.from == 0) {
      fill(pointer(work.to), work.size, work.seed);
    } else {
      std::memcpy(pointer(work.to), pointer(work.from), work.size);
    }
  }

  const size_t capacity_;
  size_t others_ = 0, used_ = 0, host_bytes_ = 0, num_handles_ = 0;
  size_t host_capacity_ = SIZE_MAX;
  CudaMemory last_handle_ = 0;
  std::map<DevicePointer, size_t> ranges_;
  std::map<CudaMemory, Memory> memory_;
  std::map<DevicePointer, Mapping> mappings_;
  std::map<DevicePointer, Host> host_;
  std::map<CudaStream, std::deque<Work>> work_;
  std::mt19937 random_;
};

}  // namespace distcomm::fake
