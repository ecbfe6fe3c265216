// A stand-in for libnccl on machines without a GPU. It has NCCL's C ABI, but "device" buffers are
// host memory, streams are ignored and every call is synchronous. Ranks (processes, or threads of
// one process) exchange real bytes through POSIX shared memory.
//
// It is stricter than NCCL: each message carries its call, data type, operation, root and count,
// so ranks that disagree get an error where NCCL would hang or mix up data. Likewise it refuses
// what NCCL lets pass but a careful caller never does: the same memory registered twice, memory
// freed under a window.
//
// Environment, read at every call; rules are separated by commas:
//   FAKE_NCCL_FAIL=ncclAllReduce:rank=1:code=6:nth=3   that call returns `code` (default 2) and
//       does nothing else. Without `rank`: on every rank. With `nth`: only this process's nth call
//       of the function, counted as fake_nccl_calls() counts. For a function that takes no
//       communicator, `rank` is the rank in this process's latest communicator.
//   FAKE_NCCL_HANG=ncclCommInitRank:rank=1             that call waits for the whole timeout (or
//       until its communicator is aborted), then returns ncclRemoteError.
//   FAKE_NCCL_TIMEOUT_S=20                             bounds each wait for a peer.
//   FAKE_NCCL_VERSION=22809                            the version to report.
//   FAKE_NCCL_MEMORY_BYTES=67108864                    how much ncclMemAlloc gives to this process
//       in all, counted as fake_nccl_live_bytes() counts.
//   FAKE_NCCL_MEMORY_DESCENDS=1                        each allocation of this process lies below
//       the one before, and not above it.
//   FAKE_NCCL_NULL_WINDOW=ncclCommWindowRegister:rank=1  that call succeeds with a NULL window, as
//       NCCL from 2.29.2 on does where windows are not supported. Rules as above.

#include <fcntl.h>
#include <sched.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <exception>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <random>
#include <set>
#include <sstream>
#include <string>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

#define NCCL_EXPORT extern "C" __attribute__((visibility("default")))

enum ncclResult_t : int {
  ncclSuccess,
  ncclUnhandledCudaError,
  ncclSystemError,
  ncclInternalError,
  ncclInvalidArgument,
  ncclInvalidUsage,
  ncclRemoteError,
  ncclInProgress,
};

struct ncclUniqueId {
  char internal[128];
};

struct ncclComm;
using ncclComm_t = ncclComm*;
struct ncclWindow;
using ncclWindow_t = ncclWindow*;

namespace {

// Data types and operations travel as int, because callers under test may pass invalid ones.
enum DataType : int {
  kInt8, kUint8, kInt32, kUint32, kInt64, kUint64,
  kFloat16, kFloat32, kFloat64, kBfloat16, kFloat8e4m3, kFloat8e5m2, kNumDataTypes
};
constexpr size_t kElementBytes[kNumDataTypes] = {1, 1, 4, 4, 8, 8, 2, 4, 8, 2, 1, 1};
enum ReduceOp : int { kSum, kProd, kMax, kMin, kAvg, kNumReduceOps };
constexpr int kNone = -1;  // no reduction, no root or no rank

constexpr int kMaxRanks = 16;
constexpr size_t kRingBytes = 16 * 1024;
constexpr uint64_t kSuspendableBytes = 12345;  // what every communicator says it has

using CommPtr = std::shared_ptr<ncclComm>;

std::mutex g_mutex;  // guards the next five
char g_last_error[1024] = "";
std::map<std::string, long> g_num_calls;
std::map<ncclComm_t, CommPtr> g_live;
std::map<const char*, size_t> g_allocations;  // of ncclMemAlloc: start and size
std::set<ncclWindow_t> g_windows;
std::atomic<int> g_latest_rank{kNone};

// ---- Errors and waits. Internal code throws Failure; entry() makes a result code of it.

struct Failure {
  ncclResult_t code;
  std::string text;
};

template <typename... Parts>
[[noreturn]] void fail(ncclResult_t code, const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw Failure{code, text.str()};
}

class BoundedWait {
 public:
  void restart() { *this = BoundedWait(); }
  bool expired() const { return Clock::now() > end_; }
  void pause() {
    if (++num_pauses_ < 100) {
      sched_yield();
    } else {
      std::this_thread::sleep_for(std::chrono::microseconds(50));
    }
  }

 private:
  using Clock = std::chrono::steady_clock;
  static std::chrono::milliseconds limit() {
    const char* seconds = std::getenv("FAKE_NCCL_TIMEOUT_S");
    return std::chrono::milliseconds(seconds ? std::lround(1000 * std::atof(seconds)) : 20000);
  }
  Clock::time_point end_ = Clock::now() + limit();
  int num_pauses_ = 0;
};

// ---- Shared memory.

// Bounded mailbox of one ordered pair of ranks: one writer, one reader.
class Ring {
 public:
  size_t movable_bytes(bool writing) const {
    const size_t filled = written_.load() - read_.load();
    return writing ? kRingBytes - filled : filled;
  }
  // Moves at most `size` bytes and returns how many.
  size_t move(bool writing, char* data, size_t size) {
    size = std::min(size, movable_bytes(writing));
    std::atomic<uint64_t>& position = writing ? written_ : read_;
    for (size_t done = 0, part = 0; done < size; done += part) {
      const size_t at = (position.load() + done) % kRingBytes;
      part = std::min(size - done, kRingBytes - at);
      std::memcpy(writing ? data_ + at : data + done, writing ? data + done : data_ + at, part);
    }
    position += size;
    return size;
  }

