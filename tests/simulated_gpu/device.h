// A CUDA device made of host memory and threads: what its parts share.
#pragma once

#include <cuda_runtime_api.h>

#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <set>
#include <thread>
#include <utility>
#include <vector>

#define SIMULATED_API extern "C" __attribute__((visibility("default")))

namespace simulated {

using Work = std::function<void()>;
using Lock = std::lock_guard<std::recursive_mutex>;

// Guards all tables, streams' captures and graphs; not held while anything waits.
std::recursive_mutex& mutex();

// Waits without holding Python's lock, which the work that is waited for may need. No destructor
// takes the lock again: where Python has ended meanwhile, that ends the thread.
void without_python(const std::function<void()>& wait);

// Something that will have happened, as an event that was recorded.
class Mark {
 public:
  void set();
  bool is_set();
  void wait();
  std::chrono::steady_clock::time_point time();

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  bool set_ = false;
  std::chrono::steady_clock::time_point time_;
};

struct Graph;

enum class NodeType : int { kKernel = 0, kMemcpy = 1, kMemset = 2, kHost = 3, kMemOps = 8 };

struct Node {
  NodeType type;
  Work work;
  std::vector<std::pair<Node*, bool>> dependencies;  // and whether the edge is programmatic
};

// Called back once the last graph that retains it is gone.
struct UserObject {
  void (*destroy)(void*);
  void* data;
  int references;
};

struct Graph {
  std::vector<std::unique_ptr<Node>> nodes;  // in the order of their capture
  std::vector<UserObject*> objects;
};

struct GraphExec {
  std::shared_ptr<const std::vector<Work>> works;
  std::vector<UserObject*> objects;
};

class Stream;

struct Capture {
  uint64_t id;
  Graph* graph;
  Stream* origin;
  cudaStreamCaptureMode mode;
  std::thread::id thread;
  std::set<Stream*> joined;
  bool invalid = false;
};

// Those under way.
std::vector<std::shared_ptr<Capture>>& captures();

// A queue of work and, from the first work on, the thread that does it.
class Stream {
 public:
  Stream(int device, int priority) : device(device), priority(priority) {}

  // To be called with the mutex held: the device or the capture gets the work.
  cudaError_t give(Work work, NodeType type, bool programmatic = false);
  void push(Work work);
  // Returns when all that was pushed is done.
  void drain();
  void drain_within(std::chrono::seconds time);
  bool is_idle();

  const int device;
  const int priority;
  std::shared_ptr<Capture> capture;
  std::vector<Node*> frontier;  // what the next captured work depends on
  bool has_unjoined_work = false;

 private:
  void run();

  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<Work> queue_;
  bool started_ = false;
  bool busy_ = false;
};

struct Event {
  std::shared_ptr<Mark> mark;        // of the latest record outside of captures
  std::shared_ptr<Capture> capture;  // that the latest record belongs to
  Stream* stream = nullptr;
  std::vector<Node*> frontier;
};

// This thread's current device, and its mode towards captures.
int& current_device();
cudaStreamCaptureMode& capture_mode();

int num_devices();
// The stream behind a handle; 0, 1 and 2 stand for the current device's default stream.
Stream* stream_of(const void* handle);
std::vector<Stream*> streams_of(int device);
// Waits for a device; not while anything is captured there.
cudaError_t synchronize(int device);
// Whether this thread may not make a call that captures forbid; such a call ends those captures.
bool is_forbidden();

// Remembers what cudaGetLastError returns.
cudaError_t failed(cudaError_t error, const char* function);

// A device's memory is counted, not limited to what this machine has.
inline constexpr size_t kTotalBytes = size_t{141} << 30;
inline constexpr size_t kGranularity = size_t{2} << 20;
bool take_bytes(size_t num_bytes);
void give_back_bytes(size_t num_bytes);
size_t free_bytes();

size_t rounded_up(size_t num_bytes, size_t step);
// Aligned address space; no memory is in it before somebody writes there. 0 if there is none.
uintptr_t reserved_space(size_t num_bytes, size_t alignment, int protection);

// What a copy engine does: a flag of 32 bits is written once, in one piece.
void copy(void* to, const void* from, size_t num_bytes);

}  // namespace simulated

// For the other libraries. `data` has to stay: the work may be replayed. Returns a cudaError_t.
SIMULATED_API int simulated_enqueue(void* stream, void (*work)(void*), void* data,
                                    int programmatic);
SIMULATED_API int simulated_is_capturing(void* stream);
SIMULATED_API int simulated_take_bytes(size_t num_bytes);
SIMULATED_API void simulated_give_back_bytes(size_t num_bytes);
// NCCL's memory, which the driver can map a second time; and NCCL's address of a pointer into it,
// or else the pointer itself.
SIMULATED_API void simulated_note_nccl_memory(void* memory, size_t size, int file);
SIMULATED_API void simulated_forget_nccl_memory(void* memory);
SIMULATED_API void* simulated_nccl_address(const void* pointer);
