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

void* host_pointer(DevicePointer address) {
  return reinterpret_cast<void*>(static_cast<uintptr_t>(address));
}

// Others read it meanwhile.
void set(int64_t* value, int64_t to) { __atomic_store_n(value, to, __ATOMIC_RELAXED); }

}  // namespace

class SleepHeap::Move {
 public:
  Move(SleepHeap& heap, const Tags& tags)
      : heap_(heap), moving_(heap.move_mutex_), context_(heap.driver_, heap.device_),
        relaxed_(heap.driver_) {
    t_failure = SleepFailure{};
    if (!context_.is_current()) {
      result_ = heap.fail("cuCtxPushCurrent", kInvalidContext);
      return;
    }
    heap.give_back_pending();
    const Lock lock(heap.mutex_);
    heap.moving_ = tags;
  }
  ~Move() {
    {
      const Lock lock(heap_.mutex_);
      heap_.moving_.clear();
    }
    if (context_.is_current()) heap_.give_back_pending();  // what was freed meanwhile
  }
  Move(const Move&) = delete;
  Move& operator=(const Move&) = delete;

  CudaResult result() const { return result_; }
  // What is awake, or asleep, under those of the tags.
  Chunks chunks(const Tags& tags, bool asleep) {
    const Lock lock(heap_.mutex_);
    Chunks chunks;
    for (auto& [address, block] : heap_.blocks_) {
      if (!has(tags, block.tag)) continue;
      for (Chunk& chunk : block.chunks) {
        if (chunk.is_asleep == asleep) chunks.push_back(&chunk);
      }
    }
    return chunks;
  }

 private:
  SleepHeap& heap_;
  const std::lock_guard<std::mutex> moving_;
  const CudaContext context_;
  const RelaxedCapture relaxed_;
  CudaResult result_ = kCudaSuccess;
};

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
  const CudaContext context(driver_, device_);  // first: without one, no stream can be asked about
  const bool capturing = context.is_current() && is_capturing(driver_, stream);
  const auto selected = t_tags.find(this);
  const int64_t tag = selected == t_tags.end() ? 0 : selected->second;
  t_failure = SleepFailure{};
  const RelaxedCapture relaxed(driver_);
  void* pointer = nullptr;
  if (capturing || tag == 0 || !context.is_current()) {
    note(!context.is_current() ? "the device can't be used"
         : capturing           ? "a captured CUDA graph can't have memory of a sleepable pool"
                               : "this thread is in no block that allocates with a tag", size);
  } else {
    pointer = try_alloc(size, tag);
    if (pointer == nullptr && t_failure.code == kOutOfMemory && has_pending()) {
      give_back_pending();
      t_failure = SleepFailure{};
      pointer = try_alloc(size, tag);
    }
  }
  const Lock lock(mutex_);
  ++counters_.allocations;
  if (pointer == nullptr) ++counters_.failed_allocations;
  return pointer;
}

bool SleepHeap::free(void* pointer, CudaStream stream) {
  if (shut_down_) return true;
  {
    const Lock lock(pending_mutex_);
    pending_.push_back(pointer);
  }
  const CudaContext context(driver_, device_);
  if (!context.is_current() || is_capturing(driver_, stream)) return true;
  const RelaxedCapture relaxed(driver_);
  const std::vector<void*> unknown = give_back_pending();
  return std::find(unknown.begin(), unknown.end(), pointer) == unknown.end();
}

void SleepHeap::settle() {
  const CudaContext context(driver_, device_);
  const RelaxedCapture relaxed(driver_);
  if (context.is_current()) give_back_pending();
}

SleepFailure SleepHeap::take_failure() {
  const SleepFailure failure = t_failure;
  t_failure = SleepFailure{};
  return failure;
}

CudaResult SleepHeap::prepare(const Tags& tags) {
  Move move(*this, tags);
  return move.result() != kCudaSuccess ? move.result() : pin(move.chunks(tags, false));
}

