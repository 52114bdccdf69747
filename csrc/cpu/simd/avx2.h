// AVX2 + FMA + F16C tier: 16 lanes as two registers.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "kimi_native/types.h"

namespace kn::cpu::KN_ISA {

struct f32x16 {
  __m256 lo, hi;
};

KN_INLINE f32x16 zero_f32() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
KN_INLINE f32x16 splat(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
KN_INLINE f32x16 load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
KN_INLINE void store(float* p, f32x16 a) {
  _mm256_storeu_ps(p, a.lo);
  _mm256_storeu_ps(p + 8, a.hi);
}
KN_INLINE __m256 widen_bf16(__m128i bits) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
KN_INLINE __m256 load8(const float* p) { return _mm256_loadu_ps(p); }
KN_INLINE __m256 load8(const bf16* p) { return widen_bf16(_mm_loadu_si128((const __m128i*)p)); }
KN_INLINE f32x16 load(const bf16* p) {
  return {widen_bf16(_mm_loadu_si128((const __m128i*)p)),
          widen_bf16(_mm_loadu_si128((const __m128i*)(p + 8)))};
}
// Round to nearest even; NaN stays NaN.
KN_INLINE __m256i bf16_bits(__m256 a) {
  const __m256i u = _mm256_castps_si256(a);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  const __m256i rounded =
      _mm256_srli_epi32(_mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
  const __m256i nan =
      _mm256_or_si256(_mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(0x8000)),
                      _mm256_set1_epi32(0x7fc0));
  return _mm256_blendv_epi8(rounded, nan, _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q)));
}
KN_INLINE void store(bf16* p, f32x16 a) {
  const __m256i packed = _mm256_packus_epi32(bf16_bits(a.lo), bf16_bits(a.hi));
  _mm256_storeu_si256((__m256i*)p, _mm256_permute4x64_epi64(packed, 0xd8));
}
KN_INLINE f32x16 round_to_bf16(f32x16 a) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(bf16_bits(a.lo), 16)),
          _mm256_castsi256_ps(_mm256_slli_epi32(bf16_bits(a.hi), 16))};
}
KN_INLINE f32x16 add(f32x16 a, f32x16 b) {
  return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)};
}
KN_INLINE f32x16 mul(f32x16 a, f32x16 b) {
  return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)};
}
KN_INLINE f32x16 div(f32x16 a, f32x16 b) {
  return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)};
}
// a * b + c
KN_INLINE f32x16 fma(f32x16 a, f32x16 b, f32x16 c) {
  return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
// Sum of the lanes as a fixed tree: halves, quarters, ... (lane i + lane i + 8 first).
KN_INLINE float sum_lanes(f32x16 a) {
  const __m256 s8 = _mm256_add_ps(a.lo, a.hi);
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(s8), _mm256_extractf128_ps(s8, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

KN_INLINE f32x16 sub(f32x16 a, f32x16 b) {
  return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)};
}
// Where either is NaN: b.
KN_INLINE f32x16 max(f32x16 a, f32x16 b) {
  return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)};
}
KN_INLINE f32x16 min(f32x16 a, f32x16 b) {
  return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)};
}
// Largest lane; a NaN lane may or may not be seen.
KN_INLINE float max_lanes(f32x16 a) {
  const __m256 s8 = _mm256_max_ps(a.lo, a.hi);
  __m128 s = _mm_max_ps(_mm256_castps256_ps128(s8), _mm256_extractf128_ps(s8, 1));
  s = _mm_max_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}
