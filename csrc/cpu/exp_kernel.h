// exp of 16 floats. x = n ln 2 + r with |r| <= ln 2 / 2; exp(r) by its series to r^7 (cut off at
// 5.2e-9, less than a tenth of an ulp), then scaled by 2^n. Within 2 ulp where the result is
// normal; exp(-inf) = 0, overflow gives inf, NaN stays NaN.
#pragma once

namespace kn::cpu::KN_ISA {

KN_INLINE f32x16 exp_f32(f32x16 x) {
  // 2^n is 0 below and inf above these, after rounding; max and min keep a NaN in their second
  // operand.
  x = min(splat(90.0f), max(splat(-110.0f), x));
  // Adding 1.5 * 2^23 leaves the nearest integer in the low bits. n itself must not be NaN.
  const f32x16 shift = splat(12582912.0f);
  const f32x16 n = sub(add(mul(max(x, splat(-110.0f)), splat(1.44269504f)), shift), shift);
  // ln 2 in two parts, the first with few enough bits that n times it is exact.
  f32x16 r = fma(n, splat(-0.693359375f), x);
  r = fma(n, splat(2.12194440e-4f), r);
  f32x16 p = splat(1.0f / 5040);
  p = fma(p, r, splat(1.0f / 720));
  p = fma(p, r, splat(1.0f / 120));
  p = fma(p, r, splat(1.0f / 24));
  p = fma(p, r, splat(1.0f / 6));
  p = fma(p, r, splat(0.5f));
  p = fma(p, r, splat(1.0f));
  p = fma(p, r, splat(1.0f));
  return scale_by_pow2(p, n);
}

KN_INLINE float exp_f32(float x) {
  float y[16];
  store(y, exp_f32(splat(x)));
  return y[0];
}

}  // namespace kn::cpu::KN_ISA
