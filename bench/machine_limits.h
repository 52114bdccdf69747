// The limits that benchmarks are measured against, on this machine in this minute: streaming read
// bandwidth and the peak rate of each unit of arithmetic, per thread count. The best of several
// rounds and ways: a limit is what the machine can do.
#pragma once
#include <map>
#include <string>
#include <vector>

namespace kn::bench {

struct ReadLimit {
  std::string pages, pattern;  // "2 MiB", "4 streams"
  double bytes_per_s;
};

struct Limits {
  int threads = 0;
  double others = 0.0;                  // share of the cores that others took meanwhile
  std::vector<ReadLimit> reads;         // every way of reading, in the order measured
  std::map<std::string, double> peaks;  // unit of peak_loops.h -> operations per second

  const ReadLimit& best_read() const;
  double peak(const std::string& unit) const;  // 0 where the machine lacks it
};

// Limits for each thread count, measured in `rounds` rounds (3: a second or two per thread count).
std::map<int, Limits> measure_limits(const std::vector<int>& thread_counts, int rounds);

}  // namespace kn::bench