KN_INLINE __m256 scale_by_pow2(__m256 a, __m256 n) {
  // In two halves: 2^n alone may lie outside of the normal range.
  const __m256i whole = _mm256_cvtps_epi32(n), half = _mm256_srai_epi32(whole, 1);
  const __m256i one = _mm256_set1_epi32(127);
  const __m256i first = _mm256_slli_epi32(_mm256_add_epi32(half, one), 23);
  const __m256i second =
      _mm256_slli_epi32(_mm256_add_epi32(_mm256_sub_epi32(whole, half), one), 23);
  return _mm256_mul_ps(_mm256_mul_ps(a, _mm256_castsi256_ps(first)), _mm256_castsi256_ps(second));
}
// a * 2^n for integral n, rounded once; a in [0.5, 2], n in [-200, 200].
KN_INLINE f32x16 scale_by_pow2(f32x16 a, f32x16 n) {
  return {scale_by_pow2(a.lo, n.lo), scale_by_pow2(a.hi, n.hi)};
}
// sum_lanes of four registers at once, bit for bit.
KN_INLINE void store_sum_lanes4(float* p, f32x16 a, f32x16 b, f32x16 c, f32x16 d) {
  const __m256 a8 = _mm256_add_ps(a.lo, a.hi), b8 = _mm256_add_ps(b.lo, b.hi);
  const __m256 c8 = _mm256_add_ps(c.lo, c.hi), d8 = _mm256_add_ps(d.lo, d.hi);
  const __m256 ac =
      _mm256_add_ps(_mm256_permute2f128_ps(a8, c8, 0x20), _mm256_permute2f128_ps(a8, c8, 0x31));
  const __m256 bd =
      _mm256_add_ps(_mm256_permute2f128_ps(b8, d8, 0x20), _mm256_permute2f128_ps(b8, d8, 0x31));
  const __m256 s = _mm256_add_ps(_mm256_shuffle_ps(ac, bd, 0x44), _mm256_shuffle_ps(ac, bd, 0xee));
  const __m256 t = _mm256_add_ps(_mm256_shuffle_ps(s, s, 0x88), _mm256_shuffle_ps(s, s, 0xdd));
  const __m128 ab4 = _mm256_castps256_ps128(t), cd4 = _mm256_extractf128_ps(t, 1);
  _mm_storeu_ps(p, _mm_movelh_ps(ab4, cd4));
}

// Four floats, four times.
KN_INLINE f32x16 splat4(const float* p) {
  const __m256 v = _mm256_broadcast_ps((const __m128*)p);
  return {v, v};
}
// Lane 4 i + j is the sum of the four lanes 4 j .. 4 j + 3 of register i: (0 + 2) + (1 + 3).
KN_INLINE __m256 sum_quads(__m256 a, __m256 b, __m256 c, __m256 d) {
  const __m256 ab = _mm256_add_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
  const __m256 cd = _mm256_add_ps(_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d));
  return _mm256_add_ps(_mm256_shuffle_ps(ab, cd, 0x44), _mm256_shuffle_ps(ab, cd, 0xee));
}
KN_INLINE f32x16 sum_quads(f32x16 a, f32x16 b, f32x16 c, f32x16 d) {
  const __m256 lo = sum_quads(a.lo, b.lo, c.lo, d.lo), hi = sum_quads(a.hi, b.hi, c.hi, d.hi);
  __m128 r0 = _mm256_castps256_ps128(lo), r1 = _mm256_extractf128_ps(lo, 1);
  __m128 r2 = _mm256_castps256_ps128(hi), r3 = _mm256_extractf128_ps(hi, 1);
  _MM_TRANSPOSE4_PS(r0, r1, r2, r3);
  return {_mm256_set_m128(r1, r0), _mm256_set_m128(r3, r2)};
}

// The first n of 16 lanes from memory, the rest zero; and only the first n to memory.
KN_INLINE f32x16 load(const float* p, int n) {
  float t[16] = {};
  std::memcpy(t, p, n * sizeof(float));
  return load(t);
}
KN_INLINE f32x16 load(const bf16* p, int n) {
  bf16 t[16] = {};
  std::memcpy(t, p, n * sizeof(bf16));
  return load(t);
}
KN_INLINE void store(float* p, f32x16 a, int n) {
  float t[16];
  store(t, a);
  std::memcpy(p, t, n * sizeof(float));
}
KN_INLINE void store(bf16* p, f32x16 a, int n) {
  bf16 t[16];
  store(t, a);
  std::memcpy(p, t, n * sizeof(bf16));
}

// 16 e4m3 bytes as numbers, each divided by kE4m3Parts: as halves they lack nothing but the bias,
// 15 instead of 7.
static constexpr float kE4m3Parts = 256.0f;
KN_INLINE f32x16 load_e4m3(const uint8_t* p) {
  const __m256i wide =
      _mm256_slli_epi16(_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)p)), 7);
  const __m256i halves = _mm256_and_si256(wide, _mm256_set1_epi16(int16_t(0xbfff)));
  return {_mm256_cvtph_ps(_mm256_castsi256_si128(halves)),
          _mm256_cvtph_ps(_mm256_extracti128_si256(halves, 1))};
}
KN_INLINE f32x16 load_e4m3(const uint8_t* p, int n) {
  uint8_t t[16] = {};
  std::memcpy(t, p, n);
  return load_e4m3(t);
}

