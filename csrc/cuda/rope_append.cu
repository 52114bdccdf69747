// rope_append: one block for a token. The pairs of all heads and of the key are shared out over the
// threads, then the latent row is copied. Bytes: the rope parts in and out, the cache row once. A
// pair is read whole before it is written, so q_out may be q. Products and sum are three roundings
// (no fused multiply-add), then one to the activation dtype, as on every device.
#include "core/op_checks.h"
#include "cuda/values.cuh"

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

template <typename T, typename Q, typename C>
__global__ void __launch_bounds__(kThreads) rope_append_kernel(RopeAppendArgs a) {
  const int64_t token = int64_t(blockIdx.x), slot = a.slots[token];
  device_require(slot >= 0 && slot < a.cache_rows,
                 "rope_append: slots must be 0 to cache_rows - 1");
  const int half = int(a.qk_rope_head_dim / 2);
  const float* cosines = a.cos + token * half;
  const float* sines = a.sin + token * half;
  C* row = static_cast<C*>(a.cache) + slot * (a.kv_lora_rank + a.qk_rope_head_dim);
  const T* latent = static_cast<const T*>(a.latent) + token * a.latent_token_stride;
  const T* key = static_cast<const T*>(a.k_rope) + token * a.k_rope_token_stride;
  for (int64_t i = threadIdx.x; i < (a.heads + 1) * half; i += kThreads) {
    const int64_t head = i / half, j = i % half;
    const T* q = static_cast<const T*>(a.q) + token * a.q_token_stride + head * a.q_head_stride;
    Q* q_out = static_cast<Q*>(a.q_out) + token * a.q_out_token_stride + head * a.q_out_head_stride;
    if (head < a.heads)
      rotate(q + 2 * j, cosines[j], sines[j], q_out + 2 * j);
    else
      rotate(key + 2 * j, cosines[j], sines[j], row + a.kv_lora_rank + 2 * j);
  }
  for (int64_t i = threadIdx.x; i < a.kv_lora_rank; i += kThreads)
    row[i] = from_float<C>(to_float(latent[i]));
}

}  // namespace

void rope_append(const RopeAppendArgs& a, void* stream) {
  check_op(a);
  KN_REQUIRE(a.cache_dtype != DType::kFp8,
             "rope_append: cache must be bf16 (0) or fp32 (1) on a GPU (got ",
             int32_t(a.cache_dtype), ")");
  if (a.tokens == 0) return;
  const LaunchConfig config{"rope_append", grid_of("rope_append", a.tokens), dim3(kThreads), 0,
                            stream};
  with_type(a.dtype, [&](auto x) {
    with_type(a.q_out_dtype, [&](auto q) {
      with_type(a.cache_dtype, [&](auto c) {
        launch(config, rope_append_kernel<decltype(x), decltype(q), decltype(c)>, a);
      });
    });
  });
}

}  // namespace kn::cuda
