// Every driver call of an operation fails in turn, and nothing is lost or left behind.

#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <string>
#include <vector>

#include "rig.h"

namespace distcomm::tests {
namespace {

using fake::Call;

// Three tags: a is offloaded, b is discarded, and c stays awake.
struct Scene {
  Scene()
      : a(rig.heap->new_tag()), b(rig.heap->new_tag()), c(rig.heap->new_tag()),
        of_a{rig.make(a, kChunk + kGranularity), rig.make(a, 3 * kChunk)},
        of_b{rig.make(b, 2 * kChunk + kGranularity)}, of_c{rig.make(c, kGranularity)} {}

  size_t bytes(const std::vector<Block>& blocks) const {
    size_t bytes = 0;
    for (const Block& block : blocks) bytes += block.size;
    return bytes;
  }
  CudaResult sleep() { return rig.sleep({a, b}, {a}); }
  CudaResult wake_up() { return rig.wake_up({a, b}); }
  void check_awake(int64_t tag, const std::vector<Block>& blocks, bool with_content = true) {
    rig.check_usage(tag, blocks.size(), bytes(blocks), 0, 0);
    for (const Block& block : blocks) {
      CHECK(rig.is_accessible(block));
      CHECK(!with_content || block.holds());
    }
  }
  void check_asleep(int64_t tag, const std::vector<Block>& blocks, bool offloaded) {
    rig.check_usage(tag, blocks.size(), 0, bytes(blocks), offloaded ? bytes(blocks) : 0);
  }
  void free_all() {
    for (const auto& blocks : {of_a, of_b, of_c}) {
      for (const Block& block : blocks) CHECK(rig.free(block));
    }
    rig.check_all_gone();
  }

