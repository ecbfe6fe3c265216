// Captures and graphs.

#include <algorithm>

#include "device.h"

using namespace simulated;

namespace {

Graph* graph_of(const void* graph) { return static_cast<Graph*>(const_cast<void*>(graph)); }
Node* node_of(const void* node) { return static_cast<Node*>(const_cast<void*>(node)); }
GraphExec* exec_of(cudaGraphExec_t exec) { return reinterpret_cast<GraphExec*>(exec); }

cudaStreamCaptureStatus status_of(const std::shared_ptr<Capture>& capture) {
  if (!capture) return cudaStreamCaptureStatusNone;
  return capture->invalid ? cudaStreamCaptureStatusInvalidated : cudaStreamCaptureStatusActive;
}

void release(UserObject* object, int num_references) {
  object->references -= num_references;
  if (object->references > 0) return;
  // As the driver does, in a thread of its own.
  std::thread([object] {
    object->destroy(object->data);
    delete object;
  }).detach();
}

void release_all(const std::vector<UserObject*>& objects) {
  for (UserObject* const object : objects) release(object, 1);
}

void destroy(Graph* graph) {
  release_all(graph->objects);
  delete graph;
}

void leave_capture(Stream* stream) {
  stream->capture = nullptr;
  stream->frontier.clear();
  stream->has_unjoined_work = false;
}

}  // namespace

// ---- Captures.

SIMULATED_API cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  std::swap(*mode, capture_mode());
  return cudaSuccess;
}

SIMULATED_API cudaError_t cudaStreamBeginCapture(cudaStream_t handle, cudaStreamCaptureMode mode) {
  static uint64_t num_captures = 0;
  Stream* const stream = stream_of(handle);
  const Lock lock(mutex());
  if (stream == stream_of(nullptr) || stream->capture) {
    return failed(cudaErrorStreamCaptureUnsupported, __func__);
  }
  stream->capture = std::make_shared<Capture>(
      Capture{++num_captures, new Graph, stream, mode, std::this_thread::get_id(), {}});
  captures().push_back(stream->capture);
  return cudaSuccess;
}

SIMULATED_API cudaError_t cudaStreamEndCapture(cudaStream_t handle, cudaGraph_t* graph) {
  Stream* const stream = stream_of(handle);
  const Lock lock(mutex());
  *graph = nullptr;
  const std::shared_ptr<Capture> capture = stream->capture;
  if (!capture || capture->origin != stream) return failed(cudaErrorIllegalState, __func__);
  bool unjoined = false;
  for (Stream* const joined : capture->joined) {
    unjoined |= joined->has_unjoined_work;
    leave_capture(joined);
  }
  leave_capture(stream);
  auto& live = captures();
  live.erase(std::find(live.begin(), live.end(), capture));
  if (capture->invalid || unjoined) {
    destroy(capture->graph);
    return failed(capture->invalid ? cudaErrorStreamCaptureInvalidated
                                   : cudaErrorStreamCaptureUnjoined, __func__);
  }
  *graph = reinterpret_cast<cudaGraph_t>(capture->graph);
  return cudaSuccess;
}

SIMULATED_API cudaError_t cudaStreamIsCapturing(cudaStream_t stream,
                                                cudaStreamCaptureStatus* status) {
  const Lock lock(mutex());
  *status = status_of(stream_of(stream)->capture);
  return cudaSuccess;
}

SIMULATED_API int cuStreamGetCaptureInfo_v2(void* handle, int* status, uint64_t* id, void** graph,
                                            void* const** dependencies, size_t* num_dependencies) {
  Stream* const stream = stream_of(handle);
  const Lock lock(mutex());
  *status = status_of(stream->capture);
  if (!stream->capture) return cudaSuccess;
  if (id != nullptr) *id = stream->capture->id;
  if (graph != nullptr) *graph = stream->capture->graph;
  if (dependencies != nullptr) {
    *dependencies = reinterpret_cast<void* const*>(stream->frontier.data());
  }
  if (num_dependencies != nullptr) *num_dependencies = stream->frontier.size();
  return cudaSuccess;
}

SIMULATED_API cudaError_t cudaStreamGetCaptureInfo(
    cudaStream_t stream, cudaStreamCaptureStatus* status, unsigned long long* id,
    cudaGraph_t* graph, const cudaGraphNode_t** dependencies, const cudaGraphEdgeData** edges,
    size_t* num_dependencies) {
  if (edges != nullptr) *edges = nullptr;
  int found = 0;
  cuStreamGetCaptureInfo_v2(stream, &found, reinterpret_cast<uint64_t*>(id),
                            reinterpret_cast<void**>(graph),
                            reinterpret_cast<void* const**>(dependencies),
                            num_dependencies);
  *status = static_cast<cudaStreamCaptureStatus>(found);
  return cudaSuccess;
}

SIMULATED_API int cuStreamIsCapturing(void* stream, int* status) {
  const Lock lock(mutex());
  *status = status_of(stream_of(stream)->capture);
  return cudaSuccess;
}

