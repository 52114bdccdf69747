#include "core/error.h"
#include "cpu/limb_gemm.h"
#include "kimi_native/ops.h"

namespace kn::cpu {

int64_t int8_gemm_workspace_bytes(const Int8GemmArgs& a) {
  check_dtype("int8_gemm", "x", a.x_dtype);
  check_dtype("int8_gemm", "y", a.y_dtype);
  check_sizes("int8_gemm", a.tokens, a.tokens, a.out, a.in, a.group_size);
  return dense_workspace("int8_gemm", a.tokens, a.in, 1, {}).bytes;
}

void int8_gemm(const Int8GemmArgs& a) {
  int8_gemm_workspace_bytes(a);
  dense_limb_gemm("int8_gemm", Int8{}, a, {(const uint8_t*)a.weight, a.weight_scale}, 1,
                  {Int8::kBlocksFrom, kernels().int8_prepare, kernels().int8_gemm_tile});
}

}  // namespace kn::cpu
