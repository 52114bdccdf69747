// AVX-512 (F, BW, VL, DQ, VNNI) tier: 16 lanes in one register.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "kimi_native/types.h"

namespace kn::cpu::KN_ISA {

struct f32x16 {
  __m512 v;
};

KN_INLINE f32x16 zero_f32() { return {_mm512_setzero_ps()}; }
KN_INLINE f32x16 splat(float x) { return {_mm512_set1_ps(x)}; }
KN_INLINE f32x16 load(const float* p) { return {_mm512_loadu_ps(p)}; }
KN_INLINE void store(float* p, f32x16 a) { _mm512_storeu_ps(p, a.v); }
KN_INLINE f32x16 load(const bf16* p) {
  return {_mm512_castsi512_ps(
      _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16))};
}
// Round to nearest even; NaN stays NaN. (vcvtneps2bf16 would flush subnormals, and is not in this
// tier.)
KN_INLINE __m512i bf16_bits(__m512 a) {
  const __m512i u = _mm512_castps_si512(a);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  const __m512i rounded =
      _mm512_srli_epi32(_mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
  const __m512i nan =
      _mm512_or_si512(_mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(0x8000)),
                      _mm512_set1_epi32(0x7fc0));
  return _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q), nan);
}
KN_INLINE void store(bf16* p, f32x16 a) {
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(bf16_bits(a.v)));
}
KN_INLINE f32x16 round_to_bf16(f32x16 a) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(bf16_bits(a.v), 16))};
}
KN_INLINE f32x16 add(f32x16 a, f32x16 b) { return {_mm512_add_ps(a.v, b.v)}; }
KN_INLINE f32x16 mul(f32x16 a, f32x16 b) { return {_mm512_mul_ps(a.v, b.v)}; }
KN_INLINE f32x16 div(f32x16 a, f32x16 b) { return {_mm512_div_ps(a.v, b.v)}; }
// a * b + c
KN_INLINE f32x16 fma(f32x16 a, f32x16 b, f32x16 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
// Sum of the lanes as a fixed tree: halves, quarters, ... (lane i + lane i + 8 first).
KN_INLINE float sum_lanes(f32x16 a) {
  const __m256 s8 = _mm256_add_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(s8), _mm256_extractf128_ps(s8, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

KN_INLINE f32x16 sub(f32x16 a, f32x16 b) { return {_mm512_sub_ps(a.v, b.v)}; }
// Where either is NaN: b.
KN_INLINE f32x16 max(f32x16 a, f32x16 b) { return {_mm512_max_ps(a.v, b.v)}; }
KN_INLINE f32x16 min(f32x16 a, f32x16 b) { return {_mm512_min_ps(a.v, b.v)}; }
// Largest lane; a NaN lane may or may not be seen.
KN_INLINE float max_lanes(f32x16 a) { return _mm512_reduce_max_ps(a.v); }
// a * 2^n for integral n, rounded once; a in [0.5, 2], n in [-200, 200].
KN_INLINE f32x16 scale_by_pow2(f32x16 a, f32x16 n) { return {_mm512_scalef_ps(a.v, n.v)}; }
// sum_lanes of four registers at once, bit for bit.
KN_INLINE void store_sum_lanes4(float* p, f32x16 a, f32x16 b, f32x16 c, f32x16 d) {
  const __m512 ab =
      _mm512_add_ps(_mm512_shuffle_f32x4(a.v, b.v, 0x44), _mm512_shuffle_f32x4(a.v, b.v, 0xee));
  const __m512 cd =
      _mm512_add_ps(_mm512_shuffle_f32x4(c.v, d.v, 0x44), _mm512_shuffle_f32x4(c.v, d.v, 0xee));
  __m512 s = _mm512_add_ps(_mm512_shuffle_f32x4(ab, cd, 0x88), _mm512_shuffle_f32x4(ab, cd, 0xdd));
  s = _mm512_add_ps(s, _mm512_permute_ps(s, 0x4e));
  s = _mm512_add_ps(s, _mm512_permute_ps(s, 0xb1));
  const __m512i first_of_each = _mm512_setr_epi32(0, 4, 8, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0);
  _mm_storeu_ps(p, _mm512_castps512_ps128(_mm512_permutexvar_ps(first_of_each, s)));
}

// Four floats, four times.
KN_INLINE f32x16 splat4(const float* p) { return {_mm512_broadcast_f32x4(_mm_loadu_ps(p))}; }
// Lane 4 i + j is the sum of the four lanes 4 j .. 4 j + 3 of register i: (0 + 2) + (1 + 3).
KN_INLINE f32x16 sum_quads(f32x16 a, f32x16 b, f32x16 c, f32x16 d) {
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a.v, b.v), _mm512_unpackhi_ps(a.v, b.v));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c.v, d.v), _mm512_unpackhi_ps(c.v, d.v));
  const __m512 s = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
  const __m512i transposed =
      _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  return {_mm512_permutexvar_ps(transposed, s)};
}

