// One line, or one JSON object, per timed case, as of the CPU's programs (bench/report.h).
#pragma once
#include <functional>
#include <string>
#include <vector>

#include "../options.h"
#include "gpu.h"
#include "limits.h"

namespace kn::bench::gpu {

// What the problem needs, not what the kernel happens to do.
struct Work {
  double bytes = 0.0;   // read and written, each once
  double flops = 0.0;   // a multiply and an add are two
  bool cached = false;  // the data stays in L2: no share of a limit is given
  double hit = 0.0;     // experts with rows, where there are experts
};

struct Case {
  std::string op, shape;
  int64_t tokens;
  Work work;
};

class Report {
 public:
  // Measures the limits and prints them.
  explicit Report(const Options& options);

  const Device& device() const { return device_; }
  // Whether a shape is asked for. Those named "tiny ..." are asked for by name, or by a rehearsal.
  bool wants(const std::string& shape) const;
  // Token counts to time: those asked for, or else these (the first and the third if quick).
  std::vector<int64_t> token_counts(const std::vector<int64_t>& usual) const;
  // Copies of `bytes` of weights that together exceed the cache several times, for calls to rotate.
  int64_t num_copies(int64_t bytes) const;
  // Whether the device has room for `bytes`; if not, says so.
  bool has_room(const std::string& shape, int64_t bytes) const;

  // Times run(call), which enqueues call number 0, 1, 2, ..., as a CUDA graph of at least
  // `rotation` calls, and prints the line.
  void time(const Case& c, int64_t rotation, const std::function<void(int64_t)>& run);

  int lines() const { return lines_; }

 private:
  struct Timing {
    double seconds, spread;  // median of one call; half the distance between the quartiles, of it
    int samples;
    int64_t calls;  // in the graph
  };
  struct Share {
    std::string limit;
    double part;
  };
  Timing measure(int64_t rotation, const std::function<void(int64_t)>& run) const;
  Share share_of_limit(const Timing& t, const Work& w) const;
  void print_limits() const;
  void print_text(const Case& c, const Timing& t, const Share& share) const;
  void print_json(const Case& c, const Timing& t, const Share& share) const;

  Options options_;
  Device device_;
  Limits limits_;
  int lines_ = 0;
};

}  // namespace kn::bench::gpu
