// rms_norm and add_rms_norm share a row: one block of 256 threads, twice over the row (14 KB in
// bf16 at K2's width: the second time from L1). Thread t has the runs of eight columns t, t + 256,
// ...
//
//   columns  | run 0 | run 1 | ... | run 255 | run 256 | ...      bytes: row in, weight, row out
//   thread       0       1             255        0
//
// Order: a thread adds its squares in ascending columns by multiply-add, then block_sum. It depends
// on `hidden` alone. The result is rounded to the activation dtype before the weight.
#pragma once
#include "cuda/reduce.cuh"
#include "cuda/values.cuh"

namespace kn::cuda {

constexpr int kNormThreads = 256;
constexpr int kNormSharedBytes = kNormThreads / 32 * 4;

__device__ __forceinline__ float add_squares(const float (&v)[kRun], float sum) {
#pragma unroll
  for (int i = 0; i < kRun; ++i) sum = __fmaf_rn(v[i], v[i], sum);
  return sum;
}

// 1 / sqrt(mean + eps), of the block's sum of squares.
__device__ __forceinline__ float norm_scale(float squares, int64_t hidden, float eps,
                                            SharedPtr<float> partial) {
  const float sum = block_sum<kNormThreads / 32>(squares, partial);
  const float mean = __fdiv_rn(sum, float(hidden));
  return __fdiv_rn(1.0f, __fsqrt_rn(__fadd_rn(mean, eps)));
}

template <typename T>
__device__ __forceinline__ void write_normed(const T* x, const bf16* weight, T* y, int64_t hidden,
                                             float scale, bool aligned) {
  for (int64_t i = int64_t(threadIdx.x) * kRun; i < hidden; i += kNormThreads * kRun) {
    float v[kRun], w[kRun];
    load_run(x + i, hidden - i, aligned, v);
    load_run(weight + i, hidden - i, aligned, w);
#pragma unroll
    for (int j = 0; j < kRun; ++j) v[j] = __fmul_rn(rounded<T>(__fmul_rn(v[j], scale)), w[j]);
    store_run(y + i, hidden - i, aligned, v);
  }
}

}  // namespace kn::cuda