  Rig rig;
  const int64_t a, b, c;
  const std::vector<Block> of_a, of_b, of_c;
};

bool is_one_of(Call call, std::initializer_list<Call> calls) {
  for (const Call each : calls) {
    if (each == call) return true;
  }
  return false;
}

// Without these, it is only that something isn't known, or not given back yet. The context is the
// one for what was freed meanwhile.
bool is_harmless(Call call) {
  return is_one_of(call, {fake::kInfo, fake::kAttribute, fake::kHostFree, fake::kRetain,
                          fake::kPush});
}

void check_text(Rig& rig, CudaResult code) {
  const SleepFailure failure = rig.heap->take_failure();
  const Call call = rig.fake.last_failed();
  if (is_one_of(call, {fake::kRetain, fake::kPush, fake::kIsCapturing})) {
    CHECK(failure.text[0] != 0);
    return;
  }
  CHECK_EQ(failure.code, code);
  for (const std::string& part : {std::string(fake::kNames[call]), std::to_string(code)}) {
    CHECK(std::strstr(failure.text, part.c_str()) != nullptr);
  }
  CHECK(std::strstr(failure.text, "fake error") != nullptr);
}

// Calls `what(scene, code)` once for each driver call that it makes, which fails with `code`;
// and `then(scene, whether it has succeeded nevertheless)`.
template <typename Before, typename What, typename Then>
void fail_each(const Before& before, const What& what, const Then& then) {
  for (const CudaResult code : {2, 700}) {
    for (int n = 1;; ++n) {
      g_case = 1000 * code + n;
      Scene scene;
      before(scene);
      scene.rig.heap->take_failure();
      const int num_calls = scene.rig.fake.calls();
      scene.rig.fake.fail_nth_of_any(n, code);
      const bool succeeded = what(scene);
      const bool has_failed = scene.rig.fake.last_failed() != fake::kNumCalls;
      scene.rig.fake.clear_failures();
      if (!has_failed) {
        CHECK(succeeded);
        CHECK(n > 3 && n > scene.rig.fake.calls() - num_calls);
        break;
      }
      if (!succeeded) check_text(scene.rig, code);
      if (succeeded) CHECK(is_harmless(scene.rig.fake.last_failed()));
      then(scene, succeeded);
      scene.free_all();
    }
  }
}

void nothing(Scene&) {}

void asleep(Scene& scene) { CHECK_EQ(scene.sleep(), kCudaSuccess); }

void alloc_fails_at_every_call() {
  constexpr size_t kSize = 2 * kChunk + kGranularity;
  void* pointer = nullptr;
  Held before{};
  fail_each(
      nothing,
      [&](Scene& scene) {
        before = scene.rig.held();
        pointer = scene.rig.alloc(scene.a, kSize);
        return pointer != nullptr;
      },
      [&](Scene& scene, bool succeeded) {
        Rig& rig = scene.rig;
        if (!succeeded) {
          CHECK(rig.held() == before);
          scene.check_awake(scene.a, scene.of_a);
          CHECK_EQ(rig.heap->stats().failed_allocations, 1);
          pointer = rig.alloc(scene.a, kSize);
        }
        CHECK(pointer != nullptr);
        CHECK_EQ(rig.heap->usage(scene.a).blocks, scene.of_a.size() + 1);
        CHECK(rig.heap->free(pointer, kPlainStream));
        CHECK(rig.held() == before);
      });
}

// The first block of all asks the driver more.
void first_alloc_fails_at_every_call() {
  for (int n = 1;; ++n) {
    g_case = n;
    Rig rig;
    const int64_t tag = rig.heap->new_tag();
    rig.fake.fail_nth_of_any(n, 700);
    void* pointer = rig.alloc(tag, kChunk);
    const Call failed = rig.fake.last_failed();
    rig.fake.clear_failures();
    if (pointer == nullptr) {
      check_text(rig, 700);
      CHECK(rig.held() == (Held{0, 0, 0, 0, 0}));
      pointer = rig.alloc(tag, kChunk);
      CHECK(pointer != nullptr);
    }
    CHECK(rig.heap->free(pointer, kPlainStream));
    rig.check_all_gone();
    if (failed == fake::kNumCalls) break;
  }
}

// As long as there is something to save, a failure undoes all.
void check_after_failed_sleep(Scene& scene, bool succeeded, bool offloads) {
  Rig& rig = scene.rig;
  scene.check_awake(scene.c, scene.of_c);
  const SleepUsage of_a = rig.heap->usage(scene.a), of_b = rig.heap->usage(scene.b);
  if (succeeded) {
    scene.check_asleep(scene.a, scene.of_a, offloads);
    scene.check_asleep(scene.b, scene.of_b, false);
  } else if (offloads && of_a.asleep_bytes == 0) {
    scene.check_awake(scene.a, scene.of_a);
    scene.check_awake(scene.b, scene.of_b);
  } else if (offloads) {
    scene.check_asleep(scene.a, scene.of_a, true);
  }
  for (const auto& blocks : {scene.of_a, scene.of_b}) {
    for (const Block& block : blocks) {
      for (size_t begin = 0; begin < block.size; begin += kChunk) {
        const size_t end = std::min(begin + kChunk, block.size);
        if (rig.is_accessible(block, begin, end)) CHECK(block.holds(begin, end));
      }
    }
  }
  CHECK_EQ(of_b.offloaded_bytes, 0);
  rig.heap->cancel({scene.a, scene.b});
  const SleepStats stats = rig.heap->stats();
  CHECK_EQ(stats.host_bytes - stats.free_host_bytes, of_a.offloaded_bytes);
}

void sleep_fails_at_every_call() {
  for (const bool offloads : {true, false}) {
    for (const bool again : {false, true}) {
      const auto sleep = [&](Scene& scene) {
        return scene.rig.sleep({scene.a, scene.b}, offloads ? Tags{scene.a} : Tags{}) == 0;
      };
      fail_each(nothing, sleep, [&](Scene& scene, bool succeeded) {
        check_after_failed_sleep(scene, succeeded, offloads);
        if (again) {
          CHECK(sleep(scene));
          scene.check_asleep(scene.a, scene.of_a, offloads);
          scene.check_asleep(scene.b, scene.of_b, false);
          CHECK_EQ(scene.rig.held().mappings, 1);
        }
        CHECK_EQ(scene.wake_up(), kCudaSuccess);
        scene.check_awake(scene.a, scene.of_a, offloads);
        scene.check_awake(scene.b, scene.of_b, false);
        scene.check_awake(scene.c, scene.of_c);
      });
    }
  }
}

void prepare_fails_at_every_call() {
  fail_each(
      nothing, [](Scene& scene) { return scene.rig.heap->prepare({scene.a}) == kCudaSuccess; },
      [](Scene& scene, bool succeeded) {
        CHECK_EQ(scene.rig.held().host, succeeded ? scene.bytes(scene.of_a) : 0);
        scene.check_awake(scene.a, scene.of_a);
        CHECK_EQ(scene.rig.heap->prepare({scene.a}), kCudaSuccess);
        CHECK_EQ(scene.rig.held().host, scene.bytes(scene.of_a));
      });
}

void wake_up_fails_at_every_call() {
  Held before{};
  fail_each(
      asleep,
      [&](Scene& scene) {
        before = scene.rig.held();
        return scene.wake_up() == kCudaSuccess;
      },
      [&](Scene& scene, bool succeeded) {
        scene.check_awake(scene.c, scene.of_c);
        if (!succeeded) {
          scene.check_asleep(scene.a, scene.of_a, true);
          scene.check_asleep(scene.b, scene.of_b, false);
          CHECK(scene.rig.held() == before);
          CHECK_EQ(scene.rig.heap->stats().free_host_bytes, 0);
          CHECK_EQ(scene.wake_up(), kCudaSuccess);
        }
        scene.check_awake(scene.a, scene.of_a);
        scene.check_awake(scene.b, scene.of_b, false);
      });
}

// What can't be given back now is later.
void free_fails_at_every_call() {
  for (const bool is_asleep : {false, true}) {
    for (int n = 1;; ++n) {
      g_case = n;
      Scene scene;
      if (is_asleep) asleep(scene);
      scene.rig.fake.fail_nth_of_any(n, 700);
      CHECK(scene.rig.free(scene.of_a[1]));
      CHECK_EQ(scene.rig.heap->take_failure().text[0], 0);  // that is an allocation's
      const Call failed = scene.rig.fake.last_failed();
      scene.rig.fake.clear_failures();
      if (failed == fake::kFreeRange || failed == fake::kUnmap) {
        CHECK_EQ(scene.rig.heap->stats().failed_releases, 1);
      }
      scene.rig.heap->settle();
      CHECK_EQ(scene.rig.heap->usage(scene.a).blocks, 1);
      CHECK_EQ(scene.rig.held().ranges, 3);
      CHECK_EQ(scene.wake_up(), kCudaSuccess);
      CHECK(scene.of_a[0].holds());
      CHECK_EQ(scene.rig.heap->stats().unknown_frees, 0);
      CHECK(scene.rig.free(scene.of_a[0]) && scene.rig.free(scene.of_b[0]));
      CHECK(scene.rig.free(scene.of_c[0]));
      scene.rig.check_all_gone();
      if (failed == fake::kNumCalls) break;
    }
  }
}

}  // namespace

std::vector<Test> failing_call_tests() {
  return {
      TEST(alloc_fails_at_every_call),
      TEST(first_alloc_fails_at_every_call),
      TEST(sleep_fails_at_every_call),
      TEST(prepare_fails_at_every_call),
      TEST(wake_up_fails_at_every_call),
      TEST(free_fails_at_every_call),
  };
}

}  // namespace distcomm::tests
