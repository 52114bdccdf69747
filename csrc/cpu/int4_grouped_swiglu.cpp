#include "core/error.h"
#include "cpu/limb_gemm.h"
#include "kimi_native/ops.h"

namespace kn::cpu {

int64_t int4_grouped_swiglu_workspace_bytes(const Int4GroupedSwigluArgs& a) {
  return grouped_workspace_bytes("int4_grouped_swiglu", a);
}

void int4_grouped_swiglu(const Int4GroupedSwigluArgs& a) {
  const Kernels& k = kernels();
  const LimbKernels exact{k.int4_prepare, k.int4_swiglu_tile};
  const LimbKernels one_limb{k.int4_prepare_one_limb, k.int4_swiglu_tile_one_limb};
  run_grouped(
      "int4_grouped_swiglu", a, kGemmUnitRows / 2,
      [&](int32_t expert) {
        return a.gate_packed && a.gate_scale && a.up_packed && a.up_scale &&
               a.gate_packed[expert] && a.gate_scale[expert] && a.up_packed[expert] &&
               a.up_scale[expert];
      },
      [&](int32_t expert, int64_t row, int64_t rows) {
        const uint8_t* const packed[2] = {a.gate_packed[expert], a.up_packed[expert]};
        const bf16* const scale[2] = {a.gate_scale[expert], a.up_scale[expert]};
        LimbTile tile = {};
        for (int p = 0; p < 2; ++p) {
          tile.weight[p] = packed[p] + row * int4_row_bytes(a.in);
          tile.scale[p] = scale[p] + row * num_groups(a.in);
          tile.rows[p] = rows;
        }
        return tile;
      },
      a.compute == Compute::kInt8 ? one_limb : exact);
}

}  // namespace kn::cpu
