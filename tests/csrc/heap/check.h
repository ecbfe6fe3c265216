// Checks that end the process, and what a test is.
#pragma once

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <iostream>
#include <vector>

namespace distcomm::tests {

inline unsigned long g_seed = 1;
// What a random test is at: its own seed, or call number.
inline std::atomic<unsigned long> g_case{0};

#define CHECK(condition)                                                                   \
  do {                                                                                     \
    if (!(condition)) {                                                                    \
      std::cerr << __FILE__ << ":" << __LINE__ << ": " << #condition << " (seed " << g_seed \
                << ", case " << g_case << ")" << std::endl;                                \
      std::_Exit(1);                                                                       \
    }                                                                                      \
  } while (false)

template <typename A, typename B>
void check_equal(const A& actual, const B& expected, const char* what, const char* file, int line) {
  if (actual == static_cast<A>(expected)) return;
  std::cerr << file << ":" << line << ": " << what << ": " << actual << " instead of " << expected
            << " (seed " << g_seed << ", case " << g_case << ")" << std::endl;
  std::_Exit(1);
}
#define CHECK_EQ(actual, expected) check_equal(actual, expected, #actual, __FILE__, __LINE__)

struct Test {
  const char* name;
  void (*run)();
};
#define TEST(name) Test{#name, name}

// main() of a test program, which takes [seed] [part of a test's name]: the files' tests in order.
inline int run_tests(int argc, char** argv, const std::vector<std::vector<Test> (*)()>& files) {
  if (argc > 1) g_seed = std::strtoul(argv[1], nullptr, 10);
  const char* const part = argc > 2 ? argv[2] : "";
  for (const auto tests_of_file : files) {
    for (const Test& test : tests_of_file()) {
      if (std::strstr(test.name, part) == nullptr) continue;
      std::cout << test.name << std::endl;
      g_case = 0;
      test.run();
    }
  }
  std::cout << "all passed" << std::endl;
  return 0;
}

// The tests of each file, in the order in which they run.
std::vector<Test> range_tests();
std::vector<Test> alloc_tests();
std::vector<Test> order_tests();
std::vector<Test> asleep_tests();
std::vector<Test> pending_tests();
std::vector<Test> window_tests();
std::vector<Test> pin_tests();
std::vector<Test> release_tests();
std::vector<Test> failure_tests();
std::vector<Test> random_tests();
std::vector<Test> thread_tests();
std::vector<Test> race_tests();

}  // namespace distcomm::tests
