// int4_grouped_swiglu, one tile: limbs_kernel.h with panel 0 from gate and panel 1 from up, so that
// both use an activation while it is in a register. The epilogue stays in fp32:
//   y = gate * sigmoid(gate) * up,   sigmoid(g) = e^min(g, 0) / (1 + e^-|g|), which never overflows
#pragma once
#include "cpu/exp_kernel.h"
#include "cpu/limbs_kernel.h"

namespace kn::cpu::KN_ISA {

struct StoreSwiglu {};

KN_INLINE void finish(StoreSwiglu, const LimbTile& tile, int64_t token, int64_t row, f32x16 gate,
                      f32x16 up) {
  const f32x16 zero = zero_f32();
  const f32x16 denominator = add(splat(1.0f), exp_f32(min(sub(zero, gate), gate)));
  const f32x16 sigmoid = div(exp_f32(min(gate, zero)), denominator);
  store_values(tile.y, tile.y_dtype, token * tile.y_stride + row, mul(mul(gate, sigmoid), up),
               rows_left(tile, 0, row));
}

static void int4_swiglu_tile(const LimbTile& tile) { limb_tile<Int4, StoreSwiglu>(tile); }
static void int4_swiglu_tile_one_limb(const LimbTile& tile) {
  limb_tile<Int4OneLimb, StoreSwiglu>(tile);
}

}  // namespace kn::cpu::KN_ISA
