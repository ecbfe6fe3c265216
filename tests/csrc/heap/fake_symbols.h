// A strict stand-in for NCCL's memory and windows and for the CUDA driver, for tests of the heap.
// Functions have no context argument, so they serve whichever Fake was made or used last.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

#include "cuda_driver.h"
#include "nccl_symbols.h"

namespace distcomm::fake {

inline const CudaStream kPlainStream = nullptr;
inline const CudaStream kCapturingStream = reinterpret_cast<CudaStream>(0xca);
inline const CudaStream kBrokenStream = reinterpret_cast<CudaStream>(0xbad);

constexpr int kGlobalCapture = 0;   // CU_STREAM_CAPTURE_MODE_GLOBAL
constexpr int kRelaxedCapture = 2;  // CU_STREAM_CAPTURE_MODE_RELAXED
inline thread_local int t_capture_mode = kGlobalCapture;
inline thread_local void* t_context = nullptr;
constexpr int kDevice = 3;  // the only one

constexpr NcclResult kAborted = 6;

enum Call { kAlloc, kFree, kRegister, kDeregister, kNumCalls };
// What a wait for the device takes, and a mapping of memory; kNoStep is none of it.
enum Step { kNoStep, kRetain, kPush, kSync, kReserve, kRange, kHandle, kMap, kAccess, kUnmap };

class Fake {
 public:
  // `downwards`: memory is handed out from high addresses to low ones.
  explicit Fake(bool downwards = false) : downwards_(downwards) { use(); }
  ~Fake() {
    if (current_ == this) current_ = nullptr;
  }
  Fake(const Fake&) = delete;
  Fake& operator=(const Fake&) = delete;
  void use() { current_ = this; }

  // ---- What goes wrong. The n-th is counted from now; 1 is the next.
  void fail_nth(Call call, int nth, NcclResult code) {
    const Lock lock(mutex_);
    failures_[{call, counts_[call] + nth}] = code;
  }
  void fail_nth_of_any(int nth, NcclResult code) {
    const Lock lock(mutex_);
    failures_[{kNumCalls, total_ + nth}] = code;
  }
  // All of this communicator's, until clear_failures().
  void fail_deregister_of(NcclComm comm, NcclResult code) {
    const Lock lock(mutex_);
    failing_comms_[comm] = code;
  }
  void clear_failures() {
    const Lock lock(mutex_);
    failures_.clear();
    failing_comms_.clear();
  }
  void give_null_windows(bool on) { null_windows_ = on; }
  void give_null_memory(bool on) { null_memory_ = on; }
  void set_jitter(bool on) { jitter_ = on; }

  // From now on this step of each wait for the device, or each mapping, fails.
  void fail_at(Step step) { failing_step_ = step; }

  void block_registration(int nth) {
    const Lock lock(mutex_);
    block_at_ = counts_[kRegister] + nth;
  }
  // Blocks the next wait for the device, as long as it has work.
  void block_wait() { block_sync_ = true; }
  void wait_until_blocked() {
    std::unique_lock<std::mutex> lock(mutex_);
    if (!changed_.wait_for(lock, kPatience, [&] { return blocked_; })) {
      violations_.push_back("nothing got blocked");
    }
  }
  void unblock() {
    const Lock lock(mutex_);
    blocked_ = false;
    block_at_ = 0;
    changed_.notify_all();
  }

  // ---- Communicators.
  NcclComm make_comm() {
    const Lock lock(mutex_);
    const NcclComm comm = reinterpret_cast<NcclComm>(0xc0000 + 16 * ++num_comms_);
    comms_.insert(comm);
    return comm;
  }
  void make_comm_at(NcclComm comm) {
    const Lock lock(mutex_);
    comms_.insert(comm);
  }
  // About to be destroyed: memory of its windows may be freed.
  void doom_comm(NcclComm comm) {
    const Lock lock(mutex_);
    doomed_.insert(comm);
  }
  // Its windows end with it.
  void destroy_comm(NcclComm comm) {
    const Lock lock(mutex_);
    comms_.erase(comm);
    doomed_.erase(comm);
    for (auto it = windows_.begin(); it != windows_.end();) {
      it = it->second.first == comm ? windows_.erase(it) : std::next(it);
    }
  }

