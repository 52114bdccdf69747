// int4_gemm by the kernel for few tokens (int4_rows.cuh), a block for 16 rows of the matrix and 16
// tokens, or one for many (int4_tile.cuh, on Hopper int4_sm90.cuh), a block for 128 of each; a row
// has the same bits in all.
#include "core/op_checks.h"
#include "cuda/int4_sm90.h"

namespace kn::cuda {
namespace {

constexpr const char* kOp = "int4_gemm";

struct GemmArgs {
  Matrix weight;
  PreparedTokens x;
  void* y;
  int64_t out, in;
};

// The block's tokens, at most `each`.
__device__ __forceinline__ TokenRows tokens_of_block(const GemmArgs& a, int each) {
  const int64_t first = int64_t(blockIdx.y) * each;
  return {a.x, nullptr, first, int(min(a.x.tokens - first, int64_t(each)))};
}

template <typename T>
__device__ __forceinline__ void store_sum(const GemmArgs& a, int64_t token, int64_t row,
                                          float sum) {
  static_cast<T*>(a.y)[token * a.out + row] = from_float<T>(sum);
}

template <typename T>
__global__ void __launch_bounds__(kRowThreads) int4_gemm_kernel(GemmArgs a) {
  KN_SHARED(shared);
  const Matrix m[1] = {a.weight};
  const TokenRows tokens = tokens_of_block(a, kSegmentTokens);
  multiply_rows(m, int64_t(blockIdx.x), a.out, column_tiles(a.in), tokens, shared,
                [&](int token, int64_t row, const float (&sums)[1]) {
                  store_sum<T>(a, tokens.first + token, row, sums[0]);
                });
}

template <typename T>
__global__ void __launch_bounds__(kManyThreads) int4_gemm_tile_kernel(GemmArgs a) {
  KN_SHARED(shared);
  const Matrix m[1] = {a.weight};
  const TokenRows tokens = tokens_of_block(a, kManyTokens);
  multiply_many(m, int64_t(blockIdx.x), a.out, a.in, tokens, shared,
                [&](int token, int64_t row, const float (&sums)[1]) {
                  store_sum<T>(a, tokens.first + token, row, sums[0]);
                });
}

template <typename T>
void multiply(const GemmArgs& a, void* stream) {
  const int64_t tokens = a.x.tokens;
  if (tokens <= kFewTokens)
    return launch({kOp, grid_of(kOp, row_tiles(a.out), blocks_of(tokens, kSegmentTokens)),
                   dim3(kRowThreads), kRowSharedBytes<1>, stream},
                  int4_gemm_kernel<T>, a);
  launch({kOp, grid_of(kOp, many_row_blocks<1>(a.out), blocks_of(tokens, kManyTokens)),
          dim3(kManyThreads), kManySharedBytes, stream},
         int4_gemm_tile_kernel<T>, a);
}

bool needs_sm90(const Int4GemmArgs& a) { return a.tokens > kFewTokens && is_hopper(kOp); }

// The tokens as rows of one expert.
void multiply_sm90(const Int4GemmArgs& a, const Matrix& weight, void* stream) {
  const Int4Experts alone = {nullptr, nullptr, weight};
  int4_sm90(kOp,
            {a.x,
             a.x_dtype,
             a.y_dtype,
             nullptr,
             1,
             {alone, {}},
             nullptr,
             blocks_of(a.tokens, kManyTokens),
             a.y,
             a.tokens,
             a.tokens,
             a.out,
             a.in,
             a.workspace},
            stream);
}

}  // namespace

int64_t int4_gemm_workspace_bytes(const Int4GemmArgs& a) {
  check_op(a);
  return needs_sm90(a) ? int4_sm90_bytes(a.x_dtype, a.tokens, a.in)
                       : prepared_bytes(a.tokens, a.in);
}

void int4_gemm(const Int4GemmArgs& a, void* stream) {
  const int64_t needed = int4_gemm_workspace_bytes(a);
  if (a.tokens == 0 || a.out == 0) return;
  KN_REQUIRE(a.workspace_bytes >= needed, kOp, ": workspace must have ", needed, " bytes (got ",
             a.workspace_bytes, ")");
  for (const void* p :
       {(const void*)a.weight_packed, (const void*)a.weight_scale, (const void*)a.workspace})
    KN_REQUIRE(p && uintptr_t(p) % 16 == 0, kOp,
               ": weights (from int4_pack) and workspace must be 16-byte aligned (got ", p, ")");
  KN_REQUIRE(a.x && a.y, kOp, ": x and y must not be null (got ", a.x, ", ", a.y, ")");
  check_elements(kOp, {{a.x, dtype_bytes(a.x_dtype)}, {a.y, dtype_bytes(a.y_dtype)}});
  const Matrix weight = {a.weight_packed, reinterpret_cast<const uint8_t*>(a.weight_scale)};
  if (needs_sm90(a)) return multiply_sm90(a, weight, stream);
  const GemmArgs gemm{weight,
                      prepare_tokens(kOp, a.x, a.x_dtype, a.tokens, a.in, a.workspace, stream), a.y,
                      a.out, a.in};
  with_type(a.y_dtype, [&](auto y) { multiply<decltype(y)>(gemm, stream); });
}

}  // namespace kn::cuda
