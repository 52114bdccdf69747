// The work of a block in the INT4 ops: sixteen rows of one matrix, or of two of the same shape,
// times up to sixteen tokens.
//
//   block: 16 rows                        a tile is 16 rows x 64 columns = 512 bytes + 64 of scales
//   warp w of 8: column tiles w, w + 8, ...        [ w0 | w1 | ... | w7 | w0 | ... ]
//
// A warp streams its tiles through a ring in shared memory (cp.async); per group of 32 columns one
// product for each quad of tokens (int4_fragments.cuh). Bytes: 0.5625 a weight, and 2.125 a token
// and input of prepared activations, from L2.
//
// Order: a warp's groups ascending, then the warps ascending. It depends on `in` alone.
#pragma once
#include "cuda/int4_fragments.cuh"

namespace kn::cuda {

constexpr int kRowWarps = 8;
constexpr int kRowThreads = kRowWarps * 32;
constexpr int kQuads = 4;
constexpr int kSegmentTokens = kQuad * kQuads;
constexpr int kStages = 6;  // 5 tiles in flight a warp: 23 KB a block and matrix
constexpr int kPartialFloats = kSegmentTokens * int(kTileRows);  // of a warp and matrix

template <int kMatrices>
constexpr int kRowSharedBytes =
    kRowWarps * kMatrices * (kStages * kStageBytes + kPartialFloats * 4);
static_assert(kRowSharedBytes<2> <= kSharedBytesAnywhere);

// Rows of y that belong to one expert; none if `count` is 0.
struct RowRange {
  int32_t expert, first, count, unused;
};

// The tokens of a block: `count` rows of y from `first`; row r reads x[x_index[r]], or x[r].
struct TokenRows {
  PreparedTokens x;
  const int32_t* x_index;
  int64_t first;
  int count;
};

// What a lane needs of its tokens, found once: where the limbs of token g / 2 of each quad begin,
// and the steps of token t. Null for a token that is not there.
struct LaneTokens {
  const uint8_t* limbs[kQuads];
  const float* steps[kQuads];
};

__device__ __forceinline__ int64_t prepared_row(const TokenRows& rows, int token) {
  const int64_t row = rows.first + token;
  if (!rows.x_index) return row;
  const int64_t x_row = rows.x_index[row];
  device_require(x_row >= 0 && x_row < rows.x.tokens, "x_index must be in [0, x_rows)");
  return x_row;
}

__device__ __forceinline__ LaneTokens find_tokens(const TokenRows& rows) {
  const int g = int(threadIdx.x) % 32 / 4, t = int(threadIdx.x) % 4;
  LaneTokens l;
#pragma unroll
  for (int q = 0; q < kQuads; ++q) {
    const int b = q * kQuad + g / 2, d = q * kQuad + t;
    l.limbs[q] = b < rows.count
                     ? rows.x.limbs + prepared_row(rows, b) * rows.x.groups * kLimbGroupBytes +
                           g % 2 * 32 + t * 8
                     : nullptr;
    l.steps[q] = d < rows.count ? rows.x.steps + prepared_row(rows, d) * rows.x.groups : nullptr;
  }
  return l;
}

// acc[2q], acc[2q + 1]: rows g and g + 8 of token t of quad q.
__device__ __forceinline__ void multiply_group(const LaneTokens& l, int quads, int64_t group,
                                               uint32_t near, uint32_t far, uint32_t scale_word,
                                               float (&acc)[2 * kQuads]) {
  uint32_t a[4];
  decode_group(near, far, a);
  float scales[2];
  decode_scales(scale_word, scales);
#pragma unroll
  for (int q = 0; q < kQuads; ++q) {
    if (q >= quads) break;  // the same for the whole block
    const uint2 v =
        l.limbs[q] ? __ldg(reinterpret_cast<const uint2*>(l.limbs[q] + group * kLimbGroupBytes))
                   : make_uint2(0, 0);
    const uint32_t b[2] = {v.x, v.y};
    const float unit = l.steps[q] ? __fmul_rn(__ldg(l.steps[q] + group), kUnitOfStep) : 0.0f;
    int32_t d[4] = {};
    ptx::mma_m16n8k32_s8(d, a, b);
    const float low = float(d[0] * 256 + d[1]), high = float(d[2] * 256 + d[3]);  // exact
    acc[2 * q] = __fmaf_rn(__fmul_rn(low, unit), scales[0], acc[2 * q]);
    acc[2 * q + 1] = __fmaf_rn(__fmul_rn(high, unit), scales[1], acc[2 * q + 1]);
  }
}

// This warp's share of the products.
template <int kMatrices>
__device__ __forceinline__ void multiply_tiles(const Matrix (&m)[kMatrices], int64_t row_tile,
                                               int64_t tiles, const TokenRows& rows,
                                               SharedPtr<uint8_t> ring,
                                               float (&acc)[kMatrices][2 * kQuads]) {
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  const LaneTokens tokens = find_tokens(rows);
  const int quads = (rows.count + kQuad - 1) / kQuad;
  auto issue = [&](int64_t c, int stage) {
    if (c < tiles)
      for (int i = 0; i < kMatrices; ++i)
        load_tile(m[i], ring + (stage * kMatrices + i) * kStageBytes, row_tile * tiles + c);
    ptx::cp_async_commit();
  };
  for (int s = 0; s < kStages - 1; ++s) issue(warp + s * kRowWarps, s);
  int stage = 0;
  for (int64_t c = warp; c < tiles; c += kRowWarps) {
    ptx::cp_async_wait<kStages - 2>();
    __syncwarp();  // the copies of all lanes are in, and all have read the stage that is free now
    issue(c + (kStages - 1) * kRowWarps, stage == 0 ? kStages - 1 : stage - 1);
#pragma unroll
    for (int i = 0; i < kMatrices; ++i) {
      const auto tile = ring + (stage * kMatrices + i) * kStageBytes;
      const uint4 words = shared_cast<uint4>(tile)[lane];
      const uint2 scales = shared_cast<uint2>(tile + int(kTileBytes))[lane / 4];
      multiply_group(tokens, quads, 2 * c, words.x, words.y, scales.x, acc[i]);
      multiply_group(tokens, quads, 2 * c + 1, words.z, words.w, scales.y, acc[i]);
    }
    stage = stage == kStages - 1 ? 0 : stage + 1;
  }
}

// Adds up what the warps have. f(token, row, sums): the finished sums of the block, token
// 0 .. count - 1, row of the matrix < out; `sums` holds one for each matrix.
template <int kMatrices, typename F>
__device__ __forceinline__ void join_warps(SharedPtr<float> partial, int64_t row_tile, int64_t out,
                                           int count, const float (&acc)[kMatrices][2 * kQuads],
                                           F f) {
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  // partial[matrix][warp][row / 8][token][row % 8]: a warp's accesses fill the banks in order
#pragma unroll
  for (int i = 0; i < kMatrices; ++i)
#pragma unroll
    for (int q = 0; q < kQuads; ++q)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        partial[(((i * kRowWarps + warp) * 2 + half) * kSegmentTokens + q * kQuad + lane % 4) * 8 +
                lane / 4] = acc[i][2 * q + half];
  __syncthreads();
  static_assert(kPartialFloats == kRowThreads);  // each thread has one token and row
  const int place = int(threadIdx.x), token = place / 8 % kSegmentTokens;
  const int64_t row = row_tile * kTileRows + place / (8 * kSegmentTokens) * 8 + place % 8;
  float sums[kMatrices];
#pragma unroll
  for (int i = 0; i < kMatrices; ++i) {
    sums[i] = partial[i * kRowWarps * kPartialFloats + place];
    for (int w = 1; w < kRowWarps; ++w)
      sums[i] = __fadd_rn(sums[i], partial[(i * kRowWarps + w) * kPartialFloats + place]);
  }
  if (token < count && row < out) f(token, row, sums);
}

template <int kMatrices, typename Bytes, typename F>
__device__ __forceinline__ void multiply_rows(const Matrix (&m)[kMatrices], int64_t row_tile,
                                              int64_t out, int64_t tiles, const TokenRows& rows,
                                              Bytes shared, F f) {
  constexpr int kRing = kMatrices * kStages * kStageBytes;
  float acc[kMatrices][2 * kQuads] = {};
  multiply_tiles(m, row_tile, tiles, rows,
                 shared_at<uint8_t>(shared, int(threadIdx.x) / 32 * kRing), acc);
  join_warps(shared_at<float>(shared, kRowWarps * kRing), row_tile, out, rows.count, acc, f);
}

// ---- activations --------------------------------------------------------------------------------

template <typename T>
static __global__ void __launch_bounds__(kRowThreads)
    int4_prepare_kernel(const T* x, int64_t in, uint8_t* limbs, float* steps, int64_t groups) {
  const int64_t token = int64_t(blockIdx.x);
  const int64_t group = int64_t(blockIdx.y) * kRowWarps + threadIdx.x / 32;
  if (group >= groups) return;
  const int64_t at = token * groups + group;
  prepare_group(x + token * in, in, group, limbs + at * kLimbGroupBytes, steps + at);
}

// x [tokens, in] into `workspace` (prepared_bytes).
inline PreparedTokens prepare_tokens(const char* op, const void* x, DType dtype, int64_t tokens,
                                     int64_t in, void* workspace, void* stream) {
  const int64_t groups = prepared_groups(in);
  auto* limbs = static_cast<uint8_t*>(workspace);
  auto* steps = reinterpret_cast<float*>(limbs + tokens * groups * kLimbGroupBytes);
  const LaunchConfig config{op, grid_of(op, tokens, (groups + kRowWarps - 1) / kRowWarps),
                            dim3(kRowThreads), 0, stream};
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    launch(config, int4_prepare_kernel<T>, static_cast<const T*>(x), in, limbs, steps, groups);
  });
  return {limbs, steps, tokens, groups};
}

}  // namespace kn::cuda
