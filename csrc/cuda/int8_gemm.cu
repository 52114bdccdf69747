// int8_gemm for few tokens: the block of int4_gemm (int4_rows.cuh), 16 rows of the matrix and 16
// tokens, with weights read in place as signed bytes.
//
// A tile is 16 rows x 64 columns, two groups: 64 bytes of each row, four pieces of 16 that are
// swizzled, so that the words of one piece of eight rows lie in 32 different banks. Scales, 1/16 of
// the bytes, are read straight into registers, a tile ahead. Bytes: 1.0625 a weight, and 2.125 a
// token and input of prepared activations, from L2. More than 16 tokens read the weights again.
//
// Order: a warp's groups ascending, then the warps ascending. It depends on `in` alone.
#include "core/op_checks.h"
#include "cuda/int4_rows.cuh"

namespace kn::cuda {
namespace {

constexpr const char* kOp = "int8_gemm";
constexpr int kInt8StageBytes = int(kTileRows * kTileColumns);
constexpr int kInt8RingBytes = kStages * kInt8StageBytes;
constexpr int kInt8SharedBytes = kRowWarps * kInt8RingBytes;  // 48 KB
static_assert(kRowWarps * kPartialFloats * 4 <= kInt8SharedBytes);

struct Int8Problem {
  const int8_t* weight;
  const bf16* scale;
  PreparedTokens x;
  void* y;
  int64_t out, in, tiles;
};

__device__ __forceinline__ int place_of(int row, int piece) {
  return row * 4 + (piece ^ (row >> 1 & 3));
}

// Starts the copy of a tile; zeros outside of the matrix.
__device__ __forceinline__ void copy_tile(const Int8Problem& p, int64_t row, int64_t tile,
                                          SharedPtr<uint8_t> stage) {
#pragma unroll
  for (int i = int(threadIdx.x) % 32; i < kInt8StageBytes / 16; i += 32) {
    const int64_t at = row + i / 4, column = tile * kTileColumns + i % 4 * 16;
    const bool inside = at < p.out && column < p.in;
    ptx::cp_async_16(stage + place_of(i / 4, i % 4) * 16,
                     p.weight + (inside ? at * p.in + column : 0), inside);
  }
}

// Scales of rows g and g + 8 for the two groups of a tile: [group][half].
__device__ __forceinline__ void load_scales(const Int8Problem& p, int64_t row, int64_t tile,
                                            float (&scales)[2][2]) {
#pragma unroll
  for (int group = 0; group < 2; ++group)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t at = row + half * 8 + int(threadIdx.x) % 32 / 4, g = tile * 2 + group;
      const bool inside = at < p.out && g * kGroupSize < p.in;
      scales[group][half] = inside ? to_float(p.scale[at * (p.in / kGroupSize) + g]) : 0.0f;
    }
}

// acc[2q], acc[2q + 1]: rows g and g + 8 of token t of quad q.
__device__ __forceinline__ void multiply_group(const LaneTokens& l, int quads, int64_t group,
                                               const uint32_t (&a)[4], const float (&scales)[2],
                                               float (&acc)[2 * kQuads]) {
#pragma unroll
  for (int q = 0; q < kQuads; ++q) {
    if (q >= quads) break;  // the same for the whole block
    const uint2 v =
        l.limbs[q] ? __ldg(reinterpret_cast<const uint2*>(l.limbs[q] + group * kLimbGroupBytes))
                   : make_uint2(0, 0);
    const uint32_t b[2] = {v.x, v.y};
    const float step = l.steps[q] ? __ldg(l.steps[q] + group) : 0.0f;
    int32_t d[4] = {};
    ptx::mma_m16n8k32_s8(d, a, b);
    const float low = float(d[0] * 256 + d[1]), high = float(d[2] * 256 + d[3]);  // below 2^28
    acc[2 * q] = __fmaf_rn(low, __fmul_rn(scales[0], step), acc[2 * q]);
    acc[2 * q + 1] = __fmaf_rn(high, __fmul_rn(scales[1], step), acc[2 * q + 1]);
  }
}

// This warp's share of the products: tiles w, w + 8, ...
__device__ __forceinline__ void multiply_tiles(const Int8Problem& p, int64_t row,
                                               const TokenRows& rows, SharedPtr<uint8_t> ring,
                                               float (&acc)[2 * kQuads]) {
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  const LaneTokens tokens = find_tokens(rows);
  const int quads = (rows.count + kQuad - 1) / kQuad;
  auto issue = [&](int64_t tile, int stage) {
    if (tile < p.tiles) copy_tile(p, row, tile, ring + stage * kInt8StageBytes);
    ptx::cp_async_commit();
  };
  for (int s = 0; s < kStages - 1; ++s) issue(warp + s * kRowWarps, s);
  float next[2][2];
  load_scales(p, row, warp, next);
  int stage = 0;
  for (int64_t tile = warp; tile < p.tiles; tile += kRowWarps) {
    const float scales[2][2] = {{next[0][0], next[0][1]}, {next[1][0], next[1][1]}};
    load_scales(p, row, tile + kRowWarps, next);
    ptx::cp_async_wait<kStages - 2>();
    __syncwarp();  // the copies of all lanes are in, and all have read the stage that is free now
    issue(tile + (kStages - 1) * kRowWarps, stage == 0 ? kStages - 1 : stage - 1);
    const auto words = shared_cast<uint32_t>(ring + stage * kInt8StageBytes);
    const int g = lane / 4, t = lane % 4;
#pragma unroll
    for (int group = 0; group < 2; ++group) {
      const int near = 2 * group, far = near + 1;  // pieces: columns 4t .. 4t + 3, and 16 on
      const uint32_t a[4] = {words[place_of(g, near) * 4 + t], words[place_of(g + 8, near) * 4 + t],
                             words[place_of(g, far) * 4 + t], words[place_of(g + 8, far) * 4 + t]};
      multiply_group(tokens, quads, 2 * tile + group, a, scales[group], acc);
    }
    stage = stage == kStages - 1 ? 0 : stage + 1;
  }
}

template <typename T>
__global__ void __launch_bounds__(kRowThreads) int8_gemm_kernel(Int8Problem p) {
  KN_SHARED(shared);
  const int64_t row_tile = int64_t(blockIdx.x), first = int64_t(blockIdx.y) * kSegmentTokens;
  const TokenRows rows{p.x, nullptr, first, int(min(p.x.tokens - first, int64_t(kSegmentTokens)))};
  float acc[1][2 * kQuads] = {};
  multiply_tiles(p, row_tile * kTileRows, rows,
                 shared_at<uint8_t>(shared, int(threadIdx.x) / 32 * kInt8RingBytes), acc[0]);
  __syncthreads();  // the sums take the place of the rings
  join_warps(shared_at<float>(shared, 0), row_tile, p.out, rows.count, acc,
             [&](int token, int64_t row, const float (&sums)[1]) {
               static_cast<T*>(p.y)[(first + token) * p.out + row] = from_float<T>(sums[0]);
             });
}

}  // namespace

