// One line, or one JSON object, per timed case: what was timed, how long it took, and what part of
// the limit that binds it has reached.
#pragma once
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "machine_limits.h"
#include "options.h"

namespace kn::bench {

struct Timing {
  double seconds;  // median of one call
  double spread;   // half the distance between the quartiles, as a fraction of the median
  int samples;
  double others;  // share of the cores' time that other processes and the hypervisor took meanwhile
};

// Times run(call) with call = 0, 1, 2, ... (to rotate weights by) for budget_s or 20 samples,
// whichever is longer; with `quick` budget_s alone counts, from 3 samples on.
Timing measure(const std::function<void(int64_t)>& run, double budget_s, bool quick);

// What the problem needs, not what the kernel happens to do.
struct Work {
  double bytes = 0.0;   // read and written, each once
  double flops = 0.0;   // a multiply and an add are two
  bool cached = false;  // the data stays in cache: no share of the memory limit is given
  bool limbs = false;   // exact products may be two int8 limbs, as the integer weights allow
  Compute compute = Compute::kExact;  // kInt8: they are one limb
  bool dots = false;                  // both factors are bf16
};

struct Case {
  std::string op, shape;
  int64_t tokens;
  Work work;
};

class Report {
 public:
  // Measures the limits of every thread count and prints them.
  Report(const Options& options, const std::vector<int>& thread_counts);

  const Options& options() const { return options_; }
  const std::vector<int>& thread_counts() const { return thread_counts_; }
  // Whether a shape is asked for. Shapes named "tiny ..." exist to be asked for by name.
  bool wants(const std::string& shape) const;
  // Token counts to time: those asked for, or else these (the first and third of them if quick).
  std::vector<int64_t> token_counts(const std::vector<int64_t>& usual) const;

  // Times `run` at the current number of threads and prints the line.
  void time(const Case& c, const std::function<void(int64_t)>& run);

  int lines() const { return lines_; }

 private:
  struct Share {
    std::string limit;  // "read", "cache", or the unit of arithmetic, such as "int8_dot/2"
    double part;        // of that limit; 0 for "cache"
  };
  Share share_of_limit(const Timing& t, const Work& w) const;
  void print_text(const Case& c, const Timing& t, const Share& share) const;
  void print_json(const Case& c, const Timing& t, const Share& share) const;

  Options options_;
  std::vector<int> thread_counts_;
  std::map<int, Limits> limits_;
  int lines_ = 0;
};

// One line, or one JSON object, per way of reading and unit of arithmetic: the limits program, and
// what every other one prints first with --json. Defined in limits.cpp.
void print_limits(const std::map<int, Limits>& limits, bool json);

}  // namespace kn::bench
