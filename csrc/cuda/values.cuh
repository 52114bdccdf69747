// Rows of bf16 or fp32 in global memory, eight values at a time: as 16-byte pieces where the whole
// row is aligned to them, else one by one. Either way a thread gets the same values, so alignment
// never enters an order of sums.
#pragma once
#include "cuda/elements.h"
#include "cuda/ptx.cuh"
#include "kimi_native/types.h"

namespace kn::cuda {

constexpr int kRun = 8;  // 16 bytes of bf16, 32 of fp32

__device__ __forceinline__ float to_float(bf16 x) {
  return __uint_as_float(uint32_t(x.bits) << 16);
}
__device__ __forceinline__ float to_float(float x) { return x; }

template <typename T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ bf16 from_float<bf16>(float x) {
  return {ptx::to_bf16(x)};
}
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}

// x as T holds it.
template <typename T>
__device__ __forceinline__ float rounded(float x) {
  return to_float(from_float<T>(x));
}

// silu(gate) * up
__device__ __forceinline__ float swiglu_of(float gate, float up) {
  return __fmul_rn(__fdiv_rn(gate, __fadd_rn(1.0f, expf(-gate))), up);
}

__device__ __forceinline__ void unpack(uint32_t word, float& low, float& high) {
  low = __uint_as_float(word << 16);
  high = __uint_as_float(word & 0xffff0000u);
}

__device__ __forceinline__ void load_whole(const bf16* p, float (&v)[kRun]) {
  const uint4 words = *reinterpret_cast<const uint4*>(p);
  unpack(words.x, v[0], v[1]);
  unpack(words.y, v[2], v[3]);
  unpack(words.z, v[4], v[5]);
  unpack(words.w, v[6], v[7]);
}

__device__ __forceinline__ void load_whole(const float* p, float (&v)[kRun]) {
  const float4 a = reinterpret_cast<const float4*>(p)[0];
  const float4 b = reinterpret_cast<const float4*>(p)[1];
  v[0] = a.x, v[1] = a.y, v[2] = a.z, v[3] = a.w;
  v[4] = b.x, v[5] = b.y, v[6] = b.z, v[7] = b.w;
}

__device__ __forceinline__ void store_whole(bf16* p, const float (&v)[kRun]) {
  *reinterpret_cast<uint4*>(p) = make_uint4(ptx::to_bf16x2(v[0], v[1]), ptx::to_bf16x2(v[2], v[3]),
                                            ptx::to_bf16x2(v[4], v[5]), ptx::to_bf16x2(v[6], v[7]));
}

__device__ __forceinline__ void store_whole(float* p, const float (&v)[kRun]) {
  reinterpret_cast<float4*>(p)[0] = make_float4(v[0], v[1], v[2], v[3]);
  reinterpret_cast<float4*>(p)[1] = make_float4(v[4], v[5], v[6], v[7]);
}

// n values from p, 0 behind them.
template <typename T>
__device__ __forceinline__ void load_run(const T* p, int64_t n, bool aligned, float (&v)[kRun]) {
  if (aligned && n >= kRun) return load_whole(p, v);
#pragma unroll
  for (int i = 0; i < kRun; ++i) v[i] = i < n ? to_float(p[i]) : 0.0f;
}

template <typename T>
__device__ __forceinline__ void store_run(T* p, int64_t n, bool aligned, const float (&v)[kRun]) {
  if (aligned && n >= kRun) return store_whole(p, v);
#pragma unroll
  for (int i = 0; i < kRun; ++i)
    if (i < n) p[i] = from_float<T>(v[i]);
}

// Whether pieces of eight values can be moved as 16 bytes: rows start at a multiple of that.
inline bool is_aligned(std::initializer_list<const void*> pointers,
                       std::initializer_list<int64_t> strides) {
  for (const void* p : pointers)
    if (reinterpret_cast<uintptr_t>(p) % 16 != 0) return false;
  for (const int64_t stride : strides)
    if (stride % kRun != 0) return false;
  return true;
}

// f(T()) with the element type.
template <typename F>
void with_type(DType dtype, F f) {
  if (dtype == DType::kBf16)
    f(bf16());
  else
    f(float());
}

}  // namespace kn::cuda
