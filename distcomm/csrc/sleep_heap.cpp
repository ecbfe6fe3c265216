#include "sleep_heap.h"

#include <algorithm>
#include <cstdio>

namespace distcomm {
namespace {

using Lock = std::lock_guard<std::mutex>;

constexpr CudaResult kInvalidValue = 1;      // CUDA_ERROR_INVALID_VALUE
constexpr CudaResult kOutOfMemory = 2;       // CUDA_ERROR_OUT_OF_MEMORY
constexpr CudaResult kInvalidContext = 201;  // CUDA_ERROR_INVALID_CONTEXT
constexpr int kPinned = 1;                   // CU_MEM_ALLOCATION_TYPE_PINNED
constexpr int kDevice = 1;                   // CU_MEM_LOCATION_TYPE_DEVICE
constexpr int kReadWrite = 3;                // CU_MEM_ACCESS_FLAGS_PROT_READWRITE
constexpr int kMinimum = 0;                  // CU_MEM_ALLOC_GRANULARITY_MINIMUM
constexpr int kRdmaWithMapping = 110;  // ..._ATTRIBUTE_GPU_DIRECT_RDMA_WITH_CUDA_VMM_SUPPORTED

// Of the thread, as torch's pools are: what is selected for each heap.
thread_local std::map<const SleepHeap*, int64_t> t_tags;
// Of the thread, because torch raises its error in the thread whose allocation failed.
thread_local SleepFailure t_failure{};

// Sizes that no memory has stay as large, and don't wrap around.
size_t rounded_up(size_t size, size_t unit) {
  const size_t largest = SIZE_MAX / 2 / unit * unit;
  return size >= largest ? largest : (size + unit - 1) / unit * unit;
}

bool has(const std::vector<int64_t>& tags, int64_t tag) {
  return std::find(tags.begin(), tags.end(), tag) != tags.end();
}

DevicePointer device_pointer(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer); }

}  // namespace

SleepHeap::SleepHeap(const CudaDriver& driver, int device, size_t chunk_bytes)
    : driver_(driver), device_(device), chunk_bytes_(chunk_bytes), host_(driver) {}

SleepHeap::~SleepHeap() {
  const CudaContext context(driver_, device_);
  if (!context.is_current()) return;
  driver_.ctx_synchronize();
  for (auto& [address, block] : blocks_) release(address, block);
  host_.trim();
}

int64_t SleepHeap::new_tag() {
  const Lock lock(mutex_);
  return ++last_tag_;
}

int64_t SleepHeap::select(int64_t tag) {
  std::swap(t_tags[this], tag);
  if (t_tags[this] == 0) t_tags.erase(this);
  return tag;
}

void* SleepHeap::alloc(size_t size, CudaStream stream) {
  // Asked before the lock is taken: the driver has locks of its own.
  const bool capturing = is_capturing(driver_, stream);
  const auto selected = t_tags.find(this);
  const int64_t tag = selected == t_tags.end() ? 0 : selected->second;
  t_failure = SleepFailure{};
  const Lock lock(mutex_);
  ++counters_.allocations;
  const CudaContext context(driver_, device_);
  if (capturing || tag == 0 || !context.is_current()) {
    ++counters_.failed_allocations;
    note(capturing ? "a captured CUDA graph can't have memory of a sleepable pool"
         : tag == 0 ? "this thread is in no block that allocates with a tag"
                      : "the device can't be used", size);
    return nullptr;
  }
  const RelaxedCapture relaxed(driver_);
  release_pending();
  DevicePointer address = 0;
  Block block{0, tag, {}};
  if (reserve(size, &address, &block) != kCudaSuccess) {
    ++counters_.failed_allocations;
    if (address != 0 && !release(address, block)) {  // tried again later
      blocks_.emplace(address, std::move(block));
      const Lock pending_lock(pending_mutex_);
      pending_.push_back(reinterpret_cast<void*>(static_cast<uintptr_t>(address)));
    }
    update_free_bytes();
    return nullptr;
  }
  blocks_.emplace(address, std::move(block));
  return reinterpret_cast<void*>(static_cast<uintptr_t>(address));
}

bool SleepHeap::free(void* pointer, CudaStream stream) {
  if (shut_down_) return true;
  const bool capturing = is_capturing(driver_, stream);
  {
    const Lock lock(pending_mutex_);
    pending_.push_back(pointer);
  }
  // Whoever holds the lock gives back what is pending when it lets go, or at the next call.
  std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
  if (!lock.owns_lock() || capturing) return true;
  const CudaContext context(driver_, device_);
  const RelaxedCapture relaxed(driver_);
  if (!context.is_current()) return true;
  const std::vector<void*> unknown = release_pending();
  return std::find(unknown.begin(), unknown.end(), pointer) == unknown.end();
}

