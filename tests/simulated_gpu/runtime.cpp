// Devices, contexts, errors and kernels, and how torch finds the driver's functions.

#include <cuda_runtime_api.h>
#include <dlfcn.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>

#include "device.h"

namespace simulated {
namespace {

constexpr int kCudaVersion = 13000;
constexpr int kMultiprocessors = 132;
constexpr int kThreadsPerBlock = 1024;
// Of the one kernel that is simulated: it does nothing for a number of clock cycles.
constexpr const char* kSleepKernel = "spin_kernel";
constexpr double kCyclesPerNanosecond = 2.0;

thread_local cudaError_t last_error = cudaSuccess;

std::map<const void*, std::string>& kernel_names() {
  static auto* const names = new std::map<const void*, std::string>;
  return *names;
}

struct LaunchConfiguration {
  dim3 grid, block;
  size_t shared_bytes;
  void* stream;
};

thread_local LaunchConfiguration pushed_configuration;

// A kernel's code can't run. Operators of torch don't come here: see operators.cpp.
cudaError_t launch(const void* kernel, void** arguments, cudaStream_t stream) {
  const std::string& name = kernel_names()[kernel];
  if (name.find(kSleepKernel) == std::string::npos) {
    std::fprintf(stderr, "simulated GPU: there is no kernel %s\n", name.c_str());
    return failed(cudaErrorNotSupported, __func__);
  }
  const auto cycles = static_cast<double>(*static_cast<int64_t*>(arguments[0]));
  const std::chrono::duration<double, std::nano> time(cycles / kCyclesPerNanosecond);
  return stream_of(stream)->give([time] { std::this_thread::sleep_for(time); },
                                 NodeType::kKernel);
}

}  // namespace

int num_devices() {
  const char* visible = std::getenv("CUDA_VISIBLE_DEVICES");
  if (visible != nullptr && *visible != '\0') {
    int count = 1;
    for (; *visible != '\0'; ++visible) count += *visible == ',';
    return count;
  }
  const char* const all = std::getenv("SIMULATED_GPUS");
  return all == nullptr ? 1 : std::atoi(all);
}

cudaError_t failed(cudaError_t error, const char* function) {
  static const bool verbose = std::getenv("SIMULATED_GPU_VERBOSE") != nullptr;
  if (verbose) std::fprintf(stderr, "simulated GPU: %s: %s\n", function, cudaGetErrorString(error));
  last_error = error;
  return error;
}

}  // namespace simulated

using namespace simulated;

// ---- Devices.

SIMULATED_API cudaError_t cudaGetDeviceCount(int* count) {
  *count = num_devices();
  return cudaSuccess;
}

SIMULATED_API cudaError_t cudaGetDevice(int* device) {
  *device = current_device();
  return cudaSuccess;
}

SIMULATED_API cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= num_devices()) return failed(cudaErrorInvalidDevice, __func__);
  current_device() = device;
  return cudaSuccess;
}

SIMULATED_API cudaError_t cudaDriverGetVersion(int* version) {
  *version = kCudaVersion;
  return cudaSuccess;
}

SIMULATED_API cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = kCudaVersion;
  return cudaSuccess;
}

SIMULATED_API cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device) {
  *properties = {};
  std::snprintf(properties->name, sizeof properties->name, "simulated GPU");
  properties->major = 7;  // with no push kernels: there is nothing that runs Triton's code
  properties->totalGlobalMem = kTotalBytes;
  properties->multiProcessorCount = kMultiprocessors;
  properties->warpSize = 32;
  properties->maxThreadsPerBlock = kThreadsPerBlock;
  properties->maxThreadsPerMultiProcessor = 2 * kThreadsPerBlock;
  properties->pciBusID = device + 1;
  properties->uuid.bytes[0] = static_cast<char>(device + 1);
  return cudaSuccess;
}

SIMULATED_API cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor: *value = 9; break;
    case cudaDevAttrMultiProcessorCount: *value = kMultiprocessors; break;
    case cudaDevAttrMaxThreadsPerBlock: *value = kThreadsPerBlock; break;
    default: *value = 0;
  }
  return cudaSuccess;
}

SIMULATED_API cudaError_t cudaDeviceGetPCIBusId(char* text, int size, int device) {
  std::snprintf(text, static_cast<size_t>(size), "0000:%02x:00.0", device + 1);
  return cudaSuccess;
}

SIMULATED_API cudaError_t cudaDeviceCanAccessPeer(int* can, int, int) {
  *can = 1;
  return cudaSuccess;
}

SIMULATED_API cudaError_t cudaDeviceEnablePeerAccess(int, unsigned) { return cudaSuccess; }

SIMULATED_API cudaError_t cudaProfilerStart() { return cudaSuccess; }

SIMULATED_API cudaError_t cudaProfilerStop() { return cudaSuccess; }

// ---- Errors.

SIMULATED_API cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }

SIMULATED_API cudaError_t cudaPeekAtLastError() { return last_error; }

