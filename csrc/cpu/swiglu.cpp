#include "core/op_checks.h"
#include "core/threads.h"
#include "cpu/dispatch.h"
#include "kimi_native/ops.h"

namespace kn::cpu {

void swiglu(const SwigluArgs& a) {
  check_op(a);
  const int64_t total = a.tokens * a.width;
  constexpr int64_t kRun = 16384;  // about 100 KB of traffic: worth waking a thread
  const Kernels& k = kernels();
  const int64_t bytes = dtype_bytes(a.dtype);
  parallel_for((total + kRun - 1) / kRun, [&](int64_t task, int) {
    const int64_t begin = task * kRun, count = begin + kRun < total ? kRun : total - begin;
    k.swiglu_run((const char*)a.gate + begin * bytes, (const char*)a.up + begin * bytes,
                 (char*)a.y + begin * bytes, a.dtype, count);
  });
}

}  // namespace kn::cpu
