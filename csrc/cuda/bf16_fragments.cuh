// Products of bf16 rows, 32 columns (a chunk) at a time, 64 bytes of a row.
//
// Lane 4g + t takes 16 bytes of row g on either side, columns 8t .. 8t + 7 of the chunk. One load
// feeds two products m16n8k16, whose k indices are columns 8t .. 8t + 3 of every lane, then
// 8t + 4 .. 8t + 7: both sides agree, and the order inside a product is not defined anyway.
#pragma once
#include "cuda/values.cuh"

namespace kn::cuda {

constexpr int kChunkColumns = 32;
constexpr int kChunkBytes = kChunkColumns * 2;  // of a row
constexpr int kPieceColumns = 8;                // 16 bytes, what a copy moves
constexpr int kChunkPieces = kChunkBytes / 16;  // of a row

// A lane's operand of 16 rows on the m16 side: rows g and g + 8.
struct RowFragment {
  uint4 low, high;
};

// x: a lane's operand of 8 rows on the n8 side, row g.
__device__ __forceinline__ void multiply_chunk(const RowFragment& w, const uint4& x,
                                               float (&acc)[4]) {
  const uint32_t a0[4] = {w.low.x, w.high.x, w.low.y, w.high.y}, b0[2] = {x.x, x.y};
  ptx::mma_m16n8k16_bf16(acc, a0, b0);
  const uint32_t a1[4] = {w.low.z, w.high.z, w.low.w, w.high.w}, b1[2] = {x.z, x.w};
  ptx::mma_m16n8k16_bf16(acc, a1, b1);
}

}  // namespace kn::cuda
