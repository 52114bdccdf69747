// Integer dot products of the INT4 and INT8 ops with VNNI. A quad of weight rows is decoded to 8
// registers, {first, second} x 4: register k of them holds a dword (4 weights) of every group,
// lane 4 r + g that of row r and group g.
//   INT4: dword k of a group's 16 bytes; first = even columns (low nibbles), second = odd ones
//   INT8: first = dword 2 k of a group's 32 bytes, second = dword 2 k + 1
// The prepared values of a chunk are {first, second} x {low, high} limbs x k x 4 groups, a dword
// each. Weights stay or become unsigned: u = q + zero_point.
#pragma once

namespace kn::cpu::KN_ISA {

KN_INLINE int zero_point(Int4) { return kInt4ZeroPoint; }
KN_INLINE int zero_point(Int8) { return 128; }

// 16 bytes of memory, aligned to 16, to all four lanes of 128 bits.
KN_INLINE __m512i broadcast_lane(const void* p) {
  return _mm512_broadcast_i32x4(_mm_load_si128((const __m128i*)p));
}

// Sums of 4 rows by the fixed tree: acc[c] lane 4 r + g is partial sum 4 c + g of row r.
KN_INLINE void store_row_sums(float* out, const float (*acc)[16]) {
  const __m512 s = _mm512_add_ps(_mm512_add_ps(_mm512_load_ps(acc[0]), _mm512_load_ps(acc[2])),
                                 _mm512_add_ps(_mm512_load_ps(acc[1]), _mm512_load_ps(acc[3])));
  const __m512 pairs = _mm512_add_ps(s, _mm512_permute_ps(s, 0x4e));
  const __m512 sums = _mm512_add_ps(pairs, _mm512_permute_ps(pairs, 0xb1));
  const __m512i each = _mm512_setr_epi32(0, 4, 8, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0);
  _mm_storeu_ps(out, _mm512_castps512_ps128(_mm512_permutexvar_ps(each, sums)));
}

// Four times 16 bytes, one to each lane of 128 bits.
KN_INLINE __m512i gather_lanes(const void* const p[4]) {
  __m512i a = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i*)p[0]));
  a = _mm512_mask_broadcast_i32x4(a, 0x00f0, _mm_loadu_si128((const __m128i*)p[1]));
  a = _mm512_mask_broadcast_i32x4(a, 0x0f00, _mm_loadu_si128((const __m128i*)p[2]));
  return _mm512_mask_broadcast_i32x4(a, 0xf000, _mm_loadu_si128((const __m128i*)p[3]));
}

// Scales of 4 rows x 8 groups to scale[c] lane 4 r + g = row r, group 4 c + g. A bf16 in the upper
// half of a lane is its float value.
KN_INLINE void load_two_chunk_scales(const bf16* const row[4], __m512 scale[2]) {
  const void* const p[4] = {row[0], row[1], row[2], row[3]};
  const __m512i a = gather_lanes(p), zero = _mm512_setzero_si512();
  scale[0] = _mm512_castsi512_ps(_mm512_unpacklo_epi16(zero, a));
  scale[1] = _mm512_castsi512_ps(_mm512_unpackhi_epi16(zero, a));
}

// out[k] lane r of 128 bits = lane k of in[r].
KN_INLINE void transpose_lanes(const __m512i in[4], __m512i out[4]) {
  const __m512i ab_low = _mm512_shuffle_i64x2(in[0], in[1], 0x44);
  const __m512i ab_high = _mm512_shuffle_i64x2(in[0], in[1], 0xee);
  const __m512i cd_low = _mm512_shuffle_i64x2(in[2], in[3], 0x44);
  const __m512i cd_high = _mm512_shuffle_i64x2(in[2], in[3], 0xee);
  out[0] = _mm512_shuffle_i64x2(ab_low, cd_low, 0x88);
  out[1] = _mm512_shuffle_i64x2(ab_low, cd_low, 0xdd);
  out[2] = _mm512_shuffle_i64x2(ab_high, cd_high, 0x88);
  out[3] = _mm512_shuffle_i64x2(ab_high, cd_high, 0xdd);
}

