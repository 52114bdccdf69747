// moe_combine: out = sum over slots of weight * row, plus the shared expert. A thread has eight
// columns of a token and goes through the slots in order; every column is summed alone, slot 0
// first, by multiply-add, the shared row last, one rounding. Bytes: topk rows and the shared row
// in, one row out, each once.
#include "core/op_checks.h"
#include "cuda/values.cuh"

namespace kn::cuda {
namespace {

constexpr int kThreads = 128;

template <typename R, typename O>
__global__ void __launch_bounds__(kThreads)
    moe_combine_kernel(MoeCombineArgs a, int64_t rows, bool aligned) {
  const int64_t token = int64_t(blockIdx.x);
  const int64_t column = (int64_t(blockIdx.y) * kThreads + threadIdx.x) * kRun;
  if (column >= a.hidden) return;
  float sum[kRun] = {};
  for (int64_t slot = 0; slot < a.topk; ++slot) {
    const int32_t row = a.row_index[token * a.topk + slot];
    device_require(row >= 0 && row < rows, "moe_combine: row_index must be in [0, tokens * topk)");
    const float weight = a.topk_weights[token * a.topk + slot];
    float v[kRun];
    load_run(static_cast<const R*>(a.rows) + row * a.hidden + column, a.hidden - column, aligned,
             v);
#pragma unroll
    for (int i = 0; i < kRun; ++i) sum[i] = __fmaf_rn(weight, v[i], sum[i]);
  }
  if (a.shared) {
    float v[kRun];
    load_run(static_cast<const O*>(a.shared) + token * a.hidden + column, a.hidden - column,
             aligned, v);
#pragma unroll
    for (int i = 0; i < kRun; ++i) sum[i] = __fadd_rn(sum[i], v[i]);
  }
  store_run(static_cast<O*>(a.out) + token * a.hidden + column, a.hidden - column, aligned, sum);
}

}  // namespace

void moe_combine(const MoeCombineArgs& a, void* stream) {
  const int64_t rows = check_op(a);
  if (a.tokens == 0) return;
  check_elements("moe_combine", {{a.rows, dtype_bytes(a.rows_dtype)},
                                 {a.row_index, 4},
                                 {a.topk_weights, 4},
                                 {a.shared, dtype_bytes(a.out_dtype)},
                                 {a.out, dtype_bytes(a.out_dtype)}});
  const int64_t columns = (a.hidden + kThreads * kRun - 1) / (kThreads * kRun);
  const LaunchConfig config{"moe_combine", grid_of("moe_combine", a.tokens, columns),
                            dim3(kThreads), 0, stream};
  const bool aligned = is_aligned({a.rows, a.shared, a.out}, {a.hidden});
  with_type(a.rows_dtype, [&](auto r) {
    with_type(a.out_dtype, [&](auto o) {
      launch(config, moe_combine_kernel<decltype(r), decltype(o)>, a, rows, aligned);
    });
  });
}

}  // namespace kn::cuda
