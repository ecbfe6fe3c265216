// What distcomm does to a CUDA graph while it is captured.

#include <cstdint>
#include <mutex>
#include <unordered_set>
#include <vector>

#include "cuda_driver.h"

namespace distcomm {
namespace {

constexpr unsigned kNoDestructorSync = 1;     // CU_USER_OBJECT_NO_DESTRUCTOR_SYNC
constexpr unsigned kMoveReference = 1;        // CU_GRAPH_USER_OBJECT_MOVE
constexpr unsigned char kProgrammatic = 1;    // CU_GRAPH_DEPENDENCY_TYPE_PROGRAMMATIC
constexpr int kKernelNode = 0;                // CU_GRAPH_NODE_TYPE_KERNEL
constexpr int kStatusActive = 1;              // CU_STREAM_CAPTURE_STATUS_ACTIVE
constexpr CudaResult kNotSupported = 801;     // CUDA_ERROR_NOT_SUPPORTED
constexpr CudaResult kInvalidated = 901;      // CUDA_ERROR_STREAM_CAPTURE_INVALIDATED

struct CaptureInfo {
  bool active = false;
  uint64_t id = 0;
  CudaGraph graph = nullptr;
  const CudaGraphNode* dependencies = nullptr;
  size_t num_dependencies = 0;
};

CudaResult capture_info(const CudaDriver& driver, CudaStream stream, CaptureInfo* info) {
  int status = 0;
  const CudaResult result =
      driver.stream_get_capture_info(stream, &status, &info->id, &info->graph,
                                     &info->dependencies, &info->num_dependencies);
  info->active = status == kStatusActive;
  if (result == kCudaSuccess && status != 0 && !info->active) return kInvalidated;
  return result;
}

// Makes what NCCL captures wait for all that was captured before it.
//
// NCCL launches its symmetric kernels with programmatic stream serialization. From 2.28 to 2.30.6
// they don't wait for the kernel before them, so that its writes may not be visible to them yet.
// Captured, that launch becomes a programmatic edge, which is replaced by an ordinary one here.
class Fence {
 public:
  // To be made before NCCL is called. Outside a capture it does nothing.
  Fence(const CudaDriver& driver, CudaStream stream) : driver_(driver), stream_(stream) {
    if (!driver.has_edge_data() || !is_capturing(driver, stream)) return;
    result_ = capture_info(driver, stream, &before_);
    const CudaGraphNode* const first = before_.dependencies;
    if (result_ == kCudaSuccess && before_.active) {
      visited_.insert(first, first + before_.num_dependencies);
    }
  }

  // To be called after NCCL was; passes its result on unless the fence has failed.
  NcclResult put(NcclResult called) {
    if (called == kNcclSuccess && result_ == kCudaSuccess && before_.active) {
      CaptureInfo after;
      result_ = capture_info(driver_, stream_, &after);
      std::vector<CudaGraphNode> pending(after.dependencies,
                                         after.dependencies + after.num_dependencies);
      while (result_ == kCudaSuccess && !pending.empty()) {
        const CudaGraphNode node = pending.back();
        pending.pop_back();
        if (!visited_.insert(node).second) continue;
        int type = -1;
        result_ = driver_.graph_node_get_type(node, &type);
        if (type == kKernelNode) result_ = replace_edges_into(node, &pending);
      }
    }
    return called == kNcclSuccess && result_ != kCudaSuccess ? kNcclUnhandledCudaError : called;
  }

 private:
  CudaResult replace_edges_into(CudaGraphNode node, std::vector<CudaGraphNode>* pending) {
    size_t count = 0;
    CudaResult result = driver_.graph_node_get_dependencies(node, nullptr, nullptr, &count);
    std::vector<CudaGraphNode> from(count);
    std::vector<CudaEdgeData> edges(count);
    if (result == kCudaSuccess && count > 0) {
      result = driver_.graph_node_get_dependencies(node, from.data(), edges.data(), &count);
    }
    for (size_t i = 0; result == kCudaSuccess && i < count; ++i) {
      if (edges[i].type != kProgrammatic) continue;
      pending->push_back(from[i]);  // another kernel of the same call, or it ends there
      result = driver_.graph_remove_dependencies(before_.graph, &from[i], &node, &edges[i], 1);
      if (result != kCudaSuccess) break;
      result = driver_.graph_add_dependencies(before_.graph, &from[i], &node, 1);
    }
    return result;
  }

