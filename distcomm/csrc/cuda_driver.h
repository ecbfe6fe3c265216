// The CUDA driver's functions that distcomm calls, resolved at run time from libcuda.
#pragma once

#include <cstddef>
#include <cstdint>

#include "nccl_symbols.h"

namespace distcomm {

using CudaGraph = void*;
using CudaGraphNode = void*;
using CudaUserObject = void*;
using DevicePointer = unsigned long long;
using CudaMemory = unsigned long long;  // CUmemGenericAllocationHandle
using CudaResult = int;                 // CUresult: 0 is success

inline constexpr CudaResult kCudaSuccess = 0;

struct CudaEdgeData {  // CUgraphEdgeData
  unsigned char from_port;
  unsigned char to_port;
  unsigned char type;
  unsigned char reserved[5];
};

struct CudaMemAccess {  // CUmemAccessDesc
  int location_type;
  int location_id;
  int flags;
};

struct CudaMemProp {  // CUmemAllocationProp
  int type;
  int handle_types;
  int location_type;
  int location_id;
  void* win32_data;
  unsigned char compression;
  unsigned char gpu_direct_rdma_capable;
  unsigned short usage;
  unsigned char reserved[4];
};
static_assert(sizeof(CudaMemProp) == 32 && offsetof(CudaMemProp, compression) == 24);

struct CudaBatchMemOp {  // CUstreamBatchMemOpParams: the members of its 32-bit waits and writes
  int operation;
  DevicePointer address;
  uint32_t value;
  uint32_t value_high;  // of 64-bit operations
  unsigned flags;
  DevicePointer alias;
  uint64_t padding;
};
static_assert(sizeof(CudaBatchMemOp) == 48 && offsetof(CudaBatchMemOp, flags) == 24);

struct CudaMemcpy2D {  // CUDA_MEMCPY2D, version 2
  size_t source_x_bytes;
  size_t source_y;
  unsigned source_memory_type;
  const void* source_host;
  DevicePointer source_device;
  void* source_array;
  size_t source_pitch;
  size_t dest_x_bytes;
  size_t dest_y;
  unsigned dest_memory_type;
  void* dest_host;
  DevicePointer dest_device;
  void* dest_array;
  size_t dest_pitch;
  size_t width_bytes;
  size_t height;
};
static_assert(sizeof(CudaMemcpy2D) == 128 && offsetof(CudaMemcpy2D, dest_device) == 88);

// Signatures are those of cuda.h, of the first version of each function that distcomm needs:
// libcuda keeps those when it adds newer ones. NULL where there is no driver.
struct CudaDriver {
  CudaResult (*stream_is_capturing)(CudaStream, int*) = nullptr;
  CudaResult (*stream_get_capture_info)(CudaStream, int*, uint64_t*, CudaGraph*,
                                        const CudaGraphNode**, size_t*) = nullptr;
  CudaResult (*graph_node_get_type)(CudaGraphNode, int*) = nullptr;
  CudaResult (*graph_node_get_dependencies)(CudaGraphNode, CudaGraphNode*, CudaEdgeData*,
                                            size_t*) = nullptr;
  CudaResult (*graph_add_dependencies)(CudaGraph, const CudaGraphNode*, const CudaGraphNode*,
                                       size_t) = nullptr;
  CudaResult (*graph_remove_dependencies)(CudaGraph, const CudaGraphNode*, const CudaGraphNode*,
                                          const CudaEdgeData*, size_t) = nullptr;
  CudaResult (*user_object_create)(CudaUserObject*, void*, void (*)(void*), unsigned,
                                   unsigned) = nullptr;
  CudaResult (*graph_retain_user_object)(CudaGraph, CudaUserObject, unsigned,
                                         unsigned) = nullptr;
  CudaResult (*user_object_release)(CudaUserObject, unsigned) = nullptr;
  CudaResult (*thread_exchange_capture_mode)(int*) = nullptr;
  CudaResult (*device_primary_ctx_retain)(void**, int) = nullptr;
  CudaResult (*ctx_push_current)(void*) = nullptr;
  CudaResult (*ctx_pop_current)(void**) = nullptr;
  CudaResult (*ctx_synchronize)() = nullptr;
  CudaResult (*memcpy_dtoh)(void*, DevicePointer, size_t) = nullptr;
  CudaResult (*memcpy_async)(DevicePointer, DevicePointer, size_t, CudaStream) = nullptr;
  CudaResult (*mem_address_reserve)(DevicePointer*, size_t, size_t, DevicePointer,
                                    unsigned long long) = nullptr;
  CudaResult (*mem_get_address_range)(DevicePointer*, size_t*, DevicePointer) = nullptr;
  CudaResult (*mem_retain_allocation_handle)(CudaMemory*, void*) = nullptr;
  CudaResult (*mem_release)(CudaMemory) = nullptr;
  CudaResult (*mem_map)(DevicePointer, size_t, size_t, CudaMemory, unsigned long long) = nullptr;
  CudaResult (*mem_set_access)(DevicePointer, size_t, const CudaMemAccess*, size_t) = nullptr;
  CudaResult (*mem_unmap)(DevicePointer, size_t) = nullptr;
  CudaResult (*mem_create)(CudaMemory*, size_t, const CudaMemProp*, unsigned long long) = nullptr;
  CudaResult (*mem_address_free)(DevicePointer, size_t) = nullptr;
  CudaResult (*mem_get_granularity)(size_t*, const CudaMemProp*, int) = nullptr;
  CudaResult (*mem_get_info)(size_t*, size_t*) = nullptr;
  CudaResult (*mem_host_alloc)(void**, size_t, unsigned) = nullptr;
  CudaResult (*mem_free_host)(void*) = nullptr;
  CudaResult (*device_get_attribute)(int*, int, int) = nullptr;
  CudaResult (*stream_synchronize)(CudaStream) = nullptr;
  CudaResult (*get_error_string)(CudaResult, const char**) = nullptr;
  CudaResult (*memset_d8_async)(DevicePointer, unsigned char, size_t, CudaStream) = nullptr;
  CudaResult (*memcpy_2d_async)(const CudaMemcpy2D*, CudaStream) = nullptr;
  CudaResult (*stream_batch_mem_op)(CudaStream, unsigned, CudaBatchMemOp*, unsigned) = nullptr;