 private:
  alignas(64) std::atomic<uint64_t> written_;  // bytes since the start
  alignas(64) std::atomic<uint64_t> read_;
  alignas(64) char data_[kRingBytes];
};
static_assert(std::atomic<uint64_t>::is_always_lock_free, "shared between processes");

struct Segment {  // fresh shared memory is zero, the start state of every member
  std::atomic<int> world_size;
  std::atomic<uint32_t> attached;    // a bit per rank
  std::atomic<uint32_t> departed;    // a bit per rank: destroyed, aborted or failed
  Ring rings[kMaxRanks][kMaxRanks];  // [from][to]
};
struct Unmap {
  void operator()(Segment* segment) const { munmap(segment, sizeof(Segment)); }
};
using SegmentPtr = std::unique_ptr<Segment, Unmap>;

SegmentPtr map_segment(const std::string& name) {
  // One size for every world: it does not matter which rank comes first, and untouched pages take
  // no memory.
  const int file = shm_open(name.c_str(), O_CREAT | O_RDWR, 0600);
  void* memory = MAP_FAILED;
  if (file >= 0 && ftruncate(file, sizeof(Segment)) == 0) {
    memory = mmap(nullptr, sizeof(Segment), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  }
  const int error = errno;
  if (file >= 0) close(file);
  if (memory != MAP_FAILED) return SegmentPtr(static_cast<Segment*>(memory));
  shm_unlink(name.c_str());
  fail(ncclSystemError, "shared memory ", name, ": ", std::strerror(error));
}

// All 128 bytes count and the first are zero, as a real id's may be: a caller that copies an id as
// a C string, or cuts it short, fails the check in the last word.
using UniqueIdWords = uint64_t[16];

uint64_t unique_id_check(const UniqueIdWords& words) {
  uint64_t hash = 0xcbf29ce484222325u;
  for (int i = 0; i < 15; ++i) hash = ((hash ^ words[i]) * 0x100000001b3u) ^ (hash >> 29);
  return hash;
}

std::string segment_name(const ncclUniqueId& id) {
  UniqueIdWords words;
  std::memcpy(words, &id, sizeof(words));
  if (words[15] != unique_id_check(words)) {
    fail(ncclInvalidArgument, "ncclCommInitRank: the unique id did not arrive unchanged");
  }
  return "/fake_nccl_" + std::to_string(words[15]);
}

}  // namespace

// ---- Communicator.

struct ncclComm {
  // Collective: returns once all ranks are attached.
  ncclComm(const std::string& name, int world_size, int rank)
      : world_size(world_size), rank(rank), segment(map_segment(name)) {
    int agreed = 0;
    if (!segment->world_size.compare_exchange_strong(agreed, world_size) && agreed != world_size) {
      fail(ncclInvalidArgument, "ncclCommInitRank: rank ", rank, " passes ", world_size,
           " ranks, another rank passes ", agreed);
    }
    const uint32_t everyone = (1u << world_size) - 1;
    const uint32_t before = segment->attached.fetch_or(1u << rank);
    if (before & (1u << rank)) {
      fail(ncclInvalidUsage, "ncclCommInitRank: rank ", rank, " of ", world_size, " is taken");
    }
    BoundedWait wait;
    while (segment->attached != everyone && !wait.expired()) wait.pause();
    shm_unlink(name.c_str());
    if (segment->attached != everyone) {
      leave();
      fail(ncclRemoteError, "ncclCommInitRank: rank ", rank, " of ", world_size,
           ": not all ranks came within the timeout");
    }
  }

  void leave() { segment->departed |= 1u << rank; }

  void require_usable(const char* function) const {
    if (aborted) fail(ncclInternalError, function, ": rank ", rank, " was aborted");
    if (finalized) fail(ncclInvalidUsage, function, ": rank ", rank, " was finalized");
    if (async_error != ncclSuccess) {
      fail(async_error, function, ": rank ", rank, " failed in an earlier call");
    }
    if (suspended) fail(ncclInvalidUsage, function, ": rank ", rank, " is suspended");
  }

  const int world_size;
  const int rank;
  const SegmentPtr segment;
  std::atomic<ncclResult_t> async_error{ncclSuccess};
  std::atomic<bool> finalized{false};
  std::atomic<bool> suspended{false};
  std::atomic<bool> aborted{false};
};

namespace {

// ---- Failure injection.

// The code of the first rule in the environment variable that matches this call.
std::optional<ncclResult_t> matching_rule(const char* variable, const char* function, int rank,
                                          int nth) {
  const char* value = std::getenv(variable);
  std::istringstream rules(value ? value : "");
  for (std::string rule; std::getline(rules, rule, ',');) {
    std::istringstream fields(rule);
    std::string name, field;
    std::getline(fields, name, ':');
    std::map<std::string, int> wanted = {{"rank", rank}, {"nth", nth}, {"code", ncclSystemError}};
    while (std::getline(fields, field, ':')) {
      const size_t equals = field.find('=');
      const auto entry = wanted.find(field.substr(0, equals));
      if (equals == std::string::npos || entry == wanted.end()) {
        fail(ncclInternalError, variable, ": '", rule, "' is not function:rank=N:code=N:nth=N");
      }
      entry->second = std::atoi(field.c_str() + equals + 1);
    }
    if (name == function && wanted["rank"] == rank && wanted["nth"] == nth) {
      return static_cast<ncclResult_t>(wanted["code"]);
    }
  }
  return std::nullopt;
}

void inject_failure(const char* function, int rank, const CommPtr& comm, int nth) {
  if (matching_rule("FAKE_NCCL_HANG", function, rank, nth)) {
    BoundedWait wait;
    while (!wait.expired() && !(comm && comm->aborted)) wait.pause();
    fail(ncclRemoteError, function, ": rank ", rank, " hung because of FAKE_NCCL_HANG");
  }
  if (const auto code = matching_rule("FAKE_NCCL_FAIL", function, rank, nth)) {
    fail(*code, function, ": rank ", rank, " failed because of FAKE_NCCL_FAIL");
  }
}

// ---- Messages, on which everything else is built.

enum Kind : int {
  kAllReduce, kAllGather, kReduceScatter, kBroadcast, kReduce, kSend, kRecv, kWindowRegister
};
constexpr const char* kFunctions[] = {"ncclAllReduce", "ncclAllGather", "ncclReduceScatter",
                                      "ncclBroadcast", "ncclReduce",    "ncclSend",
                                      "ncclRecv",      "ncclCommWindowRegister"};

struct Op {
  Kind kind;
  CommPtr comm;
  const void* send;
  void* recv;
  size_t count;
  int data_type;
  int reduce_op;
  int peer;  // the root, except in send and recv

