// Streams and events.

#include <dlfcn.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <map>

#include "device.h"

namespace simulated {
namespace {

// Never destroyed: threads of streams outlive main().
std::vector<Stream*>& all_streams() {
  static auto* const streams = new std::vector<Stream*>;
  return *streams;
}

Stream* default_stream() {
  static auto* const streams = new std::map<int, Stream*>;
  const Lock lock(mutex());
  Stream*& stream = (*streams)[current_device()];
  if (stream == nullptr) {
    stream = new Stream(current_device(), 0);
    all_streams().push_back(stream);
  }
  return stream;
}

// What torch's libraries are made of goes soon after: nothing may still be at work with it then.
void settle_at_exit() {
  constexpr std::chrono::seconds kMostWait{2};
  for (Stream* const stream : all_streams()) stream->drain_within(kMostWait);
}

template <typename Function>
Function python(const char* name) {
  return reinterpret_cast<Function>(dlsym(RTLD_DEFAULT, name));
}

}  // namespace

std::vector<std::shared_ptr<Capture>>& captures() {
  static auto* const captures = new std::vector<std::shared_ptr<Capture>>;
  return *captures;
}

std::recursive_mutex& mutex() {
  static auto* const mutex = new std::recursive_mutex;
  return *mutex;
}

void without_python(const std::function<void()>& wait) {
  static const auto initialized = python<int (*)()>("Py_IsInitialized");
  static const auto this_thread = python<void* (*)()>("PyGILState_GetThisThreadState");
  static const auto holds = python<int (*)()>("PyGILState_Check");
  static const auto save = python<void* (*)()>("PyEval_SaveThread");
  static const auto restore = python<void (*)(void*)>("PyEval_RestoreThread");
  const bool held = save != nullptr && initialized() && this_thread() != nullptr && holds();
  void* const state = held ? save() : nullptr;
  wait();
  if (held) restore(state);
}

void Mark::set() {
  const std::lock_guard<std::mutex> lock(mutex_);
  set_ = true;
  time_ = std::chrono::steady_clock::now();
  changed_.notify_all();
}

bool Mark::is_set() {
  const std::lock_guard<std::mutex> lock(mutex_);
  return set_;
}

void Mark::wait() {
  std::unique_lock<std::mutex> lock(mutex_);
  changed_.wait(lock, [this] { return set_; });
}

std::chrono::steady_clock::time_point Mark::time() {
  wait();
  return time_;
}

void Stream::run() {
  for (;;) {
    Work work;
    {
      std::unique_lock<std::mutex> lock(mutex_);
      busy_ = false;
      changed_.notify_all();
      changed_.wait(lock, [this] { return !queue_.empty(); });
      work = std::move(queue_.front());
      queue_.pop_front();
      busy_ = true;
    }
    work();
  }
}

void Stream::push(Work work) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (!started_) {  // not before: a process that forks must have no threads
    static const int registered = std::atexit(settle_at_exit);
    (void)registered;
    started_ = true;
    std::thread([this] { run(); }).detach();
  }
  queue_.push_back(std::move(work));
  changed_.notify_all();
}

void Stream::drain() {
  without_python([this] {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [this] { return queue_.empty() && !busy_; });
  });
}

void Stream::drain_within(std::chrono::seconds time) {
  std::unique_lock<std::mutex> lock(mutex_);
  changed_.wait_for(lock, time, [this] { return queue_.empty() && !busy_; });
}

bool Stream::is_idle() {
  const std::lock_guard<std::mutex> lock(mutex_);
  return queue_.empty() && !busy_;
}

cudaError_t Stream::give(Work work, NodeType type, bool programmatic) {
  const Lock lock(mutex());
  if (!capture) {
    push(std::move(work));
    return cudaSuccess;
  }
  if (capture->invalid) return failed(cudaErrorStreamCaptureInvalidated, __func__);
  auto node = std::make_unique<Node>(Node{type, std::move(work), {}});
  for (Node* const before : frontier) {
    const bool both_kernels = before->type == NodeType::kKernel && type == NodeType::kKernel;
    node->dependencies.emplace_back(before, programmatic && both_kernels);
  }
  frontier = {node.get()};
  has_unjoined_work = true;
  capture->graph->nodes.push_back(std::move(node));
  return cudaSuccess;
}