  // ---- What there is.
  int calls(Call call) const { return locked([&] { return counts_[call]; }); }
  int calls() const { return locked([&] { return total_; }); }
  // Waits for the device that were begun; and how often it was synchronized, in vain or not.
  int num_waits() const { return num_retains_; }
  int num_syncs() const { return num_syncs_; }
  size_t num_memory() const { return locked([&] { return memory_.size(); }); }
  size_t num_mappings() const { return locked([&] { return mappings_.size(); }); }
  size_t num_handles() const { return locked([&] { return num_handles_; }); }
  size_t num_windows() const { return locked([&] { return windows_.size(); }); }
  void* last_memory() const { return locked([&] { return last_memory_; }); }
  // The capture mode of the thread that asked for memory last, when it did.
  int last_alloc_mode() const { return locked([&] { return last_alloc_mode_; }); }
  // 0 if there is no memory at `pointer`.
  size_t size_of(const void* pointer) const {
    const Lock lock(mutex_);
    const auto found = memory_.find(address(pointer));
    return found == memory_.end() ? 0 : found->second;
  }
  NcclWindow window_of(NcclComm comm, const void* base) const {
    const Lock lock(mutex_);
    return find_window(comm, address(base));
  }
  std::vector<std::string> violations() const { return locked([&] { return violations_; }); }

  static NcclSymbols symbols() {
    NcclSymbols table;
    table.error_string = [](NcclResult) { return "fake error"; };
    table.last_error = [](NcclComm) { return "fake details"; };
    table.mem_alloc = [](void** memory, size_t size) { return current().alloc(memory, size); };
    table.mem_free = [](void* memory) { return current().free(memory); };
    table.window_register = [](NcclComm comm, void* base, size_t size, NcclWindow* window,
                               int flags) {
      return current().register_window(comm, base, size, window, flags);
    };
    table.window_deregister = [](NcclComm comm, NcclWindow window) {
      return current().deregister_window(comm, window);
    };
    return table;
  }

  static CudaDriver driver() {
    CudaDriver table;
    table.stream_is_capturing = [](CudaStream stream, int* status) {
      *status = stream == kCapturingStream;
      return stream == kBrokenStream ? 906 : kCudaSuccess;
    };
    table.thread_exchange_capture_mode = [](int* mode) {
      std::swap(*mode, t_capture_mode);
      return kCudaSuccess;
    };
    table.device_primary_ctx_retain = [](void** context, int device) {
      return current().retain_context(context, device);
    };
    table.ctx_push_current = [](void* context) { return current().push_context(context); };
    table.ctx_pop_current = [](void** context) { return current().pop_context(context); };
    table.ctx_synchronize = [] { return current().synchronize(); };
    return table;
  }

  // One that can also map memory at another address.
  static CudaDriver mapping_driver() {
    CudaDriver table = driver();
    table.mem_address_reserve = [](DevicePointer* pointer, size_t, size_t, DevicePointer,
                                   unsigned long long) {
      *pointer = kSecond;
      return current().step_result(kReserve);
    };
    table.mem_get_address_range = [](DevicePointer* base, size_t* size, DevicePointer pointer) {
      return current().address_range(base, size, pointer);
    };
    table.mem_retain_allocation_handle = [](CudaMemory* handle, void* memory) {
      return current().retain_handle(handle, memory);
    };
    table.mem_release = [](CudaMemory) { return current().release_handle(); };
    table.mem_map = [](DevicePointer pointer, size_t size, size_t, CudaMemory handle,
                       unsigned long long) { return current().map(pointer, size, handle); };
    table.mem_set_access = [](DevicePointer, size_t, const CudaMemAccess* access, size_t count) {
      return current().set_access(*access, count);
    };
    table.mem_unmap = [](DevicePointer pointer, size_t size) {
      return current().unmap(pointer, size);
    };
    return table;
  }
  static constexpr uintptr_t kSecond = uintptr_t{1} << 46;  // where such mappings begin

 private:
  using Lock = std::lock_guard<std::mutex>;
  static constexpr std::chrono::seconds kPatience{60};
  static constexpr uintptr_t kPage = uintptr_t{2} << 20;
  // Never mapped: nothing touches the memory, and a real mapping has a costly shadow.
  static constexpr uintptr_t kLowest = uintptr_t{1} << 44, kHighest = uintptr_t{1} << 45;

  static Fake& current() { return *current_.load(); }
  static uintptr_t address(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer); }
  static void* garbage() { return reinterpret_cast<void*>(0xdeadbeef000); }

  template <typename Function>
  std::invoke_result_t<Function> locked(const Function& function) const {
    const Lock lock(mutex_);
    return function();
  }

  void violate(const std::string& what) { violations_.push_back(what); }

  NcclResult enter(Call call) {
    ++counts_[call];
    ++total_;
    for (const auto& key : {std::pair{call, counts_[call]}, std::pair{kNumCalls, total_}}) {
      const auto found = failures_.find(key);
      if (found != failures_.end()) return found->second;
    }
    return kNcclSuccess;
  }

