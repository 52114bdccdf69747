// What the workers of one launch share: the blocks still to run, the first fault, the counts.
#pragma once
#include <atomic>
#include <mutex>
#include <string>
#include <vector>

#include "simt/thread.h"

namespace kn::simt {

struct Launch {
  explicit Launch(Grid g);

  Grid grid;
  Options settings;
  std::vector<uint64_t> order;  // of the blocks: CUDA promises none
  std::atomic<uint64_t> next_block{0};
  std::atomic<bool> stopped{false};
  std::atomic<uint64_t> progress{0};  // steps of threads that were not waiting in a loop
  std::mutex mutex;                   // of what follows
  std::string fault;
  Stats stats;

  void stop(const std::string& message);
};

// "kernel NAME, block (x, y, z), thread (x, y, z)"
std::string place(const Launch& launch, const Thread& t);

// Who waits where, in all blocks that have not ended.
std::string describe_deadlock(const Launch& launch, const std::vector<Block*>& blocks);

}  // namespace kn::simt
