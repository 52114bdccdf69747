// What feeds bf16 tiles (amx.h): limbs (bf16_limbs.h) and 16 by 16 blocks of pairs, transposed.
#pragma once
#include <immintrin.h>

#include <cstdint>

#include "cpu/simd/bf16_limbs.h"

namespace kn::cpu::KN_ISA {

static constexpr int64_t kTileBytes = 1024;  // 16 rows of 64 bytes

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
