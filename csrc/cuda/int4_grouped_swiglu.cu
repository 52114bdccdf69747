// int4_grouped_swiglu: gate and up of the row's expert in one pass over the tokens, and silu(gate)
// * up in fp32 before anything is written. A block has 16 rows of both matrices and a segment of
// tokens (int4_rows.cuh), or 64 rows of both and a tile (int4_tile.cuh, on Hopper
// int4_sm90.cuh); which rows go where is decided on the device (segments.cuh).
#include "cuda/segments.cuh"

namespace kn::cuda {
namespace {

__device__ __forceinline__ void find_matrices(const Int4GroupedSwigluArgs& a, int32_t expert,
                                              Matrix (&m)[2]) {
  m[0] = {a.gate_packed[expert], reinterpret_cast<const uint8_t*>(a.gate_scale[expert])};
  m[1] = {a.up_packed[expert], reinterpret_cast<const uint8_t*>(a.up_scale[expert])};
  device_require(m[0].tiles && m[0].scales && m[1].tiles && m[1].scales,
                 "int4_grouped_swiglu: weight pointers of an expert with rows must not be null");
}

template <typename T>
__device__ __forceinline__ void store(const Int4GroupedSwigluArgs& a, int64_t token, int64_t row,
                                      const float (&sums)[2]) {
  static_cast<T*>(a.y)[token * a.out + row] = from_float<T>(swiglu_of(sums[0], sums[1]));
}

template <typename T>
__global__ void __launch_bounds__(kRowThreads)
    int4_grouped_swiglu_kernel(Int4GroupedSwigluArgs a, Grouped g) {
  KN_SHARED(shared);
  for_each_segment(g.segments, [&](const RowRange& r) {
    Matrix m[2];
    find_matrices(a, r.expert, m);
    multiply_rows(m, int64_t(blockIdx.x), a.out, column_tiles(a.in),
                  TokenRows{g.x, a.x_index, r.first, r.count}, shared,
                  [&](int token, int64_t row, const float (&sums)[2]) {
                    store<T>(a, r.first + token, row, sums);
                  });
  });
}

template <typename T>
__global__ void __launch_bounds__(kManyThreads)
    int4_grouped_swiglu_tile_kernel(Int4GroupedSwigluArgs a, Grouped g) {
  KN_SHARED(shared);
  const RowRange r = g.tiles.places[blockIdx.y];
  if (r.count == 0) return;
  Matrix m[2];
  find_matrices(a, r.expert, m);
  multiply_many(m, int64_t(blockIdx.x), a.out, a.in, TokenRows{g.x, a.x_index, r.first, r.count},
                shared, [&](int token, int64_t row, const float (&sums)[2]) {
                  store<T>(a, r.first + token, row, sums);
                });
}

}  // namespace

int64_t int4_grouped_swiglu_workspace_bytes(const Int4GroupedSwigluArgs& a) {
  return grouped_workspace_bytes("int4_grouped_swiglu", a);
}

void int4_grouped_swiglu(const Int4GroupedSwigluArgs& a, void* stream) {
  constexpr const char* op = "int4_grouped_swiglu";
  const Grouped g = open_grouped(op, a, stream);
  if (!g.segments.places) return;
  KN_REQUIRE(a.gate_packed && a.gate_scale && a.up_packed && a.up_scale, op,
             ": weight pointers must not be null");
  with_type(a.y_dtype, [&](auto y) {
    using T = decltype(y);
    launch_grouped<2>(op, a, g, {{a.gate_packed, a.gate_scale, {}}, {a.up_packed, a.up_scale, {}}},
                      int4_grouped_swiglu_kernel<T>, int4_grouped_swiglu_tile_kernel<T>, stream);
  });
}

}  // namespace kn::cuda
