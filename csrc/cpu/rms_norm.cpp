#include "core/error.h"
#include "core/threads.h"
#include "cpu/dispatch.h"
#include "kimi_native/ops.h"

namespace kn::cpu {

void rms_norm(const RmsNormArgs& a) {
  KN_REQUIRE(a.tokens >= 0 && a.hidden >= 1,
             "rms_norm: need tokens >= 0 and hidden >= 1 (got tokens=", a.tokens,
             ", hidden=", a.hidden, ")");
  KN_REQUIRE(a.x_token_stride >= a.hidden, "rms_norm: x_token_stride must be at least hidden (got ",
             a.x_token_stride, ", hidden=", a.hidden, ")");
  checked_mul("rms_norm", a.tokens,
              checked_mul("rms_norm", a.x_token_stride, dtype_bytes(a.dtype)));
  if (a.tokens == 0) return;
  KN_REQUIRE(a.x && a.weight && a.y, "rms_norm: x, weight and y must not be null (got x=", a.x,
             ", weight=", a.weight, ", y=", a.y, ")");
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
