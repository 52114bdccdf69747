// sample: a row of logits as the ids' ranks and weights.
//
// A rank orders ids as the filters do: by score, and of equal scores the lowest id first. All ranks
// of a row differ, so "the best n" is one number, and ties need no care of their own.
#pragma once
#include "cuda/order_key.cuh"
#include "cuda/reduce.cuh"
#include "cuda/values.cuh"
#include "kimi_native/ops.h"

namespace kn::cuda::sample_row {

constexpr int kSegment = 32 * kRun;  // what a warp reads at once
constexpr int kSegments = 8;         // of a chunk
constexpr int kChunk = kSegments * kSegment;
constexpr int kBins = 32;
constexpr int kIdBits = 22;
constexpr int kMaxVocab = 1 << kIdBits;
constexpr uint32_t kSign = 1u << 31;

// What the first two kernels leave for the last, in the workspace.
struct Partials {
  uint64_t* best;    // [rows, chunks] rank
  uint64_t* steps;   // [rows, chunks, kBins]
  double* sums;      // [rows, chunks, kSegments] of weights
  uint32_t* counts;  // [rows, chunks, kBins]
  float* lowest;     // [rows, chunks] NaN if a logit is not finite
  int chunks;
};

struct Row {
  const float* logits;
  const uint8_t* allowed;
  int vocab;
  bool aligned;
  double temperature, min_p;
  double best;   // score
  double scale;  // steps of a weight of 1
};

// What is needed once a row, and kept in no register.
struct Options {
  int top_k;
  double top_p, uniform;
};

__device__ __forceinline__ Options options_of(const SampleArgs& a, int64_t row) {
  return {a.top_k[row], a.options[row * 4 + 1], a.options[row * 4 + 3]};
}

__device__ __forceinline__ Row row_of(const SampleArgs& a, bool aligned, int64_t index) {
  Row r{};
  const int vocab = int(a.vocab);
  r.logits = a.logits + index * vocab;
  r.allowed = a.allowed ? a.allowed + index * ((vocab + 7) / 8) : nullptr;
  r.vocab = vocab;
  r.aligned = aligned;
  r.temperature = a.options[index * 4];
  r.min_p = a.options[index * 4 + 2];
  return r;
}

__device__ __forceinline__ bool is_filtered(const Row& r, const Options& o) {
  return r.min_p > 0 || o.top_p < 1 || (o.top_k > 0 && o.top_k < r.vocab);
}

__device__ __forceinline__ float infinity() { return __int_as_float(0x7f800000); }

__device__ __forceinline__ uint32_t rank_key(float x) { return uint32_t(order_key(x)) ^ kSign; }

__device__ __forceinline__ uint64_t rank_of(float x, int id) {
  return uint64_t(rank_key(x)) << kIdBits | uint64_t(kMaxVocab - 1 - id);
}

__device__ __forceinline__ float score_of(uint64_t rank) {
  return key_value(int32_t(uint32_t(rank >> kIdBits) ^ kSign));
}

__device__ __forceinline__ int id_of(uint64_t rank) {
  return kMaxVocab - 1 - int(rank & (kMaxVocab - 1));
}

// Of the best 1: the distance from it, not the score, is divided, so nothing overflows upwards.
__device__ __forceinline__ double weight(const Row& r, float x) {
  return exp((double(x) - r.best) / r.temperature);
}

// Whether min_p keeps a weight.
__device__ __forceinline__ bool is_likely(const Row& r, double weight) {
  return !(r.min_p > 0) || weight >= r.min_p;
}

// Weights as whole steps have exact sums, the same in any order; n of them stay below 2^53.
__device__ __forceinline__ double scale_of(int n) { return double(1ull << (53 - (32 - __clz(n)))); }

__device__ __forceinline__ uint64_t steps(const Row& r, double weight) {
  return uint64_t(rint(weight * r.scale));
}

// The logits of up to kRun ids from `id` on; returns how many there are.
__device__ __forceinline__ int load_logits(const Row& r, int id, float (&v)[kRun]) {
  load_run(r.logits + id, r.vocab - id, r.aligned, v);
  return min(r.vocab - id, kRun);
}

__device__ __forceinline__ void mask(const Row& r, int id, float (&v)[kRun]) {
  if (!r.allowed) return;
  const unsigned bits = r.allowed[id / 8];
#pragma unroll
  for (int j = 0; j < kRun; ++j)
    if (!(bits >> j & 1)) v[j] = -infinity();
}

// f(score, id, i) for up to kRun ids from `id + i * stride` on, each i below kRuns. All are loaded
// before the first is looked at: what one multiprocessor has on its way limits how fast it reads.
template <int kRuns, typename F>
__device__ __forceinline__ void each_of_runs(const Row& r, int id, int stride, F f) {
  float v[kRuns][kRun];
  int n[kRuns];
#pragma unroll
  for (int i = 0; i < kRuns; ++i) {
    const int first = id + i * stride;
    n[i] = first < r.vocab ? load_logits(r, first, v[i]) : 0;
  }
#pragma unroll
  for (int i = 0; i < kRuns; ++i) {
    if (n[i] > 0) mask(r, id + i * stride, v[i]);
#pragma unroll
    for (int j = 0; j < kRun; ++j)
      if (j < n[i]) f(v[i][j], id + i * stride + j, i);
  }
}

// By a whole warp: the sums of weight_of(score, id) over neighbouring segments, each lane's run
// ascending, then a tree.
template <int kRuns, typename F>
__device__ __forceinline__ void segment_sums(const Row& r, int segment, double (&sums)[kRuns],
                                             F weight_of) {
#pragma unroll
  for (int i = 0; i < kRuns; ++i) sums[i] = 0;
  each_of_runs<kRuns>(r, segment * kSegment + int(threadIdx.x) % 32 * kRun, kSegment,
                      [&](float x, int id, int i) { sums[i] += weight_of(x, id); });
#pragma unroll
  for (int i = 0; i < kRuns; ++i) sums[i] = warp_sum(sums[i]);
}

template <typename T>
struct Largest {
  __device__ __forceinline__ T operator()(T a, T b) const { return a > b ? a : b; }
};

// NaN if one is.
struct Lowest {
  __device__ __forceinline__ float operator()(float a, float b) const {
    return a < b || a != a ? a : b;
  }
};

// `partial`: one value for each warp, used by nothing else until the next barrier of the block.
template <int kWarps, typename T, typename F>
__device__ __forceinline__ T block_join(T x, SharedPtr<T> partial, F join) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x = join(x, __shfl_xor_sync(kAllLanes, x, step));
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = x;
  __syncthreads();
  x = partial[0];
  for (int w = 1; w < kWarps; ++w) x = join(x, T(partial[w]));
  return x;
}

