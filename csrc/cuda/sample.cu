// sample: one id from each row of logits, three launches whatever the options are.
//
//   sample_best_kernel    a block for 2048 ids: best rank, lowest logit, whether all are finite
//   sample_count_kernel   the same blocks: weights (one exp each), their sums, and for filters how
//                         many ids and how much weight there is in each of 32 bins of scores
//   sample_draw_kernel    a block for a row: the cut (sample_select.cuh), sums of what it keeps,
//                         and the first id whose running sum exceeds uniform * total
//
// Bytes: 4 * vocab a pass. The first two pass once, all multiprocessors together, the last one not
// at all without filters, else usually twice (ids at the cut, sums). FP64: about 40 instructions an
// id. Order of sums: a run of eight ids ascending, a tree over the lanes, segments of 256 ids
// ascending, chunks ascending, filtered or not; counts and steps are integers. Up to 2^22 ids. Does
// not do penalties and logprobs.
#include "core/op_checks.h"
#include "cuda/sample_select.cuh"

namespace kn::cuda {
namespace {

using namespace sample_row;

constexpr int kCountThreads = 128;
constexpr int kCountWarps = kCountThreads / 32;
static_assert(kMaxVocab / kChunk <= kParts * kThreads);  // sums of chunks in shared memory
constexpr int kCountBytes = kBins * kCountThreads * 12 + kBins * 4 + kCountWarps * 4;

__global__ void __launch_bounds__(kCountThreads)
    sample_best_kernel(SampleArgs a, Partials p, bool aligned) {
  KN_SHARED(shared);
  const int64_t row = int64_t(blockIdx.y), chunk = int64_t(blockIdx.x);
  const Row r = row_of(a, aligned, row);
  uint64_t best = 0;
  float lowest = infinity();
  const int begin = int(chunk) * kChunk, end = min(begin + kChunk, r.vocab);
  for (int id = begin + int(threadIdx.x) * kRun; id < end; id += kCountThreads * kRun) {
    float v[kRun];
    const int n = load_logits(r, id, v);
#pragma unroll
    for (int j = 0; j < kRun; ++j)
      // x - x is 0, or NaN where x is not finite.
      if (j < n) lowest = Lowest()(lowest, __fadd_rn(v[j], __fsub_rn(v[j], v[j])));
    mask(r, id, v);
#pragma unroll
    for (int j = 0; j < kRun; ++j)
      if (j < n) best = Largest<uint64_t>()(best, rank_of(v[j], id + j));
  }
  best = block_join<kCountWarps>(best, shared_at<uint64_t>(shared, 0), Largest<uint64_t>());
  lowest = block_join<kCountWarps>(lowest, shared_at<float>(shared, kCountWarps * 8), Lowest());
  if (threadIdx.x > 0) return;
  p.best[row * p.chunks + chunk] = best;
  p.lowest[row * p.chunks + chunk] = lowest;
}

// A warp for every fourth bin: the sum of what the threads have counted.
__device__ __forceinline__ void store_bins(const Partials& p, int64_t at,
                                           SharedPtr<uint64_t> bin_steps,
                                           SharedPtr<uint32_t> bin_counts) {
  for (int bin = int(threadIdx.x) / 32; bin < kBins; bin += kCountWarps) {
    uint32_t count = 0;
    uint64_t sum = 0;
    for (int t = int(threadIdx.x) % 32; t < kCountThreads; t += 32) {
      count += bin_counts[bin * kCountThreads + t];
      sum += bin_steps[bin * kCountThreads + t];
    }
    count = warp_sum(count), sum = warp_sum(sum);
    if (threadIdx.x % 32 == 0) p.counts[at * kBins + bin] = count, p.steps[at * kBins + bin] = sum;
  }
}

__global__ void __launch_bounds__(kCountThreads)
    sample_count_kernel(SampleArgs a, Partials p, bool aligned) {
  KN_SHARED(shared);
  const auto bin_steps = shared_at<uint64_t>(shared, 0);
  const auto bin_counts = shared_at<uint32_t>(shared, kBins * kCountThreads * 8);
  const auto edges = bin_counts + kBins * kCountThreads;
  const int64_t row = int64_t(blockIdx.y), at = row * p.chunks + int64_t(blockIdx.x);
  Row r = row_of(a, aligned, row);
  if (r.temperature == 0) return;
  const Extremes e = extremes<kCountWarps>(p, row, bin_steps, shared_cast<float>(edges + kBins));
  if (!can_choose(e)) return;
  const Options o = options_of(a, row);
  set_best(r, o, e.best);
  const bool filtered = is_filtered(r, o);
  const int me = int(threadIdx.x);
  __syncthreads();  // the extremes have been read
  place_edges(r, e.lowest, edges);
  if (filtered)
    for (int bin = 0; bin < kBins; ++bin) {
      bin_steps[bin * kCountThreads + me] = 0;
      bin_counts[bin * kCountThreads + me] = 0;
    }
  __syncthreads();
  for (int s = me / 32; s < kSegments; s += kCountWarps) {
    double sum[1];
    segment_sums(r, int(blockIdx.x) * kSegments + s, sum, [&](float x, int) {
      const double w = weight(r, x);
      if (filtered && is_likely(r, w)) {
        const int mine = bin_of(edges, rank_key(x)) * kCountThreads + me;
        bin_steps[mine] += steps(r, w);
        bin_counts[mine] += 1;
      }
      return w;
    });
    if (me % 32 == 0) p.sums[at * kSegments + s] = sum[0];
  }
  __syncthreads();
  if (filtered) store_bins(p, at, bin_steps, bin_counts);
}

// The first of n weights at which the running sum exceeds `target`; the last that is not 0 if
// rounding keeps the sum below.
struct Place {
  int index;
  double before;
};

template <typename F>
__device__ __forceinline__ Place place(int n, double before, double target, F weight_at) {
  Place found{0, before};
  double sum = before;
  for (int i = 0; i < n; ++i) {
    const double w = weight_at(i);
    if (w > 0) {
      found = {i, sum};
      if (sum + w > target) return found;
    }
    sum += w;
  }
  return found;
}

// By one whole warp: the id in a segment, given the running sum before it.
template <typename F>
__device__ int draw_in_segment(const Row& r, int segment, double before, double target,
                               F weight_of) {
  const int lane = int(threadIdx.x) % 32, first = segment * kSegment + lane * kRun;
  double sum = 0;
  each_of_runs<1>(r, first, 0, [&](float x, int id, int) { sum += weight_of(x, id); });
  double inclusive = sum;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const double other = __shfl_up_sync(kAllLanes, inclusive, step);
    if (lane >= step) inclusive += other;
  }
  const double left = __shfl_up_sync(kAllLanes, inclusive, 1);
  before += lane > 0 ? left : 0.0;
  const unsigned has = __ballot_sync(kAllLanes, sum > 0);
  const unsigned exceeds = __ballot_sync(kAllLanes, sum > 0 && before + sum > target);
  const int chosen = exceeds ? __ffs(int(exceeds)) - 1 : 31 - __clz(int(has));
  double at = 0;
  int drawn = first;
  bool done = false;
  each_of_runs<1>(r, first, 0, [&](float x, int id, int) {
    const double w = weight_of(x, id);
    if (w > 0 && !done) drawn = id, done = before + (at + w) > target;
    at += w;
  });
  return __shfl_sync(kAllLanes, drawn, chosen);
}

// `sums`: shared, one for each chunk.
template <typename F>
__device__ int draw(const Row& r, const Partials& p, int64_t row, double uniform,
                    SharedPtr<double> sums, F weight_of) {
  const double* segments = p.sums + row * p.chunks * kSegments;
  for (int c = int(threadIdx.x); c < p.chunks; c += kThreads) {
    double sum = 0;
    for (int s = 0; s < kSegments; ++s) sum += segments[c * kSegments + s];
    sums[c] = sum;
  }
  __syncthreads();
  if (threadIdx.x >= 32) return 0;
  double total = 0;
  for (int c = 0; c < p.chunks; ++c) total += sums[c];
  const double target = uniform * total;
  const Place chunk = place(p.chunks, 0.0, target, [&](int c) { return double(sums[c]); });
  const int first = chunk.index * kSegments;
  const Place segment =
      place(kSegments, chunk.before, target, [&](int s) { return segments[first + s]; });
  return draw_in_segment(r, first + segment.index, segment.before, target, weight_of);
}

template <typename F>
__device__ __forceinline__ void sum_kept(const Row& r, double* sums, int n, F weight_of) {
  static_assert(kSegments % kRuns == 0);
  for (int i = int(threadIdx.x) / 32 * kRuns; i < n; i += kWarps * kRuns) {
    double sum[kRuns];
    segment_sums(r, i, sum, weight_of);
    for (int j = 0; j < kRuns; ++j)
      if (threadIdx.x % 32 == 0) sums[i + j] = sum[j];
  }
}

__global__ void __launch_bounds__(kThreads, 1)
    sample_draw_kernel(SampleArgs a, Partials p, bool aligned) {
  KN_SHARED(shared);
  const Shared s = carve(shared);
  const int64_t row = int64_t(blockIdx.x);
  Row r = row_of(a, aligned, row);
  const Extremes e = extremes<kWarps>(p, row, s.best, s.lowest);
  if (!can_choose(e) || r.temperature == 0) {
    if (threadIdx.x == 0) a.ids[row] = can_choose(e) ? id_of(e.best) : -1;
    return;
  }
  set_best(r, options_of(a, row), e.best);
  uint64_t cut = 0;
  const auto weight_of = [&](float x, int id) {
    if (rank_of(x, id) < cut) return 0.0;
    const double w = weight(r, x);
    return is_likely(r, w) ? w : 0.0;
  };
  if (is_filtered(r, options_of(a, row))) {
    cut = cut_of(r, s, a, p, row, e.lowest);
    sum_kept(r, p.sums + row * p.chunks * kSegments, p.chunks * kSegments, weight_of);
    __syncthreads();
  }
  const int id =
      draw(r, p, row, options_of(a, row).uniform, shared_cast<double>(s.part_steps), weight_of);
  if (threadIdx.x == 0) a.ids[row] = id;
}

int64_t partial_bytes(int64_t chunks) {
  return chunks * (8 + kBins * 8 + kSegments * 8 + kBins * 4 + 4);
}

Partials partials_of(const SampleArgs& a, int64_t chunks) {
  const int64_t all = a.rows * chunks;
  Partials p;
  p.chunks = int(chunks);
  p.best = static_cast<uint64_t*>(a.workspace);
  p.steps = p.best + all;
  p.sums = reinterpret_cast<double*>(p.steps + all * kBins);
  p.counts = reinterpret_cast<uint32_t*>(p.sums + all * kSegments);
  p.lowest = reinterpret_cast<float*>(p.counts + all * kBins);
  return p;
}

int64_t check_sample(const SampleArgs& a) {
  constexpr const char* op = "sample";
  KN_REQUIRE(a.rows >= 0 && a.rows <= 65535, op, ": rows must be 0 to 65535 (got ", a.rows, ")");
  KN_REQUIRE(a.vocab >= 1 && a.vocab <= kMaxVocab, op, ": vocab must be 1 to ", kMaxVocab, " (got ",
             a.vocab, ")");
  return (a.vocab + kChunk - 1) / kChunk;
}

}  // namespace

