// The windows that communicators have of the heap's segments.

#include <algorithm>

#include "segment_heap.h"

namespace distcomm {
namespace {

using Lock = std::lock_guard<std::mutex>;

}  // namespace

size_t SegmentHeap::num_new(NcclComm comm) {
  const Lock lock(mutex_);
  Comm& record = comm_record(comm);
  if (record.seen == next_ordinal_) return 0;
  const size_t count = unseen(record, next_ordinal_).size();
  // What was made since has been freed already, or is never registered.
  if (count == 0) record.seen = next_ordinal_;
  return count;
}

std::vector<SegmentInfo> SegmentHeap::pin_new(NcclComm comm) {
  const Lock lock(mutex_);
  Comm& record = comm_record(comm);
  std::vector<SegmentInfo> infos;
  for (const int64_t ordinal : unseen(record, next_ordinal_)) {
    Segment& segment = segments_.at(ordinal);
    ++segment.num_pins;
    record.pinned.push_back(ordinal);
    infos.push_back({ordinal, static_cast<int64_t>(segment.size),
                     static_cast<int64_t>(reinterpret_cast<intptr_t>(segment.base))});
  }
  return infos;
}

void SegmentHeap::unpin(NcclComm comm) {
  const Lock lock(mutex_);
  const auto found = comms_.find(comm);
  if (found == comms_.end()) return;
  std::vector<int64_t> pinned;
  std::swap(pinned, found->second->pinned);
  unpin_all(pinned);
}

void SegmentHeap::pass_over(NcclComm comm, const std::vector<int64_t>& ordinals) {
  const Lock lock(mutex_);
  Comm& record = comm_record(comm);
  for (const int64_t ordinal : ordinals) {
    if (segments_.count(ordinal) != 0) record.windows.insert({ordinal, nullptr});
  }
}

NcclResult SegmentHeap::register_new(NcclComm comm, int64_t through, int64_t* null_windows) {
  *null_windows = 0;
  std::vector<Pending> batch;
  std::vector<int64_t> pinned;
  std::shared_ptr<Comm> record;
  int64_t end = 0;  // the first ordinal that this call doesn't look at
  {
    const Lock lock(mutex_);
    comm_record(comm);
    record = comms_.at(comm);
    if (record->registering || record->cancelled) {
      fail(FailureKind::kNccl, 0, kNcclUnhandledCudaError,
           record->cancelled ? "an earlier registration with this communicator got stuck"
                             : "another registration with this communicator is under way");
      return kNcclUnhandledCudaError;
    }
    record->registering = true;
    end = std::min(through, next_ordinal_ - 1) + 1;
    for (const int64_t ordinal : unseen(*record, through)) {
      Segment& segment = segments_.at(ordinal);
      ++segment.num_pins;
      batch.push_back({ordinal, segment.base, segment.size, nullptr});
      pinned.push_back(ordinal);
    }
  }
  // Without the lock: NCCL waits here for the other ranks, and other threads go on allocating.
  NcclResult result = kNcclSuccess;
  size_t num_done = 0;
  while (result == kNcclSuccess && num_done < batch.size() && !record->cancelled) {
    Pending& next = batch[num_done];
    result = nccl_.window_register(comm, next.base, next.size, &next.window, kNcclWinSymmetric);
    if (result == kNcclSuccess) ++num_done;
  }
  const Lock lock(mutex_);
  record->registering = false;
  const auto current = comms_.find(comm);
  const bool released = current == comms_.end() || current->second != record;
  for (size_t i = 0; i < num_done && !released; ++i) {
    const Pending& done = batch[i];
    ++counters_.registrations;
    record->windows[done.ordinal] = done.window;
    if (record->cancelled || segments_.at(done.ordinal).retired) {
      end_window(comm, *record, done.ordinal);
    }
    if (done.window == nullptr) ++*null_windows;
  }
  if (result != kNcclSuccess) {
    fail(FailureKind::kNccl, batch[num_done].size, result,
         nccl_text("ncclCommWindowRegister", result));
  } else if (!record->cancelled) {
    record->seen = std::max(record->seen, end);
  }
  unpin_all(pinned);
  return result;
}

void SegmentHeap::cancel_registration(NcclComm comm) {
  const Lock lock(mutex_);
  const auto found = comms_.find(comm);
  if (found != comms_.end()) found->second->cancelled = true;
}

NcclResult SegmentHeap::abandon(NcclComm comm, const std::vector<int64_t>& ordinals) {
  const Lock lock(mutex_);
  NcclResult result = kNcclSuccess;
  for (const int64_t ordinal : ordinals) {
    if (segments_.count(ordinal) == 0) continue;
    retire(ordinal);
    const auto record = comms_.find(comm);
    if (record != comms_.end()) {
      const NcclResult ended = end_window(comm, *record->second, ordinal);
      if (result == kNcclSuccess) result = ended;
    }
    release_if_empty(ordinal);
  }
  return result;
}

NcclResult SegmentHeap::release_comm(NcclComm comm, bool deregister) {
  std::map<int64_t, NcclWindow> windows;
  std::vector<int64_t> pinned;
  {
    const Lock lock(mutex_);
    const auto found = comms_.find(comm);
    if (found == comms_.end()) return kNcclSuccess;
    windows = std::move(found->second->windows);
    pinned = std::move(found->second->pinned);
    comms_.erase(found);
    for (const auto& [ordinal, window] : windows) {  // their memory stays until they have ended
      const auto segment = segments_.find(ordinal);
      if (segment == segments_.end()) continue;
      ++segment->second.num_pins;
      pinned.push_back(ordinal);
    }
  }
  // Without the lock: a call that gets stuck is not to keep others from allocating.
  NcclResult result = kNcclSuccess;
  for (const auto& [ordinal, window] : windows) {
    if (!deregister || window == nullptr) continue;
    const NcclResult ended = nccl_.window_deregister(comm, window);
    if (result == kNcclSuccess) result = ended;
  }
  const Lock lock(mutex_);
  unpin_all(pinned);
  return result;
}

size_t SegmentHeap::num_windows(NcclComm comm) {
  const Lock lock(mutex_);
  const auto found = comms_.find(comm);
  if (found == comms_.end()) return 0;
  const auto& windows = found->second->windows;
  return std::count_if(windows.begin(), windows.end(),
                       [](const auto& entry) { return entry.second != nullptr; });
}

// ---- With the lock held.

void SegmentHeap::unpin_all(const std::vector<int64_t>& pinned) {
  for (const int64_t ordinal : pinned) {
    --segments_.at(ordinal).num_pins;
    release_if_empty(ordinal);
  }
}

SegmentHeap::Comm& SegmentHeap::comm_record(NcclComm comm) {
  std::shared_ptr<Comm>& record = comms_[comm];
  if (!record) record = std::make_shared<Comm>();
  return *record;
}

NcclResult SegmentHeap::end_window(NcclComm comm, Comm& record, int64_t ordinal) {
  const auto window = record.windows.find(ordinal);
  if (window == record.windows.end()) return kNcclSuccess;
  if (window->second != nullptr) {
    const NcclResult result = nccl_.window_deregister(comm, window->second);
    if (result != kNcclSuccess) return result;
  }
  record.windows.erase(window);
  return kNcclSuccess;
}

std::vector<int64_t> SegmentHeap::unseen(const Comm& comm, int64_t through) const {
  std::vector<int64_t> ordinals;
  for (auto entry = segments_.lower_bound(comm.seen);
       entry != segments_.end() && entry->first <= through; ++entry) {
    if (!entry->second.retired && comm.windows.count(entry->first) == 0) {
      ordinals.push_back(entry->first);
    }
  }
  return ordinals;
}

}  // namespace distcomm
