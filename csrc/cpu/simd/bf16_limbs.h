// fp32 numbers cut into bf16 limbs, x = high + low within 2^-17 |x|: what matrix tiles and dot
// instructions of bf16 make exact products of.
#pragma once
#include <immintrin.h>

namespace kn::cpu::KN_ISA {

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

// The limbs of two registers of softmax weights as pairs: lane i is (first[i], second[i]). A weight
// is at most 1; a NaN shows in the sum of the weights, whatever its limbs.
struct WeightLimbs {
  __m512i high, low;
};
KN_INLINE WeightLimbs weight_limbs(f32x16 first, f32x16 second) {
  const __m512i half = _mm512_set1_epi32(0x8000);
  const auto round = [half](__m512 x) { return _mm512_add_epi32(_mm512_castps_si512(x), half); };
  const auto pair = [](__m512i even, __m512i odd) {
    return _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(even, 16), odd);
  };
  const __m512i a = round(first.v), b = round(second.v);
  return {pair(a, b), pair(round(_mm512_sub_ps(first.v, upper_half(a))),
                           round(_mm512_sub_ps(second.v, upper_half(b))))};
}

}  // namespace kn::cpu::KN_ISA