int64_t sample_workspace_bytes(const SampleArgs& a) {
  const int64_t chunks = check_sample(a);
  return partial_bytes(a.rows * chunks);
}

void sample(const SampleArgs& a, void* stream) {
  constexpr const char* op = "sample";
  const int64_t chunks = check_sample(a), needed = sample_workspace_bytes(a);
  if (a.rows == 0) return;
  KN_REQUIRE(a.logits && a.options && a.top_k && a.ids, op,
             ": logits, options, top_k and ids must not be null (got ", (const void*)a.logits, ", ",
             (const void*)a.options, ", ", (const void*)a.top_k, ", ", (const void*)a.ids, ")");
  KN_REQUIRE(a.workspace && uintptr_t(a.workspace) % 8 == 0 && a.workspace_bytes >= needed, op,
             ": workspace must have ", needed, " bytes, 8-byte aligned (got ", a.workspace_bytes,
             " at ", a.workspace, ")");
  check_elements(op, {{a.logits, 4}, {a.options, 8}, {a.top_k, 4}, {a.ids, 4}});
  const Partials p = partials_of(a, chunks);
  const bool aligned = is_aligned({a.logits}, {a.vocab});
  const dim3 each_chunk = grid_of(op, chunks, a.rows), block(kCountThreads);
  launch({op, each_chunk, block, kCountWarps * 12, stream}, sample_best_kernel, a, p, aligned);
  launch({op, each_chunk, block, kCountBytes, stream}, sample_count_kernel, a, p, aligned);
  launch({op, grid_of(op, a.rows), dim3(kThreads), kSharedBytes, stream}, sample_draw_kernel, a, p,
         aligned);
}

}  // namespace kn::cuda
