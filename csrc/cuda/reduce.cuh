// Sums of a warp and of a block in a fixed order: a tree over the lanes, then the warps ascending.
// Every thread gets the sum. And the largest value, where order does not matter.
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

// Of values that are not NaN; -infinity if there are none. `partial` as above.
template <int kWarps>
__device__ __forceinline__ float block_max(float x, SharedPtr<float> partial) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, step));
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = x;
  __syncthreads();
  float largest = partial[0];
#pragma unroll
  for (int w = 1; w < kWarps; ++w) largest = fmaxf(largest, partial[w]);
  return largest;
}

// The sum of the values of all threads before this one. `partial`: one word for each warp.
__device__ __forceinline__ int32_t exclusive_scan(int32_t value, SharedPtr<int32_t> partial) {
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  int32_t inclusive = value;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int32_t before = __shfl_up_sync(kAllLanes, inclusive, step);
    if (lane >= step) inclusive += before;
  }
  if (lane == 31) partial[warp] = inclusive;
  __syncthreads();
  int32_t start = 0;
  for (int w = 0; w < warp; ++w) start += partial[w];
  return start + inclusive - value;
}

}  // namespace kn::cuda
