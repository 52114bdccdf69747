#include <algorithm>

#include "core/op_checks.h"
#include "core/threads.h"
#include "cpu/dispatch.h"
#include "kimi_native/ops.h"

namespace kn::cpu {
namespace {

constexpr int64_t kBytesPerTask =
    64 * 1024;  // a few microseconds of reading: worth waking a thread

void check(const MoeCombineArgs& a) {
  const char* op = "moe_combine";
  const int64_t rows = check_op(a);
  for (int64_t i = 0; i < rows; ++i)
    KN_REQUIRE(a.row_index[i] >= 0 && a.row_index[i] < rows, op, ": row_index must be in [0, ",
               rows, ") (got ", a.row_index[i], " for token ", i / a.topk, ", slot ", i % a.topk,
               ")");
}

}  // namespace

void moe_combine(const MoeCombineArgs& a) {
  check(a);
  const Kernels& k = kernels();
  const int64_t token_bytes = a.topk * a.hidden * dtype_bytes(a.rows_dtype);
  const int64_t out_bytes = a.hidden * dtype_bytes(a.out_dtype);
  const int64_t step = std::max<int64_t>(1, kBytesPerTask / token_bytes);
  parallel_for(a.tokens / step + (a.tokens % step != 0), [&](int64_t task, int) {
    const int64_t end = std::min((task + 1) * step, a.tokens);
    for (int64_t t = task * step; t < end; ++t)
      k.moe_combine_row(a.rows, a.rows_dtype, a.row_index + t * a.topk, a.topk_weights + t * a.topk,
                        a.topk, a.shared ? (const char*)a.shared + t * out_bytes : nullptr,
                        (char*)a.out + t * out_bytes, a.out_dtype, a.hidden);
  });
}

}  // namespace kn::cpu