  const char* function() const { return kFunctions[kind]; }
  bool is_p2p() const { return kind == kSend || kind == kRecv; }
  bool is_reduction() const {
    return kind == kAllReduce || kind == kReduceScatter || kind == kReduce;
  }
  bool is_root() const { return peer == comm->rank; }
  size_t num_bytes() const { return count * kElementBytes[data_type]; }
};

// Precedes every message; sender and receiver must have the same.
struct Header {
  explicit Header(const Op& op)
      : kind(op.is_p2p() ? kSend : op.kind), data_type(op.data_type), reduce_op(op.reduce_op),
        root(op.is_p2p() ? kNone : op.peer), count(op.count) {}

  std::string text() const {
    std::ostringstream text;
    text << (kind == kSend ? "send/recv" : kFunctions[kind]) << "(count " << count
         << ", data type " << data_type << ", op " << reduce_op << ", root " << root << ")";
    return text.str();
  }

  int kind, data_type, reduce_op, root;
  uint64_t count;
};
static_assert(std::has_unique_object_representations_v<Header>, "compared with memcmp");

// Messages that progress together, so that a send never keeps a receive from progressing.
class Exchange {
 public:
  void send(const Op& op, int peer, const void* data) {
    add(op, peer, true, static_cast<char*>(const_cast<void*>(data)));
  }
  void recv(const Op& op, int peer, void* data) { add(op, peer, false, static_cast<char*>(data)); }

  void run() {
    BoundedWait wait;
    while (!queues_.empty()) {
      bool moved = false;
      for (auto entry = queues_.begin(); entry != queues_.end();) {
        std::deque<Message>& queue = entry->second;
        moved |= progress(queue.front(), wait);
        if (queue.front().finished()) queue.pop_front();
        entry = queue.empty() ? queues_.erase(entry) : std::next(entry);
      }
      if (moved) {
        wait.restart();
      } else {
        wait.pause();
      }
    }
  }

 private:
  struct Message {
    bool finished() const { return header_done && num_bytes_left == 0; }

    const char* function;
    ncclComm& comm;
    Ring& ring;
    int peer;
    bool sending;
    Header header;
    char* data;
    size_t num_bytes_left;
    bool header_done;
  };

  void add(const Op& op, int peer, bool sending, char* data) {
    const int rank = op.comm->rank;
    auto& rings = op.comm->segment->rings;
    Ring& ring = sending ? rings[rank][peer] : rings[peer][rank];
    queues_[{&ring, sending}].push_back({op.function(), *op.comm, ring, peer, sending, Header(op),
                                         data, op.num_bytes(), false});
  }

  // True if anything moved.
  static bool progress(Message& message, const BoundedWait& wait) {
    ncclComm& comm = message.comm;
    // Asked before the ring, because what a peer sent before it left still counts.
    const bool peer_left = message.peer != comm.rank &&
                           (comm.segment->departed & (1u << message.peer)) != 0;
    const bool moved_header = !message.header_done && move_header(message);
    size_t num_moved = 0;
    if (message.header_done) {
      num_moved = message.ring.move(message.sending, message.data, message.num_bytes_left);
      message.data += num_moved;
      message.num_bytes_left -= num_moved;
    }
    if (moved_header || num_moved > 0) return true;
    comm.require_usable(message.function);
    if (peer_left || wait.expired()) {
      fail(ncclRemoteError, message.function, ": rank ", comm.rank, " of ", comm.world_size,
           message.sending ? " sends to" : " receives from", " rank ", message.peer,
           peer_left ? ", which has left" : ": no progress within the timeout");
    }
    return false;
  }

  static bool move_header(Message& message) {
    if (message.ring.movable_bytes(message.sending) < sizeof(Header)) return false;
    Header header = message.header;
    message.ring.move(message.sending, reinterpret_cast<char*>(&header), sizeof(Header));
    if (std::memcmp(&header, &message.header, sizeof(Header)) != 0) {
      fail(ncclInvalidUsage, message.function, ": rank ", message.comm.rank, " calls ",
           message.header.text(), " but rank ", message.peer, " calls ", header.text());
    }
    return message.header_done = true;
  }