// The first n of 16 lanes from memory, the rest zero; and only the first n to memory.
KN_INLINE __mmask16 first(int n) { return __mmask16((1u << n) - 1); }
KN_INLINE f32x16 load(const float* p, int n) { return {_mm512_maskz_loadu_ps(first(n), p)}; }
KN_INLINE f32x16 load(const bf16* p, int n) {
  return {_mm512_castsi512_ps(
      _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first(n), p)), 16))};
}
KN_INLINE void store(float* p, f32x16 a, int n) { _mm512_mask_storeu_ps(p, first(n), a.v); }
KN_INLINE void store(bf16* p, f32x16 a, int n) {
  _mm256_mask_storeu_epi16(p, first(n), _mm512_cvtepi32_epi16(bf16_bits(a.v)));
}

// 16 e4m3 bytes as numbers, each divided by kE4m3Parts: as halves they lack nothing but the bias,
// 15 instead of 7.
static constexpr float kE4m3Parts = 256.0f;
KN_INLINE f32x16 e4m3_parts(__m128i bytes) {
  const __m256i wide = _mm256_slli_epi16(_mm256_cvtepi8_epi16(bytes), 7);
  return {_mm512_cvtph_ps(_mm256_and_si256(wide, _mm256_set1_epi16(int16_t(0xbfff))))};
}
KN_INLINE f32x16 load_e4m3(const uint8_t* p) {
  return e4m3_parts(_mm_loadu_si128((const __m128i*)p));
}
KN_INLINE f32x16 load_e4m3(const uint8_t* p, int n) {
  return e4m3_parts(_mm_maskz_loadu_epi8(first(n), p));
}

// The numbers at the even (odd) places of 32; of the first n of them, the rest zero. For bf16 that
// is a shift (a mask) of a pair, half of what widening them in order takes.
KN_INLINE f32x16 even_places(__m512i pairs) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16))};
}
KN_INLINE f32x16 odd_places(__m512i pairs) {
  return {_mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(int(0xffff0000))))};
}
KN_INLINE __m512i load_pairs(const bf16* p, int n) {
  return _mm512_maskz_loadu_epi16(__mmask32((uint64_t(1) << n) - 1), p);
}
KN_INLINE f32x16 load_even(const bf16* p) { return even_places(_mm512_loadu_si512(p)); }
KN_INLINE f32x16 load_odd(const bf16* p) { return odd_places(_mm512_loadu_si512(p)); }
KN_INLINE f32x16 load_even(const bf16* p, int n) { return even_places(load_pairs(p, n)); }
KN_INLINE f32x16 load_odd(const bf16* p, int n) { return odd_places(load_pairs(p, n)); }
KN_INLINE f32x16 every_second(const float* p, int from) {
  const __m512i twice =
      _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i places = _mm512_add_epi32(twice, _mm512_set1_epi32(from));
  return {_mm512_permutex2var_ps(_mm512_loadu_ps(p), places, _mm512_loadu_ps(p + 16))};
}
KN_INLINE f32x16 load_even(const float* p) { return every_second(p, 0); }
KN_INLINE f32x16 load_odd(const float* p) { return every_second(p, 1); }

