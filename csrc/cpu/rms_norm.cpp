#include "core/op_checks.h"
#include "core/threads.h"
#include "cpu/dispatch.h"
#include "kimi_native/ops.h"

namespace kn::cpu {

void rms_norm(const RmsNormArgs& a) {
  check_op(a);
  if (a.tokens == 0) return;
  // About 100 KB of traffic at K2's width: worth waking a thread.
  constexpr int64_t kTokensPerTask = 16;
  const Kernels& k = kernels();
  const int64_t bytes = dtype_bytes(a.dtype);
  parallel_for((a.tokens + kTokensPerTask - 1) / kTokensPerTask, [&](int64_t task, int) {
    const int64_t end =
        task * kTokensPerTask + kTokensPerTask < a.tokens ? (task + 1) * kTokensPerTask : a.tokens;
    for (int64_t t = task * kTokensPerTask; t < end; ++t)
      k.rms_norm_row((const char*)a.x + t * a.x_token_stride * bytes, a.weight,
                     (char*)a.y + t * a.hidden * bytes, a.dtype, a.hidden, a.eps);
  });
}

}  // namespace kn::cpu
