// A strict stand-in for the CUDA driver, for tests of the heap of memory that can sleep. Functions
// have no context argument, so they serve whichever Fake was made last.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <map>
#include <mutex>
#include <random>
#include <string>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

#include "cuda_driver.h"
#include "fake_device.h"

namespace distcomm::fake {

inline const CudaStream kPlainStream = nullptr;
inline const CudaStream kCapturingStream = reinterpret_cast<CudaStream>(0xca);
inline const CudaStream kBrokenStream = reinterpret_cast<CudaStream>(0xbad);

constexpr int kGlobalCapture = 0;   // CU_STREAM_CAPTURE_MODE_GLOBAL
constexpr int kRelaxedCapture = 2;  // CU_STREAM_CAPTURE_MODE_RELAXED
inline thread_local int t_capture_mode = kGlobalCapture;
inline thread_local void* t_context = nullptr;
constexpr int kDevice = 3;  // the only one

// The calls that can fail. Not among them is popping a context: nothing could be done about that.
enum Call {
  kIsCapturing, kRetain, kPush, kSync, kCopy, kReserve, kFreeRange, kCreate, kRelease, kMap,
  kAccess, kUnmap, kAskGranularity, kInfo, kHostAlloc, kHostFree, kAttribute, kSyncStream,
  kNumCalls
};
constexpr const char* kNames[kNumCalls] = {
    "cuStreamIsCapturing", "cuDevicePrimaryCtxRetain", "cuCtxPushCurrent", "cuCtxSynchronize",
    "cuMemcpyAsync", "cuMemAddressReserve", "cuMemAddressFree", "cuMemCreate", "cuMemRelease",
    "cuMemMap", "cuMemSetAccess", "cuMemUnmap", "cuMemGetAllocationGranularity", "cuMemGetInfo",
    "cuMemHostAlloc", "cuMemFreeHost", "cuDeviceGetAttribute", "cuStreamSynchronize"};

class Fake {
 public:
  explicit Fake(size_t capacity) : device_(capacity) { current_ = this; }
  ~Fake() { current_ = nullptr; }
  Fake(const Fake&) = delete;
  Fake& operator=(const Fake&) = delete;

  // ---- What goes wrong: a call that fails does nothing. The n-th is counted from now.
  void fail_nth(Call call, int nth, CudaResult code) {
    const Lock lock(mutex_);
    failures_[{call, counts_[call] + nth}] = code;
  }
  void fail_nth_of_any(int nth, CudaResult code) {
    const Lock lock(mutex_);
    failures_[{kNumCalls, total_ + nth}] = code;
  }
  // From now on one in `n` of these calls, at random; none for 0.
  void fail_one_in(int n, std::vector<Call> calls, CudaResult code, unsigned long seed) {
    const Lock lock(mutex_);
    random_.seed(seed);
    one_in_ = n;
    random_calls_ = std::move(calls);
    random_code_ = code;
  }
  void clear_failures() {
    const Lock lock(mutex_);
    failures_.clear();
    one_in_ = 0;
  }
  void set_jitter(bool on) { jitter_ = on; }
  // Blocks the next call of this kind. No other thread is held up by that.
  void block(Call call) {
    const Lock lock(mutex_);
    block_at_ = call;
  }
  void wait_until_blocked() {
    std::unique_lock<std::mutex> lock(mutex_);
    if (!changed_.wait_for(lock, kPatience, [&] { return blocked_; })) {
      device_.violations.push_back("nothing got blocked");
    }
  }
  void unblock() {
    const Lock lock(mutex_);
    blocked_ = false;
    changed_.notify_all();
  }

  // ---- What there is.
  int calls(Call call) const { return locked([&] { return counts_[call]; }); }
  int calls() const { return locked([&] { return total_; }); }
  size_t failed(Call call) const { return locked([&] { return failed_[call]; }); }
  // What has failed last on purpose; kNumCalls if nothing has.
  Call last_failed() const { return locked([&] { return last_failed_; }); }
  int last_mode() const { return locked([&] { return last_mode_; }); }
  CudaMemProp last_prop() const { return locked([&] { return last_prop_; }); }
  std::vector<std::string> violations() const {
    return locked([&] { return device_.violations; });
  }
  // Asks or changes the device.
  template <typename Function>
  auto device(const Function& function) {
    const Lock lock(mutex_);
    return function(device_);
  }

