// Tests of the heap of memory that can sleep, against a fake CUDA driver:
// test_sleep_heap [seed] [part of a test's name].

#include "rig.h"

int main(int argc, char** argv) {
  using namespace distcomm::tests;
  return run_tests(argc, argv,
                   {block_tests, sleep_tests, host_tests, failing_call_tests, shortage_tests,
                    concurrent_tests, random_sleep_tests});
}