  const CudaDriver& driver_;
  const CudaStream stream_;
  CudaResult result_ = kCudaSuccess;
  CaptureInfo before_;
  std::unordered_set<CudaGraphNode> visited_;  // captured before, or looked at
};

struct EndedCaptures {
  std::mutex mutex;
  std::vector<uint64_t> ids;
};

// Never destroyed: the driver may still call back while the process exits.
EndedCaptures& ended_captures() {
  static auto* const ended = new EndedCaptures;
  return *ended;
}

// Called by the driver, in a thread of its own, once a graph and all that was instantiated from
// it are gone. It may not call CUDA, so it leaves a note.
void note_end(void* capture_id) {
  EndedCaptures& ended = ended_captures();
  const std::lock_guard<std::mutex> lock(ended.mutex);
  ended.ids.push_back(reinterpret_cast<uintptr_t>(capture_id));
}

}  // namespace
}  // namespace distcomm

using namespace distcomm;

DISTCOMM_EXPORT int distcomm_has_cuda_driver() { return cuda_driver().complete(); }

// A number of the capture under way on `stream`; 0 if there is none.
DISTCOMM_EXPORT uint64_t distcomm_capture_id(CudaStream stream) {
  const CudaDriver& driver = cuda_driver();
  CaptureInfo info;
  if (!driver.complete() || !is_capturing(driver, stream)) return 0;
  return capture_info(driver, stream, &info) == kCudaSuccess && info.active ? info.id : 0;
}

// From the end of the graph that `stream` captures, distcomm_take_ended_captures knows its capture
// id. Returns a CUresult.
DISTCOMM_EXPORT int distcomm_watch_capture(CudaStream stream) {
  const CudaDriver& driver = cuda_driver();
  if (!driver.complete()) return kNotSupported;
  CaptureInfo info;
  CudaResult result = capture_info(driver, stream, &info);
  if (result != kCudaSuccess) return result;
  if (!info.active) return kInvalidated;
  CudaUserObject object = nullptr;
  result = driver.user_object_create(&object, reinterpret_cast<void*>(uintptr_t{info.id}),
                                     note_end, 1, kNoDestructorSync);
  if (result != kCudaSuccess) return result;
  result = driver.graph_retain_user_object(info.graph, object, 1, kMoveReference);
  if (result != kCudaSuccess) driver.user_object_release(object, 1);
  return result;
}

// Moves at most `capacity` ids of captures whose graphs are gone to `ids`; returns how many.
DISTCOMM_EXPORT size_t distcomm_take_ended_captures(uint64_t* ids, size_t capacity) {
  EndedCaptures& ended = ended_captures();
  const std::lock_guard<std::mutex> lock(ended.mutex);
  size_t count = 0;
  while (count < capacity && !ended.ids.empty()) {
    ids[count++] = ended.ids.back();
    ended.ids.pop_back();
  }
  return count;
}

// NCCL's three collectives that have symmetric kernels, and the end of a group, behind a fence.

DISTCOMM_EXPORT int distcomm_fenced_all_reduce(const NcclSymbols* nccl, const void* send,
                                               void* recv, size_t count, int data_type, int op,
                                               NcclComm comm, CudaStream stream) {
  Fence fence(cuda_driver(), stream);
  return fence.put(nccl->all_reduce(send, recv, count, data_type, op, comm, stream));
}

DISTCOMM_EXPORT int distcomm_fenced_all_gather(const NcclSymbols* nccl, const void* send,
                                               void* recv, size_t count, int data_type,
                                               NcclComm comm, CudaStream stream) {
  Fence fence(cuda_driver(), stream);
  return fence.put(nccl->all_gather(send, recv, count, data_type, comm, stream));
}

DISTCOMM_EXPORT int distcomm_fenced_reduce_scatter(const NcclSymbols* nccl, const void* send,
                                                   void* recv, size_t count, int data_type,
                                                   int op, NcclComm comm, CudaStream stream) {
  Fence fence(cuda_driver(), stream);
  return fence.put(nccl->reduce_scatter(send, recv, count, data_type, op, comm, stream));
}

DISTCOMM_EXPORT int distcomm_fenced_group_end(const NcclSymbols* nccl, CudaStream stream) {
  Fence fence(cuda_driver(), stream);
  return fence.put(nccl->group_end());
}

// Copies from the device to the host, or between addresses of devices that this process can reach;
// fills with one byte. Return a CUresult.

DISTCOMM_EXPORT int distcomm_read_device(void* host, DevicePointer device, size_t num_bytes) {
  const CudaDriver& driver = cuda_driver();
  return driver.complete() ? driver.memcpy_dtoh(host, device, num_bytes) : kNotSupported;
}

DISTCOMM_EXPORT int distcomm_copy_async(DevicePointer to, DevicePointer from, size_t num_bytes,
                                        CudaStream stream) {
  const CudaDriver& driver = cuda_driver();
  return driver.complete() ? driver.memcpy_async(to, from, num_bytes, stream) : kNotSupported;
}

DISTCOMM_EXPORT int distcomm_fill_async(DevicePointer to, unsigned char value, size_t num_bytes,
                                        CudaStream stream) {
  const CudaDriver& driver = cuda_driver();
  return driver.complete() ? driver.memset_d8_async(to, value, num_bytes, stream) : kNotSupported;
}
