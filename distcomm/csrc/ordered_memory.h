// Memory from ncclMemAlloc at rising addresses.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>

#include "cuda_driver.h"
#include "nccl_symbols.h"

namespace distcomm {

// Of all that is handed out: the size of torch's smallest request, and of the pages that
// ncclMemAlloc maps.
inline constexpr size_t kAlignment = size_t{2} << 20;

// torch chooses between free blocks of one size by their addresses, so on all ranks memory has to
// lie in the order of its making. Where NCCL puts it depends on what gaps a process has. So it is
// mapped a second time, at an address of a range that is reserved for that, above all that lives
// there; NCCL's windows are of the second address. Where the driver can't do that, NCCL's address
// is used.
//
// Not thread-safe.
class OrderedMemory {
 public:
  // `nccl` and `driver` must outlive it. `range_bytes` of address space are reserved at the first
  // allocation, and never given back: what is in it may outlive the heap.
  OrderedMemory(const NcclSymbols& nccl, const CudaDriver& driver, int device,
                size_t range_bytes = size_t{4} << 40);

  // NULL on failure, with NCCL's result.
  void* alloc(size_t size, NcclResult* result);
  // What it returned, and nothing but that. On failure it is as it was.
  NcclResult free(void* pointer);
  // Gives the memory back, but not its address. Only what is mapped has one of its own. On failure
  // it may be tried again, and take_again() has nothing to do.
  NcclResult give_back(void* pointer);
  // Memory at the address again, its content undefined.
  NcclResult take_again(void* pointer);
  // Whether something that alloc() returned hasn't been given back.
  bool has_memory(void* pointer) const;
  // Whether something that alloc() returned lies in the range.
  bool is_mapped(void* pointer) const;

 private:
  struct Mapping {
    void* memory;  // NCCL's address; NULL once it is freed
    size_t size;
    bool has_memory = true;
  };

  // The second address of memory; NULL where there is none.
  void* mapped(void* memory);
  // Bytes of NCCL's mapping that begins there, which may be more than it was asked for; 0 if none.
  size_t mapped_size(void* memory);
  bool reserve_range();
  CudaResult map(DevicePointer address, size_t size, void* memory);

  const NcclSymbols& nccl_;
  const CudaDriver& driver_;
  const int device_;
  const size_t range_bytes_;
  bool tried_to_reserve_ = false;
  DevicePointer range_ = 0;  // 0: none
  std::map<DevicePointer, Mapping> mappings_;  // by second address
};

}  // namespace distcomm
