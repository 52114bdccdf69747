// int4_gemm and int4_grouped_gemm, one tile: limbs_kernel.h with INT4 weights, plain store.
#pragma once
#include "cpu/limbs_kernel.h"

namespace kn::cpu::KN_ISA {

static void int4_prepare(const void* x, DType dtype, int64_t in, void* out, bool by_rows) {
  prepare_token<Int4>(x, dtype, in, out, by_rows);
}
static void int4_gemm_tile(const LimbTile& tile) { limb_tile<Int4, StoreRows>(tile); }

static void int4_prepare_one_limb(const void* x, DType dtype, int64_t in, void* out, bool by_rows) {
  prepare_token<Int4OneLimb>(x, dtype, in, out, by_rows);
}
static void int4_gemm_tile_one_limb(const LimbTile& tile) {
  limb_tile<Int4OneLimb, StoreRows>(tile);
}

}  // namespace kn::cpu::KN_ISA
