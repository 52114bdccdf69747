#include "core/error.h"
#include "cpu/limb_gemm.h"
#include "kimi_native/ops.h"

namespace kn::cpu {

int64_t int4_gemm_workspace_bytes(const Int4GemmArgs& a) {
  check_dtype("int4_gemm", "x", a.x_dtype);
  check_dtype("int4_gemm", "y", a.y_dtype);
  check_sizes("int4_gemm", a.tokens, a.tokens, a.out, a.in, a.group_size);
  check_compute("int4_gemm", a.compute);
  return dense_workspace("int4_gemm", a.tokens, a.in, block_limbs(a.x_dtype, a.compute),
                         int4_gemm_kernels(a.compute))
      .bytes;
}

void int4_gemm(const Int4GemmArgs& a) {
  int4_gemm_workspace_bytes(a);
  dense_limb_gemm("int4_gemm", Int4{}, a, {a.weight_packed, a.weight_scale},
                  block_limbs(a.x_dtype, a.compute), int4_gemm_kernels(a.compute));
}

}  // namespace kn::cpu
