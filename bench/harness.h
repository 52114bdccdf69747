// What the benchmark programs share: check first, then time. A figure is the median of at least 20
// samples with its spread, on weights that rotate through more than the last-level cache, beside
// the limit of this machine measured in the same run (machine_limits.h).
#pragma once
#include <sys/mman.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <map>
#include <new>
#include <set>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "kimi_native/runtime.h"
#include "kimi_native/types.h"
#include "machine_limits.h"

namespace kn::bench {

struct Options {
  bool quick = false;  // few shapes, for a smoke test
  bool json = false;   // one JSON object per line
};

// Size of the largest cache of the first processor; 32 MiB where the system does not say.
inline int64_t last_level_cache_bytes() {
  int64_t largest = 0;
  for (int index = 0; index < 8; ++index) {
    std::ifstream file("/sys/devices/system/cpu/cpu0/cache/index" + std::to_string(index) +
                       "/size");
    int64_t size = 0;
    char unit = 0;
    if (!(file >> size)) break;
    file >> unit;
    largest = std::max(largest, size << (unit == 'M' ? 20 : unit == 'K' ? 10 : 0));
  }
  return largest ? largest : int64_t(32) << 20;
}

// Copies of `bytes` of weights that together are twice the last-level cache.
inline int64_t num_copies(int64_t bytes) {
  return std::max<int64_t>(2, 2 * last_level_cache_bytes() / bytes + 1);
}

// Page-aligned memory, on huge pages where the system gives them.
template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t n) : n_(n), bytes_(std::max<int64_t>(1, n * int64_t(sizeof(T)))) {
    void* p = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) throw std::bad_alloc();
    madvise(p, bytes_, MADV_HUGEPAGE);
    data_ = static_cast<T*>(p);
  }
  Buffer(Buffer&& other) noexcept : data_(other.data_), n_(other.n_), bytes_(other.bytes_) {
    other.data_ = nullptr;
  }
  Buffer(const Buffer&) = delete;
  ~Buffer() {
    if (data_) munmap(data_, bytes_);
  }
  T* data() { return data_; }
  T& operator[](int64_t i) { return data_[i]; }
  int64_t size() const { return n_; }

 private:
  T* data_;
  int64_t n_, bytes_;
};

// A small generator: the same data on every run and machine.
struct Random {
  uint64_t state = 0x9e3779b97f4a7c15;
  uint32_t bits() {
    state = state * 6364136223846793005 + 1442695040888963407;
    return uint32_t(state >> 32);
  }
  float unit() { return float(bits() >> 8) * 0x1p-24f; }
  float sign() { return 2.0f * unit() - 1.0f; }  // uniform in [-1, 1)
};

template <typename... Parts>
std::string concat(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  return text.str();
}

