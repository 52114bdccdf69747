// limits: every way of reading and every unit of arithmetic that this machine was measured for.
#include <cstdio>

#include "report.h"

namespace kn::bench {

void print_limits(const std::map<int, Limits>& limits, bool json) {
  for (const auto& [threads, l] : limits) {
    for (const ReadLimit& r : l.reads)
      std::printf(json ? "{\"op\": \"limits\", \"threads\": %d, \"limit\": \"read\", \"pages\": "
                         "\"%s\", \"pattern\": \"%s\", \"gb_per_s\": %.4g, \"others\": %.3f}\n"
                       : "threads=%-3d read, %s pages, %-32s %9.1f GB/s\n",
                  threads, r.pages.c_str(), r.pattern.c_str(), r.bytes_per_s * 1e-9, l.others);
    for (const auto& [unit, peak] : l.peaks)
      std::printf(json ? "{\"op\": \"limits\", \"threads\": %d, \"limit\": \"%s\", "
                         "\"gflop_per_s\": %.5g, \"others\": %.3f}\n"
                       : "threads=%-3d %-51s %9.1f G/s\n",
                  threads, unit.c_str(), peak * 1e-9, l.others);
    if (!json && l.others > 0.1)
      std::printf("threads=%-3d other processes took %.0f %% of the cores meanwhile\n", threads,
                  l.others * 100);
  }
}

}  // namespace kn::bench
