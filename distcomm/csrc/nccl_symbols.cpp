#include "nccl_symbols.h"

#include <dlfcn.h>

#include <cstdio>
#include <memory>

namespace distcomm {
namespace {

template <typename Function>
bool resolve(void* library, const char* name, Function& slot) {
  slot = reinterpret_cast<Function>(dlsym(library, name));
  return slot != nullptr;
}

}  // namespace

NcclSymbols::~NcclSymbols() {
  if (library != nullptr) dlclose(library);
}

}  // namespace distcomm

// Raised whenever a signature below changes; the Python side refuses another number.
DISTCOMM_EXPORT int distcomm_abi_version() { return 5; }

// Opens the libnccl at `path`. On failure returns NULL and writes the reason to `error`.
// The caller owns the table and gives it back to distcomm_nccl_close.
DISTCOMM_EXPORT distcomm::NcclSymbols* distcomm_nccl_open(const char* path, char* error,
                                                          size_t error_size) {
  using distcomm::resolve;
  auto table = std::make_unique<distcomm::NcclSymbols>();
  table->library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (table->library == nullptr) {
    std::snprintf(error, error_size, "%s", dlerror());
    return nullptr;
  }
  void* const library = table->library;
  const bool complete = resolve(library, "ncclGroupStart", table->group_start) &&
                        resolve(library, "ncclGroupEnd", table->group_end) &&
                        resolve(library, "ncclBroadcast", table->broadcast) &&
                        resolve(library, "ncclReduce", table->reduce) &&
                        resolve(library, "ncclSend", table->send) &&
                        resolve(library, "ncclRecv", table->recv);
  if (!complete) {
    const char* reason = dlerror();
    std::snprintf(error, error_size, "%s", reason != nullptr ? reason : "a symbol is missing");
    return nullptr;
  }
  resolve(library, "ncclGetErrorString", table->error_string);
  resolve(library, "ncclGetLastError", table->last_error);
  resolve(library, "ncclAllReduce", table->all_reduce);
  resolve(library, "ncclAllGather", table->all_gather);
  resolve(library, "ncclReduceScatter", table->reduce_scatter);
  resolve(library, "ncclMemAlloc", table->mem_alloc);
  resolve(library, "ncclMemFree", table->mem_free);
  resolve(library, "ncclCommWindowRegister", table->window_register);
  resolve(library, "ncclCommWindowDeregister", table->window_deregister);
  return table.release();
}

DISTCOMM_EXPORT void distcomm_nccl_close(distcomm::NcclSymbols* table) { delete table; }