SIMULATED_API int cuThreadExchangeStreamCaptureMode(int* mode) {
  const auto before = capture_mode();
  capture_mode() = static_cast<cudaStreamCaptureMode>(*mode);
  *mode = before;
  return cudaSuccess;
}

// ---- Graphs.

SIMULATED_API cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  const Lock lock(mutex());
  destroy(graph_of(graph));
  return cudaSuccess;
}

SIMULATED_API cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* exec, cudaGraph_t handle,
                                                        unsigned long long) {
  const Lock lock(mutex());
  Graph* const graph = graph_of(handle);
  std::vector<Work> works;
  for (const auto& node : graph->nodes) works.push_back(node->work);
  for (UserObject* const object : graph->objects) ++object->references;
  *exec = reinterpret_cast<cudaGraphExec_t>(new GraphExec{
      std::make_shared<const std::vector<Work>>(std::move(works)), graph->objects});
  return cudaSuccess;
}

SIMULATED_API cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec) {
  const Lock lock(mutex());
  release_all(exec_of(exec)->objects);
  delete exec_of(exec);
  return cudaSuccess;
}

SIMULATED_API cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t stream) {
  const auto replay = [works = exec_of(exec)->works] {
    for (const Work& work : *works) work();
  };
  return stream_of(stream)->give(replay, NodeType::kKernel);
}

SIMULATED_API cudaError_t cudaGraphGetNodes(cudaGraph_t handle, cudaGraphNode_t* nodes,
                                            size_t* count) {
  const Lock lock(mutex());
  const auto& all = graph_of(handle)->nodes;
  for (size_t i = 0; nodes != nullptr && i < std::min(*count, all.size()); ++i) {
    nodes[i] = reinterpret_cast<cudaGraphNode_t>(all[i].get());
  }
  *count = all.size();
  return cudaSuccess;
}

namespace {

struct EdgeData {  // CUgraphEdgeData
  unsigned char from_port, to_port, type, reserved[5];
};

EdgeData edge_data(bool programmatic) {
  return {0, 0, static_cast<unsigned char>(programmatic), {}};
}

}  // namespace

SIMULATED_API int cuGraphNodeGetType(void* node, int* type) {
  *type = static_cast<int>(node_of(node)->type);
  return cudaSuccess;
}

SIMULATED_API int cuGraphNodeGetDependencies_v2(void* node, void** from, EdgeData* edges,
                                                size_t* count) {
  const Lock lock(mutex());
  const auto& dependencies = node_of(node)->dependencies;
  for (size_t i = 0; from != nullptr && i < std::min(*count, dependencies.size()); ++i) {
    from[i] = dependencies[i].first;
    edges[i] = edge_data(dependencies[i].second);
  }
  *count = dependencies.size();
  return cudaSuccess;
}

SIMULATED_API int cuGraphAddDependencies(void*, void* const* from, void* const* to, size_t count) {
  const Lock lock(mutex());
  for (size_t i = 0; i < count; ++i) {
    node_of(to[i])->dependencies.emplace_back(node_of(from[i]), false);
  }
  return cudaSuccess;
}

SIMULATED_API int cuGraphRemoveDependencies_v2(void*, void* const* from, void* const* to,
                                               const EdgeData* edges, size_t count) {
  const Lock lock(mutex());
  for (size_t i = 0; i < count; ++i) {
    auto& dependencies = node_of(to[i])->dependencies;
    const std::pair<Node*, bool> edge(node_of(from[i]), edges[i].type != 0);
    const auto found = std::find(dependencies.begin(), dependencies.end(), edge);
    if (found == dependencies.end()) return cudaErrorInvalidValue;
    dependencies.erase(found);
  }
  return cudaSuccess;
}

SIMULATED_API int cuGraphGetEdges_v2(void* graph, void** from, void** to, EdgeData* edges,
                                     size_t* count) {
  const Lock lock(mutex());
  size_t number = 0;
  for (const auto& node : graph_of(graph)->nodes) {
    for (const auto& [before, programmatic] : node->dependencies) {
      if (from != nullptr && number < *count) {
        from[number] = before;
        to[number] = node.get();
        edges[number] = edge_data(programmatic);
      }
      ++number;
    }
  }
  *count = number;
  return cudaSuccess;
}

SIMULATED_API int cuUserObjectCreate(void** object, void* data, void (*destroy)(void*),
                                     unsigned num_references, unsigned) {
  *object = new UserObject{destroy, data, static_cast<int>(num_references)};
  return cudaSuccess;
}

SIMULATED_API int cuGraphRetainUserObject(void* graph, void* object, unsigned num_references,
                                          unsigned flags) {
  constexpr unsigned kMove = 1;  // CU_GRAPH_USER_OBJECT_MOVE
  const Lock lock(mutex());
  auto* const retained = static_cast<UserObject*>(object);
  graph_of(graph)->objects.push_back(retained);
  if ((flags & kMove) == 0) retained->references += static_cast<int>(num_references);
  return cudaSuccess;
}

SIMULATED_API int cuUserObjectRelease(void* object, unsigned num_references) {
  const Lock lock(mutex());
  release(static_cast<UserObject*>(object), static_cast<int>(num_references));
  return cudaSuccess;
}