inline float to_float(bf16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline bf16 to_bf16(float x) {  // finite x, to nearest even
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

// Fills a buffer with a random block of 64 Ki entries, repeated: filling gigabytes stays quick.
template <typename T, typename F>
void fill(Buffer<T>& buffer, F&& entry) {
  const int64_t block = std::min<int64_t>(buffer.size(), 65536);
  for (int64_t i = 0; i < block; ++i) buffer[i] = entry();
  for (int64_t i = block; i < buffer.size(); i += block)
    std::memcpy(&buffer[i], buffer.data(), std::min(block, buffer.size() - i) * sizeof(T));
}

struct Timing {
  double seconds;  // median of one call
  double spread;   // half the distance between the quartiles, as a fraction of the median
};

// Times run(call) with call = 0, 1, 2, ... (to rotate weights by). A sample is as many calls as
// take 200 us, so that the clock's own cost does not show.
template <typename F>
Timing measure(F&& run) {
  using Clock = std::chrono::steady_clock;
  int64_t call = 0;
  const auto sample = [&](int64_t calls) {
    const auto begin = Clock::now();
    for (int64_t i = 0; i < calls; ++i) run(call++);
    return std::chrono::duration<double>(Clock::now() - begin).count() / double(calls);
  };
  sample(2);
  const int64_t calls = std::max<int64_t>(1, int64_t(200e-6 / std::max(sample(2), 1e-9)));
  std::vector<double> samples;
  double total = 0.0;
  while (samples.size() < 20 || (total < 0.3 && samples.size() < 200)) {
    samples.push_back(sample(calls));
    total += samples.back() * double(calls);
  }
  std::sort(samples.begin(), samples.end());
  const size_t n = samples.size();
  const double median = samples[n / 2];
  return {median, 0.5 * (samples[n * 3 / 4] - samples[n / 4]) / median};
}

// What the problem needs, not what the kernel happens to do.
struct Work {
  double bytes = 0.0;   // read and written, each once
  double flops = 0.0;   // a multiply and an add are two
  bool cached = false;  // the data stays in cache: no share of the memory limit is given
  bool int8 = false;    // products may run as two int8 limbs
};

class Report {
 public:
  explicit Report(const Options& options) : options_(options) {
    if (options.json) return;
    std::printf(
        "# isa=%s threads=%d last-level cache %.0f MiB, median of >= 20 ± half the quartile "
        "distance\n",
        active_isa().c_str(), num_threads(), double(last_level_cache_bytes()) / 1048576.0);
  }

  void line(const std::string& op, const std::string& shape, const Timing& t, const Work& w) {
    const Share share = w.cached ? Share{"cache", 0.0} : share_of_limit(t, w);
    if (options_.json)
      print_json(op, shape, t, w, share);
    else
      print_text(op, shape, t, w, share);
    std::fflush(stdout);
  }

 private:
  struct Share {
    const char* limit;
    double part;
  };

  // The limit that binds: time at the read limit against time at the peak of the arithmetic. An
  // exact product by int8 instructions takes two of them (low and high limb of the activation).
  Share share_of_limit(const Timing& t, const Work& w) {
    const Limits& limits = limits_at(num_threads());
    const bool by_int8 = w.int8 && limits.int8_ops / 2 > limits.fp32_flops;
    const double read = w.bytes / limits.read_bytes;
    const double compute = w.flops / (by_int8 ? limits.int8_ops / 2 : limits.fp32_flops);
    if (read >= compute) return {"read", read / t.seconds};
    return {by_int8 ? "int8" : "fp32", compute / t.seconds};
  }

  void print_text(const std::string& op, const std::string& shape, const Timing& t, const Work& w,
                  const Share& share) {
    std::printf("%-20s %-8s threads=%-3d %-48s | %10.1f us ±%4.1f%% | %7.1f GB/s", op.c_str(),
                active_isa().c_str(), num_threads(), shape.c_str(), t.seconds * 1e6, t.spread * 100,
                w.bytes / t.seconds * 1e-9);
    if (w.flops > 0) std::printf(" | %7.1f GFLOP/s", w.flops / t.seconds * 1e-9);
    if (w.cached)
      std::printf(" | in cache\n");
    else
      std::printf(" | %3.0f %% of %s limit\n", share.part * 100, share.limit);
  }

  void print_json(const std::string& op, const std::string& shape, const Timing& t, const Work& w,
                  const Share& share) {
    std::printf(
        "{\"op\": \"%s\", \"isa\": \"%s\", \"threads\": %d, \"shape\": \"%s\", \"seconds\": %.4g, "
        "\"spread\": %.3f, "
        "\"bytes\": %.0f, \"flops\": %.0f, \"limit\": \"%s\", \"share\": %.3f}\n",
        op.c_str(), active_isa().c_str(), num_threads(), shape.c_str(), t.seconds, t.spread,
        w.bytes, w.flops, share.limit, share.part);
  }

  const Limits& limits_at(int threads) {
    const auto found = limits_.find(threads);
    if (found != limits_.end()) return found->second;
    const Limits limits = measure_limits(threads, 4 * last_level_cache_bytes());
    if (!options_.json)
      std::printf("# limits with %d threads: read %.1f GB/s, fp32 %.0f GFLOP/s, int8 %.0f GOP/s\n",
                  threads, limits.read_bytes * 1e-9, limits.fp32_flops * 1e-9,
                  limits.int8_ops * 1e-9);
    return limits_[threads] = limits;
  }

  Options options_;
  std::map<int, Limits> limits_;
};

// 1 and all threads, without a repetition on a single core.
inline std::set<int> thread_counts() { return {1, num_threads()}; }

inline std::vector<int64_t> token_counts(const Options& options) {
  return options.quick ? std::vector<int64_t>{1, 16} : std::vector<int64_t>{1, 4, 16, 64, 256};
}

// Throws unless |actual - expected| <= bound: a wrong kernel is not worth timing.
inline void expect_close(const std::string& what, double actual, double expected, double bound) {
  if (std::fabs(actual - expected) <= bound) return;
  char text[256];
  std::snprintf(text, sizeof text, "%s: the result is wrong (got %g, expected %g ± %g)",
                what.c_str(), actual, expected, bound);
  throw std::runtime_error(text);
}

// main(): parses the options, runs the program; an error becomes one line and exit code 1.
template <typename F>
int run_main(int argc, char** argv, F&& program) {
  Options options;
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    if (argument == "--quick") {
      options.quick = true;
    } else if (argument == "--json") {
      options.json = true;
    } else {
      std::fprintf(stderr,
                   "usage: %s [--quick] [--json]; KIMI_NATIVE_CPU_ISA forces a kernel tier\n",
                   argv[0]);
      return 2;
    }
  }
  try {
    program(options);
    return 0;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}

}  // namespace kn::bench
