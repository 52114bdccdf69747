// sample: where the filters cut a row. One block finds the last rank to keep.
//
// Each filter keeps the best: top_k a number of ids, top_p enough of them that their steps reach a
// goal. So both look for the rank at which a count is reached, first among the bins that
// sample_count_kernel has counted, then by cutting the bin that holds it into eight, again and
// again, until few ids are left in it, which are compared one with the other. Ranks differ, so this
// ends, at the latest with single ids, whatever the scores are.
#pragma once
#include "cuda/sample_row.cuh"

namespace kn::cuda::sample_row {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;
constexpr int kParts = 8;
constexpr int kFew = 256;
constexpr int kRuns = 2;  // that a thread loads at once
constexpr int kPass = kThreads * kRun * kRuns;

// Shared memory of the block. Totals are written behind a barrier that follows their last reading:
// total_bins starts with one, split and choose_few have one before they write.
struct Shared {
  SharedPtr<uint64_t> part_steps;   // [kParts, kThreads]  each thread's own, or the steps and ranks
  SharedPtr<uint32_t> part_counts;  // [kParts, kThreads]  of the few
  SharedPtr<uint64_t> few_ranks, few_steps;  // [kFew]
  SharedPtr<uint64_t> total_steps;           // [kBins] of bins or parts
  SharedPtr<uint64_t> best;                  // [kWarps]
  SharedPtr<uint64_t> found;                 // rank, steps
  SharedPtr<uint32_t> total_counts;          // [kBins]
  SharedPtr<uint32_t> edges;                 // [kBins]
  SharedPtr<int32_t> scan;                   // [kWarps]
  SharedPtr<float> lowest;                   // [kWarps]
};

constexpr int kPartBytes = kParts * kThreads * 12;
constexpr int kSharedBytes = kPartBytes + (kBins + kWarps) * 8 + 16 + (2 * kBins + 2 * kWarps) * 4;

template <typename Bytes>
__device__ __forceinline__ Shared carve(Bytes shared) {
  Shared s;
  s.part_steps = shared_at<uint64_t>(shared, 0);
  s.few_ranks = s.part_steps;
  s.few_steps = s.part_steps + kFew;
  s.part_counts = shared_at<uint32_t>(shared, kParts * kThreads * 8);
  s.total_steps = shared_at<uint64_t>(shared, kPartBytes);
  s.best = s.total_steps + kBins;
  s.found = s.best + kWarps;
  constexpr int kRest = kPartBytes + (kBins + kWarps) * 8 + 16;
  s.total_counts = shared_at<uint32_t>(shared, kRest);
  s.edges = s.total_counts + kBins;
  s.scan = shared_at<int32_t>(shared, kRest + 8 * kBins);
  s.lowest = shared_at<float>(shared, kRest + 8 * kBins + 4 * kWarps);
  return s;
}

// Ids of a row that are left, best first: `count` of them, `steps` together, down to `rank`.
struct Kept {
  uint64_t rank;
  uint64_t steps;
  uint32_t count;
};

// Ranks from `low` to `last`, `count` ids, behind `better`.
struct Interval {
  uint64_t low, last;
  uint32_t count;
  Kept better;
};

// The amount that the last id to keep reaches.
struct Goal {
  uint64_t amount;
  bool of_counts;
  __device__ __forceinline__ bool is_reached(uint32_t count, uint64_t steps) const {
    return (of_counts ? uint64_t(count) : steps) >= amount;
  }
};

// The first of n totals at which the goal is reached; those before it join what is better.
__device__ __forceinline__ int reach(const Shared& s, int n, const Goal& goal, Interval& in) {
  int i = 0;
  for (; i < n - 1; ++i) {
    const uint32_t count = in.better.count + s.total_counts[i];
    const uint64_t steps = in.better.steps + s.total_steps[i];
    if (goal.is_reached(count, steps)) break;
    in.better.count = count, in.better.steps = steps;
  }
  in.count = s.total_counts[i];
  return i;
}

// The totals of the bins over all chunks.
__device__ __forceinline__ void total_bins(const Shared& s, const Partials& p, int64_t row) {
  __syncthreads();  // the totals of before have been read
  for (int bin = int(threadIdx.x) / 32; bin < kBins; bin += kWarps) {
    uint32_t count = 0;
    uint64_t steps = 0;
    for (int c = int(threadIdx.x) % 32; c < p.chunks; c += 32) {
      const int64_t at = (row * p.chunks + c) * kBins + bin;
      count += p.counts[at], steps += p.steps[at];
    }
    count = warp_sum(count), steps = warp_sum(steps);
    if (threadIdx.x % 32 == 0) s.total_counts[bin] = count, s.total_steps[bin] = steps;
  }
  __syncthreads();
}

// f(rank, weight) for the ids of this thread's runs at `id` that are in the interval and that min_p
// keeps.
template <typename F>
__device__ __forceinline__ void each_within(const Row& r, const Interval& in, int id, F f) {
  each_of_runs<kRuns>(r, id, kThreads * kRun, [&](float x, int i, int) {
    const uint64_t rank = rank_of(x, i);
    if (rank < in.low || rank > in.last) return;
    const double w = weight(r, x);
    if (is_likely(r, w)) f(rank, w);
  });
}

__device__ __forceinline__ int bits_of(uint64_t x) {
  const uint32_t high = uint32_t(x >> 32);
  return high ? 64 - __clz(int(high)) : 32 - __clz(int(uint32_t(x)));
}

// Totals of the eight parts of an interval, best first; returns log2 of a part's length.
__device__ int split(const Row& r, const Shared& s, const Interval& in) {
  const int shift = max(bits_of(in.last - in.low) - 3, 0), me = int(threadIdx.x);
  for (int i = 0; i < kParts; ++i) {
    s.part_steps[i * kThreads + me] = 0;
    s.part_counts[i * kThreads + me] = 0;
  }
  for (int id = me * kRun; id < r.vocab; id += kPass)
    each_within(r, in, id, [&](uint64_t rank, double w) {
      const int mine = (kParts - 1 - int((rank - in.low) >> shift)) * kThreads + me;
      s.part_steps[mine] += steps(r, w);
      s.part_counts[mine] += 1;
    });
  __syncthreads();
  const int part = me / 32;
  if (part < kParts) {
    uint32_t count = 0;
    uint64_t sum = 0;
    for (int t = me % 32; t < kThreads; t += 32) {
      count += s.part_counts[part * kThreads + t];
      sum += s.part_steps[part * kThreads + t];
    }
    count = warp_sum(count), sum = warp_sum(sum);
    if (me % 32 == 0) s.total_counts[part] = count, s.total_steps[part] = sum;
  }
  __syncthreads();
  return shift;
}

// The ids of an interval, at most kFew; returns how many there are.
__device__ int collect_few(const Row& r, const Shared& s, const Interval& in) {
  int n = 0;
  for (int first = 0; first < r.vocab; first += kPass) {
    const int id = first + int(threadIdx.x) * kRun;
    int32_t mine = 0;
    each_within(r, in, id, [&](uint64_t, double) { ++mine; });
    int at = n + exclusive_scan(mine, s.scan);
    for (int w = 0; w < kWarps; ++w) n += s.scan[w];
    if (mine > 0)
      each_within(r, in, id, [&](uint64_t rank, double w) {
        s.few_ranks[at] = rank;
        s.few_steps[at++] = steps(r, w);
      });
    __syncthreads();
  }
  return n;
}

// Compares each of the few with all of them: the one that reaches the goal.
__device__ Kept choose_few(const Row& r, const Shared& s, const Goal& goal, const Interval& in) {
  const int n = collect_few(r, s, in), me = int(threadIdx.x);
  if (me < n) {
    const uint64_t rank = s.few_ranks[me], own = s.few_steps[me];
    Kept better = in.better;
    for (int i = 0; i < n; ++i)
      if (s.few_ranks[i] > rank) ++better.count, better.steps += s.few_steps[i];
    if (goal.is_reached(better.count + 1, better.steps + own) &&
        !goal.is_reached(better.count, better.steps)) {
      s.found[0] = rank, s.found[1] = better.steps + own;
      s.total_counts[0] = better.count + 1;
    }
  }
  __syncthreads();
  return {s.found[0], s.found[1], s.total_counts[0]};
}

__device__ Kept find(const Row& r, const Shared& s, const Goal& goal, Interval in) {
  while (in.count > kFew) {
    const int shift = split(r, s, in);
    const uint64_t part = uint64_t(kParts - 1 - reach(s, kParts, goal, in));
    const uint64_t last = in.last - in.low, end = ((part + 1) << shift) - 1;
    in.last = in.low + (end < last ? end : last);
    in.low += part << shift;
  }
  return choose_few(r, s, goal, in);
}

// No rank of the row is above it.
__device__ __forceinline__ uint64_t best_rank(const Row& r) { return rank_of(float(r.best), 0); }

// The bin in which the goal is reached.
__device__ __forceinline__ Interval find_bin(const Row& r, const Shared& s, const Goal& goal) {
  Interval in{};
  const int bin = reach(s, kBins, goal, in);
  in.low = uint64_t(s.edges[bin]) << kIdBits;
  in.last = bin == 0 ? best_rank(r) : (uint64_t(s.edges[bin - 1]) << kIdBits) - 1;
  return in;
}

// All that min_p keeps, from the totals of the bins.
__device__ __forceinline__ Kept all_of_bins(const Shared& s) {
  Kept all{0, 0, 0};
  for (int bin = 0; bin < kBins; ++bin) {
    all.count += s.total_counts[bin], all.steps += s.total_steps[bin];
    if (s.total_counts[bin] > 0) all.rank = uint64_t(s.edges[bin]) << kIdBits;
  }
  return all;
}

// top_p among what the others have kept. Its steps depend on how many that are, which the bins
// could not know where min_p came first.
__device__ uint64_t top_p_cut(Row& r, const Shared& s, const Partials& p, int64_t row, double top_p,
                              Kept kept) {
  const double scale = scale_of(int(kept.count));
  Interval in{kept.rank, best_rank(r), kept.count, {}};
  const bool recount = scale != r.scale;
  r.scale = scale;
  if (recount) {
    split(r, s, in);
    kept.steps = 0;
    for (int i = 0; i < kParts; ++i) kept.steps += s.total_steps[i];
  }
  const Goal goal{uint64_t(ceil(top_p * double(kept.steps))), false};
  if (!recount) {
    total_bins(s, p, row);
    in = find_bin(r, s, goal);
  }
  return find(r, s, goal, in).rank;
}

// The lowest rank that all filters keep (and min_p, which is about weights, may still refuse).
__device__ uint64_t cut_of(Row& r, const Shared& s, const SampleArgs& a, const Partials& p,
                           int64_t row, float lowest) {
  place_edges(r, lowest, s.edges);
  total_bins(s, p, row);
  Kept kept = all_of_bins(s);
  const int top_k = a.top_k[row];
  if (top_k > 0 && uint32_t(top_k) < kept.count) {
    const Goal goal{uint64_t(top_k), true};
    kept = find(r, s, goal, find_bin(r, s, goal));
  }
  const double top_p = a.options[row * 4 + 1];
  return top_p < 1 ? top_p_cut(r, s, p, row, top_p, kept) : kept.rank;
}

}  // namespace kn::cuda::sample_row
