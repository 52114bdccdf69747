// Integer dot products of the INT4 and INT8 ops with VNNI. Weights are decoded to 8 registers,
// {first, second} x 4: register k of them holds a dword (4 weights) of each lane's group, unsigned,
// u = q + zero_point.
//   INT4: dword k of a group's 16 bytes; first = even columns (low nibbles), second = odd ones
//   INT8: first = dword 2 k of a group's 32 bytes, second = dword 2 k + 1
// The prepared values of a chunk are {first, second} x {low, high} limbs x k x 4 groups, a dword
// each.
#pragma once

namespace kn::cpu::KN_ISA {

KN_INLINE int zero_point(Int4) { return kInt4ZeroPoint; }
KN_INLINE int zero_point(Int8) { return 128; }

// Four times 16 bytes, one to each lane of 128 bits.
KN_INLINE __m512i gather_lanes(const void* const p[4]) {
  __m512i a = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i*)p[0]));
  a = _mm512_mask_broadcast_i32x4(a, 0x00f0, _mm_loadu_si128((const __m128i*)p[1]));
  a = _mm512_mask_broadcast_i32x4(a, 0x0f00, _mm_loadu_si128((const __m128i*)p[2]));
  return _mm512_mask_broadcast_i32x4(a, 0xf000, _mm_loadu_si128((const __m128i*)p[3]));
}

// Dwords of 4 x 4 registers' lanes of 128 bits transposed: lane 4 r + i of out[k] is dword k of
// in[i]'s lane r.
KN_INLINE void transpose_dwords(const __m512i in[4], __m512i out[4]) {
  const __m512i ab0 = _mm512_unpacklo_epi32(in[0], in[1]);
  const __m512i ab2 = _mm512_unpackhi_epi32(in[0], in[1]);
  const __m512i cd0 = _mm512_unpacklo_epi32(in[2], in[3]);
  const __m512i cd2 = _mm512_unpackhi_epi32(in[2], in[3]);
  out[0] = _mm512_unpacklo_epi64(ab0, cd0), out[1] = _mm512_unpackhi_epi64(ab0, cd0);
  out[2] = _mm512_unpacklo_epi64(ab2, cd2), out[3] = _mm512_unpackhi_epi64(ab2, cd2);
}

// Keeps the compiler from reading memory again where it could have a register.
KN_INLINE __m512i keep_in_register(__m512i a) {
  asm("" : "+v"(a));
  return a;
}

// ---- a block of one row: 16 groups, lane 4 g + c is group g of chunk c ----

// What there is of a row's last block: dwords of each 64 bytes, scales, and the lanes of chunks
// that are there at all.
struct BlockEnd {
  __mmask16 dwords[2 * kBlockChunks], scales, lanes;
};
template <typename Format>
KN_INLINE BlockEnd block_end(Format format, int64_t inputs) {
  const auto first = [](int64_t n) {
    return __mmask16(n >= 16 ? 0xffff : n > 0 ? (1 << n) - 1 : 0);
  };
  BlockEnd end;
  for (int i = 0; i < 2 * kBlockChunks; ++i)
    end.dwords[i] = first((row_bytes(format, inputs) - 64 * i) / 4);
  end.scales = first(num_groups(inputs));
  end.lanes = __mmask16(first(num_chunks(inputs)) * 0x1111);
  return end;
}

template <bool kEnd>
KN_INLINE __m512i load_block_part(const uint8_t* w, int i, const BlockEnd& end) {
  return keep_in_register(kEnd ? _mm512_maskz_loadu_epi32(end.dwords[i], w + 64 * i)
                               : _mm512_loadu_si512(w + 64 * i));
}

template <bool kEnd>
KN_INLINE void decode_block(Int4, const uint8_t* w, const BlockEnd& end, __m512i out[8]) {
  const __m512i nibble = _mm512_set1_epi8(15);
  __m512i chunk[4], dword[4];
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) chunk[c] = load_block_part<kEnd>(w, c, end);
  transpose_dwords(chunk, dword);
#pragma GCC unroll 4
  for (int k = 0; k < 4; ++k) {
    out[k] = _mm512_and_si512(dword[k], nibble);
    out[4 + k] = _mm512_and_si512(_mm512_srli_epi16(dword[k], 4), nibble);
  }
}
template <bool kEnd>
KN_INLINE void decode_block(Int8, const uint8_t* w, const BlockEnd& end, __m512i out[8]) {
  const __m512i flip = _mm512_set1_epi8(-128);  // signed q to unsigned q + 128
  __m512i dword[2][4];  // of two groups: dwords k and 4 + k of the first, of the second
#pragma GCC unroll 2
  for (int half = 0; half < 2; ++half) {
    __m512i part[4];
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c)
      part[c] = _mm512_xor_si512(load_block_part<kEnd>(w, 2 * c + half, end), flip);
    transpose_dwords(part, dword[half]);
  }
#pragma GCC unroll 4
  for (int k = 0; k < 4; ++k) {
    out[k % 2 * 4 + k / 2] = _mm512_shuffle_i64x2(dword[0][k], dword[1][k], 0x88);
    out[k % 2 * 4 + 2 + k / 2] = _mm512_shuffle_i64x2(dword[0][k], dword[1][k], 0xdd);
  }
}

// A bf16 in the upper half of a lane is its float value.
template <bool kEnd>
KN_INLINE __m512 load_block_scales(const bf16* s, const BlockEnd& end) {
  const __m512i from = _mm512_set_epi16(15, 15, 11, 11, 7, 7, 3, 3, 14, 14, 10, 10, 6, 6, 2, 2, 13,
                                        13, 9, 9, 5, 5, 1, 1, 12, 12, 8, 8, 4, 4, 0, 0);
  const __m256i a =
      kEnd ? _mm256_maskz_loadu_epi16(end.scales, s) : _mm256_loadu_si256((const __m256i*)s);
  return _mm512_castsi512_ps(
      _mm512_maskz_permutexvar_epi16(0xaaaaaaaa, from, _mm512_castsi256_si512(a)));
}

// Lanes 4 c + g to lanes 4 g + c.
KN_INLINE __m512i to_block_order(__m512i a) {
  const __m512i from = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  return _mm512_permutexvar_epi32(from, a);
}

// The partial sums of 16 rows, a register each at p, `stride` floats apart, lane 4 g + c the
// partial sum 4 c + g. Their sums by the fixed tree of limbs.h: lane r is row r.
KN_INLINE f32x16 sum_rows(const float* p, int64_t stride) {
  __m512 a[8], b[4];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    const __m512d x = _mm512_castps_pd(_mm512_load_ps(p + 2 * i * stride));
    const __m512d y = _mm512_castps_pd(_mm512_load_ps(p + (2 * i + 1) * stride));
    a[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)),
                         _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i)
    b[i] = _mm512_add_ps(_mm512_shuffle_ps(a[2 * i], a[2 * i + 1], 0x88),
                         _mm512_shuffle_ps(a[2 * i], a[2 * i + 1], 0xdd));
  const __m512 low =
      _mm512_add_ps(_mm512_shuffle_f32x4(b[0], b[1], 0x44), _mm512_shuffle_f32x4(b[0], b[1], 0xee));
  const __m512 high =
      _mm512_add_ps(_mm512_shuffle_f32x4(b[2], b[3], 0x44), _mm512_shuffle_f32x4(b[2], b[3], 0xee));
  return {
      _mm512_add_ps(_mm512_shuffle_f32x4(low, high, 0x88), _mm512_shuffle_f32x4(low, high, 0xdd))};
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
