// int4_gemm for few tokens: weights on the m16 side of an int8 product, tokens on the n8 side, two
// columns each (the high and the low limb), so that four tokens fill a product.
//
//   block: 16 rows of the matrix          a tile is 16 rows x 64 columns = 512 bytes + 64 of scales
//   warp w of 8: column tiles w, w + 8, ...       [ w0 | w1 | ... | w7 | w0 | ... ]
//
// A warp streams its tiles through a ring in shared memory (cp.async). Per group of 32 columns:
// nibbles become bytes by two masks, one product gives the exact integer sum of u * v for both
// limbs, whose two columns meet in one lane; one multiply-add applies weight_scale * step. Bytes:
// 0.5625 a weight, plus 2.25 a token and input of prepared activations per block, from L2. More
// than 16 tokens read the weights again.
//
// Order: a warp's groups ascending, then the warps ascending. It depends on `in` alone.
#include "core/op_checks.h"
#include "cuda/limbs.cuh"

namespace kn::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * 32;
constexpr int kStages = 6;  // 5 tiles in flight a warp: 23 KB a block
constexpr int kStageBytes = int(kTileBytes + kTileScaleBytes);
constexpr int kRingBytes = kStages * kStageBytes;
constexpr int kQuad = 4;  // tokens of one product

struct GemmArgs {
  const uint8_t* tiles;
  const uint8_t* tile_scales;
  PreparedTokens x;
  void* y;
  int64_t out, column_tiles;
};

// ---- activations --------------------------------------------------------------------------------

template <typename T>
__global__ void __launch_bounds__(kThreads)
    int4_gemm_prepare_kernel(const T* x, int64_t in, uint8_t* limbs, int2* params, int64_t groups) {
  const int64_t token = int64_t(blockIdx.x);
  const int64_t group = int64_t(blockIdx.y) * kWarps + threadIdx.x / 32;
  if (group >= groups) return;
  const int64_t at = token * groups + group;
  prepare_group(x + token * in, in, group, limbs + at * kLimbGroupBytes, params + at);
}

// ---- one tile -----------------------------------------------------------------------------------

struct Lane {
  int lane, g, t;
};

__device__ __forceinline__ void load_tile(const GemmArgs& a, SharedPtr<uint8_t> stage, int64_t tile,
                                          int lane) {
  ptx::cp_async_16(stage + lane * 16, a.tiles + tile * kTileBytes + lane * 16);
  if (lane < int(kTileScaleBytes) / 16)
    ptx::cp_async_16(stage + int(kTileBytes) + lane * 16,
                     a.tile_scales + tile * kTileScaleBytes + lane * 16);
}

// b of a product: the limb g % 2 of token g / 2 of the quad.
__device__ __forceinline__ void load_limbs(const PreparedTokens& x, int64_t quad, int64_t group,
                                           Lane l, uint32_t (&b)[2]) {
  const int64_t token = quad + l.g / 2;
  uint2 v = make_uint2(0, 0);
  if (token < x.tokens)
    v = __ldg(reinterpret_cast<const uint2*>(
        x.limbs + (token * x.groups + group) * kLimbGroupBytes + l.g % 2 * 32 + l.t * 8));
  b[0] = v.x;
  b[1] = v.y;
}

__device__ __forceinline__ int2 load_params(const PreparedTokens& x, int64_t token, int64_t group) {
  return token < x.tokens ? __ldg(x.params + token * x.groups + group) : make_int2(0, 0);
}

// acc[2q], acc[2q + 1]: rows g and g + 8 of token t of quad q.
template <int kQuads>
__device__ __forceinline__ void multiply_group(const PreparedTokens& x, int64_t first_token,
                                               int64_t group, Lane l, uint32_t words_low,
                                               uint32_t words_high, uint32_t scales,
                                               float (&acc)[2 * kQuads]) {
  constexpr uint32_t kNibbles = 0x0f0f0f0fu;
  const uint32_t a[4] = {words_low & kNibbles, words_low >> 4 & kNibbles, words_high & kNibbles,
                         words_high >> 4 & kNibbles};
  float scale_low, scale_high;
  unpack(scales, scale_low, scale_high);
#pragma unroll
  for (int q = 0; q < kQuads; ++q) {
    uint32_t b[2];
    load_limbs(x, first_token + q * kQuad, group, l, b);
    const int2 params = load_params(x, first_token + q * kQuad + l.t, group);
    const float step = __int_as_float(params.x);
    int32_t d[4] = {0, params.y, 0, params.y};
    ptx::mma_m16n8k32_u8s8(d, a, b);
    const float low = float(d[0] * 256 + d[1]), high = float(d[2] * 256 + d[3]);  // exact
    acc[2 * q] = __fmaf_rn(low, __fmul_rn(scale_low, step), acc[2 * q]);
    acc[2 * q + 1] = __fmaf_rn(high, __fmul_rn(scale_high, step), acc[2 * q + 1]);
  }
}

// ---- the kernel ---------------------------------------------------------------------------------

