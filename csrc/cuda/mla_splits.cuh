// What the kernels of mla_decode share: the splits of the sequences and their results, the rows of
// the cache, and online softmax.
#pragma once
#include "cuda/mla_schedule.cuh"
#include "cuda/reduce.cuh"
#include "cuda/values.cuh"
#include "kimi_native/cache_layout.h"
#include "kimi_native/ops.h"

namespace kn::cuda {

constexpr int kLatent = 512, kRope = 64, kWidth = kLatent + kRope;
constexpr int kFp8RowBytes = int(fp8_row_bytes(kLatent, kRope));
static_assert(kFp8RowBytes % 16 == 0);

// Results of the splits; split s of the schedule has row s, or is in an earlier one (row_of).
struct SplitResults {
  float* values;  // [splits, heads, 512], not yet divided by the sum
  float2* stats;  // [splits, heads]: maximum of the scores (base 2), sum of the weights
};

// The order of a sequence's results: four splits one after the other, then these groups. A block
// that has the first of a group and more of it adds them up in the first one's row, which stays in
// L2; what other blocks have of the group is added by the last kernel. Same operations, same bits.
constexpr int kFoldSplits = 4;

struct MlaProblem {
  const bf16* q;
  const void* cache;
  const int32_t* page_table;
  const int32_t* seq_lens;
  int64_t batch, heads, pages, max_pages;
  int page_size;
  float scale;  // of the scores, times log2(e)
  Schedule schedule;
  SplitResults results;
};

// Worker w of `workers` has splits w * each .. (w + 1) * each.
__device__ __forceinline__ int splits_each(const MlaProblem& p, int workers) {
  return max((p.schedule.first[p.batch] - 1) / workers + 1, 1);
}

// The row of results of a split; `first` is its sequence's first one.
__device__ __forceinline__ int row_of(int split, int first, int each) {
  const int group = split - (split - first) % kFoldSplits;
  return group / each == split / each ? group : split;
}

// Tokens begin .. end of a sequence, and the row that the result goes to, or joins if something is
// there already.
struct Split {
  int sequence, begin, end, row;
  bool joins;
};

__device__ __forceinline__ Split find_split(const MlaProblem& p, int split, int each) {
  const int2 place = p.schedule.splits[split];
  const int end = min(p.seq_lens[place.x], place.y + kSplitTokens);
  device_require(place.y < end, "mla_decode: the schedule must be of these seq_lens");
  const int row = row_of(split, p.schedule.first[place.x], each);
  return {place.x, place.y, end, row, row != split};
}

// Factors of what is there (x) and of what joins it (y), whose maxima these are.
__device__ __forceinline__ float2 fold_factors(float there, float joining) {
  const float largest = fmaxf(there, joining);
  return make_float2(ptx::exp2_approx(__fsub_rn(there, largest)),
                     ptx::exp2_approx(__fsub_rn(joining, largest)));
}

__device__ __forceinline__ float fold(const float2& factors, float there, float joining) {
  return __fmaf_rn(there, factors.x, __fmul_rn(joining, factors.y));
}

__device__ __forceinline__ float2 fold_stats(const float2& factors, const float2& there,
                                             const float2& joining) {
  return make_float2(fmaxf(there.x, joining.x), fold(factors, there.y, joining.y));
}

// What a thread has of a row of results: pairs of columns 8 i and 8 i + 1 from `to` on, by
// value(i). It alone writes and reads them until the last kernel.
template <int kPairs, typename F>
__device__ __forceinline__ void write_run(float* to, bool joins, const float2& factors, F value) {
  constexpr int kAhead = 8;
  static_assert(kPairs % kAhead == 0);
#pragma unroll
  for (int i = 0; i < kPairs; i += kAhead) {
    float2 v[kAhead];
    if (joins) {
#pragma unroll
      for (int j = 0; j < kAhead; ++j) v[j] = *reinterpret_cast<const float2*>(to + (i + j) * 8);
#pragma unroll
      for (int j = 0; j < kAhead; ++j) {
        const float2 joining = value(i + j);
        v[j] = make_float2(fold(factors, v[j].x, joining.x), fold(factors, v[j].y, joining.y));
      }
    } else {
#pragma unroll
      for (int j = 0; j < kAhead; ++j) v[j] = value(i + j);
    }
#pragma unroll
    for (int j = 0; j < kAhead; ++j) *reinterpret_cast<float2*>(to + (i + j) * 8) = v[j];
  }
}

// The page of a tile; a tile never straddles two. 0 past the last token, where nothing is read.
__device__ __forceinline__ int64_t page_of(const MlaProblem& p, int sequence, int token, int end) {
  if (token >= end) return 0;
  const int32_t page = p.page_table[sequence * p.max_pages + token / p.page_size];
  device_require(page >= 0 && page < p.pages, "mla_decode: used page ids must be 0 to pages - 1");
  return page;
}

// The e4m3 byte at the top of a word, times scale: in fp32's places its exponent is 120 too small,
// which the first product, exact for subnormal numbers too, puts right.
__device__ __forceinline__ float widen_e4m3(uint32_t byte_at_top, float scale) {
  const uint32_t bits = uint32_t(int32_t(byte_at_top) >> 4) & 0x87f00000u;
  return __fmul_rn(__fmul_rn(__uint_as_float(bits), 0x1p120f), scale);
}
__device__ __forceinline__ uint32_t widen_pair(uint32_t low_at_top, uint32_t high_at_top,
                                               float scale) {
  return ptx::to_bf16x2(widen_e4m3(low_at_top, scale), widen_e4m3(high_at_top, scale));
}

// Two e4m3 numbers, the bytes of a word that `selector` puts at the tops of its halves, times a
// scale that is a bf16 number, twice in `scales`: again 120 too small at first. Rounded once, as
// above.
__device__ __forceinline__ uint32_t widen_both(uint32_t bytes, uint32_t selector, uint32_t scales) {
  constexpr uint32_t k2To120 = 0x7b807b80u, kMinusZero = 0x80008000u;
  const uint32_t tops = ptx::prmt(bytes, 0, selector);
  const uint32_t bits = (tops >> 4 & 0x07f007f0u) | (tops & 0x80008000u);
  return ptx::fma_bf16x2(ptx::fma_bf16x2(bits, k2To120, kMinusZero), scales, kMinusZero);
}

// Eight latents of an fp8 row in bf16. Scales as rope_append writes them are bf16 numbers.
__device__ __forceinline__ uint4 widen_run(const uint2& e, float scale) {
  const uint32_t bits = __float_as_uint(scale);
  if (bits << 16 == 0) {
    const uint32_t scales = bits | bits >> 16;
    return make_uint4(widen_both(e.x, 0x1404, scales), widen_both(e.x, 0x3424, scales),
                      widen_both(e.y, 0x1404, scales), widen_both(e.y, 0x3424, scales));
  }
  return make_uint4(widen_pair(e.x << 24, e.x << 16, scale), widen_pair(e.x << 8, e.x, scale),
                    widen_pair(e.y << 24, e.y << 16, scale), widen_pair(e.y << 8, e.y, scale));
}

// The larger of a value and those of the three other lanes of the head.
__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, 1));
  return fmaxf(x, __shfl_xor_sync(kAllLanes, x, 2));
}

// Online softmax of a lane's two heads, rows g and g + 8.
struct RunningSoftmax {
  float maximum[2] = {-INFINITY, -INFINITY};
  float sum[2] = {0.0f, 0.0f};  // of this lane's weights
};

}  // namespace kn::cuda