// The best rank and the lowest logit of a row.
struct Extremes {
  uint64_t best;
  float lowest;
};

// A whole block's. Finite logits, and one of them allowed: then there is something to choose.
__device__ __forceinline__ bool can_choose(const Extremes& e) {
  return e.lowest == e.lowest && e.best > rank_of(-infinity(), 0);
}

template <int kWarps>
__device__ __forceinline__ Extremes extremes(const Partials& p, int64_t row,
                                             SharedPtr<uint64_t> best, SharedPtr<float> lowest) {
  Extremes e{0, infinity()};
  for (int c = int(threadIdx.x); c < p.chunks; c += kWarps * 32) {
    e.best = Largest<uint64_t>()(e.best, p.best[row * p.chunks + c]);
    e.lowest = Lowest()(e.lowest, p.lowest[row * p.chunks + c]);
  }
  e.best = block_join<kWarps>(e.best, best, Largest<uint64_t>());
  e.lowest = block_join<kWarps>(e.lowest, lowest, Lowest());
  return e;
}

// What is known once the best is: the score that weighs 1, and the steps of top_p, which are as
// fine as the number of ids allows that top_k leaves.
__device__ __forceinline__ void set_best(Row& r, const Options& o, uint64_t best) {
  r.best = double(score_of(best));
  r.scale = scale_of(o.top_k > 0 ? min(o.top_k, r.vocab) : r.vocab);
}

// Bins by score, best first: even steps down from the best, 32 temperatures wide or as far as the
// logits go, the last one open. `edges`: the lowest key of each bin.
__device__ __forceinline__ void place_edges(const Row& r, float lowest, SharedPtr<uint32_t> edges) {
  const int bin = int(threadIdx.x);
  if (bin >= kBins) return;
  const float best = float(r.best);
  const float width = fminf(__fsub_rn(best, lowest), float(kBins * r.temperature));
  const float below = __fmul_rn(width, float(bin + 1) / kBins);
  edges[bin] = bin == kBins - 1 ? 0 : rank_key(__fsub_rn(best, below));
}

__device__ __forceinline__ int bin_of(SharedPtr<uint32_t> edges, uint32_t key) {
  int bin = 0;
#pragma unroll
  for (int step = kBins / 2; step > 0; step /= 2)
    if (key < edges[bin + step - 1]) bin += step;
  return bin;
}

}  // namespace kn::cuda::sample_row
