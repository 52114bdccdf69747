// bf16_gemm for few tokens: a block has 16 rows of the matrix and up to 32 tokens.
//
//   in     | segment 0 | segment 1 | ... | segment 7 |     16 rows, 64 bytes of each a chunk
//   warp         0           1                 7
//
// Every warp streams the chunks of its segment through a ring in shared memory: 5 chunks of 1 KB in
// flight a warp, 40 KB a block, more than bandwidth x latency with two blocks on a multiprocessor
// (4.3 TB/s x 0.7 us / 132 = 23 KB). Tokens come from L2 straight into registers, one chunk ahead.
// Bytes: 2 a weight, once; tokens once for every 16 rows.
#pragma once
#include "cuda/bf16_gemm.cuh"

namespace kn::cuda {

constexpr int kRowsThreads = kSegments * 32;
constexpr int kRowsStages = 6;
constexpr int kRowsStageBytes = 16 * kChunkBytes;
constexpr int kRowsRingBytes = kRowsStages * kRowsStageBytes;
constexpr int kRowsSharedBytes = kSegments * kRowsRingBytes;
// Floats from one token's 16 sums to the next: the four tokens of a store lie 8 banks apart.
constexpr int kSumStride = 20;

// The tokens of a lane in a chunk: token g of every tile of eight.
template <int kLimbs, int kTiles>
__device__ __forceinline__ void load_tokens(const Bf16Problem& p, int64_t head, int64_t first,
                                            int chunk, uint4 (&x)[kLimbs][kTiles]) {
  const int g = int(threadIdx.x) % 32 / 4, t = int(threadIdx.x) % 4;
  const int64_t column = int64_t(chunk) * kChunkColumns + t * kPieceColumns;
#pragma unroll
  for (int limb = 0; limb < kLimbs; ++limb) {
    const Bf16Rows rows = token_rows(p, head, first, limb);
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      const int token = i * 8 + g;
      x[limb][i] =
          token < rows.count && column < p.in
              ? __ldg(reinterpret_cast<const uint4*>(rows.rows + token * rows.stride + column))
              : make_uint4(0, 0, 0, 0);
    }
  }
}

// This warp's segment.
template <int kLimbs, int kTiles>
__device__ __forceinline__ void multiply_segment(const Bf16Problem& p, int64_t head, int64_t row,
                                                 int64_t first, SharedPtr<uint8_t> ring,
                                                 float (&acc)[kTiles][4]) {
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  const Bf16Rows weights = weight_rows(p, head, row);
  const int begin = min(warp * p.segment_chunks, p.chunks);
  const int end = min(begin + p.segment_chunks, p.chunks);
  auto issue = [&](int c, int stage) {
    if (c < end)
      for (int i = 0; i < 2; ++i)
        copy_piece(weights, ring + stage * kRowsStageBytes, c, lane + i * 32);
    ptx::cp_async_commit();
  };
  for (int s = 0; s < kRowsStages - 1; ++s) issue(begin + s, s);
  uint4 next[kLimbs][kTiles];
  load_tokens(p, head, first, begin, next);
  int stage = 0;
  for (int c = begin; c < end; ++c) {
    uint4 x[kLimbs][kTiles];
#pragma unroll
    for (int limb = 0; limb < kLimbs; ++limb)
#pragma unroll
      for (int i = 0; i < kTiles; ++i) x[limb][i] = next[limb][i];
    load_tokens(p, head, first, c + 1, next);
    ptx::cp_async_wait<kRowsStages - 2>();
    // No barrier: a lane reads the two pieces that it has copied itself.
    issue(c + kRowsStages - 1, stage == 0 ? kRowsStages - 1 : stage - 1);
    const auto pieces = shared_cast<uint4>(ring + stage * kRowsStageBytes);
    const RowFragment w{pieces[lane], pieces[32 + lane]};
#pragma unroll
    for (int limb = kLimbs - 1; limb >= 0; --limb)
#pragma unroll
      for (int i = 0; i < kTiles; ++i) multiply_chunk(w, x[limb][i], acc[i]);
    stage = stage == kRowsStages - 1 ? 0 : stage + 1;
  }
}

// kTiles: of eight tokens.
template <typename T, int kLimbs, int kTiles>
__global__ void __launch_bounds__(kRowsThreads) bf16_gemm_rows_kernel(Bf16Problem p) {
  constexpr int kTokens = kTiles * 8;
  static_assert(kSegments * kTokens * kSumStride * 4 <= kRowsSharedBytes);
  KN_SHARED(shared);
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  const int64_t head = int64_t(blockIdx.x) / p.row_blocks;
  const int64_t row = int64_t(blockIdx.x) % p.row_blocks * 16;
  const int64_t first = int64_t(blockIdx.y) * kTokens;
  float acc[kTiles][4] = {};
  multiply_segment<kLimbs, kTiles>(p, head, row, first,
                                   shared_at<uint8_t>(shared, warp * kRowsRingBytes), acc);
  __syncthreads();  // the sums take the place of the rings
  const auto sums = shared_at<float>(shared, 0);
#pragma unroll
  for (int i = 0; i < kTiles; ++i)
#pragma unroll
    for (int r = 0; r < 4; ++r)
      sums[(warp * kTokens + i * 8 + lane % 4 * 2 + r % 2) * kSumStride + lane / 4 + r / 2 * 8] =
          acc[i][r];
  __syncthreads();
  for (int place = int(threadIdx.x); place < kTokens * 16; place += kRowsThreads) {
    float sum = 0.0f;
    for (int w = 0; w < kSegments; ++w)
      sum = __fadd_rn(sum, sums[(w * kTokens + place / 16) * kSumStride + place % 16]);
    store_sum<T>(p, head, first + place / 16, row + place % 16, sum);
  }
}

}  // namespace kn::cuda
