// The limits that benchmarks are measured against, on this machine in this minute: streaming read
// bandwidth and the peak rates of fp32 multiply-add and of int8 dot products (VNNI), per thread
// count. The best of several rounds: a limit is what the machine can do.
#pragma once
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace kn::bench {

struct Limits {
  double read_bytes = 0.0;  // per second, several streams per thread
  double fp32_flops = 0.0;  // a multiply-add is two
  double int8_ops = 0.0;    // likewise; 0 without VNNI
};

// Runs work(thread) on each of n threads at once and returns the seconds from the common start to
// the last one's end.
inline double time_threads(int n, const std::function<void(int)>& work) {
  using Clock = std::chrono::steady_clock;
  std::atomic<int> ready{0};
  std::atomic<bool> go{false};
  std::vector<std::thread> threads;
  for (int t = 1; t < n; ++t)
    threads.emplace_back([&, t] {
      ready.fetch_add(1);
      while (!go.load(std::memory_order_acquire)) std::this_thread::yield();
      work(t);
    });
  while (ready.load() != n - 1) std::this_thread::yield();
  const auto begin = Clock::now();
  go.store(true, std::memory_order_release);
  work(0);
  for (auto& thread : threads) thread.join();
  return std::chrono::duration<double>(Clock::now() - begin).count();
}

typedef uint64_t Vector __attribute__((vector_size(16)));

// Reads four streams side by side, each a quarter of the range; returns something that depends on
// every byte.
inline uint64_t read_streams(const Vector* data, int64_t vectors) {
  const int64_t quarter = vectors / 4;
  Vector sums[4] = {};
  for (int64_t i = 0; i + 4 <= quarter; i += 4)  // a cache line of each stream
    for (int s = 0; s < 4; ++s)
      for (int j = 0; j < 4; ++j) sums[s] ^= data[s * quarter + i + j];
  const Vector sum = sums[0] ^ sums[1] ^ sums[2] ^ sums[3];
  return sum[0] ^ sum[1];
}

inline double measure_read(int threads, const Vector* data, int64_t vectors) {
  const int64_t part = vectors / threads;
  std::atomic<uint64_t> sink{0};
  double best = 0.0;
  for (int round = 0; round < 7; ++round) {
    const double seconds =
        time_threads(threads, [&](int t) { sink += read_streams(data + t * part, part); });
    best = std::max(best, double(part) * threads * sizeof(Vector) / seconds);
  }
  return best;
}

// Peak loops: `rounds` passes over independent accumulators, enough of them to cover the latency.
// Each returns operations done per round and leaves its result where the compiler cannot drop it.
constexpr int kAccumulators = 12;

inline double fma_baseline(int64_t rounds, volatile float* sink) {
  float a[kAccumulators] = {};
  for (int64_t r = 0; r < rounds; ++r)
    for (float& x : a) x = x * 0.999f + 0.5f;
  for (float x : a) *sink = x;
  return 2.0 * kAccumulators;
}

#if defined(__x86_64__)
__attribute__((target("avx2,fma"))) inline double fma_avx2(int64_t rounds, volatile float* sink) {
  __m256 a[kAccumulators];
  for (auto& x : a) x = _mm256_set1_ps(1.0f);
  const __m256 b = _mm256_set1_ps(0.999f), c = _mm256_set1_ps(0.5f);
  for (int64_t r = 0; r < rounds; ++r)
    for (auto& x : a) x = _mm256_fmadd_ps(x, b, c);
  for (auto& x : a) *sink = x[0];
  return 2.0 * 8 * kAccumulators;
}

__attribute__((target("avx512f"))) inline double fma_avx512(int64_t rounds, volatile float* sink) {
  __m512 a[kAccumulators];
  for (auto& x : a) x = _mm512_set1_ps(1.0f);
  const __m512 b = _mm512_set1_ps(0.999f), c = _mm512_set1_ps(0.5f);
  for (int64_t r = 0; r < rounds; ++r)
    for (auto& x : a) x = _mm512_fmadd_ps(x, b, c);
  for (auto& x : a) *sink = x[0];
  return 2.0 * 16 * kAccumulators;
}

__attribute__((target("avx512f,avx512vnni"))) inline double dot_vnni(int64_t rounds,
                                                                     volatile float* sink) {
  __m512i a[kAccumulators];
  for (auto& x : a) x = _mm512_setzero_si512();
  const __m512i b = _mm512_set1_epi8(3), c = _mm512_set1_epi8(-2);
  for (int64_t r = 0; r < rounds; ++r)
    for (auto& x : a) x = _mm512_dpbusd_epi32(x, b, c);
  for (auto& x : a) *sink = float(x[0]);
  return 2.0 * 64 * kAccumulators;
}
#endif

inline double measure_peak(int threads, double (*loop)(int64_t, volatile float*)) {
  constexpr int64_t kRounds = 2000000;
  std::vector<float> sinks(size_t(threads) * 16);  // a cache line each
  double best = 0.0;
  for (int round = 0; round < 5; ++round) {
    double per_round = 0.0;
    const double seconds = time_threads(threads, [&](int t) {
      const double n = loop(kRounds, &sinks[size_t(t) * 16]);
      if (t == 0) per_round = n;
    });
    best = std::max(best, per_round * double(kRounds) * threads / seconds);
  }
  return best;
}

// Reads `bytes` of memory in all, which should be several times the last-level cache.
inline Limits measure_limits(int threads, int64_t bytes) {
  const int64_t vectors = bytes / int64_t(sizeof(Vector));
  const std::unique_ptr<Vector[]> data(new Vector[size_t(vectors)]);
  for (int64_t i = 0; i < vectors; ++i) data[i] = Vector{uint64_t(i), 1};
  Limits limits;
  limits.read_bytes = measure_read(threads, data.get(), vectors);
  double (*fma)(int64_t, volatile float*) = fma_baseline;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) fma = fma_avx2;
  if (__builtin_cpu_supports("avx512f")) fma = fma_avx512;
  if (__builtin_cpu_supports("avx512vnni")) limits.int8_ops = measure_peak(threads, dot_vnni);
#endif
  limits.fp32_flops = measure_peak(threads, fma);
  return limits;
}

}  // namespace kn::bench
