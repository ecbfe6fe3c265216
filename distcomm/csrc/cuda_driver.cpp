#include "cuda_driver.h"

#include <dlfcn.h>

namespace distcomm {
namespace {

template <typename Function>
void resolve(void* library, const char* name, Function& slot) {
  slot = reinterpret_cast<Function>(dlsym(library, name));
}

CudaDriver open_driver() {
  CudaDriver driver;
  // Never closed: it is the driver that torch uses too.
  void* const library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) return driver;
  resolve(library, "cuStreamIsCapturing", driver.stream_is_capturing);
  resolve(library, "cuStreamGetCaptureInfo_v2", driver.stream_get_capture_info);
  resolve(library, "cuGraphNodeGetType", driver.graph_node_get_type);
  resolve(library, "cuGraphNodeGetDependencies_v2", driver.graph_node_get_dependencies);
  resolve(library, "cuGraphAddDependencies", driver.graph_add_dependencies);
  resolve(library, "cuGraphRemoveDependencies_v2", driver.graph_remove_dependencies);
  resolve(library, "cuUserObjectCreate", driver.user_object_create);
  resolve(library, "cuGraphRetainUserObject", driver.graph_retain_user_object);
  resolve(library, "cuUserObjectRelease", driver.user_object_release);
  resolve(library, "cuThreadExchangeStreamCaptureMode", driver.thread_exchange_capture_mode);
  resolve(library, "cuDevicePrimaryCtxRetain", driver.device_primary_ctx_retain);
  resolve(library, "cuCtxPushCurrent_v2", driver.ctx_push_current);
  resolve(library, "cuCtxPopCurrent_v2", driver.ctx_pop_current);
  resolve(library, "cuCtxSynchronize", driver.ctx_synchronize);
  resolve(library, "cuMemcpyDtoH_v2", driver.memcpy_dtoh);
  resolve(library, "cuMemcpyAsync", driver.memcpy_async);
  resolve(library, "cuMemAddressReserve", driver.mem_address_reserve);
  resolve(library, "cuMemGetAddressRange_v2", driver.mem_get_address_range);
  resolve(library, "cuMemRetainAllocationHandle", driver.mem_retain_allocation_handle);
  resolve(library, "cuMemRelease", driver.mem_release);
  resolve(library, "cuMemMap", driver.mem_map);
  resolve(library, "cuMemSetAccess", driver.mem_set_access);
  resolve(library, "cuMemUnmap", driver.mem_unmap);
  resolve(library, "cuMemCreate", driver.mem_create);
  resolve(library, "cuMemAddressFree", driver.mem_address_free);
  resolve(library, "cuMemGetAllocationGranularity", driver.mem_get_granularity);
  resolve(library, "cuMemGetInfo_v2", driver.mem_get_info);
  resolve(library, "cuMemHostAlloc", driver.mem_host_alloc);
  resolve(library, "cuMemFreeHost", driver.mem_free_host);
  resolve(library, "cuDeviceGetAttribute", driver.device_get_attribute);
  resolve(library, "cuStreamSynchronize", driver.stream_synchronize);
  resolve(library, "cuGetErrorString", driver.get_error_string);
  resolve(library, "cuMemsetD8Async", driver.memset_d8_async);
  resolve(library, "cuMemcpy2DAsync_v2", driver.memcpy_2d_async);
  resolve(library, "cuStreamBatchMemOp_v2", driver.stream_batch_mem_op);
  return driver;
}

}  // namespace

bool CudaDriver::complete() const {
  return stream_is_capturing != nullptr && stream_get_capture_info != nullptr &&
         user_object_create != nullptr && graph_retain_user_object != nullptr &&
         user_object_release != nullptr && thread_exchange_capture_mode != nullptr &&
         device_primary_ctx_retain != nullptr && ctx_push_current != nullptr &&
         ctx_pop_current != nullptr && ctx_synchronize != nullptr && memcpy_dtoh != nullptr &&
         memcpy_async != nullptr && memset_d8_async != nullptr;
}

bool CudaDriver::has_edge_data() const {
  return complete() && graph_node_get_type != nullptr && graph_node_get_dependencies != nullptr &&
         graph_add_dependencies != nullptr && graph_remove_dependencies != nullptr;
}

bool CudaDriver::can_map() const {
  return device_primary_ctx_retain != nullptr && ctx_push_current != nullptr &&
         ctx_pop_current != nullptr && mem_address_reserve != nullptr &&
         mem_get_address_range != nullptr && mem_retain_allocation_handle != nullptr &&
         mem_release != nullptr && mem_map != nullptr && mem_set_access != nullptr &&
         mem_unmap != nullptr;
}

bool CudaDriver::can_sleep() const {
  return device_primary_ctx_retain != nullptr && ctx_push_current != nullptr &&
         ctx_pop_current != nullptr && ctx_synchronize != nullptr && memcpy_async != nullptr &&
         mem_address_reserve != nullptr && mem_address_free != nullptr && mem_create != nullptr &&
         mem_release != nullptr && mem_map != nullptr && mem_set_access != nullptr &&
         mem_unmap != nullptr && mem_get_granularity != nullptr && mem_get_info != nullptr &&
         mem_host_alloc != nullptr && mem_free_host != nullptr && stream_synchronize != nullptr;
}

bool CudaDriver::can_push() const {
  return complete() && memcpy_2d_async != nullptr && stream_batch_mem_op != nullptr;
}

const CudaDriver& cuda_driver() {
  static const CudaDriver driver = open_driver();
  return driver;
}

bool is_capturing(const CudaDriver& driver, CudaStream stream) {
  if (driver.stream_is_capturing == nullptr) return false;
  int status = 0;
  return driver.stream_is_capturing(stream, &status) != kCudaSuccess || status != 0;
}

CudaContext::CudaContext(const CudaDriver& driver, int device) : driver_(driver) {
  if (driver.device_primary_ctx_retain == nullptr) return;
  // Retained once more each time, which costs a counter.
  void* context = nullptr;
  current_ = driver.device_primary_ctx_retain(&context, device) == kCudaSuccess &&
             driver.ctx_push_current(context) == kCudaSuccess;
}

CudaContext::~CudaContext() {
  void* context = nullptr;
  if (current_) driver_.ctx_pop_current(&context);
}

RelaxedCapture::RelaxedCapture(const CudaDriver& driver)
    : driver_(driver), mode_(2) {  // CU_STREAM_CAPTURE_MODE_RELAXED
  exchange();
}

RelaxedCapture::~RelaxedCapture() { exchange(); }

void RelaxedCapture::exchange() {
  if (driver_.thread_exchange_capture_mode != nullptr) {
    driver_.thread_exchange_capture_mode(&mode_);
  }
}

bool synchronize(const CudaDriver& driver, int device) {
  if (driver.ctx_synchronize == nullptr) return true;  // no driver, hence no work
  const CudaContext context(driver, device);
  return context.is_current() && driver.ctx_synchronize() == kCudaSuccess;
}

}  // namespace distcomm