template <int kQuads>
__device__ __forceinline__ void multiply_rows(const GemmArgs& a, SharedPtr<uint8_t> ring,
                                              int64_t first_token, float (&acc)[2 * kQuads]) {
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  const Lane l{lane, lane / 4, lane % 4};
  const int64_t row_start = int64_t(blockIdx.x) * a.column_tiles;
  auto issue = [&](int64_t c, int stage) {
    if (c < a.column_tiles) load_tile(a, ring + stage * kStageBytes, row_start + c, lane);
    ptx::cp_async_commit();
  };
  for (int s = 0; s < kStages - 1; ++s) issue(warp + s * kWarps, s);
  int stage = 0;
  for (int64_t c = warp; c < a.column_tiles; c += kWarps) {
    ptx::cp_async_wait<kStages - 2>();
    __syncwarp();  // the copies of all lanes are in, and all have read the stage that is free now
    issue(c + (kStages - 1) * kWarps, stage == 0 ? kStages - 1 : stage - 1);
    const auto tile = ring + stage * kStageBytes;
    const uint4 words = shared_cast<uint4>(tile)[lane];
    const uint2 scales = shared_cast<uint2>(tile + int(kTileBytes))[l.g];
    multiply_group<kQuads>(a.x, first_token, 2 * c, l, words.x, words.y, scales.x, acc);
    multiply_group<kQuads>(a.x, first_token, 2 * c + 1, l, words.z, words.w, scales.y, acc);
    stage = stage == kStages - 1 ? 0 : stage + 1;
  }
}

template <int kQuads, typename T>
__global__ void __launch_bounds__(kThreads) int4_gemm_kernel(GemmArgs a) {
  KN_SHARED(shared);
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  constexpr int kTokens = kQuads * kQuad;
  const int64_t first_token = int64_t(blockIdx.y) * kTokens;
  float acc[2 * kQuads] = {};
  multiply_rows<kQuads>(a, shared_at<uint8_t>(shared, warp * kRingBytes), first_token, acc);
  // partial[warp][row / 8][token][row % 8]: stores and loads of a warp fill the banks in order
  const auto partial = shared_at<float>(shared, kWarps * kRingBytes);
#pragma unroll
  for (int q = 0; q < kQuads; ++q)
#pragma unroll
    for (int half = 0; half < 2; ++half)
      partial[((warp * 2 + half) * kTokens + q * kQuad + lane % 4) * 8 + lane / 4] =
          acc[2 * q + half];
  __syncthreads();
  for (int i = int(threadIdx.x); i < kTokens * int(kTileRows); i += kThreads) {
    const int64_t token = first_token + i / 8 % kTokens;
    const int64_t row = int64_t(blockIdx.x) * kTileRows + i / (8 * kTokens) * 8 + i % 8;
    float sum = partial[i];
#pragma unroll
    for (int w = 1; w < kWarps; ++w)
      sum = __fadd_rn(sum, partial[w * kTokens * int(kTileRows) + i]);
    if (token < a.x.tokens && row < a.out)
      static_cast<T*>(a.y)[token * a.out + row] = from_float<T>(sum);
  }
}

template <int kQuads>
void run(const GemmArgs& a, DType y_dtype, void* stream) {
  constexpr int64_t kTokens = kQuads * kQuad;
  const LaunchConfig config{
      "int4_gemm", grid_of("int4_gemm", row_tiles(a.out), (a.x.tokens + kTokens - 1) / kTokens),
      dim3(kThreads), kWarps * (kRingBytes + kTokens * kTileRows * 4), stream};
  with_type(y_dtype, [&](auto y) { launch(config, int4_gemm_kernel<kQuads, decltype(y)>, a); });
}

}  // namespace

int64_t int4_gemm_workspace_bytes(const Int4GemmArgs& a) {
  check_op(a);
  return prepared_bytes(a.tokens, a.in);
}

void int4_gemm(const Int4GemmArgs& a, void* stream) {
  constexpr const char* op = "int4_gemm";
  const int64_t needed = int4_gemm_workspace_bytes(a);
  if (a.tokens == 0 || a.out == 0) return;
  KN_REQUIRE(a.workspace_bytes >= needed, op, ": workspace must have ", needed, " bytes (got ",
             a.workspace_bytes, ")");
  for (const void* p :
       {(const void*)a.weight_packed, (const void*)a.weight_scale, (const void*)a.workspace})
    KN_REQUIRE(p && uintptr_t(p) % 16 == 0, op,
               ": weights (from int4_pack) and workspace must be 16-byte aligned (got ", p, ")");
  const int64_t groups = prepared_groups(a.in);
  auto* limbs = static_cast<uint8_t*>(a.workspace);
  auto* params = reinterpret_cast<int2*>(limbs + a.tokens * groups * kLimbGroupBytes);
  const LaunchConfig prepare{op, grid_of(op, a.tokens, (groups + kWarps - 1) / kWarps),
                             dim3(kThreads), 0, stream};
  with_type(a.x_dtype, [&](auto x) {
    using T = decltype(x);
    launch(prepare, int4_gemm_prepare_kernel<T>, static_cast<const T*>(a.x), a.in, limbs, params,
           groups);
  });
  const GemmArgs gemm{a.weight_packed,
                      reinterpret_cast<const uint8_t*>(a.weight_scale),
                      {limbs, params, a.tokens, groups},
                      a.y,
                      a.out,
                      column_tiles(a.in)};
  if (a.tokens <= kQuad) return run<1>(gemm, a.y_dtype, stream);
  if (a.tokens <= 2 * kQuad) return run<2>(gemm, a.y_dtype, stream);
  run<4>(gemm, a.y_dtype, stream);
}

}  // namespace kn::cuda
