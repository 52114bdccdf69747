// A float as an integer that orders like it: -0 equal to +0, NaN below every number.
#pragma once
#include "cuda/device.cuh"

namespace kn::cuda {

constexpr int32_t kNanKey = INT32_MIN + 1;  // below the key of -inf

__device__ __forceinline__ int32_t order_key(float x) {
  x = __fadd_rn(x, 0.0f);  // -0 becomes +0: equal scores tie
  const int32_t bits = __float_as_int(x);
  return x != x ? kNanKey : bits ^ (bits >> 31 & 0x7fffffff);
}

__device__ __forceinline__ float key_value(int32_t key) {
  return __int_as_float(key ^ (key >> 31 & 0x7fffffff));  // kNanKey gives a NaN
}

}  // namespace kn::cuda
