#include "core/op_checks.h"
#include "core/threads.h"
#include "cpu/dispatch.h"
#include "kimi_native/ops.h"

namespace kn::cpu {

void add_rms_norm(const AddRmsNormArgs& a) {
  check_op(a);
  if (a.tokens == 0) return;
  // About 150 KB of traffic at K2's width: worth waking a thread.
  constexpr int64_t kTokensPerTask = 16;
  const Kernels& k = kernels();
  const int64_t row = a.hidden * dtype_bytes(a.dtype);
  parallel_for((a.tokens + kTokensPerTask - 1) / kTokensPerTask, [&](int64_t task, int) {
    const int64_t end =
        task * kTokensPerTask + kTokensPerTask < a.tokens ? (task + 1) * kTokensPerTask : a.tokens;
    for (int64_t t = task * kTokensPerTask; t < end; ++t) {
      char* sum = (char*)a.sum + t * row;
      k.add_row((const char*)a.x + t * row, (const char*)a.residual + t * row, sum, a.dtype,
                a.hidden);
      k.rms_norm_row(sum, a.weight, (char*)a.y + t * row, a.dtype, a.hidden, a.eps);
    }
  });
}

}  // namespace kn::cpu