int& current_device() {
  thread_local int device = 0;
  return device;
}

cudaStreamCaptureMode& capture_mode() {
  thread_local cudaStreamCaptureMode mode = cudaStreamCaptureModeGlobal;
  return mode;
}

Stream* stream_of(const void* handle) {
  if (reinterpret_cast<uintptr_t>(handle) <= 2) return default_stream();
  return static_cast<Stream*>(const_cast<void*>(handle));
}

std::vector<Stream*> streams_of(int device) {
  const Lock lock(mutex());
  std::vector<Stream*> found;
  for (Stream* const stream : all_streams()) {
    if (stream->device == device) found.push_back(stream);
  }
  return found;
}

cudaError_t synchronize(int device) {
  {
    const Lock lock(mutex());
    bool capturing = false;
    for (const auto& capture : captures()) {
      if (capture->origin->device != device) continue;
      capture->invalid = capturing = true;
    }
    if (capturing) return failed(cudaErrorStreamCaptureUnsupported, __func__);
  }
  for (Stream* const stream : streams_of(device)) stream->drain();
  return cudaSuccess;
}

bool is_forbidden() {
  const Lock lock(mutex());
  if (capture_mode() == cudaStreamCaptureModeRelaxed) return false;
  bool forbidden = false;
  for (const auto& capture : captures()) {
    if (capture->mode == cudaStreamCaptureModeRelaxed) continue;
    const bool mine = capture->thread == std::this_thread::get_id();
    const bool of_all = capture->mode == cudaStreamCaptureModeGlobal &&
                        capture_mode() == cudaStreamCaptureModeGlobal;
    if (mine || of_all) capture->invalid = forbidden = true;
  }
  return forbidden;
}

}  // namespace simulated

using namespace simulated;

namespace {

Event* event_of(cudaEvent_t event) { return reinterpret_cast<Event*>(event); }
// Ends the capture of a stream that is asked for what a capture can't have.
bool ends_capture(Stream* stream) {
  const Lock lock(mutex());
  if (!stream->capture) return false;
  stream->capture->invalid = true;
  return true;
}

}  // namespace

SIMULATED_API int simulated_enqueue(void* stream, void (*work)(void*), void* data,
                                    int programmatic) {
  return stream_of(stream)->give([=] { work(data); }, NodeType::kKernel, programmatic != 0);
}

SIMULATED_API int simulated_is_capturing(void* stream) {
  const Lock lock(mutex());
  return stream_of(stream)->capture != nullptr;
}

// ---- Streams.

SIMULATED_API cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned,
                                                       int priority) {
  auto* const made = new Stream(current_device(), priority);
  const Lock lock(mutex());
  all_streams().push_back(made);
  *stream = reinterpret_cast<cudaStream_t>(made);
  return cudaSuccess;
}

SIMULATED_API cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) {
  return cudaStreamCreateWithPriority(stream, flags, 0);
}

SIMULATED_API cudaError_t cudaStreamCreate(cudaStream_t* stream) {
  return cudaStreamCreateWithPriority(stream, 0, 0);
}

// The stream stays, for whoever still waits for it.
SIMULATED_API cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  stream_of(stream)->drain();
  return cudaSuccess;
}

SIMULATED_API cudaError_t cudaStreamGetPriority(cudaStream_t stream, int* priority) {
  *priority = stream_of(stream)->priority;
  return cudaSuccess;
}

SIMULATED_API cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  *least = 0;
  *greatest = -5;
  return cudaSuccess;
}

SIMULATED_API cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  if (ends_capture(stream_of(stream)) || is_forbidden()) {
    return failed(cudaErrorStreamCaptureUnsupported, __func__);
  }
  stream_of(stream)->drain();
  return cudaSuccess;
}

SIMULATED_API cudaError_t cudaStreamQuery(cudaStream_t stream) {
  if (ends_capture(stream_of(stream))) return failed(cudaErrorStreamCaptureUnsupported, __func__);
  return stream_of(stream)->is_idle() ? cudaSuccess : cudaErrorNotReady;
}

SIMULATED_API cudaError_t cudaDeviceSynchronize() { return synchronize(current_device()); }

SIMULATED_API cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t work, void* data) {
  return stream_of(stream)->give([=] { work(data); }, NodeType::kHost);
}

