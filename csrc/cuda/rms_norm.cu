#include "core/op_checks.h"
#include "cuda/rms_norm.cuh"

namespace kn::cuda {
namespace {

template <typename T>
__global__ void __launch_bounds__(kNormThreads) rms_norm_kernel(RmsNormArgs a, bool aligned) {
  KN_SHARED(shared);
  const int64_t token = int64_t(blockIdx.x);
  const T* x = static_cast<const T*>(a.x) + token * a.x_token_stride;
  float squares = 0.0f;
  for (int64_t i = int64_t(threadIdx.x) * kRun; i < a.hidden; i += kNormThreads * kRun) {
    float v[kRun];
    load_run(x + i, a.hidden - i, aligned, v);
    squares = add_squares(v, squares);
  }
  const float scale = norm_scale(squares, a.hidden, a.eps, shared_at<float>(shared, 0));
  write_normed(x, a.weight, static_cast<T*>(a.y) + token * a.hidden, a.hidden, scale, aligned);
}

}  // namespace

void rms_norm(const RmsNormArgs& a, void* stream) {
  check_op(a);
  if (a.tokens == 0) return;
  const int64_t bytes = dtype_bytes(a.dtype);
  check_elements("rms_norm", {{a.x, bytes}, {a.weight, 2}, {a.y, bytes}});
  const LaunchConfig config{"rms_norm", grid_of("rms_norm", a.tokens), dim3(kNormThreads),
                            kNormSharedBytes, stream};
  const bool aligned = is_aligned({a.x, a.weight, a.y}, {a.hidden, a.x_token_stride});
  with_type(a.dtype,
            [&](auto type) { launch(config, rms_norm_kernel<decltype(type)>, a, aligned); });
}

}  // namespace kn::cuda