SIMULATED_API const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "no error";
    case cudaErrorMemoryAllocation: return "out of memory";
    case cudaErrorInvalidValue: return "invalid argument";
    case cudaErrorInvalidDevice: return "invalid device ordinal";
    case cudaErrorNotSupported: return "operation not supported";
    case cudaErrorStreamCaptureUnsupported:
      return "operation not permitted when stream is capturing";
    case cudaErrorStreamCaptureInvalidated:
      return "operation failed due to a previous error during capture";
    case cudaErrorStreamCaptureUnjoined: return "capture was not joined";
    default: return "unknown error";
  }
}

SIMULATED_API const char* cudaGetErrorName(cudaError_t error) { return cudaGetErrorString(error); }

SIMULATED_API int cuGetErrorString(int error, const char** text) {
  *text = cudaGetErrorString(static_cast<cudaError_t>(error));
  return cudaSuccess;
}

SIMULATED_API int cuGetErrorName(int error, const char** text) {
  return cuGetErrorString(error, text);
}

// ---- Kernels, as compiled code registers and launches them.

SIMULATED_API void** __cudaRegisterFatBinary(void*) {
  static void* handle = nullptr;
  return &handle;
}

SIMULATED_API void __cudaRegisterFatBinaryEnd(void**) {}

SIMULATED_API void __cudaUnregisterFatBinary(void**) {}

SIMULATED_API void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}

SIMULATED_API void __cudaRegisterFunction(void**, const char* function, char*, const char* name,
                                          int, void*, void*, void*, void*, int*) {
  kernel_names()[function] = name;
}

SIMULATED_API unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared_bytes,
                                                   void* stream) {
  pushed_configuration = {grid, block, shared_bytes, stream};
  return 0;
}

SIMULATED_API cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared_bytes,
                                                     void** stream) {
  *grid = pushed_configuration.grid;
  *block = pushed_configuration.block;
  *shared_bytes = pushed_configuration.shared_bytes;
  *stream = pushed_configuration.stream;
  return cudaSuccess;
}

SIMULATED_API cudaError_t __cudaGetKernel(const void** kernel, const void* function) {
  *kernel = function;
  return cudaSuccess;
}

SIMULATED_API cudaError_t __cudaLaunchKernel(const void* kernel, dim3, dim3, void** arguments,
                                             size_t, cudaStream_t stream) {
  return launch(kernel, arguments, stream);
}

SIMULATED_API cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* configuration,
                                              const void* function, void** arguments) {
  return launch(function, arguments, configuration->stream);
}

SIMULATED_API cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  *attributes = {};
  attributes->maxThreadsPerBlock = kThreadsPerBlock;
  return cudaSuccess;
}

SIMULATED_API cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) {
  return cudaSuccess;
}

SIMULATED_API cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(
    int* num_blocks, const void*, int, size_t, unsigned) {
  *num_blocks = 1;
  return cudaSuccess;
}

// ---- The driver's contexts: one a device.

namespace {

thread_local std::vector<int> pushed_devices;

void* context_of(int device) { return reinterpret_cast<void*>(uintptr_t(device) + 1); }
int device_of(void* context) { return static_cast<int>(reinterpret_cast<uintptr_t>(context)) - 1; }

}  // namespace

SIMULATED_API int cuInit(unsigned) { return cudaSuccess; }

SIMULATED_API int cuDevicePrimaryCtxRetain(void** context, int device) {
  *context = context_of(device);
  return cudaSuccess;
}

SIMULATED_API int cuDevicePrimaryCtxGetState(int, unsigned* flags, int* active) {
  *flags = 0;
  *active = 1;
  return cudaSuccess;
}

SIMULATED_API int cuCtxGetCurrent(void** context) {
  *context = context_of(current_device());
  return cudaSuccess;
}

SIMULATED_API int cuCtxSetCurrent(void* context) {
  current_device() = device_of(context);
  return cudaSuccess;
}

SIMULATED_API int cuCtxPushCurrent_v2(void* context) {
  pushed_devices.push_back(current_device());
  return cuCtxSetCurrent(context);
}

SIMULATED_API int cuCtxPopCurrent_v2(void** context) {
  *context = context_of(current_device());
  current_device() = pushed_devices.back();
  pushed_devices.pop_back();
  return cudaSuccess;
}

SIMULATED_API int cuCtxSynchronize() { return synchronize(current_device()); }

SIMULATED_API int cuDeviceGetAttribute(int* value, int attribute, int) {
  constexpr int kVirtualMemory = 102;  // CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED
  *value = attribute == kVirtualMemory;
  return cudaSuccess;
}

// ---- What there isn't. Of the runtime, that is found in the real libcudart, which finds no GPU.

namespace {

int not_there() { return failed(cudaErrorNotSupported, "a function of the driver"); }

}  // namespace

// torch asks for all functions of the driver that it might call.
SIMULATED_API cudaError_t cudaGetDriverEntryPointByVersion(
    const char* name, void** function, unsigned, unsigned long long,
    cudaDriverEntryPointQueryResult* result) {
  Dl_info self;
  dladdr(reinterpret_cast<void*>(cuInit), &self);
  static void* const library = dlopen(self.dli_fname, RTLD_NOW | RTLD_NOLOAD);
  *function = dlsym(library, (std::string(name) + "_v2").c_str());
  if (*function == nullptr) *function = dlsym(library, name);
  if (*function == nullptr) *function = reinterpret_cast<void*>(not_there);
  if (result != nullptr) *result = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}
