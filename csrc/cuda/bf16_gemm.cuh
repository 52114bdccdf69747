// What the two kernels of bf16_gemm share: the problem, the products of one chunk, and the one
// order of sums that gives a row the same bits in both.
//
// Columns are taken in chunks of 32, 64 bytes of a row. Lane 4g + t takes 16 bytes of row g,
// columns 8t .. 8t + 7 of the chunk, of weights and tokens alike: one load feeds two products
// m16n8k16, whose k indices are columns 8t .. 8t + 3 of every lane, then 8t + 4 .. 8t + 7. Rows of
// a stage lie one after the other, so the eight lanes that shared memory serves together read 128
// bytes in order. Weights are on the m16 side, tokens on the n8 side.
//
// Order: the chunks are cut into 8 segments; in a segment they are added ascending, for fp32 tokens
// low limb before high one, and the segments ascending. It depends on `in` alone.
#pragma once
#include "cuda/values.cuh"

namespace kn::cuda {

constexpr int kChunkColumns = 32;
constexpr int kChunkBytes = kChunkColumns * 2;  // of a row
constexpr int kSegments = 8;
constexpr int kPieceColumns = 8;  // 16 bytes, what a copy moves
constexpr int kRowPieces = kChunkBytes / 16;

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

// A lane's operands of 16 weight rows: rows g and g + 8.
struct WeightFragment {
  uint4 low, high;
};

__device__ __forceinline__ void multiply_chunk(const WeightFragment& w, const uint4& x,
                                               float (&acc)[4]) {
  const uint32_t a0[4] = {w.low.x, w.high.x, w.low.y, w.high.y}, b0[2] = {x.x, x.y};
  ptx::mma_m16n8k16_bf16(acc, a0, b0);
  const uint32_t a1[4] = {w.low.z, w.high.z, w.low.w, w.high.w}, b1[2] = {x.z, x.w};
  ptx::mma_m16n8k16_bf16(acc, a1, b1);
}

// Starts the copy of piece `piece` (four to a row) of a chunk; zeros outside of the rows.
__device__ __forceinline__ void copy_piece(const Bf16Rows& r, SharedPtr<uint8_t> stage, int chunk,
                                           int piece) {
  const int row = piece / kRowPieces;
  const int64_t column = int64_t(chunk) * kChunkColumns + piece % kRowPieces * kPieceColumns;
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