  // A queue for each direction between two ranks of a communicator: there, order is kept.
  std::map<std::pair<Ring*, bool>, std::deque<Message>> queues_;
};

// ---- Arithmetic. A codec says how an element is stored and in which type it is combined.

template <typename To, typename From>
To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

template <typename T>
struct Plain {
  using Stored = T;
  static T load(T value) { return value; }
  static T store(T value) { return value; }
};

// Both 16-bit types round to nearest, ties to even.
struct Half {
  using Stored = uint16_t;
  static float load(uint16_t half) {
    const uint32_t exponent = half >> 10 & 31, mantissa = half & 1023;
    const uint32_t float_exponent = exponent == 31 ? 255 : exponent + 112;
    const float size = exponent == 0 ? std::ldexp(static_cast<float>(mantissa), -24)
                                     : bit_cast<float>(float_exponent << 23 | mantissa << 13);
    return half & 0x8000 ? -size : size;
  }
  static uint16_t store(float value) {
    const uint32_t bits = bit_cast<uint32_t>(value) & 0x7fffffff;
    const uint32_t sign = std::signbit(value) ? 0x8000 : 0;
    const float size = std::fabs(value);
    if (std::isnan(value)) return sign | 0x7e00 | (bits >> 13 & 1023);
    if (size >= 65520) return sign | 0x7c00;
    if (size < 0x1p-14f) return sign | static_cast<uint32_t>(std::nearbyint(size * 0x1p24f));
    return sign | (((bits + 0xfff + (bits >> 13 & 1)) >> 13) - (112 << 10));
  }
};

struct Bfloat16 {
  using Stored = uint16_t;
  static float load(uint16_t value) { return bit_cast<float>(uint32_t{value} << 16); }
  static uint16_t store(float value) {
    const uint32_t bits = bit_cast<uint32_t>(value);
    return std::isnan(value) ? bits >> 16 | 0x40 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  }
};

template <typename T>
T combine(int reduce_op, T a, T b) {
  if constexpr (std::is_integral_v<T>) {
    if (reduce_op == kMax) return std::max(a, b);
    if (reduce_op == kMin) return std::min(a, b);
    // Unsigned, so that an overflow wraps as it does on a GPU.
    const auto x = static_cast<uint64_t>(a), y = static_cast<uint64_t>(b);
    return static_cast<T>(reduce_op == kProd ? x * y : x + y);
  } else {
    if (reduce_op == kMax) return std::fmax(a, b);
    if (reduce_op == kMin) return std::fmin(a, b);
    return reduce_op == kProd ? a * b : a + b;
  }
}

// `vectors` holds one of `op.count` elements per rank. They are combined in rank order, so that
// every rank and every run gets the same bits.
template <typename Codec>
void reduce_vectors(const Op& op, const char* vectors) {
  using Stored = typename Codec::Stored;
  using Math = decltype(Codec::load(Stored()));
  const int world_size = op.comm->world_size;
  const auto load = [&](size_t index) {
    // Copied, here and below, because nothing says that the caller's buffers are aligned.
    Stored stored;
    std::memcpy(&stored, vectors + index * sizeof(Stored), sizeof(Stored));
    return Codec::load(stored);
  };
  for (size_t i = 0; i < op.count; ++i) {
    Math result = load(i);
    for (int rank = 1; rank < world_size; ++rank) {
      result = combine<Math>(op.reduce_op, result, load(rank * op.count + i));
    }
    if (op.reduce_op == kAvg) result = static_cast<Math>(result / static_cast<Math>(world_size));
    const Stored stored = Codec::store(result);
    std::memcpy(static_cast<char*>(op.recv) + i * sizeof(Stored), &stored, sizeof(Stored));
  }
}

void reduce_any_type(const Op& op, const char* vectors) {
  switch (op.data_type) {
    case kInt8: return reduce_vectors<Plain<int8_t>>(op, vectors);
    case kUint8: return reduce_vectors<Plain<uint8_t>>(op, vectors);
    case kInt32: return reduce_vectors<Plain<int32_t>>(op, vectors);
    case kUint32: return reduce_vectors<Plain<uint32_t>>(op, vectors);
    case kInt64: return reduce_vectors<Plain<int64_t>>(op, vectors);
    case kUint64: return reduce_vectors<Plain<uint64_t>>(op, vectors);
    case kFloat16: return reduce_vectors<Half>(op, vectors);
    case kFloat32: return reduce_vectors<Plain<float>>(op, vectors);
    case kFloat64: return reduce_vectors<Plain<double>>(op, vectors);
    case kBfloat16: return reduce_vectors<Bfloat16>(op, vectors);
  }
}

// ---- Execution.

// Every collective is one round: pieces go from all ranks (broadcast: from the root) to all ranks
// (reduce: to the root), and each receiver combines or stores what came. In-place calls work,
// because `recv` is written when all of `send` has gone.
void run_collective(const Op& op) {
  if (op.count == 0) return;  // NCCL drops empty collectives too, without meeting the other ranks
  const int world_size = op.comm->world_size;
  const size_t num_bytes = op.num_bytes();
  const bool i_send = op.kind != kBroadcast || op.is_root();
  const bool i_receive = op.kind != kReduce || op.is_root();
  std::vector<char> arrived(i_receive ? num_bytes * world_size : 0);
  Exchange exchange;
  for (int peer = 0; peer < world_size; ++peer) {
    const size_t offset = op.kind == kReduceScatter ? peer * num_bytes : 0;
    if (i_send && (op.kind != kReduce || peer == op.peer)) {
      exchange.send(op, peer, static_cast<const char*>(op.send) + offset);
    }
    if (i_receive && (op.kind != kBroadcast || peer == op.peer)) {
      exchange.recv(op, peer, arrived.data() + peer * num_bytes);
    }
  }
  exchange.run();
  if (!i_receive) return;
  if (op.is_reduction()) return reduce_any_type(op, arrived.data());
  if (op.kind == kAllGather || op.kind == kWindowRegister) {
    std::memcpy(op.recv, arrived.data(), arrived.size());
  }
  if (op.kind == kBroadcast) {
    std::memcpy(op.recv, arrived.data() + op.peer * num_bytes, num_bytes);
  }
}

// A send to oneself needs its receive in the same group, as in NCCL; the ring must not hide that.
void check_self_messages(const std::vector<Op>& ops) {
  std::map<const ncclComm*, int> num_unmatched;
  for (const Op& op : ops) {
    if (op.is_p2p() && op.is_root()) num_unmatched[op.comm.get()] += op.kind == kSend ? 1 : -1;
  }
  for (const auto& [comm, unmatched] : num_unmatched) {
    if (unmatched == 0) continue;
    fail(ncclInvalidUsage, "rank ", comm->rank, " of ", comm->world_size, ": a ",
         unmatched > 0 ? "send to" : "receive from", " itself has no counterpart in the group");
  }
}

void execute(const std::vector<Op>& ops) {
  for (const Op& op : ops) op.comm->require_usable(op.function());
  check_self_messages(ops);
  try {
    // Collectives first, then all sends and receives together: ranks may queue the two in a
    // different order.
    Exchange exchange;
    for (const Op& op : ops) {
      if (op.kind == kSend) {
        exchange.send(op, op.peer, op.send);
      } else if (op.kind == kRecv) {
        exchange.recv(op, op.peer, op.recv);
      } else {
        run_collective(op);
      }
    }
    exchange.run();
  } catch (const Failure& failure) {
    // Half a message may be left in a ring: nothing after it can be right.
    for (const Op& op : ops) {
      op.comm->async_error = failure.code;
      op.comm->leave();
    }
    throw;
  }
}

struct Group {
  int depth = 0;
  std::vector<Op> ops;
  std::optional<Failure> failure;  // the first of a call inside the group
};
thread_local Group t_group;
thread_local int t_nth;  // of the call that this thread is in, for rules

// ---- What the entry points share.

int count_call(const char* function) {
  const std::lock_guard<std::mutex> lock(g_mutex);
  return static_cast<int>(++g_num_calls[function]);
}

// Runs `body` after failure injection. An error inside a group also becomes the group's.
template <typename Body>
ncclResult_t entry(const char* function, int rank, const CommPtr& comm, Body body) {
  Failure failure;
  try {
    t_nth = count_call(function);
    inject_failure(function, rank, comm, t_nth);
    body();
    return ncclSuccess;
  } catch (const Failure& caught) {
    failure = caught;
  } catch (const std::exception& caught) {  // a senseless count, mostly
    failure = {ncclSystemError, std::string(function) + ": " + caught.what()};
  }
  if (t_group.depth > 0 && !t_group.failure) t_group.failure = failure;
  const std::lock_guard<std::mutex> lock(g_mutex);
  std::snprintf(g_last_error, sizeof(g_last_error), "%s", failure.text.c_str());
  return failure.code;
}

template <typename Body>
ncclResult_t entry(const char* function, Body body) {
  return entry(function, g_latest_rank, nullptr, body);
}

// `body` takes the communicator of `handle`, which lives until the body returns.
template <typename Body>
ncclResult_t entry(const char* function, ncclComm_t handle, Body body) {
  CommPtr comm;
  {
    const std::lock_guard<std::mutex> lock(g_mutex);
    const auto found = g_live.find(handle);
    if (found != g_live.end()) comm = found->second;
  }
  return entry(function, comm ? comm->rank : kNone, comm, [&] {
    if (!comm) fail(ncclInvalidArgument, function, ": ", handle, " is not a live communicator");
    body(comm);
  });
}

void validate(const Op& op) {
  const auto require = [&](bool valid, const char* argument, int value) {
    if (valid) return;
    fail(ncclInvalidArgument, op.function(), ": rank ", op.comm->rank, " of ",
         op.comm->world_size, ": invalid ", argument, " ", value);
  };
  require(op.data_type >= 0 && op.data_type < kNumDataTypes, "data type", op.data_type);
  if (op.is_reduction()) {
    require(op.data_type < kFloat8e4m3, "data type for a reduction", op.data_type);
    require(op.reduce_op >= 0 && op.reduce_op < kNumReduceOps, "op", op.reduce_op);
  }
  if (op.is_p2p() || op.kind == kBroadcast || op.kind == kReduce) {
    require(op.peer >= 0 && op.peer < op.comm->world_size, op.is_p2p() ? "peer" : "root", op.peer);
  }
  const bool reads = op.kind != kRecv && (op.kind != kBroadcast || op.is_root());
  const bool writes = op.kind != kSend && (op.kind != kReduce || op.is_root());
  require(op.send != nullptr || !reads || op.count == 0, "sendbuff", 0);
  require(op.recv != nullptr || !writes || op.count == 0, "recvbuff", 0);
}

ncclResult_t submit(Op op, ncclComm_t handle) {
  return entry(op.function(), handle, [&](const CommPtr& comm) {
    op.comm = comm;
    comm->require_usable(op.function());
    validate(op);
    if (t_group.depth > 0) {
      t_group.ops.push_back(op);
    } else {
      execute({op});
    }
  });
}

}  // namespace

// ---- Memory and windows.

// Never deleted, so that no window has the handle of an earlier one.
struct ncclWindow {
  bool overlaps(const char* start, size_t num_bytes) const {
    return start < base + size && base < start + num_bytes;
  }