void SleepHeap::settle() {
  const Lock lock(mutex_);
  const CudaContext context(driver_, device_);
  const RelaxedCapture relaxed(driver_);
  if (context.is_current()) release_pending();
}

SleepFailure SleepHeap::take_failure() {
  const SleepFailure failure = t_failure;
  t_failure = SleepFailure{};
  return failure;
}

CudaResult SleepHeap::prepare(const std::vector<int64_t>& tags) {
  t_failure = SleepFailure{};
  const Lock lock(mutex_);
  const CudaContext context(driver_, device_);
  if (!context.is_current()) return fail("cuCtxPushCurrent", kInvalidContext);
  const RelaxedCapture relaxed(driver_);
  release_pending();
  return prepare_locked(tags);
}

void SleepHeap::cancel(const std::vector<int64_t>& tags) {
  const Lock lock(mutex_);
  for (Chunk* const chunk : chunks_of(tags, false)) drop_host(*chunk);
}

void SleepHeap::discard(const std::vector<int64_t>& tags) {
  const Lock lock(mutex_);
  for (Chunk* const chunk : chunks_of(tags, true)) drop_host(*chunk);
}

CudaResult SleepHeap::sleep(const std::vector<int64_t>& tags, const std::vector<int64_t>& offloaded,
                            const CudaStream (&streams)[kNumStreams]) {
  t_failure = SleepFailure{};
  CudaResult result = kCudaSuccess;
  {
    const Lock lock(mutex_);
    const CudaContext context(driver_, device_);
    if (!context.is_current()) return fail("cuCtxPushCurrent", kInvalidContext);
    const RelaxedCapture relaxed(driver_);
    release_pending();
    result = prepare_locked(offloaded);
    if (result != kCudaSuccess) return result;
    result = driver_.ctx_synchronize();
    if (result != kCudaSuccess) return fail("cuCtxSynchronize", result);
    std::vector<Chunk*> kept, discarded;
    for (auto& [address, block] : blocks_) {
      if (!has(tags, block.tag)) continue;
      for (Chunk& chunk : block.chunks) {
        if (!chunk.is_asleep) (has(offloaded, block.tag) ? kept : discarded).push_back(&chunk);
      }
    }
    result = offload(kept, streams);
    // Content is discarded only once all that isn't has been saved.
    for (auto chunk = discarded.begin(); chunk != discarded.end() && result == kCudaSuccess;
         ++chunk) {
      drop_host(**chunk);
      result = unmap(**chunk);
      (*chunk)->is_asleep = (*chunk)->memory == 0;
    }
  }
  settle();  // what was freed meanwhile
  return result;
}

CudaResult SleepHeap::wake_up(const std::vector<int64_t>& tags,
                              const CudaStream (&streams)[kNumStreams]) {
  t_failure = SleepFailure{};
  CudaResult result = kCudaSuccess;
  {
    const Lock lock(mutex_);
    const CudaContext context(driver_, device_);
    if (!context.is_current()) return fail("cuCtxPushCurrent", kInvalidContext);
    const RelaxedCapture relaxed(driver_);
    release_pending();
    result = restore(chunks_of(tags, true), streams);
  }
  settle();
  return result;
}

void SleepHeap::progress(int64_t* done, int64_t* total) const {
  *total = bytes_to_copy_;
  *done = std::min(copied_bytes_.load(), *total);
}

size_t SleepHeap::trim_host() {
  const Lock lock(mutex_);
  const CudaContext context(driver_, device_);
  return context.is_current() ? host_.trim() : 0;
}

SleepUsage SleepHeap::usage(int64_t tag) {
  const Lock lock(mutex_);
  SleepUsage usage{};
  for (const auto& [address, block] : blocks_) {
    if (block.tag != tag) continue;
    ++usage.blocks;
    for (const Chunk& chunk : block.chunks) {
      const auto bytes = static_cast<int64_t>(chunk.size);
      (chunk.is_asleep ? usage.asleep_bytes : usage.mapped_bytes) += bytes;
      if (chunk.is_offloaded) usage.offloaded_bytes += bytes;
    }
  }
  return usage;
}