void SleepHeap::cancel(const Tags& tags) {
  Move move(*this, tags);
  drop_host(move.chunks(tags, false));
}

void SleepHeap::discard(const Tags& tags) {
  Move move(*this, tags);
  drop_host(move.chunks(tags, true));
}

CudaResult SleepHeap::sleep(const Tags& tags, const Tags& offloaded,
                            const CudaStream (&streams)[kNumStreams], SleepProgress* progress) {
  Move move(*this, tags);
  if (move.result() != kCudaSuccess) return move.result();
  Tags discarded;
  std::copy_if(tags.begin(), tags.end(), std::back_inserter(discarded),
               [&](int64_t tag) { return !has(offloaded, tag); });
  const Chunks kept = move.chunks(offloaded, false);
  CudaResult result = pin(kept);
  if (result != kCudaSuccess) return result;
  result = driver_.ctx_synchronize();
  if (result != kCudaSuccess) return fail("cuCtxSynchronize", result);
  result = offload(kept, streams, progress);
  // Content is discarded only once all that isn't has been saved.
  return result == kCudaSuccess ? put_to_sleep(move.chunks(discarded, false)) : result;
}

CudaResult SleepHeap::wake_up(const Tags& tags, const CudaStream (&streams)[kNumStreams],
                              SleepProgress* progress) {
  Move move(*this, tags);
  if (move.result() != kCudaSuccess) return move.result();
  return restore(move.chunks(tags, true), streams, progress);
}

size_t SleepHeap::trim_host() {
  Move move(*this, {});
  return move.result() == kCudaSuccess ? host_.trim() : 0;
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

// ---- Allocation.

void* SleepHeap::try_alloc(size_t size, int64_t tag) {
  const Lock lock(mutex_);
  if (is_moving(tag)) {
    note("the memory under this tag is being put to sleep or woken up", size);
    return nullptr;
  }
  DevicePointer address = 0;
  Block block{0, tag, {}};
  if (reserve(size, &address, &block) == kCudaSuccess) {
    blocks_.emplace(address, std::move(block));
    return host_pointer(address);
  }
  if (address != 0 && !release(address, block)) {  // tried again later
    blocks_.emplace(address, std::move(block));
    const Lock pending_lock(pending_mutex_);
    pending_.push_back(host_pointer(address));
  }
  update_free_bytes();
  return nullptr;
}

bool SleepHeap::has_pending() {
  const Lock lock(pending_mutex_);
  return !pending_.empty();
}

std::vector<void*> SleepHeap::give_back_pending() {
  if (shut_down_) return {};
  std::vector<void*> pending, kept, unknown;
  {
    const Lock lock(pending_mutex_);
    std::swap(pending, pending_);
  }
  if (pending.empty()) return unknown;
  bool waits = false;
  {
    const Lock lock(mutex_);
    for (void* const pointer : pending) {
      const auto block = blocks_.find(device_pointer(pointer));
      if (block == blocks_.end() || is_moving(block->second.tag)) continue;
      for (const Chunk& chunk : block->second.chunks) waits |= chunk.memory != 0;
    }
  }
  // Without the lock, which others need who don't wait for the device.
  if (waits && driver_.ctx_synchronize() != kCudaSuccess) {
    kept = std::move(pending);  // it may still be in use
    pending.clear();
  }
  const Lock lock(mutex_);
  for (void* const pointer : pending) {
    const auto block = blocks_.find(device_pointer(pointer));
    if (block == blocks_.end()) {
      ++counters_.unknown_frees;
      unknown.push_back(pointer);
    } else if (is_moving(block->second.tag)) {
      kept.push_back(pointer);
    } else if (release(block->first, block->second)) {
      blocks_.erase(block);
    } else {
      ++counters_.failed_releases;
      kept.push_back(pointer);
    }
  }
  const Lock pending_lock(pending_mutex_);
  pending_.insert(pending_.end(), kept.begin(), kept.end());
  return unknown;
}

// ---- During a Move.

CudaResult SleepHeap::pin(const Chunks& chunks) {
  std::vector<size_t> sizes;
  size_t total = 0;
  for (const Chunk* const chunk : chunks) {
    if (chunk->host != nullptr) continue;
    sizes.push_back(chunk->size);
    total += chunk->size;
  }
  const CudaResult result = host_.prepare(sizes);
  if (result != kCudaSuccess) return fail("cuMemHostAlloc", result, total);
  const Lock lock(mutex_);
  for (Chunk* const chunk : chunks) {
    if (chunk->host == nullptr) chunk->host = host_.take(chunk->size);
  }
  return kCudaSuccess;
}

CudaResult SleepHeap::offload(const Chunks& chunks, const CudaStream (&streams)[kNumStreams],
                              SleepProgress* progress) {
  int64_t done = 0, total = 0;
  for (const Chunk* const chunk : chunks) total += static_cast<int64_t>(chunk->size);
  set(&progress->done, 0);
  set(&progress->total, total);
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
    result = put_to_sleep(copied, true);
    if (!copied.is_asleep) continue;
    ++num_unmapped;
    set(&progress->done, done += static_cast<int64_t>(copied.size));
  }
  if (result == kCudaSuccess) return result;
  // Back to where it was, as far as the driver lets it.
  const SleepFailure failure = t_failure;
  const bool has_ended = wait_for(streams) == kCudaSuccess;
  SleepProgress undone{};
  restore({chunks.begin(), chunks.begin() + num_unmapped}, streams, &undone);
  // Neither what still has the only copy of the content, nor what one may still be written to.
  Chunks awake;
  std::copy_if(chunks.begin(), chunks.end(), std::back_inserter(awake),
               [](const Chunk* chunk) { return !chunk->is_asleep; });
  if (has_ended) drop_host(awake);
  t_failure = failure;
  return result;
}

