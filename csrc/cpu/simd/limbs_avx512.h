// Integer dot products of the INT4 and INT8 ops with VNNI. The prepared values of a chunk are four
// registers, {high, low} limbs x {first, second} half, where first and second say which 64 of the
// 128 weights a decoded register holds:
//   INT4: first = even columns (low nibbles), second = odd columns
//   INT8: first = columns 0-15 of every group, second = columns 16-31
// so 128-bit lane g of either register belongs to group g, in 4 dwords of 4 weights.
#pragma once

namespace kn::cpu::KN_ISA {

struct i32x16 {
  __m512i v;
};

KN_INLINE f32x16 to_f32(i32x16 a) { return {_mm512_cvtepi32_ps(a.v)}; }
KN_INLINE i32x16 add(i32x16 a, i32x16 b) { return {_mm512_add_epi32(a.v, b.v)}; }

// [0..3] of memory to lanes 0000 1111 2222 3333.
KN_INLINE __m512i each_four_times() {
  return _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
}
KN_INLINE f32x16 spread(const float* p) {
  return {_mm512_permutexvar_ps(each_four_times(), _mm512_castps128_ps512(_mm_loadu_ps(p)))};
}
KN_INLINE i32x16 spread(const int32_t* p) {
  return {_mm512_permutexvar_epi32(each_four_times(),
                                   _mm512_castsi128_si512(_mm_loadu_si128((const __m128i*)p)))};
}

// acc lane 4 p + r to out[r]: (p0 + p2) + (p1 + p3).
KN_INLINE void store_row_sums(float* out, f32x16 acc) {
  const __m256 s = _mm256_add_ps(_mm512_castps512_ps256(acc.v), _mm512_extractf32x8_ps(acc.v, 1));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1)));
}

// Scales of 4 rows x 16 groups to scale[c] lane 4 g + r = row r, group 4 c + g.
KN_INLINE void load_quad_scales(const bf16* const p[4], f32x16 scale[4]) {
  alignas(64) static const uint16_t kOrder[32] = {0,  0,  0,  16, 0,  32, 0, 48, 0,  1, 0,
                                                  17, 0,  33, 0,  49, 0,  2, 0,  18, 0, 34,
                                                  0,  50, 0,  3,  0,  19, 0, 35, 0,  51};
  __m256i row[4];
  for (int r = 0; r < 4; ++r) row[r] = _mm256_loadu_si256((const __m256i*)p[r]);
  const __m512i ab = _mm512_inserti64x4(_mm512_castsi256_si512(row[0]), row[1], 1);
  const __m512i cd = _mm512_inserti64x4(_mm512_castsi256_si512(row[2]), row[3], 1);
  __m512i order = _mm512_load_si512(kOrder);
  for (int c = 0; c < 4; ++c) {
    // A bf16 in the upper half of a lane is its float value.
    scale[c].v = _mm512_castsi512_ps(_mm512_maskz_permutex2var_epi16(0xaaaaaaaa, ab, order, cd));
    order = _mm512_add_epi16(order, _mm512_set1_epi16(4));
  }
}

KN_INLINE int zero_point(Int4) { return kInt4ZeroPoint; }
KN_INLINE int zero_point(Int8) { return 128; }

KN_INLINE void decode(Int4, const uint8_t* w, __m512i& first, __m512i& second) {
  const __m512i low = _mm512_set1_epi8(15), bytes = _mm512_loadu_si512(w);
  first = _mm512_and_si512(bytes, low);
  second = _mm512_and_si512(_mm512_srli_epi16(bytes, 4), low);
}
KN_INLINE void decode(Int8, const uint8_t* w, __m512i& first, __m512i& second) {
  const __m512i flip = _mm512_set1_epi8(-128);  // signed q to unsigned q + 128
  const __m512i a = _mm512_xor_si512(_mm512_loadu_si512(w), flip);
  const __m512i b = _mm512_xor_si512(_mm512_loadu_si512(w + 64), flip);
  first = _mm512_shuffle_i64x2(a, b, 0x88);
  second = _mm512_shuffle_i64x2(a, b, 0xdd);
}

KN_INLINE void pack_chunk(Int4, const int16_t* v, uint8_t* out) {
  int8_t* o = (int8_t*)out;
  for (int i = 0; i < 64; ++i) {
    o[i] = int8_t((v[2 * i] + 128) >> 8);
    o[64 + i] = int8_t((v[2 * i + 1] + 128) >> 8);
    o[128 + i] = int8_t(v[2 * i]);
    o[192 + i] = int8_t(v[2 * i + 1]);
  }
}
KN_INLINE void pack_chunk(Int8, const int16_t* v, uint8_t* out) {
  int8_t* o = (int8_t*)out;
  for (int g = 0; g < kChunkGroups; ++g)
    for (int i = 0; i < 16; ++i) {
      o[16 * g + i] = int8_t((v[32 * g + i] + 128) >> 8);
      o[64 + 16 * g + i] = int8_t((v[32 * g + 16 + i] + 128) >> 8);
      o[128 + 16 * g + i] = int8_t(v[32 * g + i]);
      o[192 + 16 * g + i] = int8_t(v[32 * g + 16 + i]);
    }
}

// Sums the 4 dwords of each group of 4 rows: lane 4 g + r.
KN_INLINE __m512i reduce_rows(const __m512i a[4]) {
  const __m512i ab =
      _mm512_add_epi32(_mm512_unpacklo_epi32(a[0], a[1]), _mm512_unpackhi_epi32(a[0], a[1]));
  const __m512i cd =
      _mm512_add_epi32(_mm512_unpacklo_epi32(a[2], a[3]), _mm512_unpackhi_epi32(a[2], a[3]));
  return _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
}

// One chunk of 4 weight rows times T tokens: d[t] lane 4 g + r is the dot product of row r and
// token t over group g, short of the token's `offset`.
template <int T, typename Format>
KN_INLINE void quad_dots(Format format, const uint8_t* const w[4], const uint8_t* const x[T],
                         i32x16 d[T]) {
  __m512i first[4], second[4];
#pragma GCC unroll 4
  for (int r = 0; r < 4; ++r) decode(format, w[r], first[r], second[r]);
#pragma GCC unroll 4
  for (int t = 0; t < T; ++t) {
    const __m512i high1 = _mm512_load_si512(x[t]), high2 = _mm512_load_si512(x[t] + 64);
    const __m512i low1 = _mm512_load_si512(x[t] + 128), low2 = _mm512_load_si512(x[t] + 192);
    __m512i a[4];
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) {
      a[r] = _mm512_dpbusd_epi32(_mm512_setzero_si512(), first[r], high1);
      a[r] = _mm512_slli_epi32(_mm512_dpbusd_epi32(a[r], second[r], high2), 8);
      a[r] = _mm512_dpbusd_epi32(a[r], first[r], low1);
      a[r] = _mm512_dpbusd_epi32(a[r], second[r], low2);
    }
    d[t].v = reduce_rows(a);
  }
}

}  // namespace kn::cpu::KN_ISA
