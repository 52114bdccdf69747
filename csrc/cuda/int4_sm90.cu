// The INT4 ops for many tokens on Hopper: prepares the tokens for int4_sm90.cuh and launches it.
// Bytes: 2 (bf16) or 4 a token and input, written once.
#include "cuda/int4_sm90.cuh"

namespace kn::cuda {
namespace {

constexpr int kPrepareThreads = 256;
constexpr float kUnit = 1.0f / 128.0f;  // of the step

// Where column 0 .. 15 of a step of wgmma stands, see decode_step.
__device__ __forceinline__ int place_of(int column) {
  return column % 2 * 8 + column / 4 * 2 + column / 2 % 2;
}

// A warp prepares a group, a lane an input.
template <typename T, int kLimbs>
__global__ void __launch_bounds__(kPrepareThreads)
    int4_sm90_prepare_kernel(const T* x, int64_t in, uint16_t* tokens, int64_t groups) {
  const int64_t token = int64_t(blockIdx.x);
  const int64_t group = int64_t(blockIdx.y) * (kPrepareThreads / 32) + threadIdx.x / 32;
  if (group >= groups) return;
  const int lane = int(threadIdx.x) % 32;
  float step;
  const int v = fixed_point(x + token * in, in, group, step);
  const float unit = __fmul_rn(step, kUnit);
  uint16_t* to = tokens + (token * kLimbs * groups + group) * kGroupSize + lane / 16 * 16 +
                 place_of(lane % 16);
  if constexpr (kLimbs == 1) {
    *to = ptx::to_bf16(__fmul_rn(float(v), unit));
  } else {
    *to = ptx::to_bf16(__fmul_rn(float(high_limb(v)), __fmul_rn(unit, 256.0f)));
    to[groups * kGroupSize] = ptx::to_bf16(__fmul_rn(float(low_limb(v)), unit));
  }
}

template <typename X, int kLimbs>
void prepare(const char* op, const Int4Sm90Args& a, void* stream) {
  const int64_t groups = prepared_groups(a.in);
  launch({op, grid_of(op, a.x_rows, blocks_of(groups, kPrepareThreads / 32)), dim3(kPrepareThreads),
          0, stream},
         int4_sm90_prepare_kernel<X, kLimbs>, static_cast<const X*>(a.x), a.in,
         static_cast<uint16_t*>(a.workspace), groups);
}

template <int kLimbs>
void multiply(const char* op, const Int4Sm90Args& a, void* stream) {
  const int64_t columns = column_tiles(a.in) * kTileColumns * kLimbs;
  Sm90Problem p{a, static_cast<const uint8_t*>(a.workspace), {}, 0};
  if (!a.x_index)
    p.map = make_tensor_map(op, {a.workspace, 2, columns, a.x_rows, columns * 2, int(kTileColumns),
                                 kHalfTokens, Swizzle::k128});
  auto run = [&](auto kernel) {
    const int64_t most = a.num_ranges * p.row_blocks;
    const LaunchConfig config{op, grid_of(op, std::min<int64_t>(most, multiprocessors(op))),
                              dim3(kSm90Threads), Sm90Layout<kLimbs>::kBytes, stream};
    launch(config, kernel, p);
  };
  with_type(a.y_dtype, [&](auto y) {
    using T = decltype(y);
    p.row_blocks = a.num_matrices == 1 ? many_row_blocks<1>(a.out) : many_row_blocks<2>(a.out);
    if (a.num_matrices == 1)
      run(int4_sm90_kernel<T, kLimbs, 1>);
    else
      run(int4_sm90_kernel<T, kLimbs, 2>);
  });
}

}  // namespace

void int4_sm90(const char* op, const Int4Sm90Args& a, void* stream) {
  if (a.x_dtype == DType::kBf16) {
    prepare<bf16, 1>(op, a, stream);
    multiply<1>(op, a, stream);
  } else {
    prepare<float, 2>(op, a, stream);
    multiply<2>(op, a, stream);
  }
}

}  // namespace kn::cuda
