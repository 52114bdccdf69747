// int4_grouped_gemm: the down projection, each row times the matrix of its expert. A block has 16
// rows of a matrix and one segment of tokens (int4_rows.cuh, segments.cuh).
#include "cuda/segments.cuh"

namespace kn::cuda {
namespace {

template <typename T>
__global__ void __launch_bounds__(kRowThreads)
    int4_grouped_gemm_kernel(Int4GroupedGemmArgs a, Grouped g) {
  KN_SHARED(shared);
  const SegmentRange s = g.segments[blockIdx.y];
  if (s.count == 0) return;
  const Matrix m[1] = {
      {a.weight_packed[s.expert], reinterpret_cast<const uint8_t*>(a.weight_scale[s.expert])}};
  device_require(m[0].tiles && m[0].scales,
                 "int4_grouped_gemm: weight pointers of an expert with rows must not be null");
  const TokenRows rows{g.x, a.x_index, s.first, s.count};
  multiply_rows(m, int64_t(blockIdx.x), a.out, column_tiles(a.in), rows, shared,
                [&](int token, int64_t row, const float (&sums)[1]) {
                  static_cast<T*>(a.y)[(s.first + token) * a.out + row] = from_float<T>(sums[0]);
                });
}

}  // namespace

int64_t int4_grouped_gemm_workspace_bytes(const Int4GroupedGemmArgs& a) {
  return grouped_workspace_bytes(a);
}

void int4_grouped_gemm(const Int4GroupedGemmArgs& a, void* stream) {
  constexpr const char* op = "int4_grouped_gemm";
  const Grouped g = open_grouped(op, a, stream);
  if (!g.segments) return;
  KN_REQUIRE(a.weight_packed && a.weight_scale, op, ": weight pointers must not be null");
  const LaunchConfig config{op, grid_of(op, row_tiles(a.out), g.count), dim3(kRowThreads),
                            kRowSharedBytes<1>, stream};
  with_type(a.y_dtype,
            [&](auto y) { launch(config, int4_grouped_gemm_kernel<decltype(y)>, a, g); });
}

}  // namespace kn::cuda
