// Tokens to blocks for matrix tiles (int4_tiles.h), with the numbers of limbs_prepare_kernel.h.
#pragma once
#include "cpu/int4_tiles.h"

namespace kn::cpu::KN_ISA {

KN_INLINE __m256i upper_words(__m512 x) {
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_castps_si512(x), 16));
}
KN_INLINE void store_words(char* to, __m512 first, __m512 second) {
  _mm256_store_si256((__m256i*)to, upper_words(first));
  _mm256_store_si256((__m256i*)(to + 32), upper_words(second));
}

// 32 numbers v, integers, as one row of a tile or two, `stride` apart.
KN_INLINE void store_limbs(const __m512 v[2], __m512 step, int64_t limbs, int64_t stride,
                           char* to) {
  if (limbs == 1) return store_words(to, _mm512_mul_ps(v[0], step), _mm512_mul_ps(v[1], step));
  __m512 high[2], low[2];
  for (int i = 0; i < 2; ++i) {
    const __m512i whole = _mm512_cvtps_epi32(v[i]);
    const __m512i upper = _mm512_andnot_si512(_mm512_set1_epi32(255),
                                              _mm512_add_epi32(whole, _mm512_set1_epi32(128)));
    high[i] = _mm512_mul_ps(_mm512_cvtepi32_ps(upper), step);
    low[i] = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_sub_epi32(whole, upper)), step);
  }
  store_words(to, high[0], high[1]);
  store_words(to + stride, low[0], low[1]);
}

// Where a token's groups go.
struct BlockRow {
  char* values;  // of the first group and limb
  float* steps;  // of the first group
  int64_t groups, limbs, tokens;
};

// Up to four groups of a token, from `group` on. Returns whether one is out of the range in which
// blocks hold step * v.
template <typename Format, bool kByStep, typename T>
KN_INLINE bool prepare_groups(Format format, const T* x, int64_t group, const BlockRow& row) {
  f32x16 f[4][2];
  const __m128i most = load_groups(x, f);
  const Steps steps = steps_of(format, most);
  const __mmask8 bad = _mm_cmpge_epu32_mask(most, _mm_set1_epi32(0x7f800000)) & 15;
  alignas(16) float inverse[4], step[4];
  _mm_store_ps(inverse, steps.inverse);
  _mm_store_ps(step, _mm_mask_mov_ps(steps.step, bad, _mm_set1_ps(__builtin_nanf(""))));
#pragma GCC unroll 4
  for (int g = 0; g < 4; ++g) {
    if (group + g >= row.groups) break;
    const int64_t at = class_start(row.groups, (group + g) % 16) + (group + g) / 16;
    const __m512 shift = _mm512_set1_ps(12582912.0f), s = _mm512_set1_ps(inverse[g]);
    __m512 v[2];
    for (int i = 0; i < 2; ++i)
      v[i] = _mm512_sub_ps(_mm512_add_ps(_mm512_mul_ps(f[g][i].v, s), shift), shift);
    char* to = row.values + at * row.limbs * row.tokens * 64;
    const bool spoiled = bad >> g & 1;
    if (spoiled) v[0] = v[1] = _mm512_setzero_ps();  // times a step that is NaN
    row.steps[at * row.tokens] = kByStep ? step[g] : 1.0f;
    store_limbs(v, _mm512_set1_ps(kByStep ? 1.0f : step[g]), row.limbs, row.tokens * 64, to);
  }
  const __m128 size = _mm_castsi128_ps(most);
  const __mmask8 out = _mm_cmp_ps_mask(size, _mm_set1_ps(kTilesLargest), _CMP_GE_OQ) |
                       (_mm_cmp_ps_mask(size, _mm_set1_ps(kTilesSmallest), _CMP_LT_OQ) &
                        _mm_cmp_ps_mask(size, _mm_setzero_ps(), _CMP_GT_OQ));
  return (out & ~bad) != 0;
}

template <typename Format, bool kByStep, typename T>
static bool prepare_block(const Int4TilesPrepare& a, int64_t limbs) {
  const int64_t groups = num_groups(a.in);
  char* values = (char*)a.out + 64;
  float* steps = (float*)(values + groups * limbs * a.tokens * 64);
  *(int32_t*)a.out = kByStep;
  bool out = false;
  for (int64_t t = 0; t < a.tokens; ++t) {
    const T* x = (const T*)a.x + (a.x_index ? a.x_index[t] : t) * a.in;
    const BlockRow row{values + t * 64, steps + t, groups, limbs, a.tokens};
    for (int64_t g = 0; g < groups; g += 4) {
      const T* from = x + g * kGroupSize;
      T last[kChunkInputs] = {};
      if (groups - g < 4) {
        std::memcpy(last, from, (groups - g) * kGroupSize * sizeof(T));
        from = last;
      }
      out |= prepare_groups<Format, kByStep>(Format{}, from, g, row);
    }
  }
  return out;
}

template <typename T>
static void prepare_exact(const Int4TilesPrepare& a, int64_t limbs) {
  if (prepare_block<Int4, false, T>(a, limbs)) prepare_block<Int4, true, T>(a, limbs);
}
static void int4_tiles_prepare(const Int4TilesPrepare& a) {
  if (a.x_dtype == DType::kBf16)
    prepare_exact<bf16>(a, 1);
  else
    prepare_exact<float>(a, 2);
}
static void int4_tiles_prepare_one_limb(const Int4TilesPrepare& a) {
  if (a.x_dtype == DType::kBf16)
    prepare_block<Int4OneLimb, true, bf16>(a, 1);
  else
    prepare_block<Int4OneLimb, true, float>(a, 1);
}

}  // namespace kn::cpu::KN_ISA
