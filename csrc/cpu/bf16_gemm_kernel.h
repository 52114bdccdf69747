// bf16_gemm, one task: a block of tokens times a block of weight rows. The tokens are packed to
// fp32 once; then kDotRows weight rows at a time meet every group of kDotVectors tokens, so a
// weight is read from memory once per block of tokens and widened once per group.
//
//             tokens of the block: packed, in L2
//   weight    [group 0] [group 1] ...       tile: dot_kernel.h
//   rows |    rows from memory, next ones prefetched past the current ones
//        v
//
// Bytes: 2 * rows * in of weights. FLOPs: 2 * tokens * rows * in. Compute-bound from about 10
// tokens on. No integer or bf16 dot instructions: on cores without AMX they are no faster than fp32
// FMA.
#pragma once
#include "cpu/dot_kernel.h"

namespace kn::cpu::KN_ISA {

static void bf16_gemm_pack(const Bf16GemmTile& a) {
  const int64_t width = round_up16(a.in);
  for (int64_t t = 0; t < a.tokens; t += kDotVectors) {
    const int vectors = int(a.tokens - t < kDotVectors ? a.tokens - t : kDotVectors);
    if (a.x_dtype == DType::kBf16)
      pack_vectors((const bf16*)a.x + t * a.x_token_stride, a.x_token_stride, vectors, a.in,
                   a.packed + t * width);
    else
      pack_vectors((const float*)a.x + t * a.x_token_stride, a.x_token_stride, vectors, a.in,
                   a.packed + t * width);
  }
}

// sums[t][r] for kDotRows weight rows from `first` on. Past the last row its pointer repeats: the
// surplus sums are never stored.
static void bf16_gemm_rows(const Bf16GemmTile& a, int64_t first, float* sums) {
  const int64_t width = round_up16(a.in);
  const bf16* rows[kDotRows];
  for (int r = 0; r < kDotRows; ++r)
    rows[r] = a.weight + (first + r < a.rows ? first + r : a.rows - 1) * a.in;
  // Fetch at the pace of use, far enough ahead that a whole tile of rows has arrived before it is
  // needed, and 16 KB cover latency * bandwidth (100 ns * 30 GB/s = 3 KB) with room for jitter.
  const int64_t tile = kDotRows * a.in;
  const bf16* ahead = a.weight + first * a.in + (tile > 8192 ? tile : 8192);
  for (int64_t t = 0; t < a.tokens; t += kDotVectors) {
    const int vectors = int(a.tokens - t < kDotVectors ? a.tokens - t : kDotVectors);
    const bool fetch = t == 0 && ahead + tile <= a.weight_end;
    const Prefetch prefetch = {fetch ? (const char*)ahead : (const char*)a.packed,
                               fetch ? kDotRows * 32 : 0};
    dot_tile_of(vectors, rows, a.packed + t * width, a.in, prefetch, sums + t * 16, 16);
  }
}

template <typename Y>
static void bf16_gemm_store(const Bf16GemmTile& a, int64_t first) {
  const int n = int(a.rows - first < 16 ? a.rows - first : 16);
  for (int64_t t = 0; t < a.tokens; ++t) {
    Y* y = (Y*)a.y + t * a.y_token_stride + first;
    const f32x16 sums = load(a.sums + t * 16);
    if (n == 16)
      store(y, sums);
    else
      store(y, sums, n);
  }
}

static void bf16_gemm_tile(const Bf16GemmTile& a) {
  bf16_gemm_pack(a);
  for (int64_t first = 0; first < a.rows; first += 16) {
    for (int r = 0; r < 16 && first + r < a.rows; r += kDotRows)
      bf16_gemm_rows(a, first + r, a.sums + r);
    if (a.y_dtype == DType::kBf16)
      bf16_gemm_store<bf16>(a, first);
    else
      bf16_gemm_store<float>(a, first);
  }
}

}  // namespace kn::cpu::KN_ISA
