// The INT4 ops for many tokens: a block has 128 rows of one matrix, or 64 of each of two, and up to
// 128 tokens.
//
//            tokens 0 .. 31 | 32 .. 63 | 64 .. 95 | 96 .. 127
//   slots 0 .. 3   warp 0      2          4          6        a warp: four tiles of 16 rows x 8
//   slots 4 .. 7        1      3          5          7        quads, 64 products a column tile
//
// A slot is a tile of weights: slot s has row tile s of the block; of two matrices, slots 0, 1 and
// 4, 5 have the first and 2, 3 and 6, 7 the second, so that a lane has the same rows of both.
// A stage of the ring is one column tile: 4.5 KB of weights with scales, 16 KB of limbs and 1 KB of
// steps. Weights are decoded in registers, once for the 32 tokens of a warp.
//
// Order: that of int4_rows.cuh. Column tiles are taken as a warp of that kernel takes them, c,
// c + 8, ..., one run after the other, and at the end of a run its sums are added to the totals.
#pragma once
#include "cuda/int4_rows.cuh"

namespace kn::cuda {

constexpr int kManyTokens = 128;  // of a block
constexpr int kManyThreads = 256;
constexpr int kManySlots = 8;
constexpr int kWarpSlots = 4;
constexpr int kWarpQuads = 8;
constexpr int kWarpTokens = kWarpQuads * kQuad;
constexpr int kManyStages = 4;
constexpr int kTokenBytes = 2 * kLimbGroupBytes;    // of a token and column tile
constexpr int kLimbsAt = kManySlots * kStageBytes;  // in a stage
constexpr int kStepsAt = kLimbsAt + kManyTokens * kTokenBytes;
constexpr int kManyStageBytes = kStepsAt + kManyTokens * 2 * kStepBytes;
constexpr int kRowsAt = kManyStages * kManyStageBytes;       // prepared rows of the tokens, or -1
constexpr int kManySharedBytes = kRowsAt + kManyTokens * 4;  // 87 KB
static_assert(kManySharedBytes <= kSharedBytesAnywhere);

template <int kMatrices>
constexpr int kManyRowTiles = kManySlots / kMatrices;  // of a block

// Up to here reading the weights once for every 16 tokens costs less than a block's idle quads.
constexpr int kFewTokens = 32;

// The column tile behind c: 0, 8, 16, ..., 1, 9, ...
__device__ __forceinline__ int next_column_tile(int c, int tiles) {
  return c + kRowWarps < tiles ? c + kRowWarps : c % kRowWarps + 1;
}

inline int64_t blocks_of(int64_t n, int64_t each) { return (n + each - 1) / each; }

template <int kMatrices>
int64_t many_row_blocks(int64_t out) {
  return blocks_of(row_tiles(out), kManyRowTiles<kMatrices>);
}

using ManySums = float[kWarpSlots][kWarpQuads][2];

template <int kMatrices>
__device__ __forceinline__ int slot_row_tile(int slot) {
  return kMatrices == 1 ? slot : slot / 4 * 2 + slot % 2;
}

// What a warp copies of every column tile: a slot, and its share of the tokens.
struct ManyCopies {
  Matrix row;   // the slot's row tile
  bool inside;  // the matrix has it
  int tiles;    // columns
  PreparedTokens x;
};

template <int kMatrices>
__device__ __forceinline__ ManyCopies find_copies(const Matrix (&m)[kMatrices], int64_t block,
                                                  int64_t out, int64_t in,
                                                  const PreparedTokens& x) {
  const int slot = int(threadIdx.x) / 32;
  const int64_t row_tile = block * kManyRowTiles<kMatrices> + slot_row_tile<kMatrices>(slot);
  const bool second = kMatrices == 2 && slot / 2 % 2 == 1;
  const int64_t tiles = column_tiles(in), first = row_tile * tiles;
  const bool inside = row_tile < row_tiles(out);
  Matrix row = {second ? m[kMatrices - 1].tiles : m[0].tiles,
                second ? m[kMatrices - 1].scales : m[0].scales};
  if (inside) row = {row.tiles + first * kTileBytes, row.scales + first * kTileScaleBytes};
  return {row, inside, int(tiles), x};
}

// The prepared row of each token of the block, found once.
template <typename Rows>
__device__ __forceinline__ void find_rows(const TokenRows& tokens, Rows rows) {
  const int token = int(threadIdx.x);
  if (token < kManyTokens)
    rows[token] = token < tokens.count ? int32_t(prepared_row(tokens, token)) : -1;
  __syncthreads();
}

// Starts the copies of column tile c. Of every odd token the limbs of the two groups change places,
// so that 16 lanes read 32 banks.
__device__ __forceinline__ void copy_stage(const ManyCopies& b, int c,
                                           SharedPtr<const int32_t> rows,
                                           SharedPtr<uint8_t> stage) {
  static_assert(kManySlots * 32 == kManyThreads);
  const int thread = int(threadIdx.x);
  load_tile(b.row, stage + thread / 32 * kStageBytes, c, b.inside);
#pragma unroll
  for (int i = 0; i < kManyTokens * kTokenBytes / 16; i += kManyThreads) {
    const int token = (i + thread) / 8, piece = thread % 8;
    const int64_t row = rows[token];
    const int64_t from = max(row, int64_t(0)) * b.x.groups * kLimbGroupBytes + c * kTokenBytes;
    ptx::cp_async_16(stage + kLimbsAt + token * kTokenBytes + (piece ^ token % 2 * 4) * 16,
                     b.x.limbs + from + piece * 16, row >= 0);
  }
  if (thread < kManyTokens) {
    const int64_t row = rows[thread];
    ptx::cp_async_8(stage + kStepsAt + thread * 2 * kStepBytes,
                    b.x.steps + max(row, int64_t(0)) * b.x.groups + 2 * c, row >= 0);
  }
}

// The products of one quad and group. Both accumulators of a product start at 1.5 * 2^23 as a float
// has it, so that its results are floats already:
//   high' = M + high, low' = M + low      unit * (256 high' + low' - 257 M) in two exact steps
__device__ __forceinline__ void multiply_quad(const uint32_t (&a)[kWarpSlots][4],
                                              const float (&scales)[kWarpSlots][2],
                                              const uint32_t (&b)[2], float step, ManySums& acc,
                                              int q) {
  constexpr float kMagic = 12582912.0f;
  constexpr int32_t kMagicBits = 0x4b400000;
  const float unit = __fmul_rn(step, kUnitOfStep);
  const float high_unit = __fmul_rn(unit, 256.0f), offset = __fmul_rn(unit, -257.0f * kMagic);
#pragma unroll
  for (int i = 0; i < kWarpSlots; ++i) {
    int32_t d[4] = {kMagicBits, kMagicBits, kMagicBits, kMagicBits};
    ptx::mma_m16n8k32_s8(d, a[i], b);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float high = __int_as_float(d[2 * half]), low = __int_as_float(d[2 * half + 1]);
      const float sum = __fmaf_rn(low, unit, __fmaf_rn(high, high_unit, offset));
      acc[i][q][half] = __fmaf_rn(sum, scales[i][half], acc[i][q][half]);
    }
  }
}

