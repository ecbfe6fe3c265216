// libnccl for simulated GPUs: the stand-in of the CPU tests (../csrc/fake_nccl.cpp), which knows
// neither streams nor memory that peers reach. Here its calls run in the order of a stream or are
// captured, and windows have addresses of the other processes' memory, laid out as in NCCL 2.28.

#include <dlfcn.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <chrono>
#include <condition_variable>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <map>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#define NCCL_API extern "C" __attribute__((visibility("default")))

extern "C" {
int simulated_enqueue(void* stream, void (*work)(void*), void* data, int programmatic);
int simulated_is_capturing(void* stream);
int simulated_take_bytes(size_t num_bytes);
void simulated_give_back_bytes(size_t num_bytes);
void simulated_note_nccl_memory(void* memory, size_t size, int file);
void simulated_forget_nccl_memory(void* memory);
void* simulated_nccl_address(const void* pointer);
int cuStreamGetCaptureInfo_v2(void* stream, int* status, uint64_t* id, void** graph,
                              void* const** dependencies, size_t* num_dependencies);
int cuUserObjectCreate(void** object, void* data, void (*destroy)(void*), unsigned num_references,
                       unsigned flags);
int cuGraphRetainUserObject(void* graph, void* object, unsigned num_references, unsigned flags);
}

