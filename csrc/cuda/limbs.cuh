// Activations as two signed 8-bit limbs, for exact products with INT4 weights on int8 tensor cores.
//
// Per token and group of 32 inputs x[i] ~ step * v[i], v = 256 * high + low, |v| <= 32639, step a
// power of two: the definition of the CPU kernels (docs/kernels.md, int4_gemm). Of a prepared token
// the groups lie one after the other, 64 bytes each, as mma m16n8k32 wants b: high limb, low limb;
// of a limb, lane t = 0 .. 3 has 8 bytes, inputs 4t .. 4t + 3 and 16 + 4t .. 16 + 4t + 3. The steps
// follow, 4 bytes a group.
#pragma once
#include "cuda/reduce.cuh"
#include "cuda/values.cuh"
#include "kimi_native/layout.h"

namespace kn::cuda {

constexpr int kLimbGroupBytes = 64;
constexpr int kStepBytes = 4;

struct PreparedTokens {
  const uint8_t* limbs;    // [tokens, groups, 64]
  const float* steps;      // [tokens, groups]
  int64_t tokens, groups;  // groups: of whole tiles
};

inline int64_t prepared_groups(int64_t in) { return column_tiles(in) * 2; }
inline int64_t prepared_bytes(int64_t tokens, int64_t in) {
  return tokens * prepared_groups(in) * (kLimbGroupBytes + kStepBytes);
}

__device__ __forceinline__ float power_of_two(uint32_t biased_exponent) {
  return __uint_as_float(biased_exponent << 23);
}

// The step for a group whose largest magnitude has these bits; NaN if it is not finite.
__device__ __forceinline__ float limb_step(uint32_t largest, float& inverse) {
  inverse = 0.0f;
  if (largest >= 0x7f800000u) return __uint_as_float(0x7fc00000u);
  const uint32_t exponent = largest >> 23;
  uint32_t step = exponent > 15 ? exponent - 14 : 1;  // biased; 1 is 2^-126
  if (__fmul_rn(__uint_as_float(largest), power_of_two(254 - step)) >= 32639.5f) ++step;
  inverse = power_of_two(254 - step);
  return power_of_two(step);
}

// A lane's v, of a group that a warp looks at, and the step; both 0 past the token. x: of the
// token, `in` values.
template <typename T>
__device__ __forceinline__ int fixed_point(const T* x, int64_t in, int64_t group, float& step) {
  const int lane = int(threadIdx.x) % 32;
  const bool inside = group * kGroupSize < in;
  const float f = inside ? to_float(x[group * kGroupSize + lane]) : 0.0f;
  const uint32_t largest = __reduce_max_sync(kAllLanes, __float_as_uint(f) & 0x7fffffffu);
  float inverse;
  const float s = limb_step(largest, inverse);
  const float shift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, ties to even
  const float whole = __fsub_rn(__fadd_rn(__fmul_rn(f, inverse), shift), shift);
  step = inside ? s : 0.0f;
  return largest >= 0x7f800000u ? 0 : int(whole);
}

__device__ __forceinline__ int low_limb(int v) { return int(int8_t(v)); }
__device__ __forceinline__ int high_limb(int v) { return (v - low_limb(v)) >> 8; }

// A warp prepares a group, a lane an input.
template <typename T>
__device__ __forceinline__ void prepare_group(const T* x, int64_t in, int64_t group, uint8_t* limbs,
                                              float* step) {
  const int lane = int(threadIdx.x) % 32;
  float s;
  const int v = fixed_point(x, in, group, s);
  const int at = lane % 16 / 4 * 8 + lane / 16 * 4 + lane % 4;
  limbs[at] = uint8_t(high_limb(v));
  limbs[32 + at] = uint8_t(low_limb(v));
  if (lane == 0) *step = s;
}

}  // namespace kn::cuda
