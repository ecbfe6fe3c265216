// A stand-in for libcuda on machines without a GPU: what distcomm calls of the driver. "Device"
// memory is host memory, and every operation runs at once, in the calling thread. Threads may pose
// as devices: a wait of one ends when another has written the value.
//
// It refuses what the driver refuses or leaves undefined, and what a careful caller never asks for:
// empty copies, copies within themselves, batches of 256 operations.

#include <sched.h>

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <mutex>
#include <random>
#include <thread>
#include <vector>

#define CUDA_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

using Clock = std::chrono::steady_clock;
using CUstream = void*;
using CUdeviceptr = unsigned long long;

enum CUresult : int {
  kSuccess = 0,
  kInvalidValue = 1,
  kLaunchFailed = 719,
  kNotSupported = 801,
  kTimeout = 909,
};

// As in cuda.h.
struct WaitOrWriteParams {
  int operation;
  CUdeviceptr address;
  union {
    uint32_t value;
    uint64_t value64;
  };
  unsigned flags;
  CUdeviceptr alias;
};

union CUstreamBatchMemOpParams {
  int operation;
  WaitOrWriteParams params;
  uint64_t pad[6];
};

struct CUDA_MEMCPY2D {
  size_t srcXInBytes, srcY;
  unsigned srcMemoryType;
  const void* srcHost;
  CUdeviceptr srcDevice;
  void* srcArray;
  size_t srcPitch;
  size_t dstXInBytes, dstY;
  unsigned dstMemoryType;
  void* dstHost;
  CUdeviceptr dstDevice;
  void* dstArray;
  size_t dstPitch;
  size_t WidthInBytes, Height;
};

constexpr int kWaitValue32 = 1, kWriteValue32 = 2;
constexpr unsigned kWaitEqual = 1;
constexpr unsigned kDevice = 2;
constexpr unsigned kBatchLimit = 256;
constexpr size_t kMostPitch = 0x7fffffff;  // CU_DEVICE_ATTRIBUTE_MAX_PITCH of today's devices

enum Kind : uint64_t { kCopy = 1, kCopy2D, kWait, kWrite };

// tests/fake_cuda.py has the same fields.
struct Record {
  uint64_t call, stream, kind, to, source, num_bytes, num_rows, to_pitch, source_pitch, value;
};

std::atomic<int> g_calls_until_failure{-1};
std::atomic<uint64_t> g_num_calls{0};
std::atomic<long long> g_timeout_us{10'000'000};
std::atomic<long long> g_delay_us{0};
std::atomic<bool> g_logs{false};
std::mutex g_mutex;  // guards the next
std::vector<Record> g_log;

void log(const Record& record) {
  if (!g_logs) return;
  const std::lock_guard<std::mutex> lock(g_mutex);
  g_log.push_back(record);
}

// Whether the call that begins now is to fail.
bool fails() {
  int left = g_calls_until_failure.load();
  while (left >= 0 && !g_calls_until_failure.compare_exchange_weak(left, left - 1)) {
  }
  return left == 0;
}

void delay() {
  const long long most_us = g_delay_us;
  if (most_us == 0) return;
  thread_local std::minstd_rand random(std::random_device{}());
  std::this_thread::sleep_for(std::chrono::microseconds(random() % most_us));
}

template <typename T>
T* pointer(CUdeviceptr address) {
  return reinterpret_cast<T*>(static_cast<uintptr_t>(address));
}

uint64_t number(CUstream stream) { return reinterpret_cast<uintptr_t>(stream); }

bool wait_for(uint32_t* word, uint32_t value) {
  const auto end = Clock::now() + std::chrono::microseconds(g_timeout_us);
  while (__atomic_load_n(word, __ATOMIC_ACQUIRE) != value) {
    if (Clock::now() > end) return false;
    sched_yield();
  }
  return true;
}

bool is_valid(const CUstreamBatchMemOpParams& operation) {
  const WaitOrWriteParams& params = operation.params;
  if (params.address == 0 || params.address % sizeof(uint32_t) != 0) return false;
  if (operation.operation == kWaitValue32) return params.flags == kWaitEqual;
  return operation.operation == kWriteValue32 && params.flags == 0;
}

}  // namespace

// ---- For the tests.

// Of the copies and batches, the one after `num_calls` of them fails and does nothing; -1: none.
CUDA_EXPORT void fake_cuda_fail_after(int num_calls) { g_calls_until_failure = num_calls; }

// Bounds each wait.
CUDA_EXPORT void fake_cuda_set_timeout(long long timeout_us) { g_timeout_us = timeout_us; }

// Each operation begins after a random time below this.
CUDA_EXPORT void fake_cuda_set_delay(long long most_us) { g_delay_us = most_us; }

// Starts a new log, or ends the one that is kept. A copy is noted when it begins, a wait or a
// write when it is done.
CUDA_EXPORT void fake_cuda_log(int on) {
  const std::lock_guard<std::mutex> lock(g_mutex);
  if (on) g_log.clear();
  g_logs = on != 0;
}

// Copies at most `capacity` records; returns how many.
CUDA_EXPORT size_t fake_cuda_take_log(Record* records, size_t capacity) {
  const std::lock_guard<std::mutex> lock(g_mutex);
  const size_t count = g_log.size() < capacity ? g_log.size() : capacity;
  if (count > 0) std::memcpy(records, g_log.data(), count * sizeof(Record));
  return count;
}