// The products of one column tile, of this warp: `quads` of its quads have tokens.
__device__ __forceinline__ void multiply_column_tile(SharedPtr<uint8_t> stage, int quads,
                                                     ManySums& acc) {
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32, g = lane / 4, t = lane % 4;
  uint4 words[kWarpSlots];
  uint2 scale_words[kWarpSlots];
#pragma unroll
  for (int i = 0; i < kWarpSlots; ++i) {
    const auto tile = stage + (warp % 2 * kWarpSlots + i) * kStageBytes;
    words[i] = shared_cast<uint4>(tile)[lane];
    scale_words[i] = shared_cast<uint2>(tile + int(kTileBytes))[g];
  }
  const int token = warp / 2 * kWarpTokens + g / 2;
  const int limbs =
      kLimbsAt + token * kTokenBytes + ((g % 2 * 2 + t / 2) ^ g / 2 % 2 * 4) * 16 + t % 2 * 8;
  const auto steps =
      shared_cast<float>(stage + kStepsAt + (warp / 2 * kWarpTokens + t) * 2 * kStepBytes);
#pragma unroll
  for (int group = 0; group < 2; ++group) {
    uint32_t a[kWarpSlots][4];
    float scales[kWarpSlots][2];
#pragma unroll
    for (int i = 0; i < kWarpSlots; ++i) {
      decode_group(group ? words[i].z : words[i].x, group ? words[i].w : words[i].y, a[i]);
      decode_scales(group ? scale_words[i].y : scale_words[i].x, scales[i]);
    }
    const auto columns = shared_cast<uint2>(stage + (limbs ^ group * kLimbGroupBytes));
#pragma unroll
    for (int q = 0; q < kWarpQuads; ++q) {
      // The same for the whole warp; four quads at a time, for products that overlap.
      if (q % 4 == 0 && q >= quads) break;
      const uint2 v = columns[q * kQuad * kTokenBytes / 8];
      const uint32_t b[2] = {v.x, v.y};
      multiply_quad(a, scales, b, steps[q * kQuad * 2 + group], acc, q);
    }
  }
}

