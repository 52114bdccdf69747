// The CUDA names that kernels use, for a C++ compiler. Included through cuda/device.cuh.
#pragma once
#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <type_traits>

#include "simt/shared.h"
#include "simt/warp.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) alignas(n)

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

#define threadIdx (kn::simt::self->index)
#define blockIdx (kn::simt::self->block->index)
#define blockDim (kn::simt::worker->grid().block)
#define gridDim (kn::simt::worker->grid().size)

// ---- synchronisation ----------------------------------------------------------------------------

inline void __syncthreads() { kn::simt::sync_barrier(0, kn::simt::kAll, "__syncthreads"); }
inline void __syncwarp(unsigned mask = kn::simt::kWholeWarp) { kn::simt::sync_warp(mask); }
inline void __threadfence() { std::atomic_thread_fence(std::memory_order_seq_cst); }

// ---- shuffles and votes -------------------------------------------------------------------------

namespace kn::simt {

// source(lane, argument, width): the lane to read from; one that is not in the mask, or outside of
// the lane's segment, leaves the lane its own value (which PTX calls out of range).
template <typename T, typename Source>
T shuffle(const char* what, unsigned mask, T value, int argument, int width, Source source) {
  struct In {
    T value;
    int argument, width;
  };
  const In in{value, argument, width};
  T out;
  meet(mask, what, in, out, [&](const In** ins, T** outs) {
    for (int l = 0; l < 32; ++l) {
      if (!outs[l]) continue;
      const int s = source(l, ins[l]->argument, ins[l]->width);
      if (s >= 0 && !ins[s]) fail(std::string(what) + ": reads a lane outside of its mask");
      *outs[l] = s >= 0 ? ins[s]->value : ins[l]->value;
    }
  });
  return out;
}

template <typename F>
unsigned vote(const char* what, unsigned mask, int predicate, F f) {
  unsigned out;
  meet(mask, what, predicate, out, [&](const int** ins, unsigned** outs) {
    unsigned set = 0;
    for (int l = 0; l < 32; ++l)
      if (ins[l] && *ins[l]) set |= 1u << l;
    for (int l = 0; l < 32; ++l)
      if (outs[l]) *outs[l] = f(set);
  });
  return out;
}

}  // namespace kn::simt

template <typename T>
T __shfl_sync(unsigned mask, T v, int source, int width = 32) {
  return kn::simt::shuffle("__shfl_sync", mask, v, source, width,
                           [](int l, int s, int w) { return (l & -w) | (s & (w - 1)); });
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T v, int x, int width = 32) {
  return kn::simt::shuffle("__shfl_xor_sync", mask, v, x, width, [](int l, int m, int w) {
    const int s = l ^ m;
    return s <= (l | (w - 1)) ? s : -1;  // earlier segments may be read, later ones not
  });
}
template <typename T>
T __shfl_up_sync(unsigned mask, T v, int d, int width = 32) {
  return kn::simt::shuffle("__shfl_up_sync", mask, v, d, width,
                           [](int l, int n, int w) { return l - n >= (l & -w) ? l - n : -1; });
}
template <typename T>
T __shfl_down_sync(unsigned mask, T v, int d, int width = 32) {
  return kn::simt::shuffle("__shfl_down_sync", mask, v, d, width,
                           [](int l, int n, int w) { return l + n <= (l | (w - 1)) ? l + n : -1; });
}
inline unsigned __ballot_sync(unsigned mask, int p) {
  return kn::simt::vote("__ballot_sync", mask, p, [](unsigned set) { return set; });
}
inline int __any_sync(unsigned mask, int p) {
  return int(kn::simt::vote("__any_sync", mask, p, [](unsigned set) { return set != 0; }));
}
inline int __all_sync(unsigned mask, int p) {
  return int(kn::simt::vote("__all_sync", mask, p, [=](unsigned set) { return set == mask; }));
}
template <typename T>
unsigned __match_any_sync(unsigned mask, T v) {
  unsigned out;
  kn::simt::meet(mask, "__match_any_sync", v, out, [](const T** ins, unsigned** outs) {
    for (int l = 0; l < 32; ++l) {
      if (!outs[l]) continue;
      *outs[l] = 0;
      for (int i = 0; i < 32; ++i)
        if (ins[i] && *ins[i] == *ins[l]) *outs[l] |= 1u << i;
    }
  });
  return out;
}

namespace kn::simt {

template <typename T, typename F>
T reduce(const char* what, unsigned mask, T v, F f) {
  T out;
  meet(mask, what, v, out, [&](const T** ins, T** outs) {
    T all = *ins[std::countr_zero(mask)];
    for (int l = 0; l < 32; ++l)
      if (ins[l]) all = f(all, *ins[l]);
    for (int l = 0; l < 32; ++l)
      if (outs[l]) *outs[l] = all;
  });
  return out;
}

}  // namespace kn::simt

// int or unsigned, as on a GPU (sm_80 and up).
template <typename T>
T __reduce_max_sync(unsigned mask, T v) {
  static_assert(std::is_integral_v<T> && sizeof(T) == 4);
  return kn::simt::reduce("__reduce_max_sync", mask, v, [](T a, T b) { return a > b ? a : b; });
}
template <typename T>
T __reduce_min_sync(unsigned mask, T v) {
  static_assert(std::is_integral_v<T> && sizeof(T) == 4);
  return kn::simt::reduce("__reduce_min_sync", mask, v, [](T a, T b) { return a < b ? a : b; });
}

// ---- arithmetic ---------------------------------------------------------------------------------

inline int __popc(unsigned x) { return std::popcount(x); }
inline int __clz(int x) { return std::countl_zero(unsigned(x)); }
inline int __ffs(int x) { return x ? std::countr_zero(unsigned(x)) + 1 : 0; }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
template <typename T>
T __ldg(const T* p) {
  return *p;
}
using std::max;
using std::min;

// ---- launch -------------------------------------------------------------------------------------

namespace kn::simt {

template <typename... P, typename... A>
void launch(const char* name, dim3 grid, dim3 block, size_t shared_bytes, void (*kernel)(P...),
            A&&... arguments) {
  std::tuple<P...> copy(static_cast<P>(arguments)...);
  run_grid({name, grid, block, shared_bytes, [&] { std::apply(kernel, copy); }});
}

}  // namespace kn::simt
