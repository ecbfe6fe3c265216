// Tests of the segment heap against a fake NCCL: test_segment_heap [seed] [part of a test's name].

#include "check.h"

int main(int argc, char** argv) {
  using namespace distcomm::tests;
  return run_tests(argc, argv,
                   {range_tests, alloc_tests, pending_tests, window_tests, pin_tests,
                    release_tests, failure_tests, race_tests, random_tests, thread_tests,
                    order_tests, asleep_tests});
}
