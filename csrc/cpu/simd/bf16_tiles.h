// What feeds bf16 tiles (amx.h): 16 by 16 blocks of pairs transposed, fp32 numbers cut into limbs.
#pragma once
#include <immintrin.h>

#include <cstdint>

namespace kn::cpu::KN_ISA {

static constexpr int64_t kTileBytes = 1024;  // 16 rows of 64 bytes

// The upper half of each result is x to bf16, to nearest, halves away from zero. NaN and infinity
// stay, and what would round to infinity is cut off instead: the low limb makes up for it.
KN_INLINE __m512i limb_bits(__m512 x) {
  const __m512i exponent = _mm512_set1_epi32(0x7f800000), u = _mm512_castps_si512(x);
  const __m512i rounded = _mm512_add_epi32(u, _mm512_set1_epi32(0x8000));
  const __mmask16 special = _mm512_cmpeq_epi32_mask(_mm512_and_si512(u, exponent), exponent) |
                            _mm512_cmpeq_epi32_mask(_mm512_and_si512(rounded, exponent), exponent);
  return _mm512_mask_mov_epi32(rounded, special, u);
}
KN_INLINE __m512 upper_half(__m512i bits) {
  return _mm512_castsi512_ps(_mm512_and_si512(bits, _mm512_set1_epi32(int(0xffff0000))));
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
