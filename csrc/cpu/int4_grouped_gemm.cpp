#include "core/error.h"
#include "cpu/limb_gemm.h"
#include "kimi_native/ops.h"

namespace kn::cpu {

int64_t int4_grouped_gemm_workspace_bytes(const Int4GroupedGemmArgs& a) {
  return grouped_workspace("int4_grouped_gemm", a, int4_gemm_kernels(a.compute)).bytes;
}

void int4_grouped_gemm(const Int4GroupedGemmArgs& a) {
  run_grouped(
      "int4_grouped_gemm", a, kGemmUnitRows,
      [&](int32_t expert) {
        return a.weight_packed && a.weight_scale && a.weight_packed[expert] &&
               a.weight_scale[expert];
      },
      [&](int32_t expert, int64_t row, int64_t rows) {
        return gemm_tile(Int4{}, {a.weight_packed[expert], a.weight_scale[expert]}, row, rows,
                         a.in);
      },
      int4_gemm_kernels(a.compute));
}

}  // namespace kn::cpu
