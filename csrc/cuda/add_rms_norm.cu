// The residual stream's step in one kernel: a thread writes its part of the sum, and reads the same
// part again for the norm, so the block meets once.
#include "core/op_checks.h"
#include "cuda/rms_norm.cuh"

namespace kn::cuda {
namespace {

template <typename T>
__global__ void __launch_bounds__(kNormThreads)
    add_rms_norm_kernel(AddRmsNormArgs a, bool aligned) {
  KN_SHARED(shared);
  const int64_t row = int64_t(blockIdx.x) * a.hidden;
  const T* x = static_cast<const T*>(a.x) + row;
  const T* residual = static_cast<const T*>(a.residual) + row;
  T* sum = static_cast<T*>(a.sum) + row;
  float squares = 0.0f;
  for (int64_t i = int64_t(threadIdx.x) * kRun; i < a.hidden; i += kNormThreads * kRun) {
    float v[kRun], r[kRun];
    load_run(x + i, a.hidden - i, aligned, v);
    load_run(residual + i, a.hidden - i, aligned, r);
#pragma unroll
    for (int j = 0; j < kRun; ++j) v[j] = rounded<T>(__fadd_rn(v[j], r[j]));
    store_run(sum + i, a.hidden - i, aligned, v);
    squares = add_squares(v, squares);
  }
  const float scale = norm_scale(squares, a.hidden, a.eps, shared_at<float>(shared, 0));
  write_normed(static_cast<const T*>(sum), a.weight, static_cast<T*>(a.y) + row, a.hidden, scale,
               aligned);
}

}  // namespace

void add_rms_norm(const AddRmsNormArgs& a, void* stream) {
  check_op(a);
  if (a.tokens == 0) return;
  const int64_t bytes = dtype_bytes(a.dtype);
  check_elements("add_rms_norm",
                 {{a.x, bytes}, {a.residual, bytes}, {a.weight, 2}, {a.y, bytes}, {a.sum, bytes}});
  const LaunchConfig config{"add_rms_norm", grid_of("add_rms_norm", a.tokens), dim3(kNormThreads),
                            kNormSharedBytes, stream};
  const bool aligned = is_aligned({a.x, a.residual, a.weight, a.y, a.sum}, {a.hidden});
  with_type(a.dtype,
            [&](auto type) { launch(config, add_rms_norm_kernel<decltype(type)>, a, aligned); });
}

}  // namespace kn::cuda