SleepStats SleepHeap::stats() {
  const Lock lock(mutex_);
  SleepStats stats = counters_;
  stats.host_bytes = static_cast<int64_t>(host_.bytes());
  stats.free_host_bytes = static_cast<int64_t>(host_.free_bytes());
  return stats;
}

// ---- With the lock held.

CudaResult SleepHeap::reserve(size_t size, DevicePointer* address, Block* block) {
  const CudaMemProp prop = properties();
  if (granularity_ == 0) {
    const CudaResult result = driver_.mem_get_granularity(&granularity_, &prop, kMinimum);
    if (result != kCudaSuccess || granularity_ == 0) {
      granularity_ = 0;
      return fail("cuMemGetAllocationGranularity", result == 0 ? kInvalidValue : result);
    }
  }
  block->size = rounded_up(std::max<size_t>(size, 1), granularity_);
  const size_t step = rounded_up(chunk_bytes_, granularity_);
  // Else all there is would be taken before it turns out to be too little, from others, too.
  size_t num_free = 0, all = 0;
  if (driver_.mem_get_info(&num_free, &all) == kCudaSuccess && num_free < block->size) {
    return fail("cuMemGetInfo", kOutOfMemory, block->size);
  }
  CudaResult result = driver_.mem_address_reserve(address, block->size, 0, 0, 0);
  if (result != kCudaSuccess) {
    *address = 0;
    return fail("cuMemAddressReserve", result, block->size);
  }
  for (size_t offset = 0; offset < block->size; offset += step) {
    block->chunks.push_back({*address + offset, std::min(step, block->size - offset)});
  }
  for (Chunk& chunk : block->chunks) {
    result = map(chunk);
    if (result == kCudaSuccess) continue;
    t_failure.needed_bytes = static_cast<int64_t>(block->size);
    return result;
  }
  return kCudaSuccess;
}

CudaResult SleepHeap::map(Chunk& chunk) {
  const CudaMemProp prop = properties();
  CudaMemory memory = 0;
  CudaResult result = driver_.mem_create(&memory, chunk.size, &prop, 0);
  if (result != kCudaSuccess) return fail("cuMemCreate", result, chunk.size);
  result = driver_.mem_map(chunk.address, chunk.size, 0, memory, 0);
  if (result != kCudaSuccess) {
    driver_.mem_release(memory);
    return fail("cuMemMap", result);
  }
  const CudaMemAccess access = {kDevice, device_, kReadWrite};
  result = driver_.mem_set_access(chunk.address, chunk.size, &access, 1);
  if (result != kCudaSuccess) {
    fail("cuMemSetAccess", result);
    if (driver_.mem_unmap(chunk.address, chunk.size) == kCudaSuccess) {
      driver_.mem_release(memory);
    } else {
      chunk.memory = memory;  // to be unmapped later
    }
    return result;
  }
  chunk.memory = memory;
  return kCudaSuccess;
}

CudaResult SleepHeap::unmap(Chunk& chunk) {
  CudaResult result = driver_.mem_unmap(chunk.address, chunk.size);
  if (result != kCudaSuccess) return fail("cuMemUnmap", result);
  result = driver_.mem_release(chunk.memory);
  chunk.memory = 0;  // without its mapping it is of no use, whatever becomes of it
  return result == kCudaSuccess ? result : fail("cuMemRelease", result);
}

bool SleepHeap::release(DevicePointer address, Block& block) {
  const SleepFailure failure = t_failure;  // that of the call which comes here, not of this one
  bool released = true;
  for (Chunk& chunk : block.chunks) {
    drop_host(chunk);
    if (chunk.memory != 0) released &= unmap(chunk) == kCudaSuccess || chunk.memory == 0;
  }
  released = released && driver_.mem_address_free(address, block.size) == kCudaSuccess;
  if (!released) block.tag = 0;  // what is left of it neither sleeps nor wakes up
  t_failure = failure;
  return released;
}

std::vector<void*> SleepHeap::release_pending() {
  if (shut_down_) return {};
  std::vector<void*> pending, unknown;
  {
    const Lock lock(pending_mutex_);
    std::swap(pending, pending_);
  }
  if (pending.empty()) return unknown;
  const bool waits = std::any_of(pending.begin(), pending.end(), [this](void* pointer) {
    const auto block = blocks_.find(device_pointer(pointer));
    return block != blocks_.end() &&
           std::any_of(block->second.chunks.begin(), block->second.chunks.end(),
                       [](const Chunk& chunk) { return chunk.memory != 0; });
  });
  std::vector<void*> kept;
  if (waits && driver_.ctx_synchronize() != kCudaSuccess) {
    kept = std::move(pending);  // it may still be in use
    pending.clear();
  }
  for (void* const pointer : pending) {
    const auto block = blocks_.find(device_pointer(pointer));
    if (block == blocks_.end()) {
      ++counters_.unknown_frees;
      unknown.push_back(pointer);
    } else if (release(block->first, block->second)) {
      blocks_.erase(block);
    } else {
      ++counters_.failed_releases;
      kept.push_back(pointer);
    }
  }
  const Lock lock(pending_mutex_);
  pending_.insert(pending_.end(), kept.begin(), kept.end());
  return unknown;
}