// The numbers at the even (odd) places of 32; of the first n of them, the rest zero. load8_: of 16.
KN_INLINE __m256 load8_even(const bf16* p) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_loadu_si256((const __m256i*)p), 16));
}
KN_INLINE __m256 load8_odd(const bf16* p) {
  return _mm256_castsi256_ps(
      _mm256_and_si256(_mm256_loadu_si256((const __m256i*)p), _mm256_set1_epi32(int(0xffff0000))));
}
KN_INLINE f32x16 load_even(const bf16* p) { return {load8_even(p), load8_even(p + 16)}; }
KN_INLINE f32x16 load_odd(const bf16* p) { return {load8_odd(p), load8_odd(p + 16)}; }
KN_INLINE f32x16 load_even(const bf16* p, int n) {
  bf16 t[32] = {};
  std::memcpy(t, p, n * sizeof(bf16));
  return load_even(t);
}
KN_INLINE f32x16 load_odd(const bf16* p, int n) {
  bf16 t[32] = {};
  std::memcpy(t, p, n * sizeof(bf16));
  return load_odd(t);
}
template <int kSelect>
KN_INLINE __m256 every_second(const float* p) {
  const __m256 mixed = _mm256_shuffle_ps(_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8), kSelect);
  return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(mixed), 0xd8));
}
KN_INLINE f32x16 load_even(const float* p) {
  return {every_second<0x88>(p), every_second<0x88>(p + 16)};
}
KN_INLINE f32x16 load_odd(const float* p) {
  return {every_second<0xdd>(p), every_second<0xdd>(p + 16)};
}

// The largest of 32 magnitudes: NaN if one is NaN, else infinite if one is.
KN_INLINE float largest_of(__m128i magnitudes) {  // of 8, by the instruction that finds a smallest
  const __m128i flipped = _mm_xor_si128(magnitudes, _mm_set1_epi32(-1));
  const int bits = ~_mm_cvtsi128_si32(_mm_minpos_epu16(flipped)) & 0x7fff;
  return _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128(bits << 16)));
}
KN_INLINE float largest_magnitude(const bf16* p) {
  const __m256i mask = _mm256_set1_epi16(0x7fff);
  const __m256i a = _mm256_and_si256(_mm256_loadu_si256((const __m256i*)p), mask);
  const __m256i b = _mm256_and_si256(_mm256_loadu_si256((const __m256i*)(p + 16)), mask);
  const __m256i both = _mm256_max_epu16(a, b);
  return largest_of(_mm_max_epu16(_mm256_castsi256_si128(both), _mm256_extracti128_si256(both, 1)));
}
// The low four bits of each lane, those of `even` in the low half of a byte.
KN_INLINE __m256i nibble_pairs(__m256 even, __m256 odd) {
  const __m256i low = _mm256_and_si256(_mm256_castps_si256(even), _mm256_set1_epi32(15));
  const __m256i high = _mm256_and_si256(_mm256_castps_si256(odd), _mm256_set1_epi32(15));
  return _mm256_or_si256(low, _mm256_slli_epi32(high, 4));
}
KN_INLINE void store_nibbles(uint8_t* p, f32x16 even, f32x16 odd) {
  const __m256i words =
      _mm256_packus_epi32(nibble_pairs(even.lo, odd.lo), nibble_pairs(even.hi, odd.hi));
  const __m256i ordered = _mm256_permute4x64_epi64(words, 0xd8);
  _mm_storeu_si128((__m128i*)p, _mm_packus_epi16(_mm256_castsi256_si128(ordered),
                                                 _mm256_extracti128_si256(ordered, 1)));
}

// sum_lanes of 16 registers, `p` and the next at 64 bytes: lane i is the sum of register i.
KN_INLINE f32x16 sum_lanes16(const float* p) {
  float sums[16];
  for (int i = 0; i < 16; i += 4)
    store_sum_lanes4(sums + i, load(p + i * 16), load(p + i * 16 + 16), load(p + i * 16 + 32),
                     load(p + i * 16 + 48));
  return load(sums);
}

}  // namespace kn::cpu::KN_ISA