  static CudaDriver driver() {
    CudaDriver table;
    table.stream_is_capturing = [](CudaStream stream, int* status) {
      *status = stream == kCapturingStream;
      return call(kIsCapturing, [&](Device&) { return stream == kBrokenStream ? 906 : 0; });
    };
    table.thread_exchange_capture_mode = [](int* mode) {
      std::swap(*mode, t_capture_mode);
      return kCudaSuccess;
    };
    table.device_primary_ctx_retain = [](void** context, int device) {
      *context = reinterpret_cast<void*>(uintptr_t{0xd000});
      return call(kRetain, [&](Device& fake) {
        if (device != kDevice) fake.violations.push_back("the context of another device");
        return kCudaSuccess;
      });
    };
    table.ctx_push_current = [](void* context) {
      return call(kPush, [&](Device& fake) {
        if (t_context != nullptr) fake.violations.push_back("two contexts pushed");
        t_context = context;
        return kCudaSuccess;
      });
    };
    table.ctx_pop_current = [](void** context) {
      *context = std::exchange(t_context, nullptr);
      return *context == nullptr ? kInvalid : kCudaSuccess;
    };
    table.ctx_synchronize = [] {
      return call(kSync, [](Device& device) { return device.run_all(), kCudaSuccess; });
    };
    table.stream_synchronize = [](CudaStream stream) {
      return call(kSyncStream, [&](Device& device) { return device.run(stream), kCudaSuccess; });
    };
    table.memcpy_async = [](DevicePointer to, DevicePointer from, size_t size, CudaStream stream) {
      return call(kCopy, [&](Device& device) { return device.copy(to, from, size, stream); });
    };
    table.mem_address_reserve = [](DevicePointer* address, size_t size, size_t, DevicePointer,
                                   unsigned long long) {
      *address = 0xdead0000;
      return call(kReserve, [&](Device& device) { return device.reserve(address, size); });
    };
    table.mem_address_free = [](DevicePointer address, size_t size) {
      return call(kFreeRange, [&](Device& device) { return device.free_range(address, size); });
    };
    table.mem_create = [](CudaMemory* handle, size_t size, const CudaMemProp* prop,
                          unsigned long long) {
      *handle = 0xdead;
      return call(kCreate, [&](Device& device) {
        check_prop(device, *prop);
        current().last_prop_ = *prop;
        current().last_mode_ = t_capture_mode;
        return device.create(handle, size);
      });
    };
    table.mem_release = [](CudaMemory handle) {
      return call(kRelease, [&](Device& device) { return device.release(handle); });
    };
    table.mem_map = [](DevicePointer address, size_t size, size_t offset, CudaMemory handle,
                       unsigned long long) {
      return call(kMap, [&](Device& device) { return device.map(address, size, offset, handle); });
    };
    table.mem_set_access = [](DevicePointer address, size_t size, const CudaMemAccess* access,
                              size_t count) {
      return call(kAccess, [&](Device& device) {
        const bool right = count == 1 && access->location_type == 1 && access->flags == 3;
        if (!right || access->location_id != kDevice) {
          device.violations.push_back("access of somebody else");
        }
        return device.set_access(address, size);
      });
    };
    table.mem_unmap = [](DevicePointer address, size_t size) {
      return call(kUnmap, [&](Device& device) { return device.unmap(address, size); });
    };
    table.mem_get_granularity = [](size_t* granularity, const CudaMemProp* prop, int) {
      *granularity = kGranularity;
      return call(kAskGranularity, [&](Device& device) { return check_prop(device, *prop), 0; });
    };
    table.mem_get_info = [](size_t* num_free, size_t* all) {
      *num_free = 1;
      return call(kInfo, [&](Device& device) {
        *num_free = device.free_bytes();
        *all = device.capacity();
        return kCudaSuccess;
      });
    };
    table.mem_host_alloc = [](void** buffer, size_t size, unsigned) {
      *buffer = reinterpret_cast<void*>(0xdead);
      return call(kHostAlloc, [&](Device& device) { return device.host_alloc(buffer, size); });
    };
    table.mem_free_host = [](void* buffer) {
      return call(kHostFree, [&](Device& device) { return device.host_free(buffer); });
    };
    table.device_get_attribute = [](int* value, int attribute, int device) {
      *value = attribute == 110 && device == kDevice;
      return call(kAttribute, [](Device&) { return kCudaSuccess; });
    };
    table.get_error_string = [](CudaResult, const char** text) {
      *text = "fake error";
      return kCudaSuccess;
    };
    return table;
  }

