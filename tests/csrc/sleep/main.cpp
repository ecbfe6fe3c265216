// Tests of the heap of memory that can sleep, against a fake CUDA driver:
// test_sleep_heap [seed] [part of a test's name].

#include <cstdlib>
#include <cstring>
#include <iostream>
#include <vector>

#include "rig.h"

int main(int argc, char** argv) {
  using namespace distcomm::tests;
  if (argc > 1) g_seed = std::strtoul(argv[1], nullptr, 10);
  const char* const part = argc > 2 ? argv[2] : "";
  const std::vector<std::vector<Test> (*)()> files = {
      block_tests,      sleep_tests,        host_tests, failing_call_tests, shortage_tests,
      concurrent_tests, random_sleep_tests,
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
