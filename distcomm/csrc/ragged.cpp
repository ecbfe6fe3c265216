// Collectives with a different size per rank, which NCCL has not: each is one NCCL group of
// point-to-point or rooted calls. In C++ because a group of W ranks is 2W + 2 calls, each of
// which would cost about a microsecond of host time from Python.
//
// Every function returns the first error, and always ends the NCCL group that it began.

#include <cstddef>

#include "nccl_symbols.h"

namespace distcomm {
namespace {

// Begins an NCCL group, runs `body`, ends the group. The group is ended even when `body` fails:
// an open group would swallow every later NCCL call of this thread.
template <typename Body>
NcclResult in_group(const NcclSymbols& nccl, Body body) {
  if (NcclResult started = nccl.group_start(); started != kNcclSuccess) return started;
  const NcclResult inside = body();
  const NcclResult ended = nccl.group_end();
  return inside != kNcclSuccess ? inside : ended;
}

}  // namespace
}  // namespace distcomm

using distcomm::CudaStream;
using distcomm::in_group;
using distcomm::kNcclSuccess;
using distcomm::kNcclUint8;
using distcomm::NcclComm;
using distcomm::NcclResult;
using distcomm::NcclSymbols;

// `recv` holds the ranks' pieces one after another; piece r has `num_bytes[r]` bytes and is
// broadcast by rank r from its `send`.
DISTCOMM_EXPORT int distcomm_all_gatherv(const NcclSymbols* nccl, NcclComm comm, const void* send,
                                         void* recv, const size_t* num_bytes, int world_size,
                                         CudaStream stream) {
  return in_group(*nccl, [&]() -> NcclResult {
    char* piece = static_cast<char*>(recv);
    for (int root = 0; root < world_size; piece += num_bytes[root], ++root) {
      if (num_bytes[root] == 0) continue;
      const NcclResult result =
          nccl->broadcast(send, piece, num_bytes[root], kNcclUint8, root, comm, stream);
      if (result != kNcclSuccess) return result;
    }
    return kNcclSuccess;
  });
}

// `send` holds one piece per rank; piece r has `counts[r]` elements of `element_bytes` and is
// reduced to rank r's `recv`.
DISTCOMM_EXPORT int distcomm_reduce_scatterv(const NcclSymbols* nccl, NcclComm comm,
                                             const void* send, void* recv, const size_t* counts,
                                             int world_size, size_t element_bytes, int data_type,
                                             int op, CudaStream stream) {
  return in_group(*nccl, [&]() -> NcclResult {
    const char* piece = static_cast<const char*>(send);
    for (int root = 0; root < world_size; piece += counts[root] * element_bytes, ++root) {
      if (counts[root] == 0) continue;
      const NcclResult result =
          nccl->reduce(piece, recv, counts[root], data_type, op, root, comm, stream);
      if (result != kNcclSuccess) return result;
    }
    return kNcclSuccess;
  });
}

// Rank r gets `send_bytes[r]` bytes from the r-th piece of `send`; the piece that comes from
// rank r goes to the r-th piece of `recv`.
DISTCOMM_EXPORT int distcomm_all_to_allv(const NcclSymbols* nccl, NcclComm comm, const void* send,
                                         const size_t* send_bytes, void* recv,
                                         const size_t* recv_bytes, int world_size,
                                         CudaStream stream) {
  return in_group(*nccl, [&]() -> NcclResult {
    const char* outgoing = static_cast<const char*>(send);
    char* incoming = static_cast<char*>(recv);
    for (int peer = 0; peer < world_size; ++peer) {
      if (send_bytes[peer] != 0) {
        const NcclResult sent =
            nccl->send(outgoing, send_bytes[peer], kNcclUint8, peer, comm, stream);
        if (sent != kNcclSuccess) return sent;
      }
      if (recv_bytes[peer] != 0) {
        const NcclResult received =
            nccl->recv(incoming, recv_bytes[peer], kNcclUint8, peer, comm, stream);
        if (received != kNcclSuccess) return received;
      }
      outgoing += send_bytes[peer];
      incoming += recv_bytes[peer];
    }
    return kNcclSuccess;
  });
}
