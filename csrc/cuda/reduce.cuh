// Sums of a warp and of a block in a fixed order: a tree over the lanes, then the warps ascending.
// Every thread gets the sum.
#pragma once
#include "cuda/device.cuh"

namespace kn::cuda {

constexpr unsigned kAllLanes = 0xffffffffu;

template <typename T>
__device__ __forceinline__ T warp_sum(T x) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(kAllLanes, x, step);
  return x;
}

// `partial`: one value for each warp, used by nothing else until the next barrier of the block.
template <int kWarps, typename T>
__device__ __forceinline__ T block_sum(T x, SharedPtr<T> partial) {
  x = warp_sum(x);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = x;
  __syncthreads();
  T sum = partial[0];
#pragma unroll
  for (int w = 1; w < kWarps; ++w) sum += partial[w];
  return sum;
}

}  // namespace kn::cuda
