// NCCL's functions, resolved at run time from the libnccl that the Python side has loaded.
#pragma once

#include <cstddef>

#if defined(__GNUC__)
#define DISTCOMM_EXPORT extern "C" __attribute__((visibility("default")))
#else
#define DISTCOMM_EXPORT extern "C"
#endif

namespace distcomm {

using NcclComm = void*;
using NcclWindow = void*;
using CudaStream = void*;
using NcclResult = int;  // ncclResult_t: 0 is success

inline constexpr NcclResult kNcclSuccess = 0;
inline constexpr NcclResult kNcclUnhandledCudaError = 1;
inline constexpr NcclResult kNcclInvalidUsage = 5;
inline constexpr int kNcclUint8 = 1;         // ncclDataType_t
inline constexpr int kNcclWinSymmetric = 1;  // NCCL_WIN_COLL_SYMMETRIC

// One resolved symbol table per libnccl. The library stays open while the table lives.
struct NcclSymbols {
  void* library = nullptr;
  NcclResult (*group_start)() = nullptr;
  NcclResult (*group_end)() = nullptr;
  NcclResult (*broadcast)(const void*, void*, size_t, int, int, NcclComm, CudaStream) = nullptr;
  NcclResult (*reduce)(const void*, void*, size_t, int, int, int, NcclComm, CudaStream) = nullptr;
  NcclResult (*send)(const void*, size_t, int, int, NcclComm, CudaStream) = nullptr;
  NcclResult (*recv)(void*, size_t, int, int, NcclComm, CudaStream) = nullptr;

  // From here on NULL where this libnccl has no such function.
  const char* (*error_string)(NcclResult) = nullptr;
  const char* (*last_error)(NcclComm) = nullptr;
  NcclResult (*all_reduce)(const void*, void*, size_t, int, int, NcclComm, CudaStream) = nullptr;
  NcclResult (*all_gather)(const void*, void*, size_t, int, NcclComm, CudaStream) = nullptr;
  NcclResult (*reduce_scatter)(const void*, void*, size_t, int, int, NcclComm,
                               CudaStream) = nullptr;
  NcclResult (*mem_alloc)(void**, size_t) = nullptr;
  NcclResult (*mem_free)(void*) = nullptr;
  NcclResult (*window_register)(NcclComm, void*, size_t, NcclWindow*, int) = nullptr;
  NcclResult (*window_deregister)(NcclComm, NcclWindow) = nullptr;

  ~NcclSymbols();
};

}  // namespace distcomm