// ---- The driver's functions.

CUDA_EXPORT CUresult cuMemcpyAsync(CUdeviceptr to, CUdeviceptr from, size_t num_bytes,
                                   CUstream stream) {
  if (fails()) return kLaunchFailed;
  if (to == 0 || from == 0 || num_bytes == 0) return kInvalidValue;
  if (to < from + num_bytes && from < to + num_bytes) return kInvalidValue;
  delay();
  log({g_num_calls++, number(stream), kCopy, to, from, num_bytes, 1, 0, 0, 0});
  if (num_bytes == sizeof(uint32_t) && to % sizeof(uint32_t) == 0) {  // it may be a flag
    uint32_t word;
    std::memcpy(&word, pointer<void>(from), sizeof(word));
    __atomic_store_n(pointer<uint32_t>(to), word, __ATOMIC_RELEASE);
  } else {
    std::memcpy(pointer<void>(to), pointer<void>(from), num_bytes);
  }
  return kSuccess;
}

CUDA_EXPORT CUresult cuMemcpy2DAsync_v2(const CUDA_MEMCPY2D* copy, CUstream stream) {
  if (fails()) return kLaunchFailed;
  if (copy->srcMemoryType != kDevice || copy->dstMemoryType != kDevice) return kInvalidValue;
  if (copy->srcDevice == 0 || copy->dstDevice == 0) return kInvalidValue;
  if (copy->WidthInBytes == 0 || copy->Height == 0) return kInvalidValue;
  for (const size_t pitch : {copy->srcPitch, copy->dstPitch}) {
    if (pitch < copy->WidthInBytes || pitch > kMostPitch) return kInvalidValue;
  }
  delay();
  const CUdeviceptr from = copy->srcDevice + copy->srcY * copy->srcPitch + copy->srcXInBytes;
  const CUdeviceptr to = copy->dstDevice + copy->dstY * copy->dstPitch + copy->dstXInBytes;
  log({g_num_calls++, number(stream), kCopy2D, to, from, copy->WidthInBytes, copy->Height,
       copy->dstPitch, copy->srcPitch, 0});
  for (size_t row = 0; row < copy->Height; ++row) {
    std::memcpy(pointer<void>(to + row * copy->dstPitch), pointer<void>(from + row * copy->srcPitch),
                copy->WidthInBytes);
  }
  return kSuccess;
}

CUDA_EXPORT CUresult cuStreamBatchMemOp_v2(CUstream stream, unsigned count,
                                           CUstreamBatchMemOpParams* operations, unsigned flags) {
  if (fails()) return kLaunchFailed;
  if (count == 0 || count >= kBatchLimit || flags != 0) return kInvalidValue;
  for (unsigned i = 0; i < count; ++i) {
    if (!is_valid(operations[i])) return kInvalidValue;
  }
  const uint64_t call = g_num_calls++;
  for (unsigned i = 0; i < count; ++i) {
    delay();
    const WaitOrWriteParams& params = operations[i].params;
    uint32_t* const word = pointer<uint32_t>(params.address);
    const bool waits = operations[i].operation == kWaitValue32;
    if (waits) {
      if (!wait_for(word, params.value)) return kTimeout;
    } else {
      __atomic_store_n(word, params.value, __ATOMIC_RELEASE);
    }
    log({call, number(stream), waits ? kWait : kWrite, params.address, 0, 0, 0, 0, 0,
         params.value});
  }
  return kSuccess;
}

CUDA_EXPORT CUresult cuMemcpyDtoH_v2(void* to, CUdeviceptr from, size_t num_bytes) {
  std::memcpy(to, pointer<void>(from), num_bytes);
  return kSuccess;
}

// Nothing is captured, and there is nothing to wait for.

CUDA_EXPORT CUresult cuStreamIsCapturing(CUstream, int* status) {
  *status = 0;
  return kSuccess;
}

CUDA_EXPORT CUresult cuStreamGetCaptureInfo_v2(CUstream, int* status, uint64_t*, void**,
                                               const void**, size_t*) {
  *status = 0;
  return kSuccess;
}

CUDA_EXPORT CUresult cuUserObjectCreate(void**, void*, void (*)(void*), unsigned, unsigned) {
  return kNotSupported;
}

CUDA_EXPORT CUresult cuGraphRetainUserObject(void*, void*, unsigned, unsigned) {
  return kNotSupported;
}

CUDA_EXPORT CUresult cuUserObjectRelease(void*, unsigned) { return kNotSupported; }

CUDA_EXPORT CUresult cuThreadExchangeStreamCaptureMode(int*) { return kSuccess; }

CUDA_EXPORT CUresult cuDevicePrimaryCtxRetain(void** context, int) {
  static int the_context;
  *context = &the_context;
  return kSuccess;
}

CUDA_EXPORT CUresult cuCtxPushCurrent_v2(void*) { return kSuccess; }

CUDA_EXPORT CUresult cuCtxPopCurrent_v2(void**) { return kSuccess; }

CUDA_EXPORT CUresult cuCtxSynchronize() { return kSuccess; }