SIMULATED_API cudaError_t cudaStreamAddCallback(cudaStream_t stream, cudaStreamCallback_t work,
                                                void* data, unsigned) {
  return stream_of(stream)->give([=] { work(stream, cudaSuccess, data); }, NodeType::kHost);
}

// ---- Events.

SIMULATED_API cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  *event = reinterpret_cast<cudaEvent_t>(new Event);
  return cudaSuccess;
}

SIMULATED_API cudaError_t cudaEventCreate(cudaEvent_t* event) {
  return cudaEventCreateWithFlags(event, 0);
}

SIMULATED_API cudaError_t cudaEventDestroy(cudaEvent_t event) {
  delete event_of(event);
  return cudaSuccess;
}

SIMULATED_API cudaError_t cudaEventRecordWithFlags(cudaEvent_t handle, cudaStream_t stream_handle,
                                                   unsigned flags) {
  Event* const event = event_of(handle);
  Stream* const stream = stream_of(stream_handle);
  const Lock lock(mutex());
  if (stream->capture && (flags & cudaEventRecordExternal) == 0) {
    if (stream->capture->invalid) return failed(cudaErrorStreamCaptureInvalidated, __func__);
    event->capture = stream->capture;
    event->stream = stream;
    event->frontier = stream->frontier;
    return cudaSuccess;
  }
  const auto mark = std::make_shared<Mark>();
  event->mark = mark;
  event->capture = nullptr;
  return stream->give([mark] { mark->set(); }, NodeType::kHost);
}

SIMULATED_API cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  return cudaEventRecordWithFlags(event, stream, 0);
}

SIMULATED_API cudaError_t cudaEventQuery(cudaEvent_t handle) {
  Event* const event = event_of(handle);
  if (event->capture) {
    event->capture->invalid = true;
    return failed(cudaErrorCapturedEvent, __func__);
  }
  if (is_forbidden()) return failed(cudaErrorStreamCaptureUnsupported, __func__);
  return !event->mark || event->mark->is_set() ? cudaSuccess : cudaErrorNotReady;
}

SIMULATED_API cudaError_t cudaEventSynchronize(cudaEvent_t handle) {
  Event* const event = event_of(handle);
  if (event->capture) return failed(cudaErrorCapturedEvent, __func__);
  if (is_forbidden()) return failed(cudaErrorStreamCaptureUnsupported, __func__);
  if (event->mark) without_python([event] { event->mark->wait(); });
  return cudaSuccess;
}

SIMULATED_API cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t from,
                                               cudaEvent_t to) {
  const auto begin = event_of(from)->mark, end = event_of(to)->mark;
  without_python([&] { end->wait(), begin->wait(); });
  const auto elapsed = end->time() - begin->time();
  *milliseconds = std::chrono::duration<float, std::milli>(elapsed).count();
  return cudaSuccess;
}

SIMULATED_API cudaError_t cudaStreamWaitEvent(cudaStream_t stream_handle, cudaEvent_t handle,
                                              unsigned flags) {
  Event* const event = event_of(handle);
  Stream* const stream = stream_of(stream_handle);
  const Lock lock(mutex());
  if (event->capture && (flags & cudaEventWaitExternal) == 0) {
    const auto& live = captures();
    if (event->capture->invalid) return failed(cudaErrorStreamCaptureInvalidated, __func__);
    if (std::find(live.begin(), live.end(), event->capture) == live.end()) {
      return failed(cudaErrorCapturedEvent, __func__);
    }
    if (stream->capture && stream->capture != event->capture) {
      return failed(cudaErrorStreamCaptureMerge, __func__);
    }
    stream->capture = event->capture;
    if (stream != event->capture->origin) stream->capture->joined.insert(stream);
    for (Node* const node : event->frontier) {
      const auto& known = stream->frontier;
      if (std::find(known.begin(), known.end(), node) == known.end()) {
        stream->frontier.push_back(node);
      }
    }
    const bool sees_all = event->stream->frontier == event->frontier;
    if (event->stream != stream && sees_all) event->stream->has_unjoined_work = false;
    return cudaSuccess;
  }
  if (!event->mark) return cudaSuccess;
  if (stream->capture) {
    stream->capture->invalid = true;
    return failed(cudaErrorStreamCaptureIsolation, __func__);
  }
  return stream->give([mark = event->mark] { mark->wait(); }, NodeType::kHost);
}
