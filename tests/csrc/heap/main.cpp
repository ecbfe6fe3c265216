// Tests of the segment heap against a fake NCCL: test_segment_heap [seed] [part of a test's name].

#include <cstdlib>
#include <cstring>
#include <iostream>
#include <vector>

#include "check.h"

int main(int argc, char** argv) {
  using namespace distcomm::tests;
  if (argc > 1) g_seed = std::strtoul(argv[1], nullptr, 10);
  const char* const part = argc > 2 ? argv[2] : "";
  const std::vector<std::vector<Test> (*)()> files = {
      range_tests,   alloc_tests,   pending_tests, window_tests, pin_tests,
      release_tests, failure_tests, race_tests,    random_tests, thread_tests, order_tests,
      asleep_tests,
  };
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