__device__ __forceinline__ void close_run(ManySums& acc, ManySums& total) {
#pragma unroll
  for (int i = 0; i < kWarpSlots; ++i)
#pragma unroll
    for (int q = 0; q < kWarpQuads; ++q)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        total[i][q][half] = __fadd_rn(total[i][q][half], acc[i][q][half]);
        acc[i][q][half] = 0.0f;
      }
}

template <typename Bytes>
__device__ __forceinline__ void multiply_block(const ManyCopies& b, int quads, Bytes shared,
                                               ManySums& total) {
  const SharedPtr<const int32_t> rows = shared_at<int32_t>(shared, kRowsAt);
  auto stage_at = [&](int s) { return shared_at<uint8_t>(shared, s * kManyStageBytes); };
  int ahead = 0;  // the column tile to copy next
  auto issue = [&](int number, int s) {
    if (number < b.tiles) copy_stage(b, ahead, rows, stage_at(s));
    ptx::cp_async_commit();
    ahead = next_column_tile(ahead, b.tiles);
  };
  for (int s = 0; s < kManyStages - 1; ++s) issue(s, s);
  ManySums acc = {};
  int stage = 0, c = 0;
  for (int done = 0; done < b.tiles; ++done) {
    ptx::cp_async_wait<kManyStages - 2>();
    __syncthreads();  // the copies of all are in, and all have read the stage that is free now
    issue(done + kManyStages - 1, stage == 0 ? kManyStages - 1 : stage - 1);
    multiply_column_tile(stage_at(stage), quads, acc);
    if (c + kRowWarps >= b.tiles) close_run(acc, total);
    c = next_column_tile(c, b.tiles);
    stage = stage == kManyStages - 1 ? 0 : stage + 1;
  }
}

// f(token, row, sums) as join_warps has it. block: the block's place along the rows.
template <int kMatrices, typename Bytes, typename F>
__device__ __forceinline__ void multiply_many(const Matrix (&m)[kMatrices], int64_t block,
                                              int64_t out, int64_t in, const TokenRows& tokens,
                                              Bytes shared, F f) {
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  find_rows(tokens, shared_at<int32_t>(shared, kRowsAt));
  const int first = warp / 2 * kWarpTokens;
  ManySums total = {};
  multiply_block(find_copies(m, block, out, in, tokens.x),
                 (tokens.count - first + kQuad - 1) / kQuad, shared, total);
  constexpr int kEach = kWarpSlots / kMatrices;  // slots of a warp and matrix
#pragma unroll
  for (int i = 0; i < kEach; ++i)
#pragma unroll
    for (int q = 0; q < kWarpQuads; ++q)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float sums[kMatrices];
#pragma unroll
        for (int j = 0; j < kMatrices; ++j) sums[j] = total[j * kEach + i][q][half];
        const int token = first + q * kQuad + lane % 4;
        const int64_t row_tile =
            block * kManyRowTiles<kMatrices> + slot_row_tile<kMatrices>(warp % 2 * kWarpSlots + i);
        const int64_t row = row_tile * kTileRows + half * 8 + lane / 4;
        if (token < tokens.count && row < out) f(token, row, sums);
      }
}

}  // namespace kn::cuda