// One chunk of 4 rows to out[half][k].
KN_INLINE void decode_quad(Int4, const uint8_t* const row[4], __m512i out[2][4]) {
  // Dwords k and k + 1 of every group of two rows: lanes (a k) (b k) (a k + 1) (b k + 1).
  const __m512i low = _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 1, 5, 9, 13, 17, 21, 25, 29);
  const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(2));
  const __m512i a = _mm512_loadu_si512(row[0]), b = _mm512_loadu_si512(row[1]);
  const __m512i c = _mm512_loadu_si512(row[2]), d = _mm512_loadu_si512(row[3]);
  const __m512i ab0 = _mm512_permutex2var_epi32(a, low, b);
  const __m512i ab2 = _mm512_permutex2var_epi32(a, high, b);
  const __m512i cd0 = _mm512_permutex2var_epi32(c, low, d);
  const __m512i cd2 = _mm512_permutex2var_epi32(c, high, d);
  const __m512i k[4] = {_mm512_shuffle_i64x2(ab0, cd0, 0x44), _mm512_shuffle_i64x2(ab0, cd0, 0xee),
                        _mm512_shuffle_i64x2(ab2, cd2, 0x44), _mm512_shuffle_i64x2(ab2, cd2, 0xee)};
  const __m512i nibble = _mm512_set1_epi8(15);
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    out[0][i] = _mm512_and_si512(k[i], nibble);
    out[1][i] = _mm512_and_si512(_mm512_srli_epi16(k[i], 4), nibble);
  }
}
KN_INLINE void decode_quad(Int8, const uint8_t* const row[4], __m512i out[2][4]) {
  const __m512i even = _mm512_setr_epi32(0, 8, 16, 24, 2, 10, 18, 26, 4, 12, 20, 28, 6, 14, 22, 30);
  const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
  const __m512i flip = _mm512_set1_epi8(-128);  // signed q to unsigned q + 128
  __m512i first[4], second[4];
#pragma GCC unroll 4
  for (int r = 0; r < 4; ++r) {
    const __m512i a = _mm512_xor_si512(_mm512_loadu_si512(row[r]), flip);
    const __m512i b = _mm512_xor_si512(_mm512_loadu_si512(row[r] + 64), flip);
    first[r] = _mm512_permutex2var_epi32(a, even, b);
    second[r] = _mm512_permutex2var_epi32(a, odd, b);
  }
  transpose_lanes(first, out[0]);
  transpose_lanes(second, out[1]);
}

// Up to 64 bytes of memory; the rest of the register is zero.
KN_INLINE __m512i load_bytes(const uint8_t* p, int64_t n) {
  if (n >= 64) return _mm512_loadu_si512(p);
  return _mm512_maskz_loadu_epi8(n > 0 ? (uint64_t(1) << n) - 1 : 0, p);
}

// One chunk of a single row, `n` bytes of it, to {first, second}: lane 4 k + g is dword k of group
// g.
KN_INLINE void decode_row(Int4, const uint8_t* w, int64_t n, __m512i out[2]) {
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const __m512i nibble = _mm512_set1_epi8(15);
  const __m512i a = _mm512_permutexvar_epi32(order, load_bytes(w, n));
  out[0] = _mm512_and_si512(a, nibble);
  out[1] = _mm512_and_si512(_mm512_srli_epi16(a, 4), nibble);
}
KN_INLINE void decode_row(Int8, const uint8_t* w, int64_t n, __m512i out[2]) {
  const __m512i even = _mm512_setr_epi32(0, 8, 16, 24, 2, 10, 18, 26, 4, 12, 20, 28, 6, 14, 22, 30);
  const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
  const __m512i flip = _mm512_set1_epi8(-128);  // signed q to unsigned q + 128
  const __m512i a = _mm512_xor_si512(load_bytes(w, n), flip);
  const __m512i b = _mm512_xor_si512(load_bytes(w + 64, n - 64), flip);
  out[0] = _mm512_permutex2var_epi32(a, even, b);
  out[1] = _mm512_permutex2var_epi32(a, odd, b);
}