  // Whether there is a driver, with all functions but those that only the four below need.
  bool complete() const;
  // Whether it has what graphs with edge data need. Before CUDA 12.3 they had none.
  bool has_edge_data() const;
  // Whether it has what it takes to map memory at addresses of one's choice.
  bool can_map() const;
  // Whether it has what memory that can sleep is made of.
  bool can_sleep() const;
  // Whether it has what distcomm_push_rows needs. Before CUDA 11.7 batches had no version 2.
  bool can_push() const;
};

// This process's driver, looked for once.
const CudaDriver& cuda_driver();

// Whether work given to `stream` is captured into a graph. True also when the driver can't tell,
// as it can't of the default stream while another one is captured.
bool is_capturing(const CudaDriver& driver, CudaStream stream);

// While one lives, a device's primary context, which torch uses, is this thread's current one.
class CudaContext {
 public:
  CudaContext(const CudaDriver& driver, int device);
  ~CudaContext();
  CudaContext(const CudaContext&) = delete;
  CudaContext& operator=(const CudaContext&) = delete;

  // False where there is no driver, or the device can't be used.
  bool is_current() const { return current_; }

 private:
  const CudaDriver& driver_;
  bool current_ = false;
};

// While one lives, this thread may allocate and free memory although a graph is captured, which the
// driver may refuse otherwise.
class RelaxedCapture {
 public:
  explicit RelaxedCapture(const CudaDriver& driver);
  ~RelaxedCapture();
  RelaxedCapture(const RelaxedCapture&) = delete;
  RelaxedCapture& operator=(const RelaxedCapture&) = delete;

 private:
  void exchange();

  const CudaDriver& driver_;
  int mode_;
};

// Waits for all work on a device. False if that isn't possible now, as while a graph is captured.
bool synchronize(const CudaDriver& driver, int device);

}  // namespace distcomm
