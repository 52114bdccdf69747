// What the two kernels of bf16_gemm share: the problem, the products of one chunk, and the one
// order of sums that gives a row the same bits in both.
//
// Columns are taken in chunks of 32 (bf16_fragments.cuh), weights on the m16 side, tokens on the n8
// side. Rows of a stage lie one after the other, so the eight lanes that shared memory serves
// together read 128 bytes in order.
//
// Order: the chunks are cut into 8 segments; in a segment they are added ascending, for fp32 tokens
// low limb before high one, and the segments ascending. It depends on `in` alone.
#pragma once
#include "cuda/bf16_fragments.cuh"

namespace kn::cuda {

constexpr int kSegments = 8;

// Strides in elements. Tokens are bf16: as given, or three limbs whose sum is the fp32 token.
struct Bf16Problem {
  const bf16* weight;
  const bf16* x;
  void* y;
  int64_t tokens, out, in;
  int64_t weight_head_stride, x_token_stride, x_head_stride, x_limb_stride;
  int64_t y_token_stride, y_head_stride;
  int64_t row_blocks;  // of a head: block b of the grid is head b / row_blocks
  int chunks, segment_chunks;
};

// `count` rows of bf16 from `rows`.
struct Bf16Rows {
  const bf16* rows;
  int64_t stride, count, in;
};

// Starts the copy of piece `piece` (four to a row) of a chunk; zeros outside of the rows.
__device__ __forceinline__ void copy_piece(const Bf16Rows& r, SharedPtr<uint8_t> stage, int chunk,
                                           int piece) {
  const int row = piece / kChunkPieces;
  const int64_t column = int64_t(chunk) * kChunkColumns + piece % kChunkPieces * kPieceColumns;
  const bool inside = row < r.count && column < r.in;
  ptx::cp_async_16(stage + piece * 16, r.rows + (inside ? row * r.stride + column : 0), inside);
}

__device__ __forceinline__ Bf16Rows weight_rows(const Bf16Problem& p, int64_t head, int64_t row) {
  return {p.weight + head * p.weight_head_stride + row * p.in, p.in, p.out - row, p.in};
}

__device__ __forceinline__ Bf16Rows token_rows(const Bf16Problem& p, int64_t head, int64_t token,
                                               int limb) {
  return {p.x + limb * p.x_limb_stride + head * p.x_head_stride + token * p.x_token_stride,
          p.x_token_stride, p.tokens - token, p.in};
}

template <typename T>
__device__ __forceinline__ void store_sum(const Bf16Problem& p, int64_t head, int64_t token,
                                          int64_t row, float sum) {
  if (token < p.tokens && row < p.out)
    static_cast<T*>(p.y)[token * p.y_token_stride + head * p.y_head_stride + row] =
        from_float<T>(sum);
}

}  // namespace kn::cuda
