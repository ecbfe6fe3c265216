// A stand-in for libcuda on machines without a GPU: what distcomm calls of the driver. "Device"
// memory is host memory, and every operation runs at once, in the calling thread. Threads may pose
// as devices: a wait of one ends when another has written the value.
//
// Virtual memory is real: physical memory is a file, and a range without it can't be touched. Copies
// to and from it are made when their stream is waited for, and not before.
//
// It refuses what the driver refuses or leaves undefined, and what a careful caller never asks for:
// empty copies, copies within themselves, batches of 256 operations, unmapping memory or freeing
// host memory that a copy still needs.

#include <sched.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <map>
#include <mutex>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#define CUDA_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

using Clock = std::chrono::steady_clock;
using CUstream = void*;
using CUdeviceptr = unsigned long long;

enum CUresult : int {
  kSuccess = 0,
  kInvalidValue = 1,
  kOutOfMemory = 2,
  kInvalidContext = 201,
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

struct CUmemAllocationProp {
  int type;
  int requestedHandleTypes;
  struct {
    int type;
    int id;
  } location;
  void* win32HandleMetaData;
  struct {
    unsigned char compressionType;
    unsigned char gpuDirectRDMACapable;
    unsigned short usage;
    unsigned char reserved[4];
  } allocFlags;
};

struct CUmemAccessDesc {
  struct {
    int type;
    int id;
  } location;
  int flags;
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

constexpr size_t kGranularity = 2 << 20;
constexpr int kRdmaAttribute = 110;  // ..._ATTRIBUTE_GPU_DIRECT_RDMA_WITH_CUDA_VMM_SUPPORTED

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

// ---- Calls by name: counted, made to fail, held.

struct Calls {
  uint64_t count;
  uint64_t first_failing, end_of_failing;
  CUresult code;
};

std::mutex g_calls_mutex;  // guards all of these
std::condition_variable g_released;
std::map<std::string, Calls> g_calls;
std::string g_held;
uint64_t g_first_held = 0;
int g_num_held = 0;

// Every call begins here. What it returns is what the call is to return, if no success.
CUresult enter(const char* name) {
  std::unique_lock<std::mutex> lock(g_calls_mutex);
  Calls& calls = g_calls[name];
  const uint64_t number = ++calls.count;
  if (g_held == name && number >= g_first_held) {
    ++g_num_held;
    g_released.wait(lock, [name] { return g_held != name; });
    --g_num_held;
  }
  return calls.first_failing <= number && number < calls.end_of_failing ? calls.code : kSuccess;
}

thread_local int t_num_contexts = 0;
std::atomic<uint64_t> g_num_faults{0};  // calls that no careful caller makes

CUresult enter_in_context(const char* name) {
  const CUresult result = enter(name);
  if (result != kSuccess || t_num_contexts > 0) return result;
  ++g_num_faults;
  return kInvalidContext;
}

// ---- Virtual memory, and pinned host memory.

struct Physical {
  int file;
  size_t size;
  bool has_handle;
  bool is_rdma_capable;
  int num_mappings;
};

struct Mapping {
  size_t size;
  uint64_t handle;
  bool is_accessible;
};

struct Copy {
  CUstream stream;
  CUdeviceptr to, from;
  size_t size;
};

// tests/fake_cuda.py has the same fields.
struct Live {
  uint64_t device_bytes, handles, mappings, ranges, range_bytes, host_buffers, host_bytes,
      rdma_bytes, copies, faults;
};

std::mutex g_memory_mutex;  // guards all of these
size_t g_capacity = size_t{1} << 30;
size_t g_host_limit = size_t{1} << 30;
bool g_supports_rdma = true;
uint64_t g_last_handle = 0;
std::map<uint64_t, Physical> g_physicals;
std::map<CUdeviceptr, size_t> g_ranges;
std::map<CUdeviceptr, Mapping> g_mappings;
std::map<CUdeviceptr, size_t> g_host;
std::vector<Copy> g_copies;
std::atomic<uint64_t> g_capturing{UINT64_MAX};  // a stream's number

using Lock = std::lock_guard<std::mutex>;

uint64_t device_bytes() {
  uint64_t bytes = 0;
  for (const auto& [handle, physical] : g_physicals) bytes += physical.size;
  return bytes;
}

uint64_t host_bytes() {
  uint64_t bytes = 0;
  for (const auto& [address, size] : g_host) bytes += size;
  return bytes;
}

CUresult fault() {
  ++g_num_faults;
  return kInvalidValue;
}

bool overlap(CUdeviceptr one, size_t size, CUdeviceptr other, size_t other_size) {
  return one < other + other_size && other < one + size;
}

template <typename T>
bool overlaps_any(const std::map<CUdeviceptr, T>& all, CUdeviceptr start, size_t size,
                  size_t (*size_of)(const T&)) {
  return std::any_of(all.begin(), all.end(), [&](const auto& entry) {
    return overlap(start, size, entry.first, size_of(entry.second));
  });
}

size_t plain(const size_t& size) { return size; }
size_t of_mapping(const Mapping& mapping) { return mapping.size; }

bool is_copied(CUdeviceptr start, size_t size) {
  return std::any_of(g_copies.begin(), g_copies.end(), [&](const Copy& copy) {
    return overlap(start, size, copy.to, copy.size) || overlap(start, size, copy.from, copy.size);
  });
}

bool is_virtual(CUdeviceptr start, size_t size) {
  return overlaps_any(g_ranges, start, size, plain);
}

// Whether all of it can be read and written by a copy that runs later.
bool can_be_copied(CUdeviceptr start, size_t size) {
  if (!is_virtual(start, size)) {
    return std::any_of(g_host.begin(), g_host.end(), [&](const auto& entry) {
      return entry.first <= start && start + size <= entry.first + entry.second;
    });
  }
  size_t covered = 0;
  for (const auto& [address, mapping] : g_mappings) {
    if (!mapping.is_accessible || !overlap(start, size, address, mapping.size)) continue;
    covered += std::min(start + size, address + mapping.size) - std::max(start, address);
  }
  return covered == size;
}

// The mappings in a range; none if it isn't made of whole ones.
std::vector<CUdeviceptr> whole_mappings(CUdeviceptr start, size_t size) {
  std::vector<CUdeviceptr> found;
  size_t covered = 0;
  for (const auto& [address, mapping] : g_mappings) {
    if (address < start || address + mapping.size > start + size) continue;
    found.push_back(address);
    covered += mapping.size;
  }
  if (covered != size) found.clear();
  return found;
}

void forget_if_unused(uint64_t handle) {
  const auto found = g_physicals.find(handle);
  if (found->second.has_handle || found->second.num_mappings > 0) return;
  close(found->second.file);
  g_physicals.erase(found);
}

// Makes the copies of a stream, or all.
void make_copies(CUstream stream, bool all) {
  const auto is_due = [&](const Copy& copy) { return all || copy.stream == stream; };
  for (const Copy& copy : g_copies) {
    if (!is_due(copy)) continue;
    std::memcpy(reinterpret_cast<void*>(static_cast<uintptr_t>(copy.to)),
                reinterpret_cast<void*>(static_cast<uintptr_t>(copy.from)), copy.size);
  }
  g_copies.erase(std::remove_if(g_copies.begin(), g_copies.end(), is_due), g_copies.end());
}

bool is_memory_of_a_device(int type, int id) { return type == 1 && id >= 0; }

bool is_right(const CUmemAllocationProp& prop) {
  return prop.type == 1 && is_memory_of_a_device(prop.location.type, prop.location.id) &&
         prop.requestedHandleTypes == 0 && prop.win32HandleMetaData == nullptr &&
         prop.allocFlags.compressionType == 0 && prop.allocFlags.usage == 0 &&
         (g_supports_rdma || prop.allocFlags.gpuDirectRDMACapable == 0);
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

// Of the calls of this name, those from the `nth` from now on fail, `count` of them, and do nothing.
CUDA_EXPORT void fake_cuda_fail_call(const char* name, uint64_t nth, uint64_t count, int code) {
  const Lock lock(g_calls_mutex);
  Calls& calls = g_calls[name];
  calls.first_failing = calls.count + nth;
  calls.end_of_failing = calls.first_failing + count;
  calls.code = static_cast<CUresult>(code);
}

CUDA_EXPORT void fake_cuda_fail_no_call() {
  const Lock lock(g_calls_mutex);
  for (auto& [name, calls] : g_calls) calls.end_of_failing = 0;
}

CUDA_EXPORT uint64_t fake_cuda_num_calls(const char* name) {
  const Lock lock(g_calls_mutex);
  return g_calls[name].count;
}

// Calls of this name wait, from the `nth` from now on, until another name is given.
CUDA_EXPORT void fake_cuda_hold(const char* name, uint64_t nth) {
  const Lock lock(g_calls_mutex);
  g_held = name;
  g_first_held = g_calls[name].count + nth;
  g_released.notify_all();
}

CUDA_EXPORT int fake_cuda_num_held() {
  const Lock lock(g_calls_mutex);
  return g_num_held;
}

// Of memory made from now on.
CUDA_EXPORT void fake_cuda_set_limits(size_t capacity, size_t host_limit) {
  const Lock lock(g_memory_mutex);
  g_capacity = capacity;
  g_host_limit = host_limit;
}

CUDA_EXPORT void fake_cuda_set_rdma(int supported) {
  const Lock lock(g_memory_mutex);
  g_supports_rdma = supported != 0;
}

// Work of this stream is captured; UINT64_MAX: of none.
CUDA_EXPORT void fake_cuda_set_capturing(uint64_t stream) { g_capturing = stream; }

// Releases handles whose memory is mapped nowhere: a test has made a release of them fail.
CUDA_EXPORT void fake_cuda_release_unmapped() {
  const Lock lock(g_memory_mutex);
  std::vector<uint64_t> handles;
  for (auto& [handle, physical] : g_physicals) {
    if (physical.num_mappings > 0) continue;
    physical.has_handle = false;
    handles.push_back(handle);
  }
  for (const uint64_t handle : handles) forget_if_unused(handle);
}

CUDA_EXPORT void fake_cuda_live(Live* live) {
  const Lock lock(g_memory_mutex);
  *live = {};
  live->device_bytes = device_bytes();
  for (const auto& [handle, physical] : g_physicals) {
    live->handles += physical.has_handle;
    if (physical.is_rdma_capable) live->rdma_bytes += physical.size;
  }
  live->mappings = g_mappings.size();
  live->ranges = g_ranges.size();
  for (const auto& [address, size] : g_ranges) live->range_bytes += size;
  live->host_buffers = g_host.size();
  live->host_bytes = host_bytes();
  live->copies = g_copies.size();
  live->faults = g_num_faults;
}

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
  if (const CUresult result = enter("cuMemcpyAsync")) return result;
  if (to == 0 || from == 0 || num_bytes == 0) return kInvalidValue;
  if (to < from + num_bytes && from < to + num_bytes) return kInvalidValue;
  delay();
  {
    const Lock lock(g_memory_mutex);
    if (is_virtual(to, num_bytes) || is_virtual(from, num_bytes)) {
      if (!can_be_copied(to, num_bytes) || !can_be_copied(from, num_bytes)) return fault();
      g_copies.push_back({stream, to, from, num_bytes});
      return kSuccess;
    }
  }
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

// ---- Virtual memory.

CUDA_EXPORT CUresult cuMemGetAllocationGranularity(size_t* granularity,
                                                   const CUmemAllocationProp* prop, int option) {
  if (const CUresult result = enter_in_context("cuMemGetAllocationGranularity")) return result;
  const Lock lock(g_memory_mutex);
  if (!is_right(*prop) || option != 0) return fault();
  *granularity = kGranularity;
  return kSuccess;
}

CUDA_EXPORT CUresult cuMemGetInfo_v2(size_t* num_free, size_t* all) {
  if (const CUresult result = enter_in_context("cuMemGetInfo")) return result;
  const Lock lock(g_memory_mutex);
  const size_t used = device_bytes();
  *num_free = g_capacity > used ? g_capacity - used : 0;
  *all = g_capacity;
  return kSuccess;
}

CUDA_EXPORT CUresult cuMemAddressReserve(CUdeviceptr* start, size_t size, size_t alignment,
                                         CUdeviceptr wish, unsigned long long flags) {
  if (const CUresult result = enter_in_context("cuMemAddressReserve")) return result;
  const Lock lock(g_memory_mutex);
  if (alignment != 0 || wish != 0 || flags != 0) return fault();
  if (size == 0 || size % kGranularity != 0) return fault();
  if (size > size_t{1} << 46) return kOutOfMemory;
  void* const space = mmap(nullptr, size + kGranularity, PROT_NONE,
                           MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (space == MAP_FAILED) return kOutOfMemory;
  const auto first = reinterpret_cast<uintptr_t>(space);
  *start = (first + kGranularity - 1) / kGranularity * kGranularity;
  if (*start > first) munmap(space, *start - first);
  if (*start - first < kGranularity) {
    munmap(pointer<void>(*start + size), kGranularity - (*start - first));
  }
  g_ranges[*start] = size;
  return kSuccess;
}

CUDA_EXPORT CUresult cuMemAddressFree(CUdeviceptr start, size_t size) {
  if (const CUresult result = enter_in_context("cuMemAddressFree")) return result;
  const Lock lock(g_memory_mutex);
  const auto found = g_ranges.find(start);
  if (found == g_ranges.end() || found->second != size) return fault();
  if (overlaps_any(g_mappings, start, size, of_mapping)) return fault();
  munmap(pointer<void>(start), size);
  g_ranges.erase(found);
  return kSuccess;
}

CUDA_EXPORT CUresult cuMemCreate(uint64_t* handle, size_t size, const CUmemAllocationProp* prop,
                                 unsigned long long flags) {
  if (const CUresult result = enter_in_context("cuMemCreate")) return result;
  const Lock lock(g_memory_mutex);
  if (!is_right(*prop) || flags != 0) return fault();
  if (size == 0 || size % kGranularity != 0) return fault();
  if (device_bytes() + size > g_capacity) return kOutOfMemory;
  const int file = memfd_create("fake physical memory", 0);
  if (file < 0) return kOutOfMemory;
  if (ftruncate(file, static_cast<off_t>(size)) != 0) {
    close(file);
    return kOutOfMemory;
  }
  *handle = ++g_last_handle;
  g_physicals[*handle] = {file, size, true, prop->allocFlags.gpuDirectRDMACapable != 0, 0};
  return kSuccess;
}

CUDA_EXPORT CUresult cuMemRelease(uint64_t handle) {
  if (const CUresult result = enter_in_context("cuMemRelease")) return result;
  const Lock lock(g_memory_mutex);
  const auto found = g_physicals.find(handle);
  if (found == g_physicals.end() || !found->second.has_handle) return fault();
  found->second.has_handle = false;
  forget_if_unused(handle);
  return kSuccess;
}

CUDA_EXPORT CUresult cuMemMap(CUdeviceptr start, size_t size, size_t offset, uint64_t handle,
                              unsigned long long flags) {
  if (const CUresult result = enter_in_context("cuMemMap")) return result;
  const Lock lock(g_memory_mutex);
  const auto found = g_physicals.find(handle);
  if (found == g_physicals.end() || !found->second.has_handle) return fault();
  if (offset != 0 || flags != 0 || size != found->second.size) return fault();
  const auto after = g_ranges.upper_bound(start);
  if (after == g_ranges.begin()) return fault();
  const auto& [begin, range_size] = *std::prev(after);
  if (start + size > begin + range_size || start % kGranularity != 0) return fault();
  if (overlaps_any(g_mappings, start, size, of_mapping)) return fault();
  if (mmap(pointer<void>(start), size, PROT_NONE, MAP_SHARED | MAP_FIXED, found->second.file, 0) ==
      MAP_FAILED) {
    return kOutOfMemory;
  }
  ++found->second.num_mappings;
  g_mappings[start] = {size, handle, false};
  return kSuccess;
}

CUDA_EXPORT CUresult cuMemSetAccess(CUdeviceptr start, size_t size, const CUmemAccessDesc* access,
                                    size_t count) {
  if (const CUresult result = enter_in_context("cuMemSetAccess")) return result;
  const Lock lock(g_memory_mutex);
  const auto mappings = whole_mappings(start, size);
  if (mappings.empty() || count != 1 || access->flags != 3) return fault();
  if (!is_memory_of_a_device(access->location.type, access->location.id)) return fault();
  for (const CUdeviceptr each : mappings) g_mappings[each].is_accessible = true;
  mprotect(pointer<void>(start), size, PROT_READ | PROT_WRITE);
  return kSuccess;
}

CUDA_EXPORT CUresult cuMemUnmap(CUdeviceptr start, size_t size) {
  if (const CUresult result = enter_in_context("cuMemUnmap")) return result;
  const Lock lock(g_memory_mutex);
  const auto mappings = whole_mappings(start, size);
  if (mappings.empty() || is_copied(start, size)) return fault();
  for (const CUdeviceptr each : mappings) {
    const uint64_t handle = g_mappings[each].handle;
    g_mappings.erase(each);
    --g_physicals[handle].num_mappings;
    forget_if_unused(handle);
  }
  // The addresses stay reserved.
  mmap(pointer<void>(start), size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED,
       -1, 0);
  return kSuccess;
}

CUDA_EXPORT CUresult cuMemHostAlloc(void** buffer, size_t size, unsigned flags) {
  if (const CUresult result = enter_in_context("cuMemHostAlloc")) return result;
  const Lock lock(g_memory_mutex);
  if (size == 0 || flags != 0) return fault();
  if (host_bytes() + size > g_host_limit) return kOutOfMemory;
  *buffer = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (*buffer == MAP_FAILED) return kOutOfMemory;
  g_host[reinterpret_cast<uintptr_t>(*buffer)] = size;
  return kSuccess;
}

CUDA_EXPORT CUresult cuMemFreeHost(void* buffer) {
  if (const CUresult result = enter_in_context("cuMemFreeHost")) return result;
  const Lock lock(g_memory_mutex);
  const auto found = g_host.find(reinterpret_cast<uintptr_t>(buffer));
  if (found == g_host.end() || is_copied(found->first, found->second)) return fault();
  munmap(buffer, found->second);
  g_host.erase(found);
  return kSuccess;
}

CUDA_EXPORT CUresult cuStreamSynchronize(CUstream stream) {
  if (const CUresult result = enter_in_context("cuStreamSynchronize")) return result;
  const Lock lock(g_memory_mutex);
  make_copies(stream, false);
  return kSuccess;
}

CUDA_EXPORT CUresult cuDeviceGetAttribute(int* value, int attribute, int) {
  if (const CUresult result = enter("cuDeviceGetAttribute")) return result;
  const Lock lock(g_memory_mutex);
  if (attribute != kRdmaAttribute) return fault();
  *value = g_supports_rdma;
  return kSuccess;
}

CUDA_EXPORT CUresult cuGetErrorString(CUresult code, const char** text) {
  switch (code) {
    case kInvalidValue: *text = "invalid argument"; return kSuccess;
    case kOutOfMemory: *text = "out of memory"; return kSuccess;
    case kInvalidContext: *text = "invalid device context"; return kSuccess;
    case kLaunchFailed: *text = "unspecified launch failure"; return kSuccess;
    default: *text = nullptr; return kInvalidValue;
  }
}

// ---- Captures, of which there is only what is pretended.

CUDA_EXPORT CUresult cuStreamIsCapturing(CUstream stream, int* status) {
  *status = number(stream) == g_capturing;
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

// ---- Contexts.

CUDA_EXPORT CUresult cuDevicePrimaryCtxRetain(void** context, int) {
  if (const CUresult result = enter("cuDevicePrimaryCtxRetain")) return result;
  static int the_context;
  *context = &the_context;
  return kSuccess;
}

CUDA_EXPORT CUresult cuCtxPushCurrent_v2(void*) {
  if (const CUresult result = enter("cuCtxPushCurrent")) return result;
  ++t_num_contexts;
  return kSuccess;
}

CUDA_EXPORT CUresult cuCtxPopCurrent_v2(void**) {
  if (t_num_contexts == 0) return kInvalidContext;
  --t_num_contexts;
  return kSuccess;
}

CUDA_EXPORT CUresult cuCtxSynchronize() {
  if (const CUresult result = enter_in_context("cuCtxSynchronize")) return result;
  const Lock lock(g_memory_mutex);
  make_copies(nullptr, true);
  return kSuccess;
}

CUDA_EXPORT CUresult cuMemsetD8Async(CUdeviceptr to, unsigned char value, size_t num_bytes,
                                     CUstream) {
  std::memset(pointer<void>(to), value, num_bytes);
  return kSuccess;
}
