// int4_gemm for few tokens (int4_rows.cuh): a block for 16 rows of the matrix and 16 tokens. More
// than 16 tokens read the weights again.
#include "core/op_checks.h"
#include "cuda/int4_rows.cuh"

namespace kn::cuda {
namespace {

struct GemmArgs {
  Matrix weight;
  PreparedTokens x;
  void* y;
  int64_t out, column_tiles;
};

template <typename T>
__global__ void __launch_bounds__(kRowThreads) int4_gemm_kernel(GemmArgs a) {
  KN_SHARED(shared);
  const Matrix m[1] = {a.weight};
  const int64_t first = int64_t(blockIdx.y) * kSegmentTokens;
  const TokenRows rows{a.x, nullptr, first, int(min(a.x.tokens - first, int64_t(kSegmentTokens)))};
  multiply_rows(m, int64_t(blockIdx.x), a.out, a.column_tiles, rows, shared,
                [&](int token, int64_t row, const float (&sums)[1]) {
                  static_cast<T*>(a.y)[(first + token) * a.out + row] = from_float<T>(sums[0]);
                });
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
  const GemmArgs gemm{{a.weight_packed, reinterpret_cast<const uint8_t*>(a.weight_scale)},
                      prepare_tokens(op, a.x, a.x_dtype, a.tokens, a.in, a.workspace, stream),
                      a.y,
                      a.out,
                      column_tiles(a.in)};
  const int64_t segments = (a.tokens + kSegmentTokens - 1) / kSegmentTokens;
  const LaunchConfig config{op, grid_of(op, row_tiles(a.out), segments), dim3(kRowThreads),
                            kRowSharedBytes<1>, stream};
  with_type(a.y_dtype, [&](auto y) { launch(config, int4_gemm_kernel<decltype(y)>, gemm); });
}

}  // namespace kn::cuda