int64_t int8_gemm_workspace_bytes(const Int8GemmArgs& a) {
  check_op(a);
  return prepared_bytes(a.tokens, a.in);
}

void int8_gemm(const Int8GemmArgs& a, void* stream) {
  const int64_t needed = int8_gemm_workspace_bytes(a);
  if (a.tokens == 0 || a.out == 0) return;
  check_elements(
      kOp, {{a.x, dtype_bytes(a.x_dtype)}, {a.weight_scale, 2}, {a.y, dtype_bytes(a.y_dtype)}});
  KN_REQUIRE(a.weight && uintptr_t(a.weight) % 16 == 0, kOp,
             ": weight must be 16-byte aligned on a GPU (got ", (const void*)a.weight, ")");
  KN_REQUIRE(a.x && a.y && a.weight_scale, kOp, ": x, y and weight_scale must not be null (got ",
             a.x, ", ", a.y, ", ", (const void*)a.weight_scale, ")");
  KN_REQUIRE(a.workspace && uintptr_t(a.workspace) % 16 == 0 && a.workspace_bytes >= needed, kOp,
             ": workspace must have ", needed, " bytes, 16-byte aligned (got ", a.workspace_bytes,
             " at ", a.workspace, ")");
  const Int8Problem p{a.weight,
                      a.weight_scale,
                      prepare_tokens(kOp, a.x, a.x_dtype, a.tokens, a.in, a.workspace, stream),
                      a.y,
                      a.out,
                      a.in,
                      column_tiles(a.in)};
  const int64_t segments = (a.tokens + kSegmentTokens - 1) / kSegmentTokens;
  const LaunchConfig config{kOp, grid_of(kOp, row_tiles(a.out), segments), dim3(kRowThreads),
                            kInt8SharedBytes, stream};
  with_type(a.y_dtype, [&](auto y) { launch(config, int8_gemm_kernel<decltype(y)>, p); });
}

}  // namespace kn::cuda
