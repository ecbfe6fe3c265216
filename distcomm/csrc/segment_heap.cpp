#include "segment_heap.h"

#include <algorithm>
#include <cstdio>
#include <iterator>

namespace distcomm {
namespace {

using Lock = std::lock_guard<std::mutex>;

// Of the thread, because torch raises its error in the thread whose allocation failed.
thread_local AllocationFailure t_failure{};

// Sizes that no memory has stay as large, and don't wrap around.
size_t rounded_up(size_t size) {
  constexpr size_t kLargest = SIZE_MAX / 2 / kAlignment * kAlignment;
  return size >= kLargest ? kLargest : (size + kAlignment - 1) / kAlignment * kAlignment;
}

}  // namespace

SegmentHeap::SegmentHeap(const NcclSymbols& nccl, const CudaDriver& driver, int device,
                         size_t chunk_bytes)
    : nccl_(nccl),
      driver_(driver),
      device_(device),
      chunk_bytes_(rounded_up(chunk_bytes)),
      memory_(nccl, driver, device) {}

void* SegmentHeap::alloc(size_t size, CudaStream stream) {
  // Asked before the lock is taken: the driver has locks of its own.
  const bool capturing = is_capturing(driver_, stream);
  size = std::max(rounded_up(size), kAlignment);
  t_failure = AllocationFailure{};
  const bool deferring = defers_frees();
  if (!capturing && !deferring) settle();
  std::optional<Range> range = take(size);
  if (!range && !capturing && deferring && settle()) range = take(size);
  const Lock lock(mutex_);
  ++counters_.allocations;
  if (asleep_) {  // since a range was taken, or before
    if (range) take_back(*range);
    ++counters_.failed_allocations;
    fail(FailureKind::kAsleep, size, kNcclSuccess, "the symmetric memory is asleep");
    return nullptr;
  }
  if (!range) {  // unless another thread has made room meanwhile
    range = ranges_.take(size);
    if (range) counters_.bytes_used += static_cast<int64_t>(size);
  }
  if (!range && frozen_) return alloc_ordinary(size);
  if (!range && capturing) {
    ++counters_.failed_allocations;
    fail(FailureKind::kCapturing, size, kNcclSuccess,
         "no registered segment has room, and none can be registered during a capture");
    return nullptr;
  }
  if (!range) {
    if (!make_segment(std::max(size, chunk_bytes_), SegmentKind::kGrown)) return nullptr;
    range = ranges_.take(size);
    counters_.bytes_used += static_cast<int64_t>(size);
  }
  return segments_.at(range->ordinal).base + range->offset;
}

bool SegmentHeap::free(void* pointer, CudaStream stream) {
  {
    const Lock lock(mutex_);
    if (shut_down_) return true;
    if (defers_frees_) {
      pending_.push_back(pointer);
      return true;
    }
  }
  std::vector<void*> pending;
  const bool capturing = is_capturing(driver_, stream);
  if (!capturing) {
    const Lock lock(mutex_);
    std::swap(pending, pending_);
  }
  const bool idle = !capturing && synchronize(driver_, device_);
  const Lock lock(mutex_);
  give_back_or_keep(pending, idle);
  if (idle) return give_back(pointer);
  pending_.push_back(pointer);
  return true;
}

bool SegmentHeap::settle() {
  std::vector<void*> pending;
  {
    const Lock lock(mutex_);
    if (!shut_down_) std::swap(pending, pending_);
  }
  if (pending.empty()) return false;
  const bool idle = synchronize(driver_, device_);
  const Lock lock(mutex_);
  give_back_or_keep(pending, idle);
  return idle;
}

void SegmentHeap::defer_frees(bool deferred) {
  const Lock lock(mutex_);
  defers_frees_ = deferred;
}

bool SegmentHeap::defers_frees() {
  const Lock lock(mutex_);
  return defers_frees_;
}

std::optional<Range> SegmentHeap::take(size_t size) {
  const Lock lock(mutex_);
  const std::optional<Range> range = ranges_.take(size);
  if (range) counters_.bytes_used += static_cast<int64_t>(size);
  return range;
}

void SegmentHeap::take_back(const Range& range) {
  counters_.bytes_used -= static_cast<int64_t>(ranges_.give_back(range.ordinal, range.offset));
}

void* SegmentHeap::borrow(size_t size) {
  const Lock lock(mutex_);
  if (asleep_) return nullptr;
  const std::optional<Range> range = ranges_.take(std::max(rounded_up(size), kAlignment));
  return range ? segments_.at(range->ordinal).base + range->offset : nullptr;
}

void SegmentHeap::give_back_borrowed(void* pointer) {
  const Lock lock(mutex_);
  const std::optional<int64_t> ordinal = ordinal_at(pointer);
  if (!ordinal) return;
  ranges_.give_back(*ordinal, static_cast<const char*>(pointer) - segments_.at(*ordinal).base);
  release_if_empty(*ordinal);
}

AllocationFailure SegmentHeap::take_failure() {
  const AllocationFailure failure = t_failure;
  t_failure = AllocationFailure{};
  return failure;
}

NcclResult SegmentHeap::reserve(size_t size) {
  const Lock lock(mutex_);
  size = std::max(rounded_up(size), kAlignment);
  if (make_segment(size, SegmentKind::kSlab)) return kNcclSuccess;
  return static_cast<NcclResult>(t_failure.code);
}

void SegmentHeap::retire_all() {
  const Lock lock(mutex_);
  asleep_ = false;
  for (const int64_t ordinal : ordinals()) {
    retire(ordinal);
    segments_.at(ordinal).of_the_past = true;
    release_if_empty(ordinal);
  }
}

void SegmentHeap::freeze(bool frozen) {
  const Lock lock(mutex_);
  frozen_ = frozen;
}

void SegmentHeap::trim() {
  const Lock lock(mutex_);
  for (const int64_t ordinal : ordinals()) release_if_empty(ordinal);
}

void SegmentHeap::shut_down() {
  const Lock lock(mutex_);
  shut_down_ = true;
}

bool SegmentHeap::can_sleep() {
  t_failure = AllocationFailure{};
  const Lock lock(mutex_);
  for (const auto& [ordinal, segment] : segments_) {
    const char* const why = why_awake(segment);
    if (why == nullptr) continue;
    fail(FailureKind::kNccl, segment.size, kNcclInvalidUsage,
         "segment " + std::to_string(ordinal) + " " + why);
    return false;
  }
  return true;
}

NcclResult SegmentHeap::fall_asleep(int64_t* bytes) {
  *bytes = 0;
  t_failure = AllocationFailure{};
  const Lock lock(mutex_);
  asleep_ = true;
  NcclResult result = kNcclSuccess;
  for (const auto& [ordinal, segment] : segments_) {
    if (segment.of_the_past || !memory_.has_memory(segment.base)) continue;
    const char* why = why_awake(segment);
    if (why == nullptr && has_windows(ordinal)) why = "still has windows";
    const NcclResult given = why == nullptr ? memory_.give_back(segment.base) : kNcclInvalidUsage;
    if (given == kNcclSuccess) {
      *bytes += static_cast<int64_t>(segment.size);
    } else if (result == kNcclSuccess) {
      result = given;
      fail(FailureKind::kNccl, segment.size, given,
           why == nullptr ? nccl_text("ncclMemFree", given)
                          : "segment " + std::to_string(ordinal) + " " + why);
    }
  }
  return result;
}

NcclResult SegmentHeap::wake_up(int64_t* bytes) {
  *bytes = 0;
  t_failure = AllocationFailure{};
  const Lock lock(mutex_);
  std::vector<char*> taken;
  for (const auto& [ordinal, segment] : segments_) {
    if (segment.of_the_past || memory_.has_memory(segment.base)) continue;
    const NcclResult result = memory_.take_again(segment.base);
    if (result == kNcclSuccess) {
      taken.push_back(segment.base);
      *bytes += static_cast<int64_t>(segment.size);
      continue;
    }
    fail(FailureKind::kNccl, segment.size, result, nccl_text("ncclMemAlloc", result));
    for (char* const base : taken) memory_.give_back(base);
    *bytes = 0;
    return result;
  }
  asleep_ = false;
  return kNcclSuccess;
}

bool SegmentHeap::find(NcclComm comm, const void* pointer, Location* location) {
  const Lock lock(mutex_);
  const std::optional<int64_t> ordinal = ordinal_at(pointer);
  if (!ordinal) return false;
  const Segment& segment = segments_.at(*ordinal);
  location->ordinal = *ordinal;
  location->offset = static_cast<const char*>(pointer) - segment.base;
  location->segment_bytes = static_cast<int64_t>(segment.size);
  location->window = nullptr;
  const auto record = comms_.find(comm);
  if (record == comms_.end()) return true;
  const auto window = record->second->windows.find(*ordinal);
  if (window != record->second->windows.end()) location->window = window->second;
  return true;
}

int64_t SegmentHeap::num_ordinary() {
  const Lock lock(mutex_);
  return counters_.ordinary_allocations;
}

int64_t SegmentHeap::next_ordinal() {
  const Lock lock(mutex_);
  return next_ordinal_;
}

void SegmentHeap::raise_ordinal(int64_t ordinal) {
  const Lock lock(mutex_);
  next_ordinal_ = std::max(next_ordinal_, ordinal);
}

HeapStats SegmentHeap::stats() {
  const Lock lock(mutex_);
  HeapStats stats = counters_;
  stats.segments = static_cast<int64_t>(segments_.size());
  for (const auto& [ordinal, segment] : segments_) {
    stats.bytes_reserved += static_cast<int64_t>(segment.size);
    stats.slabs += segment.kind == SegmentKind::kSlab;
    stats.retired_segments += segment.retired;
  }
  stats.largest_free = static_cast<int64_t>(ranges_.largest());
  return stats;
}

// ---- With the lock held.

void* SegmentHeap::make_memory(size_t size) {
  const void* top = by_base_.empty() ? nullptr : by_base_.rbegin()->first;
  if (!ordinary_.empty()) top = std::max<const void*>(top, ordinary_.rbegin()->first);
  NcclResult result = kNcclSuccess;
  void* const memory = memory_.alloc(size, &result);
  if (memory == nullptr) {
    ++counters_.failed_allocations;
    fail(FailureKind::kNccl, size, result, nccl_text("ncclMemAlloc", result));
  } else {
    counters_.out_of_order += memory < top;
    counters_.not_mapped += !memory_.is_mapped(memory);
  }
  return memory;
}

bool SegmentHeap::make_segment(size_t size, SegmentKind kind) {
  if (asleep_) {
    fail(FailureKind::kAsleep, size, kNcclInvalidUsage, "the symmetric memory is asleep");
    return false;
  }
  char* const base = static_cast<char*>(make_memory(size));
  if (base == nullptr) return false;
  const int64_t ordinal = next_ordinal_++;
  ++counters_.segments_made;
  ranges_.add(ordinal, size);
  by_base_[base] = ordinal;
  segments_[ordinal] = Segment{base, size, kind};
  return true;
}

void* SegmentHeap::alloc_ordinary(size_t size) {
  const RelaxedCapture relaxed(driver_);
  void* const memory = make_memory(size);
  if (memory == nullptr) return nullptr;
  ordinary_[memory] = size;
  counters_.ordinary_bytes += static_cast<int64_t>(size);
  ++counters_.ordinary_allocations;
  return memory;
}

void SegmentHeap::give_back_or_keep(const std::vector<void*>& pending, bool idle) {
  for (void* const pointer : pending) {
    if (idle) {
      give_back(pointer);
    } else {
      pending_.push_back(pointer);
    }
  }
}

bool SegmentHeap::give_back(void* pointer) {
  if (free_ordinary(pointer)) return true;
  const std::optional<int64_t> ordinal = ordinal_at(pointer);
  size_t given = 0;
  if (ordinal) {
    const char* const base = segments_.at(*ordinal).base;
    given = ranges_.give_back(*ordinal, static_cast<const char*>(pointer) - base);
  }
  if (given == 0) {
    ++counters_.unknown_frees;
    return false;
  }
  counters_.bytes_used -= static_cast<int64_t>(given);
  release_if_empty(*ordinal);
  return true;
}

bool SegmentHeap::free_ordinary(void* pointer) {
  const auto found = ordinary_.find(pointer);
  if (found == ordinary_.end()) return false;
  counters_.ordinary_bytes -= static_cast<int64_t>(found->second);
  ordinary_.erase(found);
  if (memory_.free(pointer) != kNcclSuccess) ++counters_.failed_releases;
  return true;
}

std::vector<int64_t> SegmentHeap::ordinals() const {
  std::vector<int64_t> all;
  for (const auto& entry : segments_) all.push_back(entry.first);
  return all;
}

void SegmentHeap::retire(int64_t ordinal) {
  segments_.at(ordinal).retired = true;
  ranges_.retire(ordinal);
}

void SegmentHeap::release_if_empty(int64_t ordinal) {
  const auto found = segments_.find(ordinal);
  if (found == segments_.end()) return;
  const Segment& segment = found->second;
  const bool stays = segment.kind == SegmentKind::kSlab && !segment.retired;
  if (stays || segment.num_pins > 0 || !ranges_.all_free(ordinal)) return;
  const RelaxedCapture relaxed(driver_);
  NcclResult result = kNcclSuccess;
  for (auto& [comm, record] : comms_) {  // windows end before their memory does
    const NcclResult ended = end_window(comm, *record, ordinal);
    if (result == kNcclSuccess) result = ended;
  }
  if (result == kNcclSuccess) result = memory_.free(segment.base);
  if (result != kNcclSuccess) {
    // It has lost some of its windows, so it isn't used again; trim() tries once more.
    ++counters_.failed_releases;
    retire(ordinal);
    return;
  }
  ranges_.remove(ordinal);
  by_base_.erase(segment.base);
  segments_.erase(found);
}

void SegmentHeap::fail(FailureKind kind, size_t size, NcclResult code, const std::string& text) {
  t_failure.kind = kind;
  t_failure.bytes = static_cast<int64_t>(size);
  t_failure.code = code;
  std::snprintf(t_failure.text, sizeof(t_failure.text), "%s", text.c_str());
}

std::string SegmentHeap::nccl_text(const char* call, NcclResult code) const {
  std::string text = std::string(call) + " returned " + std::to_string(code);
  if (nccl_.error_string != nullptr) {
    text += std::string(" (") + nccl_.error_string(code) + ")";
  }
  const char* const last = nccl_.last_error != nullptr ? nccl_.last_error(nullptr) : nullptr;
  return last != nullptr && *last != '\0' ? text + ": " + last : text;
}

const char* SegmentHeap::why_awake(const Segment& segment) const {
  if (segment.num_pins > 0) return "is being registered";
  if (segment.of_the_past || memory_.is_mapped(segment.base)) return nullptr;
  return "lies at NCCL's own address, which would not stay";
}

bool SegmentHeap::has_windows(int64_t ordinal) const {
  return std::any_of(comms_.begin(), comms_.end(), [ordinal](const auto& entry) {
    const auto window = entry.second->windows.find(ordinal);
    return window != entry.second->windows.end() && window->second != nullptr;
  });
}

std::optional<int64_t> SegmentHeap::ordinal_at(const void* pointer) const {
  const char* const address = static_cast<const char*>(pointer);
  auto next = by_base_.upper_bound(address);
  if (next == by_base_.begin()) return std::nullopt;
  const auto [base, ordinal] = *std::prev(next);
  const size_t offset = address - base;
  if (offset >= segments_.at(ordinal).size) return std::nullopt;
  return ordinal;
}

}  // namespace distcomm
