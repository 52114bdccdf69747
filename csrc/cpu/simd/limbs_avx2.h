// Integer dot products of the INT4 and INT8 ops with 16-bit multiplies: vpmaddwd of int16 weights
// and int16 values is exact in 32 bits, so the values need no splitting. The prepared values of a
// chunk are two halves (64 inputs = 2 groups) of four registers; 128-bit lane g of register k holds
//   INT4: the inputs 4 i + k of group g, i < 8 (nibble k of each 16-bit word)
//   INT8: the inputs 16 (k / 2) + 2 i + k % 2 of group g (byte k % 2 of each word)
#pragma once

namespace kn::cpu::KN_ISA {

struct i32x16 {
  __m256i lo, hi;
};

KN_INLINE f32x16 to_f32(i32x16 a) { return {_mm256_cvtepi32_ps(a.lo), _mm256_cvtepi32_ps(a.hi)}; }
KN_INLINE i32x16 add(i32x16 a, i32x16 b) {
  return {_mm256_add_epi32(a.lo, b.lo), _mm256_add_epi32(a.hi, b.hi)};
}

// [0..3] of memory to lanes 0000 1111 2222 3333.
KN_INLINE f32x16 spread(const float* p) {
  return {_mm256_set_m128(_mm_broadcast_ss(p + 1), _mm_broadcast_ss(p)),
          _mm256_set_m128(_mm_broadcast_ss(p + 3), _mm_broadcast_ss(p + 2))};
}
KN_INLINE i32x16 spread(const int32_t* p) {
  return {_mm256_set_m128i(_mm_set1_epi32(p[1]), _mm_set1_epi32(p[0])),
          _mm256_set_m128i(_mm_set1_epi32(p[3]), _mm_set1_epi32(p[2]))};
}

// acc lane 4 p + r to out[r]: (p0 + p2) + (p1 + p3).
KN_INLINE void store_row_sums(float* out, f32x16 acc) {
  const __m256 s = _mm256_add_ps(acc.lo, acc.hi);
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1)));
}

// Scales of 4 rows x 16 groups to scale[c] lane 4 g + r = row r, group 4 c + g.
KN_INLINE void load_quad_scales(const bf16* const p[4], f32x16 scale[4]) {
  for (int c = 0; c < 4; ++c) {
    __m128 row[4];
    for (int r = 0; r < 4; ++r)  // a bf16 in the upper half of a lane is its float value
      row[r] = _mm_castsi128_ps(
          _mm_unpacklo_epi16(_mm_setzero_si128(), _mm_loadl_epi64((const __m128i*)(p[r] + 4 * c))));
    _MM_TRANSPOSE4_PS(row[0], row[1], row[2], row[3]);
    scale[c] = {_mm256_set_m128(row[1], row[0]), _mm256_set_m128(row[3], row[2])};
  }
}

KN_INLINE int zero_point(Int4) { return kInt4ZeroPoint; }
KN_INLINE int zero_point(Int8) { return 0; }

// 64 weights to 4 registers of int16, in the order above.
KN_INLINE void decode(Int4, const uint8_t* w, __m256i q[4]) {
  const __m256i low = _mm256_set1_epi16(15), words = _mm256_loadu_si256((const __m256i*)w);
  q[0] = _mm256_and_si256(words, low);
  q[1] = _mm256_and_si256(_mm256_srli_epi16(words, 4), low);
  q[2] = _mm256_and_si256(_mm256_srli_epi16(words, 8), low);
  q[3] = _mm256_srli_epi16(words, 12);
}
KN_INLINE void decode(Int8, const uint8_t* w, __m256i q[4]) {
  const __m256i a = _mm256_loadu_si256((const __m256i*)w);
  const __m256i b = _mm256_loadu_si256((const __m256i*)(w + 32));
  const __m256i front = _mm256_permute2x128_si256(a, b, 0x20);
  const __m256i back = _mm256_permute2x128_si256(a, b, 0x31);
  q[0] = _mm256_srai_epi16(_mm256_slli_epi16(front, 8), 8);
  q[1] = _mm256_srai_epi16(front, 8);
  q[2] = _mm256_srai_epi16(_mm256_slli_epi16(back, 8), 8);
  q[3] = _mm256_srai_epi16(back, 8);
}

KN_INLINE void pack_chunk(Int4, const int16_t* v, uint8_t* out) {
  int16_t* o = (int16_t*)out;
  for (int half = 0; half < 2; ++half)
    for (int k = 0; k < 4; ++k)
      for (int i = 0; i < 16; ++i) o[64 * half + 16 * k + i] = v[64 * half + 4 * i + k];
}
KN_INLINE void pack_chunk(Int8, const int16_t* v, uint8_t* out) {
  int16_t* o = (int16_t*)out;
  for (int half = 0; half < 2; ++half)
    for (int k = 0; k < 4; ++k)
      for (int g = 0; g < 2; ++g)
        for (int i = 0; i < 8; ++i)
          o[64 * half + 16 * k + 8 * g + i] = v[64 * half + 32 * g + 16 * (k / 2) + 2 * i + k % 2];
}

// Sums the 4 dwords of each group of 4 rows: lane 4 g + r.
KN_INLINE __m256i reduce_rows(const __m256i a[4]) {
  const __m256i ab =
      _mm256_add_epi32(_mm256_unpacklo_epi32(a[0], a[1]), _mm256_unpackhi_epi32(a[0], a[1]));
  const __m256i cd =
      _mm256_add_epi32(_mm256_unpacklo_epi32(a[2], a[3]), _mm256_unpackhi_epi32(a[2], a[3]));
  return _mm256_add_epi32(_mm256_unpacklo_epi64(ab, cd), _mm256_unpackhi_epi64(ab, cd));
}

// 64 weights of 4 rows times T tokens.
template <int T, typename Format>
KN_INLINE void half_quad_dots(Format format, const uint8_t* const w[4], int64_t w_start,
                              const uint8_t* const x[T], int64_t x_start, __m256i d[T]) {
  __m256i a[T][4];
#pragma GCC unroll 4
  for (int r = 0; r < 4; ++r) {
    __m256i q[4];
    decode(format, w[r] + w_start, q);
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) {
      const __m256i* v = (const __m256i*)(x[t] + x_start);
      const __m256i s01 = _mm256_add_epi32(_mm256_madd_epi16(q[0], _mm256_load_si256(v)),
                                           _mm256_madd_epi16(q[1], _mm256_load_si256(v + 1)));
      const __m256i s23 = _mm256_add_epi32(_mm256_madd_epi16(q[2], _mm256_load_si256(v + 2)),
                                           _mm256_madd_epi16(q[3], _mm256_load_si256(v + 3)));
      a[t][r] = _mm256_add_epi32(s01, s23);
    }
  }
#pragma GCC unroll 4
  for (int t = 0; t < T; ++t) d[t] = reduce_rows(a[t]);
}

// One chunk of 4 weight rows times T tokens: d[t] lane 4 g + r is the dot product of row r and
// token t over group g, short of the token's `offset`.
template <int T, typename Format>
KN_INLINE void quad_dots(Format format, const uint8_t* const w[4], const uint8_t* const x[T],
                         i32x16 d[T]) {
  __m256i lo[T], hi[T];
  half_quad_dots<T>(format, w, 0, x, 0, lo);
  half_quad_dots<T>(format, w, Format::kChunkBytes / 2, x, kChunkValueBytes / 2, hi);
  for (int t = 0; t < T; ++t) d[t] = {lo[t], hi[t]};
}

}  // namespace kn::cpu::KN_ISA
