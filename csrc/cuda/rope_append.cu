// rope_append: one block for a token. The pairs of all heads and of the key are shared out over the
// threads, then the latent row is copied. Bytes: the rope parts in and out, the cache row once. A
// pair is read whole before it is written, so q_out may be q. Products and sum are three roundings
// (no fused multiply-add), then one to the activation dtype, as on every device. The latents of an
// fp8 row (cache_layout.h) are quantized by a warp for each group: the bytes of the CPU.
#include <type_traits>

#include "core/op_checks.h"
#include "cuda/reduce.cuh"
#include "cuda/values.cuh"
#include "kimi_native/cache_layout.h"

namespace kn::cuda {
namespace {

constexpr int kThreads = 256;

template <typename T, typename O>
__device__ __forceinline__ void rotate(const T* x, float c, float s, O* y) {
  const float a = to_float(x[0]), b = to_float(x[1]);
  const float first = __fsub_rn(__fmul_rn(a, c), __fmul_rn(b, s));
  const float second = __fadd_rn(__fmul_rn(a, s), __fmul_rn(b, c));
  y[0] = from_float<O>(rounded<T>(first));
  y[1] = from_float<O>(rounded<T>(second));
}

template <typename T>
__device__ __forceinline__ void append_fp8_latent(const T* latent, int64_t width, uint8_t* row) {
  constexpr int kEach = kFp8Group / 32;
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
  auto* scales = reinterpret_cast<uint32_t*>(row + fp8_scale_offset(width));
  for (int64_t group = warp; group * kFp8Group < width; group += kThreads / 32) {
    float x[kEach];
    uint32_t largest = 0;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int64_t at = group * kFp8Group + i * 32 + lane;
      x[i] = at < width ? to_float(latent[at]) : 0.0f;
      largest = max(largest, __float_as_uint(x[i]) & 0x7fffffffu);
    }
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2)
      largest = max(largest, __shfl_xor_sync(kAllLanes, largest, lanes));
    const uint32_t scale = fp8_scale_bits(largest);
    const float inverse = __uint_as_float(fp8_inverse_bits(scale));
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int64_t at = group * kFp8Group + i * 32 + lane;
      if (at < width) row[at] = e4m3_of(__fmul_rn(x[i], inverse));
    }
    if (lane == 0) scales[group] = scale;
  }
  if (threadIdx.x == 0)
    for (int64_t i = width; i < fp8_scale_offset(width); ++i) row[i] = 0;
}

// C: of the cache; uint8_t for fp8 rows.
template <typename T, typename Q, typename C>
__global__ void __launch_bounds__(kThreads) rope_append_kernel(RopeAppendArgs a) {
  const int64_t token = int64_t(blockIdx.x), slot = a.slots[token];
  device_require(slot >= 0 && slot < a.cache_rows,
                 "rope_append: slots must be 0 to cache_rows - 1");
  const int half = int(a.qk_rope_head_dim / 2);
  const float* cosines = a.cos + token * half;
  const float* sines = a.sin + token * half;
  constexpr bool kFp8 = std::is_same_v<C, uint8_t>;
  using Key = std::conditional_t<kFp8, bf16, C>;
  int64_t row_items = a.kv_lora_rank + a.qk_rope_head_dim;
  if constexpr (kFp8) row_items = fp8_row_bytes(a.kv_lora_rank, a.qk_rope_head_dim);
  C* row = static_cast<C*>(a.cache) + slot * row_items;
  C* key_place = row + (kFp8 ? fp8_rope_offset(a.kv_lora_rank) : a.kv_lora_rank);
  const T* latent = static_cast<const T*>(a.latent) + token * a.latent_token_stride;
  const T* key = static_cast<const T*>(a.k_rope) + token * a.k_rope_token_stride;
  for (int64_t i = threadIdx.x; i < (a.heads + 1) * half; i += kThreads) {
    const int64_t head = i / half, j = i % half;
    const T* q = static_cast<const T*>(a.q) + token * a.q_token_stride + head * a.q_head_stride;
    Q* q_out = static_cast<Q*>(a.q_out) + token * a.q_out_token_stride + head * a.q_out_head_stride;
    if (head < a.heads)
      rotate(q + 2 * j, cosines[j], sines[j], q_out + 2 * j);
    else
      rotate(key + 2 * j, cosines[j], sines[j], reinterpret_cast<Key*>(key_place) + 2 * j);
  }
  if constexpr (kFp8) {
    append_fp8_latent(latent, a.kv_lora_rank, row);
    const int64_t used = fp8_rope_offset(a.kv_lora_rank) + 2 * a.qk_rope_head_dim;
    for (int64_t i = used + threadIdx.x; i < row_items; i += kThreads) row[i] = 0;
  } else {
    for (int64_t i = threadIdx.x; i < a.kv_lora_rank; i += kThreads)
      row[i] = from_float<C>(to_float(latent[i]));
  }
}

// f(T()) with the type of the cache's elements, uint8_t for fp8 rows.
template <typename F>
void with_cache_type(DType dtype, F f) {
  if (dtype == DType::kFp8)
    f(uint8_t());
  else
    with_type(dtype, f);
}

}  // namespace

void rope_append(const RopeAppendArgs& a, void* stream) {
  check_op(a);
  if (a.tokens == 0) return;
  const int64_t bytes = dtype_bytes(a.dtype);
  check_elements("rope_append", {{a.q, bytes},
                                 {a.latent, bytes},
                                 {a.k_rope, bytes},
                                 {a.cos, 4},
                                 {a.sin, 4},
                                 {a.slots, 8},
                                 {a.q_out, dtype_bytes(a.q_out_dtype)},
                                 {a.cache, dtype_bytes(a.cache_dtype)}});
  const LaunchConfig config{"rope_append", grid_of("rope_append", a.tokens), dim3(kThreads), 0,
                            stream};
  with_type(a.dtype, [&](auto x) {
    with_type(a.q_out_dtype, [&](auto q) {
      with_cache_type(a.cache_dtype, [&](auto c) {
        launch(config, rope_append_kernel<decltype(x), decltype(q), decltype(c)>, a);
      });
    });
  });
}

}  // namespace kn::cuda