  const ncclComm_t comm;
  const int rank;
  const int world_size;
  char* const base;
  const size_t size;
};

namespace {

constexpr size_t kPageBytes = 4096;
constexpr size_t kGranuleBytes = 2 << 20;  // ncclMemAlloc rounds up to this and aligns to it

int version() {
  const char* text = std::getenv("FAKE_NCCL_VERSION");
  return text ? std::atoi(text) : 22809;
}

// The caller holds g_mutex.
size_t live_bytes() {
  size_t total = 0;
  for (const auto& [start, size] : g_allocations) total += size;
  return total;
}

// Address space that costs memory only where it is touched; null if there is none. Used once, in
// an order that is the same in all processes. The caller holds g_mutex.
char* map_granules(size_t num_bytes) {
  constexpr uintptr_t kMiddle = uintptr_t{1} << 45;  // far from where Linux puts anything
  static uintptr_t above = kMiddle, below = kMiddle;
  const bool descends = std::getenv("FAKE_NCCL_MEMORY_DESCENDS") != nullptr;
  if (num_bytes > kMiddle / 2) return nullptr;
  const uintptr_t start = descends ? below - num_bytes : above;
  void* const mapped =
      mmap(reinterpret_cast<void*>(start), num_bytes, PROT_READ | PROT_WRITE,
           MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED_NOREPLACE, -1, 0);
  if (mapped == MAP_FAILED) return nullptr;
  (descends ? below : above) = descends ? start : start + num_bytes;
  return static_cast<char*>(mapped);
}

char* allocate(size_t size) {
  if (size == 0) fail(ncclInvalidArgument, "ncclMemAlloc: no bytes are asked for");
  const char* text = std::getenv("FAKE_NCCL_MEMORY_BYTES");
  const size_t address_space = SIZE_MAX / 2;  // so that no sum below overflows
  const size_t limit = text ? std::min<size_t>(std::strtoull(text, nullptr, 10), address_space)
                            : address_space;
  const std::lock_guard<std::mutex> lock(g_mutex);
  const size_t in_use = live_bytes();
  const size_t num_bytes = (size - 1) / kGranuleBytes * kGranuleBytes + kGranuleBytes;
  const bool fits = size <= limit && num_bytes <= limit && in_use <= limit - num_bytes;
  char* const start = fits ? map_granules(num_bytes) : nullptr;
  if (start == nullptr) {
    fail(ncclUnhandledCudaError, "ncclMemAlloc: out of memory: ", size, " bytes with ", in_use,
         " in use");
  }
  g_allocations[start] = num_bytes;
  return start;
}

void release(const char* start) {
  const std::lock_guard<std::mutex> lock(g_mutex);
  const auto found = g_allocations.find(start);
  if (found == g_allocations.end()) {
    fail(ncclInvalidArgument, "ncclMemFree: ", static_cast<const void*>(start),
         " is not the start of live memory of ncclMemAlloc");
  }
  for (const ncclWindow* window : g_windows) {
    if (!window->overlaps(start, found->second)) continue;
    fail(ncclInvalidUsage, "ncclMemFree: a window of rank ", window->rank, " of ",
         window->world_size, " is still on this memory");
  }
  munmap(const_cast<char*>(start), found->second);
  g_allocations.erase(found);
}

// The caller holds g_mutex.
bool is_allocated(const char* start, size_t size) {
  for (const auto& [base, num_bytes] : g_allocations) {
    if (start < base || start >= base + num_bytes) continue;
    return size <= num_bytes - (start - base);
  }
  return false;
}

// A window that is on the list already, so that nothing frees its memory before the other ranks
// come. Checks what NCCL checks without them.
ncclWindow_t new_window(const CommPtr& comm, char* base, size_t size, int flags) {
  const auto refuse = [&](ncclResult_t code, const char* reason) {
    fail(code, "ncclCommWindowRegister: rank ", comm->rank, " of ", comm->world_size, ": ", size,
         " bytes at ", static_cast<void*>(base), ", flags ", flags, ": ", reason);
  };
  if (t_group.depth > 0) refuse(ncclInvalidUsage, "not within a group");
  if (flags != 0 && flags != 1) refuse(ncclInvalidArgument, "invalid flags");
  if (size == 0) refuse(ncclInvalidArgument, "empty");
  if (reinterpret_cast<uintptr_t>(base) % kPageBytes != 0) {
    refuse(ncclInvalidArgument, "not at a multiple of 4096");
  }
  const std::lock_guard<std::mutex> lock(g_mutex);
  if (!is_allocated(base, size)) {
    refuse(ncclInvalidArgument, "not inside live memory of ncclMemAlloc");
  }
  for (const ncclWindow* window : g_windows) {
    if (window->comm == comm.get() && window->overlaps(base, size)) {
      refuse(ncclInvalidUsage, "this communicator has a window there already");
    }
  }
  const auto window = new ncclWindow{comm.get(), comm->rank, comm->world_size, base, size};
  g_windows.insert(window);
  return window;
}

// Returns when all ranks have come. If they disagree it fails on all of them, and the communicator
// remains usable, as it does not after a failed exchange.
void agree_on_window(const CommPtr& comm, size_t size, int flags) {
  const uint64_t mine[] = {size, static_cast<uint64_t>(flags)};
  std::vector<uint64_t> all(2 * comm->world_size);
  const Op op = {kWindowRegister, comm, mine, all.data(), 2, kUint64, kNone, kNone};
  // Twice, so that a rank that comes late does not succeed with what the others sent before they
  // gave up.
  execute({op, op});
  for (int peer = 1; peer < comm->world_size; ++peer) {
    const auto differ = [&](ncclResult_t code, const char* what, int field) {
      fail(code, "ncclCommWindowRegister: rank ", comm->rank, " of ", comm->world_size, ": ", what,
           " differ: ", all[field], " on rank 0, ", all[2 * peer + field], " on rank ", peer);
    };
    if (all[2 * peer + 1] != all[1]) differ(ncclInvalidUsage, "flags", 1);
    if (all[2 * peer] != all[0] && version() < 23007) differ(ncclUnhandledCudaError, "sizes", 0);
  }
}

bool forget_window(ncclWindow_t window) {
  const std::lock_guard<std::mutex> lock(g_mutex);
  return g_windows.erase(window) > 0;
}

// Takes the communicator out of service, with its windows; the last call inside it frees it.
void retire(const CommPtr& comm) {
  comm->leave();
  const std::lock_guard<std::mutex> lock(g_mutex);
  g_live.erase(comm.get());
  for (auto window = g_windows.begin(); window != g_windows.end();) {
    window = (*window)->comm == comm.get() ? g_windows.erase(window) : std::next(window);
  }
}

}  // namespace

// ---- The ABI.

NCCL_EXPORT ncclResult_t ncclGetVersion(int* version) {
  return entry("ncclGetVersion", [&] { *version = ::version(); });
}

NCCL_EXPORT const char* ncclGetErrorString(ncclResult_t result) {
  count_call("ncclGetErrorString");
  switch (result) {
    case ncclSuccess: return "no error";
    case ncclUnhandledCudaError: return "unhandled cuda error";
    case ncclSystemError: return "unhandled system error";
    case ncclInternalError: return "internal error";
    case ncclInvalidArgument: return "invalid argument";
    case ncclInvalidUsage: return "invalid usage";
    case ncclRemoteError: return "remote process exited or there was a network error";
    case ncclInProgress: return "NCCL operation in progress";
  }
  return "unknown result code";
}

// As in NCCL: the latest error of the process, whatever the communicator, and never cleared.
NCCL_EXPORT const char* ncclGetLastError(ncclComm_t) {
  count_call("ncclGetLastError");
  return g_last_error;
}

NCCL_EXPORT ncclResult_t ncclGetUniqueId(ncclUniqueId* id) {
  return entry("ncclGetUniqueId", [&] {
    static std::atomic<uint64_t> counter{0};
    std::random_device random;
    UniqueIdWords words = {0, static_cast<uint64_t>(getpid()), ++counter};
    for (int i = 3; i < 15; ++i) words[i] = uint64_t{random()} << 32 | random();
    words[15] = unique_id_check(words);
    std::memcpy(id, words, sizeof(words));
  });
}

NCCL_EXPORT ncclResult_t ncclCommInitRank(ncclComm_t* handle, int num_ranks, ncclUniqueId id,
                                          int rank) {
  return entry("ncclCommInitRank", rank, nullptr, [&] {
    if (num_ranks < 1 || num_ranks > kMaxRanks || rank < 0 || rank >= num_ranks) {
      fail(ncclInvalidArgument, "ncclCommInitRank: invalid rank ", rank, " of ", num_ranks,
           " (at most ", kMaxRanks, ")");
    }
    const auto comm = std::make_shared<ncclComm>(segment_name(id), num_ranks, rank);
    const std::lock_guard<std::mutex> lock(g_mutex);
    g_live[comm.get()] = comm;
    g_latest_rank = rank;
    *handle = comm.get();
  });
}

NCCL_EXPORT ncclResult_t ncclCommFinalize(ncclComm_t handle) {
  return entry("ncclCommFinalize", handle, [](const CommPtr& comm) {
    if (comm->finalized.exchange(true)) fail(ncclInvalidArgument, "ncclCommFinalize: called twice");
  });
}

NCCL_EXPORT ncclResult_t ncclCommDestroy(ncclComm_t handle) {
  if (handle == nullptr) return ncclSuccess;  // as in NCCL, here and in ncclCommAbort
  return entry("ncclCommDestroy", handle, retire);
}

NCCL_EXPORT ncclResult_t ncclCommAbort(ncclComm_t handle) {
  if (handle == nullptr) return ncclSuccess;
  return entry("ncclCommAbort", handle, [](const CommPtr& comm) {
    comm->aborted = true;
    retire(comm);
  });
}

NCCL_EXPORT ncclResult_t ncclCommGetAsyncError(ncclComm_t handle, ncclResult_t* error) {
  return entry("ncclCommGetAsyncError", handle,
               [&](const CommPtr& comm) { *error = comm->async_error; });
}

// Like NCCL since 2.29.7: suspending is local, and resuming waits for all ranks.
NCCL_EXPORT ncclResult_t ncclCommSuspend(ncclComm_t handle, int flags) {
  return entry("ncclCommSuspend", handle, [&](const CommPtr& comm) {
    comm->require_usable("ncclCommSuspend");
    if (flags != 1) fail(ncclInvalidArgument, "ncclCommSuspend: unknown flags ", flags);
    comm->suspended = true;
  });
}

NCCL_EXPORT ncclResult_t ncclCommResume(ncclComm_t handle) {
  return entry("ncclCommResume", handle, [&](const CommPtr& comm) {
    if (!comm->suspended.exchange(false)) {
      fail(ncclInvalidUsage, "ncclCommResume: rank ", comm->rank, " is not suspended");
    }
    agree_on_window(comm, 0, 0);
  });
}

NCCL_EXPORT ncclResult_t ncclCommMemStats(ncclComm_t handle, int stat, uint64_t* value) {
  return entry("ncclCommMemStats", handle, [&](const CommPtr& comm) {
    if (stat < 0 || stat > 3) fail(ncclInvalidArgument, "ncclCommMemStats: unknown stat ", stat);
    *value = stat == 1 ? uint64_t{comm->suspended} : kSuspendableBytes;
  });
}

NCCL_EXPORT ncclResult_t ncclCommCount(ncclComm_t handle, int* count) {
  return entry("ncclCommCount", handle, [&](const CommPtr& comm) { *count = comm->world_size; });
}

NCCL_EXPORT ncclResult_t ncclCommUserRank(ncclComm_t handle, int* rank) {
  return entry("ncclCommUserRank", handle, [&](const CommPtr& comm) { *rank = comm->rank; });
}

NCCL_EXPORT ncclResult_t ncclAllReduce(const void* send, void* recv, size_t count, int data_type,
                                       int op, ncclComm_t comm, void* /*stream*/) {
  return submit({kAllReduce, nullptr, send, recv, count, data_type, op, kNone}, comm);
}

NCCL_EXPORT ncclResult_t ncclAllGather(const void* send, void* recv, size_t send_count,
                                       int data_type, ncclComm_t comm, void* /*stream*/) {
  return submit({kAllGather, nullptr, send, recv, send_count, data_type, kNone, kNone}, comm);
}

NCCL_EXPORT ncclResult_t ncclReduceScatter(const void* send, void* recv, size_t recv_count,
                                           int data_type, int op, ncclComm_t comm,
                                           void* /*stream*/) {
  return submit({kReduceScatter, nullptr, send, recv, recv_count, data_type, op, kNone}, comm);
}

NCCL_EXPORT ncclResult_t ncclBroadcast(const void* send, void* recv, size_t count, int data_type,
                                       int root, ncclComm_t comm, void* /*stream*/) {
  return submit({kBroadcast, nullptr, send, recv, count, data_type, kNone, root}, comm);
}

NCCL_EXPORT ncclResult_t ncclReduce(const void* send, void* recv, size_t count, int data_type,
                                    int op, int root, ncclComm_t comm, void* /*stream*/) {
  return submit({kReduce, nullptr, send, recv, count, data_type, op, root}, comm);
}

NCCL_EXPORT ncclResult_t ncclSend(const void* send, size_t count, int data_type, int peer,
                                  ncclComm_t comm, void* /*stream*/) {
  return submit({kSend, nullptr, send, nullptr, count, data_type, kNone, peer}, comm);
}

NCCL_EXPORT ncclResult_t ncclRecv(void* recv, size_t count, int data_type, int peer,
                                  ncclComm_t comm, void* /*stream*/) {
  return submit({kRecv, nullptr, nullptr, recv, count, data_type, kNone, peer}, comm);
}

NCCL_EXPORT ncclResult_t ncclGroupStart() {
  return entry("ncclGroupStart", [] { ++t_group.depth; });
}

NCCL_EXPORT ncclResult_t ncclGroupEnd() {
  // Left before entry(): an injected failure too must end the group, or it would swallow later
  // calls.
  const bool was_open = t_group.depth > 0;
  Group ended;
  if (was_open && --t_group.depth == 0) std::swap(ended, t_group);
  return entry("ncclGroupEnd", [&] {
    if (!was_open) fail(ncclInvalidUsage, "ncclGroupEnd: not in a group");
    if (ended.failure) throw *ended.failure;
    execute(ended.ops);
  });
}

NCCL_EXPORT ncclResult_t ncclMemAlloc(void** memory, size_t size) {
  // NCCL leaves garbage after a failure: what a caller must not take for memory.
  *memory = reinterpret_cast<void*>(0xdeadbeef000);
  return entry("ncclMemAlloc", [&] { *memory = allocate(size); });
}

NCCL_EXPORT ncclResult_t ncclMemFree(void* memory) {
  return entry("ncclMemFree", [&] { release(static_cast<const char*>(memory)); });
}

NCCL_EXPORT ncclResult_t ncclCommWindowRegister(ncclComm_t handle, void* memory, size_t size,
                                                ncclWindow_t* result, int flags) {
  constexpr const char* kFunction = "ncclCommWindowRegister";
  return entry(kFunction, handle, [&](const CommPtr& comm) {
    comm->require_usable(kFunction);
    const bool is_null =
        matching_rule("FAKE_NCCL_NULL_WINDOW", kFunction, comm->rank, t_nth).has_value();
    const ncclWindow_t window = new_window(comm, static_cast<char*>(memory), size, flags);
    try {
      agree_on_window(comm, size, flags);
    } catch (...) {
      forget_window(window);
      throw;
    }
    if (is_null) forget_window(window);
    *result = is_null ? nullptr : window;
  });
}

NCCL_EXPORT ncclResult_t ncclCommWindowDeregister(ncclComm_t handle, ncclWindow_t window) {
  return entry("ncclCommWindowDeregister", handle, [&](const CommPtr& comm) {
    const std::lock_guard<std::mutex> lock(g_mutex);
    const auto found = g_windows.find(window);
    if (found == g_windows.end() || (*found)->comm != comm.get()) {
      fail(ncclInvalidArgument, "ncclCommWindowDeregister: rank ", comm->rank, " of ",
           comm->world_size, ": ", window, " is no live window of this communicator");
    }
    g_windows.erase(found);
  });
}

// No rank reaches another's memory here: NULL, as NCCL says of a peer on another machine.
NCCL_EXPORT ncclResult_t ncclGetPeerDevicePointer(ncclWindow_t window, size_t offset, int peer,
                                                  void** pointer) {
  constexpr const char* kFunction = "ncclGetPeerDevicePointer";
  bool is_live;
  {
    const std::lock_guard<std::mutex> lock(g_mutex);
    is_live = g_windows.count(window) > 0;
  }
  return entry(kFunction, is_live ? window->rank : kNone, nullptr, [&] {
    if (!is_live) fail(ncclInvalidArgument, kFunction, ": ", window, " is not a live window");
    if (offset >= window->size || peer < 0 || peer >= window->world_size) {
      fail(ncclInvalidArgument, kFunction, ": rank ", window->rank, " of ", window->world_size,
           ": invalid offset ", offset, " of ", window->size, " or peer ", peer);
    }
    *pointer = peer == window->rank ? window->base + offset : nullptr;
  });
}

// Communicators of this process that were neither destroyed nor aborted.
NCCL_EXPORT int fake_nccl_live_comms() {
  const std::lock_guard<std::mutex> lock(g_mutex);
  return static_cast<int>(g_live.size());
}

// Windows of this process that were not deregistered and whose communicator is live.
NCCL_EXPORT int fake_nccl_live_windows() {
  const std::lock_guard<std::mutex> lock(g_mutex);
  return static_cast<int>(g_windows.size());
}

// Bytes of ncclMemAlloc, rounded up as it does, that this process has not freed.
NCCL_EXPORT long fake_nccl_live_bytes() {
  const std::lock_guard<std::mutex> lock(g_mutex);
  return static_cast<long>(live_bytes());
}

// How often this process called the function `name`, failed calls included.
NCCL_EXPORT long fake_nccl_calls(const char* name) {
  const std::lock_guard<std::mutex> lock(g_mutex);
  const auto found = g_num_calls.find(name);
  return found == g_num_calls.end() ? 0 : found->second;
}
