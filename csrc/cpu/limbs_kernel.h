// The tile that int4_gemm, int4_grouped_gemm, int4_grouped_swiglu and int8_gemm share: two panels
// of weight rows times some prepared tokens (limbs.h has the arithmetic). The loops are in
//
//   limbs_rows_kernel.h    avx512, amx: few tokens; 16 groups of a row are the lanes
//   limbs_blocks_kernel.h  avx512, amx: many tokens; 16 rows are the lanes
//   limbs_quads_kernel.h   generic, avx2: any number of tokens
//
// int4_tiles_kernel.h has the INT4 ops of many tokens on matrix tiles (amx), with the same bits.
//
// Few tokens: each weight byte is read from memory once, and this is bandwidth-bound. More tokens:
// decoded weights are used by every token while in registers. The integers are exact and the
// multiply-adds in the same order everywhere, so the bits do not tell which loop ran.
// Bytes: 0.5625 per INT4 weight, 1.0625 per INT8 weight, once. Multiply-adds: 2 byte-wide (VNNI)
// or 1 word-wide (AVX2) per weight and token. Not supported: groups other than 32, zero points.
#pragma once
#include "cpu/limbs_prepare_kernel.h"

namespace kn::cpu::KN_ISA {

// ---- what happens to the sums of a token: a for panel 0, b for panel 1 ----

struct StoreRows {};

KN_INLINE void store_values(void* y, DType dtype, int64_t at, f32x16 a, int n) {
  if (n == 16 && dtype == DType::kBf16) return store((bf16*)y + at, a);
  if (n == 16) return store((float*)y + at, a);
  if (dtype == DType::kBf16) return store((bf16*)y + at, a, n);
  store((float*)y + at, a, n);
}
// `row`: of both panels, the first of up to 16.
KN_INLINE int rows_left(const LimbTile& tile, int p, int64_t row) {
  const int64_t left = tile.rows[p] - row;
  return int(left < 0 ? 0 : left < kPanelRows ? left : kPanelRows);
}
KN_INLINE void finish(StoreRows, const LimbTile& tile, int64_t token, int64_t row, f32x16 a,
                      f32x16 b) {
  const int64_t at = token * tile.y_stride + row;
  store_values(tile.y, tile.y_dtype, at, a, rows_left(tile, 0, row));
  if (const int n = rows_left(tile, 1, row); n > 0)
    store_values(tile.y, tile.y_dtype, at + tile.rows[0], b, n);
}

// The prepared token that is number `token` of a tile.
KN_INLINE const uint8_t* tile_token(const LimbTile& tile, int64_t token) {
  return tile.x + (tile.x_index ? tile.x_index[token] : token) * prepared_bytes(tile.in);
}

}  // namespace kn::cpu::KN_ISA

#if KN_TIER >= 2
#include "cpu/limbs_blocks_kernel.h"
#include "cpu/limbs_rows_kernel.h"

namespace kn::cpu::KN_ISA {

template <typename Format, typename T>
KN_INLINE void prepare_typed(const T* x, int64_t in, uint8_t* out, bool by_rows) {
  if (by_rows)
    prepare_blocks<Format>(x, in, out);
  else
    prepare_chunks<Format>(x, in, out);
}

template <typename Format, typename Finish>
static void limb_tile(const LimbTile& tile) {
  if (tile.by_rows) return rows_tile<Format, Finish>(tile);
  for (int64_t row = 0; row < tile.rows[0]; row += kPanelRows)
    blocks_tile<Format, Finish>(tile, row);
}

}  // namespace kn::cpu::KN_ISA
#else
#include "cpu/limbs_quads_kernel.h"

namespace kn::cpu::KN_ISA {

template <typename Format, typename T>
KN_INLINE void prepare_typed(const T* x, int64_t in, uint8_t* out, bool) {
  prepare_chunks<Format>(x, in, out);
}

}  // namespace kn::cpu::KN_ISA
#endif

namespace kn::cpu::KN_ISA {

template <typename Format>
static void prepare_token(const void* x, DType dtype, int64_t in, void* out, bool by_rows) {
  if (dtype == DType::kBf16)
    prepare_typed<Format>((const bf16*)x, in, (uint8_t*)out, by_rows);
  else
    prepare_typed<Format>((const float*)x, in, (uint8_t*)out, by_rows);
}

}  // namespace kn::cpu::KN_ISA