  NcclWindow find_window(NcclComm comm, uintptr_t base) const {
    for (const auto& [window, of] : windows_) {
      if (of == std::pair{comm, base}) return window;
    }
    return nullptr;
  }

  // The outermost gap in which it fits, so that addresses are used again, and neighbours touch.
  uintptr_t place(size_t size) const {
    size = (size + kPage - 1) / kPage * kPage;
    if (!downwards_) {
      uintptr_t begin = kLowest;
      for (const auto& [base, taken] : memory_) {
        if (base - begin >= size) break;
        begin = base + taken;
      }
      return begin;
    }
    uintptr_t end = kHighest;
    for (auto it = memory_.rbegin(); it != memory_.rend(); ++it) {
      if (end - (it->first + it->second) >= size) break;
      end = it->first;
    }
    return end - size;
  }

  // ---- The driver's context; each is asked for by its device's number.
  CudaResult step_result(Step step) { return failing_step_ == step ? 700 : kCudaSuccess; }

  CudaResult retain_context(void** context, int device) {
    const Lock lock(mutex_);
    ++num_retains_;
    *context = reinterpret_cast<void*>(uintptr_t{0xd000} + device);
    if (device != kDevice) violate("the context of another device");
    return step_result(kRetain);
  }
  CudaResult push_context(void* context) {
    const Lock lock(mutex_);
    if (step_result(kPush) != kCudaSuccess) return step_result(kPush);
    if (t_context != nullptr) violate("two contexts pushed");
    t_context = context;
    return kCudaSuccess;
  }
  CudaResult pop_context(void** context) {
    const Lock lock(mutex_);
    if (t_context == nullptr) violate("no context to pop");
    *context = std::exchange(t_context, nullptr);
    return kCudaSuccess;
  }
  CudaResult synchronize() {
    std::unique_lock<std::mutex> lock(mutex_);
    ++num_syncs_;
    if (t_context == nullptr) violate("synchronization without a context");
    if (block_sync_.exchange(false)) block(lock);
    if (jitter_ && num_syncs_ % 16 == 0) {
      lock.unlock();
      std::this_thread::sleep_for(std::chrono::microseconds(50));
      lock.lock();
    }
    return step_result(kSync);
  }

  void block(std::unique_lock<std::mutex>& lock) {
    blocked_ = true;
    changed_.notify_all();
    if (!changed_.wait_for(lock, kPatience, [&] { return !blocked_; })) {
      violate("what was blocked never got unblocked");
    }
  }

  // ---- The driver's mappings. A handle is the memory's own address.
  CudaResult address_range(DevicePointer* base, size_t* size, DevicePointer pointer) {
    const Lock lock(mutex_);
    const auto found = memory_.find(pointer);
    if (found == memory_.end()) violate("the address range of unknown memory");
    *base = pointer;
    *size = found == memory_.end() ? 0 : found->second;
    return step_result(kRange);
  }
  CudaResult retain_handle(CudaMemory* handle, void* memory) {
    const Lock lock(mutex_);
    if (step_result(kHandle) != kCudaSuccess) return step_result(kHandle);
    *handle = address(memory);
    ++num_handles_;
    return kCudaSuccess;
  }
  CudaResult release_handle() {
    const Lock lock(mutex_);
    if (num_handles_ == 0) violate("a handle released twice");
    --num_handles_;
    return kCudaSuccess;
  }
  CudaResult map(DevicePointer pointer, size_t size, CudaMemory handle) {
    const Lock lock(mutex_);
    if (step_result(kMap) != kCudaSuccess) return step_result(kMap);
    if (t_context == nullptr) violate("a mapping without a context");
    for (const auto& [begin, of] : mappings_) {
      if (begin < pointer + size && pointer < begin + memory_sizes_[of]) violate("mapped twice");
    }
    memory_sizes_[handle] = size;
    mappings_[pointer] = handle;
    return kCudaSuccess;
  }
  CudaResult set_access(const CudaMemAccess& access, size_t count) {
    const Lock lock(mutex_);
    const bool right = count == 1 && access.location_type == 1 && access.flags == 3;
    if (!right || access.location_id != kDevice) violate("access of somebody else");
    return step_result(kAccess);
  }
  CudaResult unmap(DevicePointer pointer, size_t size) {
    const Lock lock(mutex_);
    if (step_result(kUnmap) != kCudaSuccess) return step_result(kUnmap);
    const auto found = mappings_.find(pointer);
    if (found == mappings_.end() || memory_sizes_[found->second] != size) {
      violate("unmapping of what is not mapped");
      return 1;
    }
    mappings_.erase(found);
    return kCudaSuccess;
  }
  // NCCL's address of what is mapped a second time.
  uintptr_t first_address(const void* pointer) const {
    const auto found = mappings_.find(address(pointer));
    return found == mappings_.end() ? address(pointer) : found->second;
  }

