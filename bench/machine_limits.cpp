#include "machine_limits.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <thread>

#include "memory.h"
#include "other_load.h"
#include "peak_loops.h"

namespace kn::bench {
namespace {

using Clock = std::chrono::steady_clock;

// Runs work(thread) on each of n threads at once; seconds from the first one's start to the last
// one's end.
double time_threads(int n, const std::function<void(int)>& work) {
  std::atomic<int> ready{0};
  std::vector<Clock::time_point> begin(n), end(n);
  const auto run = [&](int t) {
    ready.fetch_add(1);
    while (ready.load(std::memory_order_acquire) < n) std::this_thread::yield();
    begin[t] = Clock::now();
    work(t);
    end[t] = Clock::now();
  };
  std::vector<std::thread> threads;
  for (int t = 1; t < n; ++t) threads.emplace_back(run, t);
  run(0);
  for (auto& thread : threads) thread.join();
  const auto first = *std::min_element(begin.begin(), begin.end());
  return std::chrono::duration<double>(*std::max_element(end.begin(), end.end()) - first).count();
}

// ---- reading ------------------------------------------------------------------------------------

// Reads `lines` cache lines as kStreams streams side by side, each asking for the line
// kPrefetch lines ahead; the result depends on every byte. always_inline: each caller below
// compiles it for its own instruction set.
template <typename V, int kStreams, int kPrefetch>
__attribute__((always_inline)) inline uint64_t read_lines(const uint8_t* data, int64_t lines) {
  constexpr int kPerLine = 64 / int(sizeof(V));
  const int64_t part = lines / kStreams;
  V sums[kStreams] = {};
  for (int64_t line = 0; line < part; ++line)
    for (int s = 0; s < kStreams; ++s) {
      const uint8_t* p = data + 64 * (s * part + line);
      if (kPrefetch) __builtin_prefetch(p + 64 * kPrefetch);
      for (int j = 0; j < kPerLine; ++j) sums[s] ^= reinterpret_cast<const V*>(p)[j];
    }
  V sum = {};
  for (const V& s : sums) sum ^= s;
  return sum[0] ^ sum[1];
}

struct Pattern {
  const char* name;
  uint64_t (*read)(const uint8_t*, int64_t);
};

typedef uint64_t Vector16 __attribute__((vector_size(16)));
typedef uint64_t Vector32 __attribute__((vector_size(32)));
typedef uint64_t Vector64 __attribute__((vector_size(64)));

#define KN_READ(isa, attribute, V, streams, prefetch)                                          \
  attribute uint64_t read_##isa##_##streams##_##prefetch(const uint8_t* data, int64_t lines) { \
    return read_lines<V, streams, prefetch>(data, lines);                                      \
  }
#define KN_PATTERNS(isa, attribute, V)                                                         \
  KN_READ(isa, attribute, V, 1, 0)                                                             \
  KN_READ(isa, attribute, V, 4, 0)                                                             \
  KN_READ(isa, attribute, V, 1, 16)                                                            \
  KN_READ(isa, attribute, V, 4, 8)                                                             \
  KN_READ(isa, attribute, V, 4, 32)                                                            \
  const std::vector<Pattern> k_##isa = {{"plain", read_##isa##_1_0},                           \
                                        {"4 streams", read_##isa##_4_0},                       \
                                        {"prefetch 1 KiB ahead", read_##isa##_1_16},           \
                                        {"4 streams, prefetch 512 B ahead", read_##isa##_4_8}, \
                                        {"4 streams, prefetch 2 KiB ahead", read_##isa##_4_32}};

KN_PATTERNS(baseline, , Vector16)
#if defined(__x86_64__)
KN_PATTERNS(avx2, __attribute__((target("avx2"))), Vector32)
KN_PATTERNS(avx512, __attribute__((target("avx512f"))), Vector64)
#endif

const std::vector<Pattern>& patterns() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f")) return k_avx512;
  if (__builtin_cpu_supports("avx2")) return k_avx2;
#endif
  return k_baseline;
}

// Three times the last-level cache, read a sixth at a time: what is read has been evicted since.
class ReadBuffer {
 public:
  explicit ReadBuffer(Pages pages)
      : memory_(std::clamp<int64_t>(3 * last_level_cache_bytes(), kParts << 23, kMaxRotationBytes) /
                    kUnit * kUnit,
                pages) {
    const int threads = std::max(1u, std::thread::hardware_concurrency());
    time_threads(threads, [&](int t) {
      const int64_t part = memory_.bytes() / threads / 8 * 8;
      uint64_t* words = reinterpret_cast<uint64_t*>(memory_.data() + t * part);
      for (int64_t i = 0; i < part / 8; ++i) words[i] = uint64_t(i);
    });
  }
  // Bytes per second of one part read by `threads` threads.
  double time(const Pattern& pattern, int threads) {
    const int64_t bytes = memory_.bytes() / kParts;
    const uint8_t* data = memory_.data() + next_++ % kParts * bytes;
    const int64_t lines = bytes / 64 / threads / 8 * 8;  // whole lines in up to eight streams
    const double seconds =
        time_threads(threads, [&](int t) { sink_ += pattern.read(data + 64 * t * lines, lines); });
    return double(64 * lines * threads) / seconds;
  }

 private:
  static constexpr int64_t kParts = 6, kUnit = kParts << 12;
  Memory memory_;
  int64_t next_ = 0;
  std::atomic<uint64_t> sink_{0};
};

void measure_reads(std::map<int, Limits>& limits, int rounds) {
  for (const auto& [pages, name] : {std::pair{Pages::k4KiB, "4 KiB"}, {Pages::k2MiB, "2 MiB"}}) {
    ReadBuffer buffer(pages);
    for (auto& [threads, l] : limits) {
      const size_t first = l.reads.size();
      for (const Pattern& p : patterns()) l.reads.push_back({name, p.name, 0.0});
      // Round by round, so that a busy moment of the host does not hit one pattern alone.
      for (int round = 0; round < rounds; ++round)
        for (size_t i = 0; i < patterns().size(); ++i) {
          double& best = l.reads[first + i].bytes_per_s;
          best = std::max(best, buffer.time(patterns()[i], threads));
        }
    }
  }
}

// ---- arithmetic ---------------------------------------------------------------------------------

double measure_peak(const PeakLoop& peak, int threads, int rounds) {
  constexpr double kSeconds = 0.006;
  int64_t n = 4096;
  double seconds;
  while ((seconds = time_threads(1, [&](int) { peak.loop(n); })) < 0.1 * kSeconds) n *= 4;
  n = std::max<int64_t>(1, int64_t(double(n) * kSeconds / seconds));
  double best = 0.0;
  for (int round = 0; round < rounds; ++round)
    best = std::max(best, double(n) * threads / time_threads(threads, [&](int) { peak.loop(n); }));
  return best * peak.ops_per_round;
}

}  // namespace

const ReadLimit& Limits::best_read() const {
  return *std::max_element(reads.begin(), reads.end(), [](const auto& a, const auto& b) {
    return a.bytes_per_s < b.bytes_per_s;
  });
}

double Limits::peak(const std::string& unit) const {
  const auto found = peaks.find(unit);
  return found == peaks.end() ? 0.0 : found->second;
}

std::map<int, Limits> measure_limits(const std::vector<int>& thread_counts, int rounds) {
  const OtherLoad load;
  std::map<int, Limits> limits;
  for (const int n : thread_counts) limits[n].threads = n;
  measure_reads(limits, rounds);
  for (const PeakLoop& peak : peak_loops())
    for (auto& [threads, l] : limits) l.peaks[peak.unit] = measure_peak(peak, threads, rounds + 2);
  for (auto& [threads, l] : limits) l.others = load.share();
  return limits;
}

}  // namespace kn::bench
