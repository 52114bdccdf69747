#include <algorithm>

#include "core/op_checks.h"
#include "core/threads.h"
#include "cpu/dispatch.h"
#include "kimi_native/ops.h"

namespace kn::cpu {
namespace {

void check_slots(const RopeAppendArgs& a) {
  for (int64_t t = 0; t < a.tokens; ++t)
    KN_REQUIRE(a.slots[t] >= 0 && a.slots[t] < a.cache_rows,
               "rope_append: slots must be 0 to cache_rows - 1 = ", a.cache_rows - 1,
               " (got slots[", t, "]=", a.slots[t], ")");
}

}  // namespace

void rope_append(const RopeAppendArgs& a) {
  check_op(a);
  if (a.tokens == 0) return;
  check_slots(a);
  constexpr int64_t kTokensPerTask = 8;  // 8 tokens of K2: 130 KB of traffic, worth waking a thread
  const Kernels& k = kernels();
  const int64_t bytes = dtype_bytes(a.dtype), half = a.qk_rope_head_dim / 2;
  const int64_t row_bytes = cache_row_bytes(a.cache_dtype, a.kv_lora_rank, a.qk_rope_head_dim);
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
      token.row = (char*)a.cache + a.slots[t] * row_bytes;
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
