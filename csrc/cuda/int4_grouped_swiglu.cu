// int4_grouped_swiglu: gate and up of the row's expert in one pass over the tokens, and silu(gate)
// * up in fp32 before anything is written. A block has 16 rows of both matrices and one segment of
// tokens (int4_rows.cuh, segments.cuh).
#include "cuda/segments.cuh"

namespace kn::cuda {
namespace {

template <typename T>
__global__ void __launch_bounds__(kRowThreads)
    int4_grouped_swiglu_kernel(Int4GroupedSwigluArgs a, Grouped g) {
  KN_SHARED(shared);
  const SegmentRange s = g.segments[blockIdx.y];
  if (s.count == 0) return;
  const Matrix m[2] = {
      {a.gate_packed[s.expert], reinterpret_cast<const uint8_t*>(a.gate_scale[s.expert])},
      {a.up_packed[s.expert], reinterpret_cast<const uint8_t*>(a.up_scale[s.expert])}};
  device_require(m[0].tiles && m[0].scales && m[1].tiles && m[1].scales,
                 "int4_grouped_swiglu: weight pointers of an expert with rows must not be null");
  const TokenRows rows{g.x, a.x_index, s.first, s.count};
  multiply_rows(m, int64_t(blockIdx.x), a.out, column_tiles(a.in), rows, shared,
                [&](int token, int64_t row, const float (&sums)[2]) {
                  const float gate = sums[0], denominator = __fadd_rn(1.0f, expf(-gate));
                  const float y = __fmul_rn(__fdiv_rn(gate, denominator), sums[1]);
                  static_cast<T*>(a.y)[(s.first + token) * a.out + row] = from_float<T>(y);
                });
}

}  // namespace

int64_t int4_grouped_swiglu_workspace_bytes(const Int4GroupedSwigluArgs& a) {
  return grouped_workspace_bytes(a);
}

void int4_grouped_swiglu(const Int4GroupedSwigluArgs& a, void* stream) {
  constexpr const char* op = "int4_grouped_swiglu";
  const Grouped g = open_grouped(op, a, stream);
  if (!g.segments) return;
  KN_REQUIRE(a.gate_packed && a.gate_scale && a.up_packed && a.up_scale, op,
             ": weight pointers must not be null");
  const LaunchConfig config{op, grid_of(op, row_tiles(a.out), g.count), dim3(kRowThreads),
                            kRowSharedBytes<2>, stream};
  with_type(a.y_dtype,
            [&](auto y) { launch(config, int4_grouped_swiglu_kernel<decltype(y)>, a, g); });
}

}  // namespace kn::cuda
