// int8_gemm, one tile: limbs_kernel.h with INT8 weights. A group's integer dot product may pass
// 2^24, so turning it into a float rounds it once.
#pragma once
#include "cpu/limbs_kernel.h"

namespace kn::cpu::KN_ISA {

static void int8_prepare(const void* x, DType dtype, int64_t in, void* out, bool by_rows) {
  prepare_token<Int8>(x, dtype, in, out, by_rows);
}
static void int8_gemm_tile(const LimbTile& tile) { limb_tile<Int8, StoreRows>(tile); }

}  // namespace kn::cpu::KN_ISA
