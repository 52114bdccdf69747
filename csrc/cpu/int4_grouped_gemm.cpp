#include "core/error.h"
#include "kimi_native/ops.h"

namespace kn::cpu {

int64_t int4_grouped_gemm_workspace_bytes(const Int4GroupedGemmArgs&) { return 0; }

void int4_grouped_gemm(const Int4GroupedGemmArgs&) {
  throw std::runtime_error("int4_grouped_gemm: not written yet");
}

}  // namespace kn::cpu
