// Pinned host memory that is used again.
#pragma once

#include <cstddef>
#include <map>
#include <mutex>
#include <vector>

#include "cuda_driver.h"

namespace distcomm {

// Buffers of the sizes that were asked for. What is given back stays, to be taken again: pinning
// takes much longer than copying. Before more is pinned, what fits no request goes, so that there
// is never more than the largest set of requests so far.
//
// Thread-safe, but for prepare() and trim(), of which only one may run at a time; neither keeps the
// others waiting. These two need a current context of the device.
class HostMemory {
 public:
  explicit HostMemory(const CudaDriver& driver) : driver_(driver) {}
  ~HostMemory() { trim(); }
  HostMemory(const HostMemory&) = delete;
  HostMemory& operator=(const HostMemory&) = delete;

  // Has buffers of all these sizes ready for take(). On failure there is no more than before.
  CudaResult prepare(const std::vector<size_t>& sizes);
  // A buffer of exactly this size; NULL unless one is ready.
  void* take(size_t size);
  // What take() returned.
  void give_back(void* buffer, size_t size);
  // Frees the buffers that nobody has; how many bytes. What the driver doesn't take back stays.
  size_t trim();

  size_t bytes() const;
  size_t free_bytes() const;

 private:
  using Buffers = std::multimap<size_t, void*>;  // by size

  size_t free_all(Buffers buffers);
  void put(const Buffers& buffers);

  const CudaDriver& driver_;
  mutable std::mutex mutex_;  // guards all below; not held while the driver is called
  Buffers free_;
  size_t free_bytes_ = 0;
  size_t taken_bytes_ = 0;
};

}  // namespace distcomm