// Sums the 4 lanes of 128 bits of each register: lane 4 c + g of the result comes from a[c].
KN_INLINE __m512i reduce_chunks(const __m512i a[4]) {
  const __m512i ab = _mm512_add_epi32(_mm512_shuffle_i64x2(a[0], a[1], 0x44),
                                      _mm512_shuffle_i64x2(a[0], a[1], 0xee));
  const __m512i cd = _mm512_add_epi32(_mm512_shuffle_i64x2(a[2], a[3], 0x44),
                                      _mm512_shuffle_i64x2(a[2], a[3], 0xee));
  return _mm512_add_epi32(_mm512_shuffle_i64x2(ab, cd, 0x88), _mm512_shuffle_i64x2(ab, cd, 0xdd));
}

// ---- activations ----
#define KN_OWN_PREPARE_CHUNK

// Bytes of 8 inputs' (low, high) limb pairs to {first, second} x {low, high} dwords.
KN_INLINE __m512i limb_order(Int4) {
  return _mm512_broadcast_i32x4(
      _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
}
KN_INLINE __m512i limb_order(Int8) {
  return _mm512_broadcast_i32x4(
      _mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15));
}

// Lane i of the result: the largest lane of m[i], as unsigned integers.
KN_INLINE __m128i largest_of_each(const __m512i m[4]) {
  __m128i a[4];
#pragma GCC unroll 4
  for (int g = 0; g < 4; ++g) {
    const __m256i half =
        _mm256_max_epu32(_mm512_castsi512_si256(m[g]), _mm512_extracti64x4_epi64(m[g], 1));
    a[g] = _mm_max_epu32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
  }
  const __m128i ab = _mm_max_epu32(_mm_unpacklo_epi32(a[0], a[1]), _mm_unpackhi_epi32(a[0], a[1]));
  const __m128i cd = _mm_max_epu32(_mm_unpacklo_epi32(a[2], a[3]), _mm_unpackhi_epi32(a[2], a[3]));
  return _mm_max_epu32(_mm_unpacklo_epi64(ab, cd), _mm_unpackhi_epi64(ab, cd));
}

// Four groups as floats; returns the bits of their largest magnitudes.
template <typename T>
KN_INLINE __m128i load_groups(const T* x, f32x16 (&f)[4][2]) {
  __m512i largest[4];
  const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
#pragma GCC unroll 4
  for (int g = 0; g < 4; ++g) {
    f[g][0] = load(x + 32 * g);
    f[g][1] = load(x + 32 * g + 16);
    largest[g] = _mm512_max_epu32(_mm512_and_si512(_mm512_castps_si512(f[g][0].v), magnitude),
                                  _mm512_and_si512(_mm512_castps_si512(f[g][1].v), magnitude));
  }
  return largest_of_each(largest);
}

// Largest magnitudes of four groups to the biased exponents of their steps, at least 1: 2^-126.
KN_INLINE __m128i step_exponents(__m128i largest) {
  const __m128i exponent = _mm_srli_epi32(largest, 23);
  const __m128i step =
      _mm_max_epi32(_mm_sub_epi32(exponent, _mm_set1_epi32(14)), _mm_set1_epi32(1));
  const __m128 inverse =
      _mm_castsi128_ps(_mm_slli_epi32(_mm_sub_epi32(_mm_set1_epi32(254), step), 23));
  const __mmask8 passes = _mm_cmp_ps_mask(_mm_mul_ps(_mm_castsi128_ps(largest), inverse),
                                          _mm_set1_ps(kLimbLimit + 0.5f), _CMP_GE_OQ);
  return _mm_mask_add_epi32(step, passes, step, _mm_set1_epi32(1));
}