  NcclResult alloc(void** memory, size_t size) {
    const Lock lock(mutex_);
    last_alloc_mode_ = t_capture_mode;
    NcclResult result = enter(kAlloc);
    if (size == 0 || size % kPage != 0) violate("memory of an odd size");
    if (size > kHighest - kLowest) result = kNcclUnhandledCudaError;
    if (result != kNcclSuccess || null_memory_) {
      *memory = null_memory_ ? nullptr : garbage();
      return result;
    }
    const uintptr_t base = place(size);
    memory_[base] = size;
    *memory = last_memory_ = reinterpret_cast<void*>(base);
    return kNcclSuccess;
  }

  NcclResult free(void* memory) {
    const Lock lock(mutex_);
    const NcclResult result = enter(kFree);
    const uintptr_t base = address(memory);
    if (memory_.count(base) == 0) {
      violate("free of unknown memory");
      return kNcclUnhandledCudaError;
    }
    for (const auto& [window, of] : windows_) {
      if (of.second == base && doomed_.count(of.first) == 0) violate("free of a live window");
    }
    for (const auto& [comm, registering] : registering_) {
      if (registering == base) violate("free during a registration");
    }
    if (result == kNcclSuccess) memory_.erase(base);
    return result;
  }

  NcclResult register_window(NcclComm comm, void* memory, size_t size, NcclWindow* window,
                             int flags) {
    std::unique_lock<std::mutex> lock(mutex_);
    const NcclResult result = enter(kRegister);
    const uintptr_t base = first_address(memory);
    if (flags != kNcclWinSymmetric) violate("registration without the symmetric flag");
    if (comms_.count(comm) == 0) violate("registration with an unknown communicator");
    if (memory_.count(base) == 0 || memory_[base] != size) violate("no such memory to register");
    if (find_window(comm, base) != nullptr) violate("registered twice");
    if (!registering_.insert({comm, base}).second) violate("two registrations at once");
    if (counts_[kRegister] == block_at_) block(lock);
    if (jitter_ && counts_[kRegister] % 4 == 0) {
      lock.unlock();
      std::this_thread::sleep_for(std::chrono::microseconds(100));
      lock.lock();
    }
    registering_.erase(comm);
    if (result != kNcclSuccess || comms_.count(comm) == 0) {
      *window = garbage();
      return result != kNcclSuccess ? result : kAborted;
    }
    *window = nullptr;
    if (null_windows_) return kNcclSuccess;
    *window = reinterpret_cast<NcclWindow>(0xf0000000 + 16 * ++num_windows_made_);
    windows_[*window] = {comm, base};
    return kNcclSuccess;
  }

  NcclResult deregister_window(NcclComm comm, NcclWindow window) {
    const Lock lock(mutex_);
    NcclResult result = enter(kDeregister);
    const auto found = windows_.find(window);
    if (found == windows_.end() || found->second.first != comm) {
      violate("deregistration of an unknown window");
      return kNcclUnhandledCudaError;
    }
    const auto failing = failing_comms_.find(comm);
    if (failing != failing_comms_.end()) result = failing->second;
    if (result == kNcclSuccess) windows_.erase(found);
    return result;
  }

  static inline std::atomic<Fake*> current_{nullptr};
  const bool downwards_;
  std::atomic<bool> null_windows_{false}, null_memory_{false}, jitter_{false};
  std::atomic<bool> block_sync_{false};
  std::atomic<Step> failing_step_{kNoStep};
  std::atomic<int> num_retains_{0}, num_syncs_{0};

  mutable std::mutex mutex_;  // guards all below
  std::condition_variable changed_;
  std::array<int, kNumCalls> counts_{};
  int total_ = 0;
  std::map<std::pair<Call, int>, NcclResult> failures_;  // by the call's number
  std::map<NcclComm, NcclResult> failing_comms_;
  int block_at_ = 0;
  bool blocked_ = false;
  uintptr_t num_comms_ = 0, num_windows_made_ = 0;
  std::set<NcclComm> comms_, doomed_;
  std::map<uintptr_t, size_t> memory_;
  std::map<uintptr_t, uintptr_t> mappings_;      // second address to NCCL's
  std::map<uintptr_t, size_t> memory_sizes_;     // of what is or was mapped
  size_t num_handles_ = 0;
  std::map<NcclWindow, std::pair<NcclComm, uintptr_t>> windows_;
  std::map<NcclComm, uintptr_t> registering_;
  std::vector<std::string> violations_;
  void* last_memory_ = nullptr;
  int last_alloc_mode_ = kGlobalCapture;
};

}  // namespace distcomm::fake
