#include <algorithm>

#include "core/error.h"
#include "core/threads.h"
#include "cpu/dispatch.h"
#include "kimi_native/ops.h"

namespace kn::cpu {
namespace {

constexpr const char* kOp = "rope_append";

void check_sizes(const RopeAppendArgs& a) {
  KN_REQUIRE(a.tokens >= 0 && a.heads >= 1 && a.kv_lora_rank >= 1 && a.cache_rows >= 0,
             "rope_append: need tokens, cache_rows >= 0 and heads, kv_lora_rank >= 1 (got tokens=",
             a.tokens, ", cache_rows=", a.cache_rows, ", heads=", a.heads,
             ", kv_lora_rank=", a.kv_lora_rank, ")");
  KN_REQUIRE(a.qk_rope_head_dim >= 2 && a.qk_rope_head_dim % 2 == 0,
             "rope_append: qk_rope_head_dim must be even and at least 2 (got ", a.qk_rope_head_dim,
             ")");
  const int64_t strides[] = {a.q_token_stride,    a.q_head_stride,       a.q_out_token_stride,
                             a.q_out_head_stride, a.latent_token_stride, a.k_rope_token_stride};
  for (const int64_t stride : strides) {
    KN_REQUIRE(stride >= 0, "rope_append: strides must not be negative (got ", stride, ")");
    checked_mul(kOp, checked_mul(kOp, std::max(a.tokens, a.heads), stride), 8);
  }
  checked_mul(kOp, checked_mul(kOp, a.cache_rows, a.kv_lora_rank + a.qk_rope_head_dim), 8);
}

void check_buffers(const RopeAppendArgs& a) {
  KN_REQUIRE(a.q && a.latent && a.k_rope && a.cos && a.sin && a.slots && a.q_out && a.cache,
             "rope_append: no pointer may be null (got q=", a.q, ", latent=", a.latent,
             ", k_rope=", a.k_rope, ", cos=", a.cos, ", sin=", a.sin, ", slots=", a.slots,
             ", q_out=", a.q_out, ", cache=", a.cache, ")");
  for (int64_t t = 0; t < a.tokens; ++t)
    KN_REQUIRE(a.slots[t] >= 0 && a.slots[t] < a.cache_rows,
               "rope_append: slots must be 0 to cache_rows - 1 = ", a.cache_rows - 1,
               " (got slots[", t, "]=", a.slots[t], ")");
}

}  // namespace

void rope_append(const RopeAppendArgs& a) {
  check_sizes(a);
  if (a.tokens == 0) return;
  check_buffers(a);
  constexpr int64_t kTokensPerTask = 8;  // 8 tokens of K2: 130 KB of traffic, worth waking a thread
  const Kernels& k = kernels();
  const int64_t bytes = dtype_bytes(a.dtype), half = a.qk_rope_head_dim / 2;
  const int64_t width = a.kv_lora_rank + a.qk_rope_head_dim;
  parallel_for((a.tokens + kTokensPerTask - 1) / kTokensPerTask, [&](int64_t task, int) {
    const int64_t end = std::min(a.tokens, (task + 1) * kTokensPerTask);
    for (int64_t t = task * kTokensPerTask; t < end; ++t) {
      RopeAppendToken token;
      token.q = (const char*)a.q + t * a.q_token_stride * bytes;
      token.latent = (const char*)a.latent + t * a.latent_token_stride * bytes;
      token.k_rope = (const char*)a.k_rope + t * a.k_rope_token_stride * bytes;
      token.cos = a.cos + t * half;
      token.sin = a.sin + t * half;
      token.q_out = (char*)a.q_out + t * a.q_out_token_stride * dtype_bytes(a.q_out_dtype);
      token.row = (char*)a.cache + a.slots[t] * width * dtype_bytes(a.cache_dtype);
      token.dtype = a.dtype;
      token.q_out_dtype = a.q_out_dtype;
      token.cache_dtype = a.cache_dtype;
      token.heads = a.heads;
      token.latent_width = a.kv_lora_rank;
      token.rope = a.qk_rope_head_dim;
      token.q_head_stride = a.q_head_stride;
      token.q_out_head_stride = a.q_out_head_stride;
      k.rope_append_token(token);
    }
  });
}

}  // namespace kn::cpu
