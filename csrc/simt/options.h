// How kernels are run on the CPU, what a run counted, and how it reports a bug.
#pragma once
#include <cstdint>
#include <stdexcept>

namespace kn::simt {

// When an asynchronous copy (cp.async, TMA, wgmma) takes place: when it is issued, as late as the
// waits of the kernel allow, or one or the other by a seeded coin.
enum class Async : int32_t { kEarly = 0, kLate = 1, kSeeded = 2 };

struct Options {
  uint64_t seed = 0;  // 0: threads and blocks in order; else a shuffled schedule of its own
  Async async = Async::kLate;
  int os_threads = 1;
  int resident = 1;     // blocks that share one OS thread, and run interleaved
  bool hopper = false;  // what the ops are told of the device; every wrapper works either way
};

Options& options();

// Of the last launch. A wavefront is one pass of a shared-memory access over the 32 banks.
struct Stats {
  uint64_t switches = 0;
  uint64_t shared_wavefronts = 0;        // passes the accesses of the kernel need
  uint64_t shared_ideal_wavefronts = 0;  // passes they would need without bank conflicts
};

const Stats& last_stats();

// A bug in a kernel: what happened, in which kernel, block and thread. Thrown by a launch.
struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

}  // namespace kn::simt