std::vector<SleepHeap::Chunk*> SleepHeap::chunks_of(const std::vector<int64_t>& tags, bool asleep) {
  std::vector<Chunk*> chunks;
  for (auto& [address, block] : blocks_) {
    if (!has(tags, block.tag)) continue;
    for (Chunk& chunk : block.chunks) {
      if (chunk.is_asleep == asleep) chunks.push_back(&chunk);
    }
  }
  return chunks;
}

CudaResult SleepHeap::prepare_locked(const std::vector<int64_t>& tags) {
  std::vector<Chunk*> chunks = chunks_of(tags, false);
  chunks.erase(std::remove_if(chunks.begin(), chunks.end(),
                              [](const Chunk* chunk) { return chunk->host != nullptr; }),
               chunks.end());
  std::vector<size_t> sizes;
  size_t total = 0;
  for (const Chunk* const chunk : chunks) {
    sizes.push_back(chunk->size);
    total += chunk->size;
  }
  const CudaResult result = host_.prepare(sizes);
  if (result != kCudaSuccess) return fail("cuMemHostAlloc", result, total);
  for (Chunk* const chunk : chunks) chunk->host = host_.take(chunk->size);
  return kCudaSuccess;
}

void SleepHeap::drop_host(Chunk& chunk) {
  if (chunk.host != nullptr) host_.give_back(chunk.host, chunk.size);
  chunk.host = nullptr;
  chunk.is_offloaded = false;
}

CudaResult SleepHeap::offload(const std::vector<Chunk*>& chunks,
                              const CudaStream (&streams)[kNumStreams]) {
  copied_bytes_ = bytes_to_copy_ = 0;
  for (const Chunk* const chunk : chunks) bytes_to_copy_ += static_cast<int64_t>(chunk->size);
  CudaResult result = kCudaSuccess;
  size_t num_unmapped = 0;
  // A chunk is unmapped while the next one is copied.
  for (size_t i = 0; i <= chunks.size() && result == kCudaSuccess; ++i) {
    if (i < chunks.size()) {
      const Chunk& next = *chunks[i];
      result = driver_.memcpy_async(device_pointer(next.host), next.address, next.size,
                                    streams[i % kNumStreams]);
      if (result != kCudaSuccess) fail("cuMemcpyAsync", result);
    }
    if (i == 0 || result != kCudaSuccess) continue;
    Chunk& copied = *chunks[i - 1];
    result = driver_.stream_synchronize(streams[(i - 1) % kNumStreams]);
    if (result != kCudaSuccess) {
      fail("cuStreamSynchronize", result);
      continue;
    }
    result = unmap(copied);
    if (copied.memory != 0) continue;
    copied.is_asleep = copied.is_offloaded = true;
    ++num_unmapped;
    copied_bytes_ += static_cast<int64_t>(copied.size);
  }
  if (result == kCudaSuccess) return result;
  // Back to where it was, as far as the driver lets it.
  const SleepFailure failure = t_failure;
  const bool has_ended = wait_for(streams) == kCudaSuccess;
  restore({chunks.begin(), chunks.begin() + num_unmapped}, streams);
  // Neither what still has the only copy of the content, nor what one may still be written to.
  for (Chunk* const chunk : chunks) {
    if (has_ended && !chunk->is_asleep) drop_host(*chunk);
  }
  t_failure = failure;
  return result;
}

