// int4_grouped_gemm: the down projection, each row times the matrix of its expert. A block has 16
// rows of a matrix and a segment of tokens (int4_rows.cuh), or 128 and a tile (int4_tile.cuh, on
// Hopper int4_sm90.cuh); which rows go where is decided on the device (segments.cuh).
#include "cuda/segments.cuh"

namespace kn::cuda {
namespace {

__device__ __forceinline__ void find_matrices(const Int4GroupedGemmArgs& a, int32_t expert,
                                              Matrix (&m)[1]) {
  m[0] = {a.weight_packed[expert], reinterpret_cast<const uint8_t*>(a.weight_scale[expert])};
  device_require(m[0].tiles && m[0].scales,
                 "int4_grouped_gemm: weight pointers of an expert with rows must not be null");
}

template <typename T>
__device__ __forceinline__ void store(const Int4GroupedGemmArgs& a, int64_t token, int64_t row,
                                      const float (&sums)[1]) {
  static_cast<T*>(a.y)[token * a.out + row] = from_float<T>(sums[0]);
}

template <typename T>
__global__ void __launch_bounds__(kRowThreads)
    int4_grouped_gemm_kernel(Int4GroupedGemmArgs a, Grouped g) {
  KN_SHARED(shared);
  for_each_segment(g.segments, [&](const RowRange& r) {
    Matrix m[1];
    find_matrices(a, r.expert, m);
    multiply_rows(m, int64_t(blockIdx.x), a.out, column_tiles(a.in),
                  TokenRows{g.x, a.x_index, r.first, r.count}, shared,
                  [&](int token, int64_t row, const float (&sums)[1]) {
                    store<T>(a, r.first + token, row, sums);
                  });
  });
}

template <typename T>
__global__ void __launch_bounds__(kManyThreads)
    int4_grouped_gemm_tile_kernel(Int4GroupedGemmArgs a, Grouped g) {
  KN_SHARED(shared);
  const RowRange r = g.tiles.places[blockIdx.y];
  if (r.count == 0) return;
  Matrix m[1];
  find_matrices(a, r.expert, m);
  multiply_many(m, int64_t(blockIdx.x), a.out, a.in, TokenRows{g.x, a.x_index, r.first, r.count},
                shared, [&](int token, int64_t row, const float (&sums)[1]) {
                  store<T>(a, r.first + token, row, sums);
                });
}

}  // namespace

int64_t int4_grouped_gemm_workspace_bytes(const Int4GroupedGemmArgs& a) {
  return grouped_workspace_bytes("int4_grouped_gemm", a);
}

void int4_grouped_gemm(const Int4GroupedGemmArgs& a, void* stream) {
  constexpr const char* op = "int4_grouped_gemm";
  const Grouped g = open_grouped(op, a, stream);
  if (!g.segments.places) return;
  KN_REQUIRE(a.weight_packed && a.weight_scale, op, ": weight pointers must not be null");
  with_type(a.y_dtype, [&](auto y) {
    using T = decltype(y);
    launch_grouped<1>(op, a, g, {{a.weight_packed, a.weight_scale, {}}},
                      int4_grouped_gemm_kernel<T>, int4_grouped_gemm_tile_kernel<T>, stream);
  });
}

}  // namespace kn::cuda