// The steps of four groups and their reciprocals, from the bits of their largest magnitudes.
struct Steps {
  __m128 step, inverse;
};
template <typename Format>
KN_INLINE Steps steps_of(Format, __m128i largest) {
  const __m128i exponent = step_exponents(largest);
  return {_mm_castsi128_ps(_mm_slli_epi32(exponent, 23)),
          _mm_castsi128_ps(_mm_slli_epi32(_mm_sub_epi32(_mm_set1_epi32(254), exponent), 23))};
}
KN_INLINE Steps steps_of(Int4OneLimb, __m128i largest) {
  const __m128 limit = _mm_set1_ps(kByteLimit);
  const __m128 at_least = _mm_max_ps(_mm_castsi128_ps(largest), _mm_set1_ps(kSmallestByteMax));
  return {_mm_div_ps(at_least, limit), _mm_div_ps(limit, at_least)};
}

// Sum over the four lanes of 128 bits.
KN_INLINE __m128i add_lanes(__m512i a) {
  const __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(a), _mm512_extracti64x4_epi64(a, 1));
  return _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
}

template <typename Format, typename T>
KN_INLINE void prepare_chunk(Format format, const T* x, uint8_t* values, int32_t* offset,
                             float* step) {
  f32x16 f[4][2];
  const __m128i most = load_groups(x, f);
  const Steps steps = steps_of(format, most);
  const __mmask8 bad = _mm_cmpge_epu32_mask(most, _mm_set1_epi32(0x7f800000));
  alignas(16) float inverse[4];
  _mm_store_ps(inverse, _mm_maskz_mov_ps(__mmask8(~bad), steps.inverse));
  __m512i limbs[4];
#pragma GCC unroll 4
  for (int g = 0; g < 4; ++g) {
    // Adding and taking away 1.5 * 2^23 rounds to an integer, ties to even. NaN and infinity times
    // zero is NaN, whose conversion leaves 16 zero bits.
    const __m512 shift = _mm512_set1_ps(12582912.0f), s = _mm512_set1_ps(inverse[g]);
    __m256i half[2];
    for (int i = 0; i < 2; ++i)
      half[i] = _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(
          _mm512_sub_ps(_mm512_add_ps(_mm512_mul_ps(f[g][i].v, s), shift), shift)));
    const __m512i v = _mm512_inserti64x4(_mm512_castsi256_si512(half[0]), half[1], 1);
    // v + 128 has the high limb in its upper byte and the low one, sign flipped, in its lower.
    limbs[g] = _mm512_shuffle_epi8(
        _mm512_xor_si512(_mm512_add_epi16(v, _mm512_set1_epi16(128)), _mm512_set1_epi16(128)),
        limb_order(format));
  }
  const __m512i ab0 = _mm512_unpacklo_epi32(limbs[0], limbs[1]);
  const __m512i ab2 = _mm512_unpackhi_epi32(limbs[0], limbs[1]);
  const __m512i cd0 = _mm512_unpacklo_epi32(limbs[2], limbs[3]);
  const __m512i cd2 = _mm512_unpackhi_epi32(limbs[2], limbs[3]);
  const __m512i low[2] = {_mm512_unpacklo_epi64(ab0, cd0), _mm512_unpacklo_epi64(ab2, cd2)};
  const __m512i high[2] = {_mm512_unpackhi_epi64(ab0, cd0), _mm512_unpackhi_epi64(ab2, cd2)};
  const __m512i ones = _mm512_set1_epi8(1), zero = _mm512_setzero_si512();
  __m512i sum = _mm512_slli_epi32(
      _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(zero, ones, high[0]), ones, high[1]), 8);
  sum = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(sum, ones, low[0]), ones, low[1]);
  for (int half = 0; half < 2; ++half) {
    _mm512_storeu_si512(values + half * 128, low[half]);
    if constexpr (Format::kLimbs == 2) _mm512_storeu_si512(values + half * 128 + 64, high[half]);
  }
  _mm_store_si128((__m128i*)offset,
                  _mm_mullo_epi32(add_lanes(sum), _mm_set1_epi32(-zero_point(format))));
  _mm_store_si128((__m128i*)step, _mm_mask_mov_epi32(_mm_castps_si128(steps.step), bad,
                                                     _mm_set1_epi32(0x7fc00000)));
}

}  // namespace kn::cpu::KN_ISA