// The largest of 32 magnitudes: NaN if one is NaN, else infinite if one is.
KN_INLINE float largest_of(__m128i magnitudes) {  // of 8, by the instruction that finds a smallest
  const __m128i flipped = _mm_xor_si128(magnitudes, _mm_set1_epi32(-1));
  const int bits = ~_mm_cvtsi128_si32(_mm_minpos_epu16(flipped)) & 0x7fff;
  return _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128(bits << 16)));
}
KN_INLINE float largest_magnitude(const bf16* p) {
  const __m512i all = _mm512_and_si512(_mm512_loadu_si512(p), _mm512_set1_epi16(0x7fff));
  const __m256i half =
      _mm256_max_epu16(_mm512_castsi512_si256(all), _mm512_extracti64x4_epi64(all, 1));
  return largest_of(_mm_max_epu16(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1)));
}
// The low four bits of each lane, those of `even` in the low half of a byte.
KN_INLINE void store_nibbles(uint8_t* p, f32x16 even, f32x16 odd) {
  const __m512i low = _mm512_and_si512(_mm512_castps_si512(even.v), _mm512_set1_epi32(15));
  const __m512i high = _mm512_slli_epi32(_mm512_castps_si512(odd.v), 4);
  _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(_mm512_or_si512(low, high)));
}

// sum_lanes of 16 registers, `p` and the next at 64 bytes: lane i is the sum of register i. Each
// step adds the halves (quarters, pairs, ...) of two registers at once: a blend, a shuffle and an
// addition, whose operands may come in either order. The registers enter in bit-reversed order and
// so leave in order.
KN_INLINE __m512 add_halves(__m512 a, __m512 b) {
  return _mm512_add_ps(_mm512_mask_blend_ps(0xff00, a, b), _mm512_shuffle_f32x4(a, b, 0x4e));
}
KN_INLINE __m512 add_quarters(__m512 a, __m512 b) {
  const __m512i crossed =
      _mm512_setr_epi32(4, 5, 6, 7, 16, 17, 18, 19, 12, 13, 14, 15, 24, 25, 26, 27);
  return _mm512_add_ps(_mm512_mask_blend_ps(0xf0f0, a, b), _mm512_permutex2var_ps(a, crossed, b));
}
KN_INLINE __m512 add_pairs(__m512 a, __m512 b) {
  return _mm512_add_ps(_mm512_mask_blend_ps(0xcccc, a, b), _mm512_shuffle_ps(a, b, 0x4e));
}
KN_INLINE __m512 add_neighbours(__m512 a, __m512 b) {
  return _mm512_add_ps(_mm512_mask_blend_ps(0xaaaa, a, b),
                       _mm512_permute_ps(_mm512_mask_blend_ps(0x5555, a, b), 0xb1));
}
KN_INLINE f32x16 sum_lanes16(const float* p) {
  const auto four = [p](int a, int b, int c, int d) {
    return add_quarters(add_halves(load(p + a * 16).v, load(p + b * 16).v),
                        add_halves(load(p + c * 16).v, load(p + d * 16).v));
  };
  return {add_neighbours(add_pairs(four(0, 8, 4, 12), four(2, 10, 6, 14)),
                         add_pairs(four(1, 9, 5, 13), four(3, 11, 7, 15)))};
}

// 16 rows of 16 32-bit entries become columns.
KN_INLINE void transpose16(__m512i (&r)[16]) {
  __m512i t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {  // r[i + j]: entry j of each quarter, of rows i .. i + 3
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const __m512i lo0 = _mm512_shuffle_i32x4(r[j], r[4 + j], 0x44);
    const __m512i lo1 = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0x44);
    const __m512i hi0 = _mm512_shuffle_i32x4(r[j], r[4 + j], 0xee);
    const __m512i hi1 = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0xee);
    t[j] = _mm512_shuffle_i32x4(lo0, lo1, 0x88);
    t[4 + j] = _mm512_shuffle_i32x4(lo0, lo1, 0xdd);
    t[8 + j] = _mm512_shuffle_i32x4(hi0, hi1, 0x88);
    t[12 + j] = _mm512_shuffle_i32x4(hi0, hi1, 0xdd);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) r[i] = t[i];
}

}  // namespace kn::cpu::KN_ISA