 private:
  using Lock = std::lock_guard<std::mutex>;
  static constexpr std::chrono::seconds kPatience{60};

  static Fake& current() { return *current_.load(); }
  template <typename Function>
  std::invoke_result_t<Function> locked(const Function& function) const {
    const Lock lock(mutex_);
    return function();
  }
  static void check_prop(Device& device, const CudaMemProp& prop) {
    const bool right = prop.type == 1 && prop.location_type == 1 && prop.location_id == kDevice;
    if (!right) device.violations.push_back("memory of another kind");
  }

  template <typename Function>
  static CudaResult call(Call which, const Function& function) {
    return current().make(which, function);
  }
  template <typename Function>
  CudaResult make(Call which, const Function& function) {
    if (jitter_ && (which == kSync || which == kSyncStream)) {
      std::this_thread::sleep_for(std::chrono::microseconds(20));
    }
    std::unique_lock<std::mutex> lock(mutex_);
    const bool needs_context =
        which != kRetain && which != kPush && which != kAttribute;
    if (needs_context && t_context == nullptr) {
      device_.violations.push_back(std::string(kNames[which]) + " without a context");
      return 201;
    }
    const CudaResult failure = enter(which);
    if (block_at_ == which) block(lock);
    if (failure != kCudaSuccess) {
      ++failed_[which];
      last_failed_ = which;
      return failure;
    }
    return function(device_);
  }
  CudaResult enter(Call call) {
    ++counts_[call];
    ++total_;
    for (const auto& key : {std::pair{call, counts_[call]}, std::pair{kNumCalls, total_}}) {
      const auto found = failures_.find(key);
      if (found != failures_.end()) return found->second;
    }
    const bool may_fail =
        std::find(random_calls_.begin(), random_calls_.end(), call) != random_calls_.end();
    return one_in_ > 0 && may_fail && random_() % one_in_ == 0 ? random_code_ : kCudaSuccess;
  }
  void block(std::unique_lock<std::mutex>& lock) {
    block_at_ = kNumCalls;
    blocked_ = true;
    changed_.notify_all();
    if (!changed_.wait_for(lock, kPatience, [&] { return !blocked_; })) {
      device_.violations.push_back("what was blocked never got unblocked");
    }
  }

  static inline std::atomic<Fake*> current_{nullptr};
  std::atomic<bool> jitter_{false};

  mutable std::mutex mutex_;  // guards all below
  std::condition_variable changed_;
  Device device_;
  std::array<int, kNumCalls> counts_{};
  std::array<size_t, kNumCalls> failed_{};
  int total_ = 0;
  std::map<std::pair<Call, int>, CudaResult> failures_;  // by the call's number
  std::mt19937_64 random_;
  int one_in_ = 0;
  std::vector<Call> random_calls_;
  CudaResult random_code_ = 0;
  Call last_failed_ = kNumCalls;
  Call block_at_ = kNumCalls;
  bool blocked_ = false;
  int last_mode_ = kGlobalCapture;
  CudaMemProp last_prop_{};
};

}  // namespace distcomm::fake