CudaResult SleepHeap::put_to_sleep(const Chunks& chunks) {
  drop_host(chunks);
  for (Chunk* const chunk : chunks) {
    const CudaResult result = put_to_sleep(*chunk, false);
    if (result != kCudaSuccess) return result;
  }
  return kCudaSuccess;
}

CudaResult SleepHeap::restore(const Chunks& chunks, const CudaStream (&streams)[kNumStreams],
                              SleepProgress* progress) {
  size_t needed = 0;
  int64_t done = 0, total = 0;
  bool has_leftovers = false;
  for (const Chunk* const chunk : chunks) {
    if (chunk->memory == 0) needed += chunk->size;
    has_leftovers |= chunk->memory != 0;
    if (chunk->is_offloaded) total += static_cast<int64_t>(chunk->size);
  }
  set(&progress->done, 0);
  set(&progress->total, total);
  size_t num_free = 0, all = 0;
  if (driver_.mem_get_info(&num_free, &all) == kCudaSuccess && num_free < needed) {
    return fail("cuMemGetInfo", kOutOfMemory, needed);
  }
  CudaResult result = has_leftovers ? wait_for(streams) : kCudaSuccess;
  // An earlier call's copies may still use them.
  if (result != kCudaSuccess) return fail("cuStreamSynchronize", result);
  size_t num_mapped = 0;
  for (size_t i = 0; i < chunks.size() && result == kCudaSuccess; ++i) {
    Chunk& chunk = *chunks[i];
    result = map_anew(chunk);
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
    set(&progress->done, done);
    done += static_cast<int64_t>(chunk.size);
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
      if (has_ended || !chunks[i]->is_offloaded) put_to_sleep(*chunks[i], chunks[i]->is_offloaded);
    }
    t_failure = failure;
    update_free_bytes();
    return result;
  }
  set(&progress->done, total);
  drop_host(chunks);
  const Lock lock(mutex_);
  for (Chunk* const chunk : chunks) chunk->is_asleep = false;
  return kCudaSuccess;
}

