// bf16_gemm: y = x * Wt on bf16 tensor cores, by the kernel for few tokens (bf16_gemm_rows.cuh) or
// the one for many (bf16_gemm_tile.cuh); a row has the same bits in both. bf16 tokens are read in
// place. fp32 tokens are first split into three bf16 limbs that sum to them exactly, which triples
// the products and keeps every bit: products of two bf16 numbers are exact in fp32.
#include "core/op_checks.h"
#include "cuda/bf16_gemm_rows.cuh"
#include "cuda/bf16_gemm_tile.cuh"

namespace kn::cuda {
namespace {

constexpr const char* kOp = "bf16_gemm";
constexpr int kFewTokens = 32;
constexpr int kLimbs = 3;
constexpr int kLimbThreads = 256;

int64_t blocks_of(int64_t n, int64_t each) { return (n + each - 1) / each; }

// limbs [3][tokens][heads][in]: each the upper half of what the ones before it leave, so that 24
// bits of a float end up in them. A value that is not finite is in the first, beside zeros.
__global__ void __launch_bounds__(kLimbThreads)
    bf16_limbs_kernel(const float* x, int64_t heads, int64_t in, int64_t token_stride,
                      int64_t head_stride, bf16* limbs, int64_t limb_stride) {
  const int64_t row = int64_t(blockIdx.x);
  const int64_t column = int64_t(blockIdx.y) * kLimbThreads + threadIdx.x;
  if (column >= in) return;
  const float value = x[row / heads * token_stride + row % heads * head_stride + column];
  const bool finite = (__float_as_uint(value) & 0x7f800000u) != 0x7f800000u;
  float left = value;
  for (int limb = 0; limb < kLimbs; ++limb) {
    const float part = __uint_as_float(__float_as_uint(left) & 0xffff0000u);
    bf16 bits = {uint16_t(__float_as_uint(part) >> 16)};
    if (!finite) bits = limb == 0 ? from_float<bf16>(value) : bf16{0};
    limbs[limb * limb_stride + row * in + column] = bits;
    left = __fsub_rn(left, part);
  }
}

void check_alignment(const Bf16GemmArgs& a) {
  KN_REQUIRE(
      a.in % kPieceColumns == 0 && (a.heads == 1 || a.weight_head_stride % kPieceColumns == 0), kOp,
      ": in and weight_head_stride must be multiples of 8 on a GPU (got in=", a.in,
      ", weight_head_stride=", a.weight_head_stride, ")");
  KN_REQUIRE(a.weight && uintptr_t(a.weight) % 16 == 0, kOp,
             ": weight must be 16-byte aligned on a GPU (got ", (const void*)a.weight, ")");
  KN_REQUIRE(a.y && uintptr_t(a.y) % uintptr_t(dtype_bytes(a.y_dtype)) == 0, kOp,
             ": y must be aligned to its elements on a GPU (got ", a.y, ")");
  const int64_t token_stride = a.tokens > 1 ? a.x_token_stride : 0;
  const int64_t head_stride = a.heads > 1 ? a.x_head_stride : 0;
  if (a.x_dtype == DType::kFp32)
    KN_REQUIRE(a.x && uintptr_t(a.x) % 4 == 0, kOp,
               ": fp32 x must be 4-byte aligned on a GPU (got ", a.x, ")");
  else
    KN_REQUIRE(a.x && is_aligned({a.x}, {token_stride, head_stride}), kOp,
               ": rows of bf16 x must be 16-byte aligned on a GPU (got x=", a.x,
               ", x_token_stride=", a.x_token_stride, ", x_head_stride=", a.x_head_stride, ")");
}

// The tokens as bf16, in place or in the workspace.
void take_tokens(const Bf16GemmArgs& a, Bf16Problem& p, void* stream) {
  p.x = static_cast<const bf16*>(a.x);
  p.x_token_stride = a.x_token_stride;
  p.x_head_stride = a.x_head_stride;
  p.x_limb_stride = 0;
  if (a.x_dtype == DType::kBf16) return;
  auto* limbs = static_cast<bf16*>(a.workspace);
  p.x = limbs;
  p.x_token_stride = a.heads * a.in;
  p.x_head_stride = a.in;
  p.x_limb_stride = a.tokens * a.heads * a.in;
  launch({kOp, grid_of(kOp, a.tokens * a.heads, blocks_of(a.in, kLimbThreads)), dim3(kLimbThreads),
          0, stream},
         bf16_limbs_kernel, static_cast<const float*>(a.x), a.heads, a.in, a.x_token_stride,
         a.x_head_stride, limbs, p.x_limb_stride);
}

template <typename T, int kXLimbs, int kTiles>
void multiply_few(Bf16Problem p, int64_t heads, void* stream) {
  p.row_blocks = blocks_of(p.out, 16);
  launch({kOp, grid_of(kOp, p.row_blocks * heads, blocks_of(p.tokens, kTiles * 8)),
          dim3(kRowsThreads), kRowsSharedBytes, stream},
         bf16_gemm_rows_kernel<T, kXLimbs, kTiles>, p);
}

template <typename T, int kXLimbs>
void multiply(Bf16Problem p, int64_t heads, void* stream) {
  if (p.tokens <= 8) return multiply_few<T, kXLimbs, 1>(p, heads, stream);
  if (p.tokens <= kFewTokens) return multiply_few<T, kXLimbs, kFewTokens / 8>(p, heads, stream);
  p.row_blocks = blocks_of(p.out, kTileSide);
  launch({kOp, grid_of(kOp, p.row_blocks * heads, blocks_of(p.tokens, kTileSide)),
          dim3(kTileThreads), kTileSharedBytes<kXLimbs>, stream},
         bf16_gemm_tile_kernel<T, kXLimbs>, p);
}

}  // namespace

int64_t bf16_gemm_workspace_bytes(const Bf16GemmArgs& a) {
  check_op(a);
  if (a.x_dtype == DType::kBf16) return 0;
  return checked_mul(kOp, checked_mul(kOp, a.tokens, checked_mul(kOp, a.heads, a.in)),
                     kLimbs * int64_t(sizeof(bf16)));
}

void bf16_gemm(const Bf16GemmArgs& a, void* stream) {
  const int64_t needed = bf16_gemm_workspace_bytes(a);
  if (a.tokens == 0) return;
  check_alignment(a);
  KN_REQUIRE(needed == 0 ||
                 (a.workspace && uintptr_t(a.workspace) % 16 == 0 && a.workspace_bytes >= needed),
             kOp, ": workspace must have ", needed, " bytes, 16-byte aligned (got ",
             a.workspace_bytes, " at ", a.workspace, ")");
  Bf16Problem p{};
  p.weight = a.weight;
  p.y = a.y;
  p.tokens = a.tokens;
  p.out = a.out;
  p.in = a.in;
  p.weight_head_stride = a.weight_head_stride;
  p.y_token_stride = a.y_token_stride;
  p.y_head_stride = a.y_head_stride;
  KN_REQUIRE(blocks_of(a.in, kChunkColumns) < (1 << 28), kOp, ": in is too large (got ", a.in, ")");
  p.chunks = int(blocks_of(a.in, kChunkColumns));
  p.segment_chunks = int(blocks_of(p.chunks, kSegments));
  take_tokens(a, p, stream);
  with_type(a.y_dtype, [&](auto y) {
    using T = decltype(y);
    if (a.x_dtype == DType::kBf16)
      multiply<T, 1>(p, a.heads, stream);
    else
      multiply<T, kLimbs>(p, a.heads, stream);
  });
}

}  // namespace kn::cuda
