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

// Results of the splits; split s of the schedule is row s.
struct SplitResults {
  float* values;  // [splits, heads, 512], not yet divided by the sum
  float2* stats;  // [splits, heads]: maximum of the scores (base 2), sum of the weights
};

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

// Tokens begin .. end of a sequence.
struct Split {
  int sequence, begin, end;
};

__device__ __forceinline__ Split find_split(const MlaProblem& p, int64_t split) {
  const int2 place = p.schedule.splits[split];
  const int end = min(p.seq_lens[place.x], place.y + kSplitTokens);
  device_require(place.y < end, "mla_decode: the schedule must be of these seq_lens");
  return {place.x, place.y, end};
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
