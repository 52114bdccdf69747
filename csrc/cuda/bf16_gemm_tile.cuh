// bf16_gemm for many tokens: a block has 128 rows of the matrix and 128 tokens.
//
//            tokens 0 .. 31 | 32 .. 63 | 64 .. 95 | 96 .. 127
//   rows  0 ..  63   warp 0      2          4          6        a warp: 64 rows x 32 tokens,
//   rows 64 .. 127        1      3          5          7        32 products a chunk and limb
//
// Chunks of both operands come through a ring in shared memory that all warps share: per chunk 8 KB
// of weights and 8 KB of each limb of the tokens. At the end of a segment its sums are added to the
// totals, which therefore have the bits of the kernel for few tokens. Bytes: weights once for every
// 128 tokens, tokens once for every 128 rows.
#pragma once
#include "cuda/bf16_gemm.cuh"

namespace kn::cuda {

constexpr int kTileSide = 128;  // rows, and tokens
constexpr int kTileThreads = 256;
constexpr int kTilePlaneBytes = kTileSide * kChunkBytes;
constexpr int kWarpRowTiles = 4, kWarpTokenTiles = 4;  // 64 rows, 32 tokens

template <int kLimbs>
constexpr int kTileStages = kLimbs == 1 ? 4 : 3;  // 64 and 96 KB
template <int kLimbs>
constexpr int kTileStageBytes = (1 + kLimbs) * kTilePlaneBytes;
template <int kLimbs>
constexpr int kTileSharedBytes = kTileStages<kLimbs> * kTileStageBytes<kLimbs>;
static_assert(kTileSharedBytes<1> <= kSharedBytesAnywhere);
static_assert(kTileSharedBytes<3> <= kSharedBytesAnywhere);

using TileSums = float[kWarpRowTiles][kWarpTokenTiles][4];

// The products of one chunk, of this warp.
template <int kLimbs>
__device__ __forceinline__ void multiply_stage(SharedPtr<uint8_t> stage, TileSums& acc) {
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  const auto weights = shared_cast<uint4>(stage);
  RowFragment w[kWarpRowTiles];
#pragma unroll
  for (int i = 0; i < kWarpRowTiles; ++i) {
    const int at = (warp % 2 * 64 + i * 16) * kChunkPieces + lane;
    w[i] = {weights[at], weights[at + 8 * kChunkPieces]};
  }
#pragma unroll
  for (int limb = kLimbs - 1; limb >= 0; --limb) {
    const auto tokens = shared_cast<uint4>(stage + (1 + limb) * kTilePlaneBytes);
#pragma unroll
    for (int j = 0; j < kWarpTokenTiles; ++j) {
      const uint4 x = tokens[(warp / 2 * 32 + j * 8) * kChunkPieces + lane];
#pragma unroll
      for (int i = 0; i < kWarpRowTiles; ++i) multiply_chunk(w[i], x, acc[i][j]);
    }
  }
}

__device__ __forceinline__ void close_segment(TileSums& acc, TileSums& total) {
#pragma unroll
  for (int i = 0; i < kWarpRowTiles; ++i)
#pragma unroll
    for (int j = 0; j < kWarpTokenTiles; ++j)
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        total[i][j][r] = __fadd_rn(total[i][j][r], acc[i][j][r]);
        acc[i][j][r] = 0.0f;
      }
}

template <int kLimbs, typename Bytes>
__device__ __forceinline__ void multiply_tile(const Bf16Problem& p, int64_t head, int64_t row,
                                              int64_t token, Bytes shared, TileSums& total) {
  constexpr int kStages = kTileStages<kLimbs>;
  const Bf16Rows weights = weight_rows(p, head, row);
  auto issue = [&](int c, int at) {
    const auto stage = shared_at<uint8_t>(shared, at * kTileStageBytes<kLimbs>);
    if (c < p.chunks)
      for (int i = 0; i < kTilePlaneBytes / 16; i += kTileThreads) {
        const int piece = i + int(threadIdx.x);
        copy_piece(weights, stage, c, piece);
        for (int limb = 0; limb < kLimbs; ++limb)
          copy_piece(token_rows(p, head, token, limb), stage + (1 + limb) * kTilePlaneBytes, c,
                     piece);
      }
    ptx::cp_async_commit();
  };
  for (int s = 0; s < kStages - 1; ++s) issue(s, s);
  TileSums acc = {};
  int stage = 0, left = p.segment_chunks;
  for (int c = 0; c < p.chunks; ++c) {
    ptx::cp_async_wait<kStages - 2>();
    __syncthreads();  // the copies of all are in, and all have read the stage that is free now
    issue(c + kStages - 1, stage == 0 ? kStages - 1 : stage - 1);
    multiply_stage<kLimbs>(shared_at<uint8_t>(shared, stage * kTileStageBytes<kLimbs>), acc);
    if (--left == 0) {
      close_segment(acc, total);
      left = p.segment_chunks;
    }
    stage = stage == kStages - 1 ? 0 : stage + 1;
  }
  close_segment(acc, total);  // of a segment that the matrix ends in; else zeros
}

template <typename T, int kLimbs>
__global__ void __launch_bounds__(kTileThreads) bf16_gemm_tile_kernel(Bf16Problem p) {
  KN_SHARED(shared);
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  const int64_t head = int64_t(blockIdx.x) / p.row_blocks;
  const int64_t row = int64_t(blockIdx.x) % p.row_blocks * kTileSide;
  const int64_t token = int64_t(blockIdx.y) * kTileSide;
  TileSums total = {};
  multiply_tile<kLimbs>(p, head, row, token, shared, total);
#pragma unroll
  for (int i = 0; i < kWarpRowTiles; ++i)
#pragma unroll
    for (int j = 0; j < kWarpTokenTiles; ++j)
#pragma unroll
      for (int r = 0; r < 4; ++r)
        store_sum<T>(p, head, token + warp / 2 * 32 + j * 8 + lane % 4 * 2 + r % 2,
                     row + warp % 2 * 64 + i * 16 + lane / 4 + r / 2 * 8, total[i][j][r]);
}

}  // namespace kn::cuda