CudaResult SleepHeap::map_anew(Chunk& chunk) {
  CudaMemory memory = chunk.memory;
  CudaResult result = kCudaSuccess;
  if (memory != 0) result = unmap(chunk.address, chunk.size, &memory);  // that could not be undone
  if (result == kCudaSuccess) result = map(chunk.address, chunk.size, &memory);
  const Lock lock(mutex_);
  chunk.memory = memory;
  return result;
}

CudaResult SleepHeap::put_to_sleep(Chunk& chunk, bool is_offloaded) {
  CudaMemory memory = chunk.memory;
  const CudaResult result = unmap(chunk.address, chunk.size, &memory);
  const Lock lock(mutex_);
  chunk.memory = memory;
  if (memory == 0) {
    chunk.is_asleep = true;
    chunk.is_offloaded = is_offloaded;
  }
  return result;
}

CudaResult SleepHeap::wait_for(const CudaStream (&streams)[kNumStreams]) {
  CudaResult result = kCudaSuccess;
  for (const CudaStream stream : streams) {
    const CudaResult waited = driver_.stream_synchronize(stream);
    if (result == kCudaSuccess) result = waited;
  }
  return result;
}

void SleepHeap::drop_host(const Chunks& chunks) {
  const Lock lock(mutex_);
  for (Chunk* const chunk : chunks) drop_host(*chunk);
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
    result = map(chunk.address, chunk.size, &chunk.memory);
    if (result == kCudaSuccess) continue;
    t_failure.needed_bytes = static_cast<int64_t>(block->size);
    return result;
  }
  return kCudaSuccess;
}

bool SleepHeap::release(DevicePointer address, Block& block) {
  const SleepFailure failure = t_failure;  // that of the call which comes here, not of this one
  bool released = true;
  for (Chunk& chunk : block.chunks) {
    drop_host(chunk);
    if (chunk.memory != 0) unmap(chunk.address, chunk.size, &chunk.memory);
    released &= chunk.memory == 0;
  }
  released = released && driver_.mem_address_free(address, block.size) == kCudaSuccess;
  if (!released) block.tag = 0;  // what is left of it neither sleeps nor wakes up
  t_failure = failure;
  return released;
}

void SleepHeap::drop_host(Chunk& chunk) {
  if (chunk.host != nullptr) host_.give_back(chunk.host, chunk.size);
  chunk.host = nullptr;
  chunk.is_offloaded = false;
}

bool SleepHeap::is_moving(int64_t tag) const { return has(moving_, tag); }

// ---- Without.

CudaResult SleepHeap::map(DevicePointer address, size_t size, CudaMemory* memory) {
  const CudaMemProp prop = properties();
  CudaMemory created = 0;
  CudaResult result = driver_.mem_create(&created, size, &prop, 0);
  if (result != kCudaSuccess) return fail("cuMemCreate", result, size);
  result = driver_.mem_map(address, size, 0, created, 0);
  if (result != kCudaSuccess) {
    driver_.mem_release(created);
    return fail("cuMemMap", result);
  }
  const CudaMemAccess access = {kDevice, device_, kReadWrite};
  result = driver_.mem_set_access(address, size, &access, 1);
  if (result != kCudaSuccess) {
    fail("cuMemSetAccess", result);
    if (driver_.mem_unmap(address, size) == kCudaSuccess) {
      driver_.mem_release(created);
      created = 0;
    }
  }
  *memory = created;  // after an error to be unmapped later, if at all
  return result;
}

CudaResult SleepHeap::unmap(DevicePointer address, size_t size, CudaMemory* memory) {
  CudaResult result = driver_.mem_unmap(address, size);
  if (result != kCudaSuccess) return fail("cuMemUnmap", result);
  result = driver_.mem_release(*memory);
  *memory = 0;  // without its mapping it is of no use, whatever becomes of it
  return result == kCudaSuccess ? result : fail("cuMemRelease", result);
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
