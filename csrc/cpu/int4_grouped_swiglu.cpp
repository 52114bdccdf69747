#include "core/error.h"
#include "cpu/limb_gemm.h"
#include "kimi_native/ops.h"

namespace kn::cpu {
namespace {

LimbKernels swiglu_kernels(Compute compute) {
  const Kernels& k = kernels();
  if (compute == Compute::kInt8)
    return {Int4::kBlocksFrom, k.int4_prepare_one_limb, k.int4_swiglu_tile_one_limb,
            k.int4_tiles.prepare_one_limb, k.int4_tiles.swiglu};
  return {Int4::kBlocksFrom, k.int4_prepare, k.int4_swiglu_tile, k.int4_tiles.prepare,
          k.int4_tiles.swiglu};
}

}  // namespace

int64_t int4_grouped_swiglu_workspace_bytes(const Int4GroupedSwigluArgs& a) {
  return grouped_workspace("int4_grouped_swiglu", a, swiglu_kernels(a.compute)).bytes;
}

void int4_grouped_swiglu(const Int4GroupedSwigluArgs& a) {
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
      swiglu_kernels(a.compute));
}

}  // namespace kn::cpu