CudaResult SleepHeap::restore(const std::vector<Chunk*>& chunks,
                              const CudaStream (&streams)[kNumStreams]) {
  size_t needed = 0;
  copied_bytes_ = bytes_to_copy_ = 0;
  for (const Chunk* const chunk : chunks) {
    if (chunk->memory == 0) needed += chunk->size;
    if (chunk->is_offloaded) bytes_to_copy_ += static_cast<int64_t>(chunk->size);
  }
  size_t num_free = 0, all = 0;
  if (driver_.mem_get_info(&num_free, &all) == kCudaSuccess && num_free < needed) {
    return fail("cuMemGetInfo", kOutOfMemory, needed);
  }
  CudaResult result = kCudaSuccess;
  if (std::any_of(chunks.begin(), chunks.end(), [](Chunk* chunk) { return chunk->memory != 0; })) {
    result = wait_for(streams);  // an earlier call's copies may still use it
    if (result != kCudaSuccess) return fail("cuStreamSynchronize", result);
  }
  size_t num_mapped = 0;
  for (size_t i = 0; i < chunks.size() && result == kCudaSuccess; ++i) {
    Chunk& chunk = *chunks[i];
    if (chunk.memory != 0) result = unmap(chunk);  // what an earlier call could not undo
    if (result == kCudaSuccess) result = map(chunk);
    if (result != kCudaSuccess) break;
    ++num_mapped;
    if (!chunk.is_offloaded) continue;
    const CudaStream stream = streams[i % kNumStreams];
    // Of the copy before the one before, so that one is always under way.
    result = driver_.stream_synchronize(stream);
    if (result != kCudaSuccess) {
      fail("cuStreamSynchronize", result);
      break;
    }
    result = driver_.memcpy_async(chunk.address, device_pointer(chunk.host), chunk.size, stream);
    if (result != kCudaSuccess) fail("cuMemcpyAsync", result);
    copied_bytes_ += static_cast<int64_t>(chunk.size);
  }
  const CudaResult waited = wait_for(streams);
  if (result == kCudaSuccess && waited != kCudaSuccess) {
    result = fail("cuStreamSynchronize", waited);
  }
  if (result != kCudaSuccess) {
    SleepFailure failure = t_failure;
    failure.needed_bytes = static_cast<int64_t>(needed);
    // What a copy may still be using keeps its memory, until it is tried again.
    const bool has_ended = waited == kCudaSuccess || wait_for(streams) == kCudaSuccess;
    for (size_t i = 0; i < num_mapped; ++i) {
      if (has_ended || !chunks[i]->is_offloaded) unmap(*chunks[i]);
    }
    t_failure = failure;
    update_free_bytes();
    return result;
  }
  for (Chunk* const chunk : chunks) {
    chunk->is_asleep = false;
    drop_host(*chunk);
  }
  return kCudaSuccess;
}

CudaResult SleepHeap::wait_for(const CudaStream (&streams)[kNumStreams]) {
  CudaResult result = kCudaSuccess;
  for (const CudaStream stream : streams) {
    const CudaResult waited = driver_.stream_synchronize(stream);
    if (result == kCudaSuccess) result = waited;
  }
  return result;
}

CudaResult SleepHeap::fail(const char* call, CudaResult code, size_t needed) {
  std::string text = std::string(call) + " failed with driver error " + std::to_string(code);
  const char* meaning = nullptr;
  if (driver_.get_error_string != nullptr &&
      driver_.get_error_string(code, &meaning) == kCudaSuccess && meaning != nullptr) {
    text += std::string(" (") + meaning + ")";
  }
  note(text, needed);
  t_failure.code = code;
  size_t num_free = 0, all = 0;
  if (code == kOutOfMemory && std::string(call) != "cuMemHostAlloc" &&
      driver_.mem_get_info(&num_free, &all) == kCudaSuccess) {
    t_failure.free_bytes = static_cast<int64_t>(num_free);
  }
  return code;
}

void SleepHeap::update_free_bytes() {
  size_t num_free = 0, all = 0;
  if (t_failure.free_bytes >= 0 && driver_.mem_get_info(&num_free, &all) == kCudaSuccess) {
    t_failure.free_bytes = static_cast<int64_t>(num_free);
  }
}

void SleepHeap::note(const std::string& text, size_t needed) {
  t_failure = SleepFailure{};
  t_failure.needed_bytes = static_cast<int64_t>(needed);
  t_failure.free_bytes = -1;
  std::snprintf(t_failure.text, sizeof(t_failure.text), "%s", text.c_str());
}

CudaMemProp SleepHeap::properties() const {
  CudaMemProp prop{};
  prop.type = kPinned;
  prop.location_type = kDevice;
  prop.location_id = device_;
  int supported = 0;
  // A network card may then read it directly, as transfers of KV caches between engines do.
  if (driver_.device_get_attribute != nullptr &&
      driver_.device_get_attribute(&supported, kRdmaWithMapping, device_) == kCudaSuccess) {
    prop.gpu_direct_rdma_capable = supported != 0;
  }
  return prop;
}

}  // namespace distcomm