namespace {

using Result = int;
constexpr Result kSuccess = 0, kUnhandledCudaError = 1, kSystemError = 2, kInvalidArgument = 4,
                 kInvalidUsage = 5;
constexpr int kUint8 = 1;
constexpr size_t kGranularity = size_t{2} << 20;
constexpr uint64_t kStrideUnit = uint64_t{1} << 32;
constexpr std::chrono::seconds kMostWait{60};
void* const kGarbage = reinterpret_cast<void*>(0xdeadbeef000);

struct UniqueId {
  char internal[128];
};

// The stand-in's function of a name.
template <typename Function>
Function found(const char* name) {
  static void* const library = dlopen(std::getenv("SIMULATED_GPU_FAKE_NCCL"), RTLD_NOW);
  void* const function = library == nullptr ? nullptr : dlsym(library, name);
  if (function == nullptr) {
    std::fprintf(stderr, "simulated NCCL: %s\n", dlerror());
    std::abort();
  }
  return reinterpret_cast<Function>(function);
}

template <typename... Arguments>
Result stand_in(const char* name, Arguments... arguments) {
  return found<Result (*)(Arguments...)>(name)(arguments...);
}

struct Comm {
  int num_ranks;
  int rank;
  int num_pending = 0;   // calls that streams have yet to make
  int num_captured = 0;  // calls in graphs that live
  Result error = kSuccess;
};

struct Memory {
  size_t size;
  int file;
};

// What a window's handle points to. The first members are those of ncclWindow_vidmem.
struct Window {
  void* host;
  uint64_t first_base;  // of the first rank within reach
  int rank_within_reach;
  int rank;
  uint32_t stride;  // from one rank's to the next's, in units of 4 GiB
  void* handle;     // the stand-in's
  size_t mapped_bytes;
};

// Never destroyed: threads of streams outlive main().
std::mutex& mutex = *new std::mutex;
std::condition_variable& changed = *new std::condition_variable;
auto& comms = *new std::map<void*, Comm>;  // live ones
auto& memories = *new std::map<uintptr_t, Memory>;
bool out_of_memory = false;

struct Call {
  std::function<Result()> make;
  void* stream;
  void* comm;
  bool symmetric;  // whether NCCL would use a symmetric kernel
};

thread_local int group_depth = 0;
thread_local std::vector<Call> group;

bool is_symmetric(const void* pointer) {
  const std::lock_guard<std::mutex> lock(mutex);
  const auto address = reinterpret_cast<uintptr_t>(simulated_nccl_address(pointer));
  auto after = memories.upper_bound(address);
  if (after == memories.begin()) return false;
  --after;
  return address < after->first + after->second.size;
}

Result made(const std::vector<Call>& calls) {
  Result result = kSuccess;
  const auto keep = [&](Result next) { result = result == kSuccess ? next : result; };
  if (calls.size() > 1) keep(stand_in("ncclGroupStart"));
  for (const Call& call : calls) keep(call.make());
  if (calls.size() > 1) keep(stand_in("ncclGroupEnd"));
  return result;
}

// A communicator lives as long as the graphs that captured its calls.
void hold_by_graph(void* stream, void* comm) {
  int status = 0;
  void* graph = nullptr;
  void* object = nullptr;
  cuStreamGetCaptureInfo_v2(stream, &status, nullptr, &graph, nullptr, nullptr);
  const auto released = [](void* held) {
    const std::lock_guard<std::mutex> lock(mutex);
    const auto live = comms.find(held);
    if (live != comms.end()) --live->second.num_captured;
    changed.notify_all();
  };
  {
    const std::lock_guard<std::mutex> lock(mutex);
    ++comms.at(comm).num_captured;
  }
  constexpr unsigned kMove = 1;
  cuUserObjectCreate(&object, comm, released, 1, 0);
  cuGraphRetainUserObject(graph, object, 1, kMove);
}

// One piece of work for the stream of the first of them.
Result enqueue(std::vector<Call> calls) {
  if (calls.empty()) return kSuccess;
  void* const stream = calls.front().stream;
  const bool captured = simulated_is_capturing(stream) != 0;
  bool symmetric = true;
  {
    const std::lock_guard<std::mutex> lock(mutex);
    for (const Call& call : calls) {
      const auto comm = comms.find(call.comm);
      if (comm == comms.end()) return kInvalidArgument;
      comm->second.num_pending += !captured;
      symmetric &= call.symmetric;
    }
  }
  if (captured) {
    for (const Call& call : calls) hold_by_graph(stream, call.comm);
  }
  auto* const work = new std::function<void()>([calls = std::move(calls), captured] {
    bool live = true;
    {
      const std::lock_guard<std::mutex> lock(mutex);
      for (const Call& call : calls) live &= comms.count(call.comm) > 0;
    }
    const Result result = live ? made(calls) : kSuccess;
    const std::lock_guard<std::mutex> lock(mutex);
    for (const Call& call : calls) {
      const auto comm = comms.find(call.comm);
      if (comm == comms.end()) continue;
      comm->second.num_pending -= !captured;
      if (result != kSuccess) comm->second.error = result;
    }
    changed.notify_all();
  });
  const auto run = [](void* data) { (*static_cast<std::function<void()>*>(data))(); };
  return simulated_enqueue(stream, run, work, symmetric) == 0 ? kSuccess : kUnhandledCudaError;
}

Result submit(Call call) {
  if (group_depth == 0) return enqueue({std::move(call)});
  group.push_back(std::move(call));
  return kSuccess;
}

// Until streams have made all calls that they were given.
void wait_for_calls(void* comm) {
  std::unique_lock<std::mutex> lock(mutex);
  changed.wait_for(lock, kMostWait, [comm] {
    const auto live = comms.find(comm);
    return live == comms.end() || live->second.num_pending == 0;
  });
}

// As long as NCCL waits: for good. What NCCL does after that while the interpreter shuts down ends
// the process now and then; here it always does.
void wait_for_graphs(void* comm) {
  std::unique_lock<std::mutex> lock(mutex);
  const auto is_free = [comm] {
    const auto live = comms.find(comm);
    return live == comms.end() || live->second.num_captured == 0;
  };
  if (is_free()) return;
  changed.wait(lock, is_free);
  for (const char* name : {"Py_IsFinalizing", "_Py_IsFinalizing"}) {
    const auto function = reinterpret_cast<int (*)()>(dlsym(RTLD_DEFAULT, name));
    if (function != nullptr && function()) std::raise(SIGSEGV);
  }
}

// Where a rank's memory is found by the others.
struct Place {
  long host;
  long process;
  long file;
  uint64_t size;
};

Place place_of(const void* memory) {
  const char* const host = std::getenv("NCCL_HOSTID");
  const long host_number = host == nullptr ? 0 : static_cast<long>(std::hash<std::string>()(host));
  const std::lock_guard<std::mutex> lock(mutex);
  const Memory& own = memories.at(reinterpret_cast<uintptr_t>(memory));
  return {host_number, getpid(), own.file, own.size};
}

// Maps the memory of all ranks of this host, one after another.
bool map_peers(const std::vector<Place>& places, int rank, Window* window) {
  const Place& own = places[static_cast<size_t>(rank)];
  const uint64_t stride = (own.size + kStrideUnit - 1) / kStrideUnit * kStrideUnit;
  window->mapped_bytes = stride * places.size();
  void* const space = mmap(nullptr, window->mapped_bytes, PROT_NONE,
                           MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (space == MAP_FAILED) return false;
  uint64_t offset = 0;
  for (size_t peer = 0; peer < places.size(); ++peer) {
    const Place& place = places[peer];
    if (place.host != own.host) continue;
    if (static_cast<int>(peer) < rank) ++window->rank_within_reach;
    const std::string path = "/proc/" + std::to_string(place.process) + "/fd/" +
                             std::to_string(place.file);
    const int file = open(path.c_str(), O_RDWR);
    if (file < 0) return false;
    void* const mapped = mmap(static_cast<char*>(space) + offset, place.size,
                              PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, file, 0);
    close(file);
    if (mapped == MAP_FAILED) return false;
    offset += stride;
  }
  window->host = window;
  window->first_base = reinterpret_cast<uint64_t>(space);
  window->rank = rank;
  window->stride = static_cast<uint32_t>(stride / kStrideUnit);
  return true;
}

template <typename T>
Result gather(void* comm, const T& own, std::vector<T>* all) {
  const void* const send = &own;
  void* const receive = all->data();
  void* const no_stream = nullptr;
  return stand_in("ncclAllGather", send, receive, sizeof own, kUint8, comm, no_stream);
}

}  // namespace

// ---- Passed on as they are.

NCCL_API Result ncclGetVersion(int* version) { return stand_in("ncclGetVersion", version); }

NCCL_API Result ncclGetUniqueId(UniqueId* id) { return stand_in("ncclGetUniqueId", id); }

NCCL_API Result ncclCommFinalize(void* comm) { return stand_in("ncclCommFinalize", comm); }

NCCL_API Result ncclCommCount(void* comm, int* count) {
  return stand_in("ncclCommCount", comm, count);
}

NCCL_API Result ncclCommUserRank(void* comm, int* rank) {
  return stand_in("ncclCommUserRank", comm, rank);
}

NCCL_API Result ncclCommSuspend(void* comm, int flags) {
  return stand_in("ncclCommSuspend", comm, flags);
}

NCCL_API Result ncclCommResume(void* comm) { return stand_in("ncclCommResume", comm); }

NCCL_API Result ncclCommMemStats(void* comm, int stat, uint64_t* value) {
  return stand_in("ncclCommMemStats", comm, stat, value);
}

NCCL_API const char* ncclGetErrorString(Result result) {
  return found<const char* (*)(Result)>("ncclGetErrorString")(result);
}

NCCL_API const char* ncclGetLastError(void* comm) {
  if (std::exchange(out_of_memory, false)) return "Cuda failure 2 'out of memory'";
  return found<const char* (*)(void*)>("ncclGetLastError")(comm);
}

// ---- Communicators.

NCCL_API Result ncclCommInitRank(void** comm, int num_ranks, UniqueId id, int rank) {
  const Result result = stand_in("ncclCommInitRank", comm, num_ranks, id, rank);
  const std::lock_guard<std::mutex> lock(mutex);
  if (result == kSuccess) comms[*comm] = Comm{num_ranks, rank};
  return result;
}

NCCL_API Result ncclCommInitRankConfig(void** comm, int num_ranks, UniqueId id, int rank, void*) {
  return ncclCommInitRank(comm, num_ranks, id, rank);
}

NCCL_API Result ncclCommDestroy(void* comm) {
  wait_for_calls(comm);
  wait_for_graphs(comm);
  {
    const std::lock_guard<std::mutex> lock(mutex);
    comms.erase(comm);
  }
  return stand_in("ncclCommDestroy", comm);
}

NCCL_API Result ncclCommAbort(void* comm) {
  {
    const std::lock_guard<std::mutex> lock(mutex);
    comms.erase(comm);
  }
  return stand_in("ncclCommAbort", comm);
}

NCCL_API Result ncclCommGetAsyncError(void* comm, Result* error) {
  const Result result = stand_in("ncclCommGetAsyncError", comm, error);
  const std::lock_guard<std::mutex> lock(mutex);
  const auto live = comms.find(comm);
  if (*error == kSuccess && live != comms.end()) *error = live->second.error;
  return result;
}

// ---- Collectives.

NCCL_API Result ncclGroupStart() {
  ++group_depth;
  return kSuccess;
}

NCCL_API Result ncclGroupEnd() {
  if (group_depth == 0) return kInvalidUsage;
  if (--group_depth > 0) return kSuccess;
  return enqueue(std::exchange(group, {}));
}

NCCL_API Result ncclAllReduce(const void* send, void* receive, size_t count, int type, int op,
                              void* comm, void* stream) {
  const auto make = [=] {
    return stand_in("ncclAllReduce", send, receive, count, type, op, comm, stream);
  };
  return submit({make, stream, comm, is_symmetric(send) && is_symmetric(receive)});
}

NCCL_API Result ncclAllGather(const void* send, void* receive, size_t count, int type, void* comm,
                              void* stream) {
  const auto make = [=] {
    return stand_in("ncclAllGather", send, receive, count, type, comm, stream);
  };
  return submit({make, stream, comm, is_symmetric(send) && is_symmetric(receive)});
}

NCCL_API Result ncclReduceScatter(const void* send, void* receive, size_t count, int type, int op,
                                  void* comm, void* stream) {
  const auto make = [=] {
    return stand_in("ncclReduceScatter", send, receive, count, type, op, comm, stream);
  };
  return submit({make, stream, comm, is_symmetric(send) && is_symmetric(receive)});
}

NCCL_API Result ncclBroadcast(const void* send, void* receive, size_t count, int type, int root,
                              void* comm, void* stream) {
  const auto make = [=] {
    return stand_in("ncclBroadcast", send, receive, count, type, root, comm, stream);
  };
  return submit({make, stream, comm, false});
}

NCCL_API Result ncclReduce(const void* send, void* receive, size_t count, int type, int op,
                           int root, void* comm, void* stream) {
  const auto make = [=] {
    return stand_in("ncclReduce", send, receive, count, type, op, root, comm, stream);
  };
  return submit({make, stream, comm, false});
}

NCCL_API Result ncclSend(const void* send, size_t count, int type, int peer, void* comm,
                         void* stream) {
  const auto make = [=] { return stand_in("ncclSend", send, count, type, peer, comm, stream); };
  return submit({make, stream, comm, false});
}

NCCL_API Result ncclRecv(void* receive, size_t count, int type, int peer, void* comm,
                         void* stream) {
  const auto make = [=] { return stand_in("ncclRecv", receive, count, type, peer, comm, stream); };
  return submit({make, stream, comm, false});
}

// ---- Memory and windows.

NCCL_API Result ncclMemAlloc(void** memory, size_t num_bytes) {
  *memory = kGarbage;  // as NCCL leaves it after a failure
  const size_t size = (num_bytes + kGranularity - 1) / kGranularity * kGranularity;
  if (simulated_take_bytes(size) == 0) {
    out_of_memory = true;
    return kUnhandledCudaError;
  }
  const int file = memfd_create("simulated NCCL memory", 0);
  Result result = file >= 0 && ftruncate(file, static_cast<off_t>(size)) == 0
                      ? stand_in("ncclMemAlloc", memory, num_bytes)
                      : kSystemError;
  if (result == kSuccess && mmap(*memory, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED,
                                 file, 0) == MAP_FAILED) {
    result = kSystemError;
  }
  if (result != kSuccess) {
    close(file);
    simulated_give_back_bytes(size);
    return result;
  }
  const std::lock_guard<std::mutex> lock(mutex);
  memories[reinterpret_cast<uintptr_t>(*memory)] = {size, file};
  simulated_note_nccl_memory(*memory, size, file);
  return kSuccess;
}

NCCL_API Result ncclMemFree(void* memory) {
  const Result result = stand_in("ncclMemFree", memory);
  if (result != kSuccess) return result;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto freed = memories.find(reinterpret_cast<uintptr_t>(memory));
  if (freed == memories.end()) return kSuccess;
  simulated_forget_nccl_memory(memory);
  close(freed->second.file);
  simulated_give_back_bytes(freed->second.size);
  memories.erase(freed);
  return kSuccess;
}

NCCL_API Result ncclCommWindowRegister(void* comm, void* memory, size_t num_bytes, void** handle,
                                       int flags) {
  // NCCL registers over a channel of its own, the stand-in over that of the collectives.
  wait_for_calls(comm);
  memory = simulated_nccl_address(memory);
  const Result result =
      stand_in("ncclCommWindowRegister", comm, memory, num_bytes, handle, flags);
  if (result != kSuccess || *handle == nullptr) return result;
  int num_ranks = 0, rank = 0;
  {
    const std::lock_guard<std::mutex> lock(mutex);
    num_ranks = comms.at(comm).num_ranks;
    rank = comms.at(comm).rank;
  }
  auto* const window = new Window{};
  window->handle = *handle;
  std::vector<Place> places(static_cast<size_t>(num_ranks));
  std::vector<int> mapped(static_cast<size_t>(num_ranks));
  Result gathered = gather(comm, place_of(memory), &places);
  const int is_mapped = gathered == kSuccess && map_peers(places, rank, window);
  if (gathered == kSuccess) gathered = gather(comm, is_mapped, &mapped);  // nobody frees before
  *handle = window;
  return is_mapped ? gathered : kSystemError;
}

NCCL_API Result ncclCommWindowDeregister(void* comm, void* handle) {
  auto* const window = static_cast<Window*>(handle);
  const Result result = stand_in("ncclCommWindowDeregister", comm, window->handle);
  if (result != kSuccess) return result;
  munmap(reinterpret_cast<void*>(window->first_base), window->mapped_bytes);
  delete window;
  return kSuccess;
}

// ---- What torch's library wants to find, and these tests never call.

#define NEVER_CALLED(function) \
  NCCL_API Result function() { return kInvalidUsage; }
NEVER_CALLED(ncclAlltoAll)
NEVER_CALLED(ncclBcast)
NEVER_CALLED(ncclCommDeregister)
NEVER_CALLED(ncclCommInitAll)
NEVER_CALLED(ncclCommInitRankScalable)
NEVER_CALLED(ncclCommRegister)
NEVER_CALLED(ncclCommShrink)
NEVER_CALLED(ncclCommSplit)
NEVER_CALLED(ncclDevCommCreate)
NEVER_CALLED(ncclDevCommDestroy)
NEVER_CALLED(ncclGroupSimulateEnd)
NEVER_CALLED(ncclRedOpCreatePreMulSum)
NEVER_CALLED(ncclRedOpDestroy)
