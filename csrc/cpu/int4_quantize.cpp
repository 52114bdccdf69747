#include <atomic>

#include "core/op_checks.h"
#include "core/threads.h"
#include "cpu/dispatch.h"
#include "kimi_native/ops.h"

namespace kn::cpu {

void int4_quantize(const Int4QuantizeArgs& a) {
  check_op(a);
  constexpr int64_t kRun = 2048;  // groups: 128 KiB in, 36 KiB out, worth waking a thread
  const Kernels& k = kernels();
  const int64_t groups = a.out * num_groups(a.in);
  std::atomic<int64_t> bad{0};
  parallel_for((groups + kRun - 1) / kRun, [&](int64_t task, int) {
    const int64_t first = task * kRun, count = std::min(kRun, groups - first);
    bad += k.int4_quantize_run(a.w + first * kGroupSize,
                               a.weight_packed + int4_row_bytes(first * kGroupSize),
                               a.weight_scale + first, count);
  });
  KN_REQUIRE(bad == 0, "int4_quantize: w must be finite (got NaN or infinite values in ",
             bad.load(), " groups of ", kGroupSize, ")");
}

}  // namespace kn::cpu
