// silu(gate) * up: each thread eight elements. Bytes: two inputs and one output, once. An element's
// arithmetic does not depend on where it stands.
#include "core/op_checks.h"
#include "cuda/values.cuh"

namespace kn::cuda {
namespace {

constexpr int kThreads = 256;

template <typename T>
__global__ void __launch_bounds__(kThreads)
    swiglu_kernel(const T* gate, const T* up, T* y, int64_t count, bool aligned) {
  const int64_t i = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * kRun;
  if (i >= count) return;
  float g[kRun], u[kRun];
  load_run(gate + i, count - i, aligned, g);
  load_run(up + i, count - i, aligned, u);
#pragma unroll
  for (int j = 0; j < kRun; ++j) g[j] = swiglu_of(g[j], u[j]);
  store_run(y + i, count - i, aligned, g);
}

}  // namespace

void swiglu(const SwigluArgs& a, void* stream) {
  check_op(a);
  const int64_t count = a.tokens * a.width;
  if (count == 0) return;
  const int64_t bytes = dtype_bytes(a.dtype);
  check_elements("swiglu", {{a.gate, bytes}, {a.up, bytes}, {a.y, bytes}});
  const int64_t blocks = (count + kThreads * kRun - 1) / (kThreads * kRun);
  const LaunchConfig config{"swiglu", grid_of("swiglu", blocks), dim3(kThreads), 0, stream};
  with_type(a.dtype, [&](auto type) {
    using T = decltype(type);
    launch(config, swiglu_kernel<T>, static_cast<const T*>(a.gate), static_cast<const T*>(a.up),
           static_cast<T*>(a.y), count, is_aligned({a.gate, a.up, a.y}, {}));
  });
}

}  // namespace kn::cuda
