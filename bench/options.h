// What the benchmark program is asked to time.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "kimi_native/types.h"
#include "memory.h"

namespace kn::bench {

struct Options {
  std::vector<std::string> programs;  // names of the table in main.cpp; empty: all but limits
  std::vector<int> threads;           // thread counts; empty: one and all
  std::vector<int64_t> tokens;        // empty: each program's own
  std::string shape;                  // part of a shape's text; empty: every shape of a real model
  double budget_s = 0.3;              // timing of one case, where 20 samples take no longer
  bool quick = false;                 // fewer cases, and 0.1 s each even for less than 20 samples
  bool json = false;                  // one JSON object per line
  Pages pages = Pages::k2MiB;         // under the weights
  Compute compute = Compute::kExact;  // of the INT4 ops
};

// Raises UsageError.
Options parse_options(int argc, char** argv);

struct UsageError {
  std::string text;
};

// The usage text; `programs` are the names that may be given.
std::string usage(const std::vector<std::string>& programs);

}  // namespace kn::bench
