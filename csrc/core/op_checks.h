// The rules between an op's sizes, the same on every device. Throw std::invalid_argument("op: what
// must hold (got ...)"). Rules about the contents of a buffer are checked where the buffer is.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "core/error.h"
#include "kimi_native/cache_layout.h"
#include "kimi_native/layout.h"
#include "kimi_native/ops.h"

namespace kn {

constexpr int64_t kMaxExperts = 4096;  // bounds what moe_route keeps of a token on chip

inline void check_op_dtype(const char* op, DType dtype) {
  KN_REQUIRE(dtype == DType::kBf16 || dtype == DType::kFp32, op, ": dtype must be 0 or 1 (got ",
             int32_t(dtype), ")");
}

inline void check_cache_dtype(const char* op, DType dtype) {
  KN_REQUIRE(dtype == DType::kBf16 || dtype == DType::kFp32 || dtype == DType::kFp8, op,
             ": cache must be bf16 (0), fp32 (1) or fp8 (2) (got ", int32_t(dtype), ")");
}

inline void check_eps(const char* op, float eps) {
  KN_REQUIRE(std::isfinite(eps) && eps >= 0, op, ": eps must be finite and at least 0 (got ", eps,
             ")");
}

inline void check_op(const RmsNormArgs& a) {
  check_eps("rms_norm", a.eps);
  KN_REQUIRE(a.tokens >= 0 && a.hidden >= 1,
             "rms_norm: need tokens >= 0 and hidden >= 1 (got tokens=", a.tokens,
             ", hidden=", a.hidden, ")");
  KN_REQUIRE(a.x_token_stride >= a.hidden, "rms_norm: x_token_stride must be at least hidden (got ",
             a.x_token_stride, ", hidden=", a.hidden, ")");
  checked_mul("rms_norm", a.tokens,
              checked_mul("rms_norm", a.x_token_stride, dtype_bytes(a.dtype)));
  KN_REQUIRE(a.tokens == 0 || (a.x && a.weight && a.y),
             "rms_norm: x, weight and y must not be null (got x=", a.x, ", weight=", a.weight,
             ", y=", a.y, ")");
}

inline void check_op(const AddRmsNormArgs& a) {
  check_eps("add_rms_norm", a.eps);
  KN_REQUIRE(a.tokens >= 0 && a.hidden >= 1,
             "add_rms_norm: need tokens >= 0 and hidden >= 1 (got tokens=", a.tokens,
             ", hidden=", a.hidden, ")");
  checked_mul("add_rms_norm", a.tokens,
              checked_mul("add_rms_norm", a.hidden, dtype_bytes(a.dtype)));
  KN_REQUIRE(a.tokens == 0 || (a.x && a.residual && a.weight && a.y && a.sum),
             "add_rms_norm: x, residual, weight, y and sum must not be null (got x=", a.x,
             ", residual=", a.residual, ", weight=", a.weight, ", y=", a.y, ", sum=", a.sum, ")");
}

inline void check_op(const SwigluArgs& a) {
  KN_REQUIRE(a.tokens >= 0 && a.width >= 1,
             "swiglu: need tokens >= 0 and width >= 1 (got tokens=", a.tokens, ", width=", a.width,
             ")");
  checked_mul("swiglu", checked_mul("swiglu", a.tokens, a.width), dtype_bytes(a.dtype));
}

inline void check_op(const RopeAppendArgs& a) {
  constexpr const char* op = "rope_append";
  check_op_dtype(op, a.dtype);
  check_op_dtype(op, a.q_out_dtype);
  check_cache_dtype(op, a.cache_dtype);
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
    checked_mul(op, checked_mul(op, std::max(a.tokens, a.heads), stride), 8);
  }
  checked_mul(op, checked_mul(op, a.cache_rows, a.kv_lora_rank + a.qk_rope_head_dim), 8);
  KN_REQUIRE(a.tokens == 0 ||
                 (a.q && a.latent && a.k_rope && a.cos && a.sin && a.slots && a.q_out && a.cache),
             "rope_append: no pointer may be null (got q=", a.q, ", latent=", a.latent,
             ", k_rope=", a.k_rope, ", cos=", a.cos, ", sin=", a.sin, ", slots=", a.slots,
             ", q_out=", a.q_out, ", cache=", a.cache, ")");
}

inline void check_op(const MoeRouteArgs& a) {
  constexpr const char* op = "moe_route";
  KN_REQUIRE(a.tokens >= 0, op, ": tokens must be at least 0 (got ", a.tokens, ")");
  KN_REQUIRE(a.experts >= 1 && a.experts <= kMaxExperts, op, ": experts must be 1 to ", kMaxExperts,
             " (got ", a.experts, ")");
  KN_REQUIRE(a.topk >= 1 && a.topk <= a.experts, op, ": topk must be 1 to ", a.experts, " (got ",
             a.topk, ")");
  KN_REQUIRE(a.n_group >= 1 && a.n_group <= a.experts && a.experts % a.n_group == 0, op,
             ": n_group must divide experts (got n_group=", a.n_group, ", experts=", a.experts,
             ")");
  KN_REQUIRE(a.topk_group >= 1 && a.topk_group <= a.n_group, op, ": topk_group must be 1 to ",
             a.n_group, " (got ", a.topk_group, ")");
  KN_REQUIRE(a.topk <= a.topk_group * (a.experts / a.n_group), op,
             ": the kept groups must hold at least topk experts (got topk=", a.topk,
             ", topk_group=", a.topk_group, " groups of ", a.experts / a.n_group, ")");
  KN_REQUIRE(a.scoring == Scoring::kSigmoid || a.scoring == Scoring::kSoftmax, op,
             ": scoring must be 0 or 1 (got ", int32_t(a.scoring), ")");
  KN_REQUIRE(a.group_score == GroupScore::kTop2Sum || a.group_score == GroupScore::kMax, op,
             ": group_score must be 0 or 1 (got ", int32_t(a.group_score), ")");
  KN_REQUIRE(std::isfinite(a.routed_scaling_factor), op,
             ": routed_scaling_factor must be finite (got ", a.routed_scaling_factor, ")");
  checked_mul(op, a.tokens, a.experts * int64_t(sizeof(float)));
}

// Returns tokens * topk.
inline int64_t check_op(const MoeDispatchArgs& a) {
  constexpr const char* op = "moe_dispatch";
  constexpr int64_t kMaxRows = std::numeric_limits<int32_t>::max();
  KN_REQUIRE(a.experts >= 1 && a.experts < kMaxRows, op, ": experts must be 1 to ", kMaxRows - 1,
             " (got ", a.experts, ")");
  KN_REQUIRE(a.tokens >= 0 && a.topk >= 1, op,
             ": need tokens >= 0 and topk >= 1 (got tokens=", a.tokens, ", topk=", a.topk, ")");
  const int64_t rows = checked_mul(op, a.tokens, a.topk);
  KN_REQUIRE(rows <= kMaxRows, op, ": tokens * topk must be at most ", kMaxRows, " (got ", a.tokens,
             " * ", a.topk, ")");
  return rows;
}

// Returns tokens * topk.
inline int64_t check_op(const MoeCombineArgs& a) {
  constexpr const char* op = "moe_combine";
  KN_REQUIRE(a.tokens >= 0 && a.topk >= 1 && a.hidden >= 1, op,
             ": need tokens >= 0, topk >= 1 and hidden >= 1 (got tokens=", a.tokens,
             ", topk=", a.topk, ", hidden=", a.hidden, ")");
  check_op_dtype(op, a.rows_dtype);
  check_op_dtype(op, a.out_dtype);
  const int64_t rows = checked_mul(op, a.tokens, a.topk);
  KN_REQUIRE(rows <= std::numeric_limits<int32_t>::max(), op,
             ": tokens * topk must fit in 32 bits (got ", a.tokens, " * ", a.topk, ")");
  checked_mul(op, std::max<int64_t>(rows, a.topk), checked_mul(op, a.hidden, 4));
  return rows;
}

inline void check_gemm_dtype(const char* op, const char* name, DType dtype) {
  KN_REQUIRE(dtype == DType::kBf16 || dtype == DType::kFp32, op, ": ", name,
             " must be bf16 (0) or fp32 (1) (got ", int32_t(dtype), ")");
}

// A quantized matrix: [out, in], one scale per 32 inputs.
inline void check_grouped_matrix(const char* op, int64_t out, int64_t in, int32_t group_size) {
  KN_REQUIRE(group_size == kGroupSize, op, ": group_size must be ", kGroupSize, " (got ",
             group_size, ")");
  KN_REQUIRE(in > 0 && in % kGroupSize == 0, op, ": in must be a positive multiple of ", kGroupSize,
             " (got ", in, ")");
  checked_mul(op, out, checked_mul(op, in, 8));
}

// The GPU's INT4 products are exact.
inline void check_exact(const char* op, Compute compute) {
  KN_REQUIRE(compute == Compute::kExact, op, ": compute must be exact (0) on a GPU (got ",
             int32_t(compute), ")");
}

inline void check_op(const Int4GemmArgs& a) {
  constexpr const char* op = "int4_gemm";
  check_exact(op, a.compute);
  check_gemm_dtype(op, "x", a.x_dtype);
  check_gemm_dtype(op, "y", a.y_dtype);
  check_grouped_matrix(op, a.out, a.in, a.group_size);
  checked_mul(op, a.tokens, checked_mul(op, a.in, 8));
  checked_mul(op, a.tokens, checked_mul(op, a.out, 8));
}

inline void check_op(const Int4QuantizeArgs& a) {
  constexpr const char* op = "int4_quantize";
  KN_REQUIRE(a.out >= 0, op, ": out must be at least 0 (got ", a.out, ")");
  check_grouped_matrix(op, a.out, a.in, a.group_size);
  KN_REQUIRE(a.out == 0 || (a.w && a.weight_packed && a.weight_scale), op,
             ": w, weight_packed and weight_scale must not be null (got ", (const void*)a.w, ", ",
             (const void*)a.weight_packed, ", ", (const void*)a.weight_scale, ")");
}

inline void check_op(const Int8GemmArgs& a) {
  constexpr const char* op = "int8_gemm";
  check_gemm_dtype(op, "x", a.x_dtype);
  check_gemm_dtype(op, "y", a.y_dtype);
  check_grouped_matrix(op, a.out, a.in, a.group_size);
  checked_mul(op, a.tokens, checked_mul(op, a.in, 8));
  checked_mul(op, a.tokens, checked_mul(op, a.out, 8));
}

inline void check_op(const Bf16GemmArgs& a) {
  constexpr const char* op = "bf16_gemm";
  check_gemm_dtype(op, "x", a.x_dtype);
  check_gemm_dtype(op, "y", a.y_dtype);
  KN_REQUIRE(a.tokens >= 0 && a.heads >= 1 && a.out >= 1 && a.in >= 1, op,
             ": need tokens >= 0 and heads, out, in >= 1 (got tokens=", a.tokens,
             ", heads=", a.heads, ", out=", a.out, ", in=", a.in, ")");
  KN_REQUIRE(a.x_token_stride >= 0 && a.x_head_stride >= 0 && a.weight_head_stride >= 0 &&
                 a.y_token_stride >= 0 && a.y_head_stride >= 0,
             op, ": strides must not be negative (got x_token_stride=", a.x_token_stride,
             ", x_head_stride=", a.x_head_stride, ", weight_head_stride=", a.weight_head_stride,
             ", y_token_stride=", a.y_token_stride, ", y_head_stride=", a.y_head_stride, ")");
  // Each size stays 64 times below the limit, so sums and paddings of sizes fit too.
  checked_mul(op, checked_mul(op, std::max<int64_t>(a.tokens, 1), a.x_token_stride), 256);
  checked_mul(op, checked_mul(op, a.heads, a.x_head_stride), 256);
  checked_mul(op, checked_mul(op, a.heads, a.weight_head_stride), 128);
  checked_mul(op, checked_mul(op, a.out, a.in), 128);
  checked_mul(op, checked_mul(op, checked_mul(op, a.tokens, a.heads), a.out), 256);
  checked_mul(op, checked_mul(op, std::max<int64_t>(a.tokens, 1), a.y_token_stride), 256);
  checked_mul(op, checked_mul(op, a.heads, a.y_head_stride), 256);
  checked_mul(op, checked_mul(op, a.heads, a.in), 1 << 16);
}

template <typename Args>
void check_grouped_op(const char* op, const Args& a) {
  check_exact(op, a.compute);
  check_gemm_dtype(op, "x", a.x_dtype);
  check_gemm_dtype(op, "y", a.y_dtype);
  check_grouped_matrix(op, a.out, a.in, a.group_size);
  checked_mul(op, a.x_rows, checked_mul(op, a.in, 8));
  checked_mul(op, a.rows, checked_mul(op, a.out, 8));
  checked_mul(op, a.experts, 64);
}

inline void check_op(const Int4GroupedGemmArgs& a) { check_grouped_op("int4_grouped_gemm", a); }
inline void check_op(const Int4GroupedSwigluArgs& a) { check_grouped_op("int4_grouped_swiglu", a); }

inline void check_op(const MlaDecodeArgs& a) {
  constexpr const char* op = "mla_decode";
  check_gemm_dtype(op, "q", a.q_dtype);
  check_cache_dtype(op, a.cache_dtype);
  KN_REQUIRE(a.batch >= 0 && a.heads >= 1 && a.kv_lora_rank >= 1 && a.qk_rope_head_dim >= 0, op,
             ": need batch, qk_rope_head_dim >= 0 and heads, kv_lora_rank >= 1 (got batch=",
             a.batch, ", heads=", a.heads, ", kv_lora_rank=", a.kv_lora_rank,
             ", qk_rope_head_dim=", a.qk_rope_head_dim, ")");
  KN_REQUIRE(a.pages >= 0 && a.page_size >= 1 && a.max_pages >= 0, op,
             ": need pages, max_pages >= 0 and page_size >= 1 (got pages=", a.pages,
             ", max_pages=", a.max_pages, ", page_size=", a.page_size, ")");
  KN_REQUIRE(std::isfinite(a.softmax_scale), op, ": softmax_scale must be finite (got ",
             a.softmax_scale, ")");
  // Each size stays 64 times below the limit, so sums and paddings of sizes fit too.
  const int64_t width =
      checked_mul(op, a.kv_lora_rank, 64) / 64 + checked_mul(op, a.qk_rope_head_dim, 64) / 64;
  checked_mul(op, checked_mul(op, checked_mul(op, a.batch, a.heads), width), 256);
  checked_mul(op, checked_mul(op, checked_mul(op, a.pages, a.page_size), width), 256);
  checked_mul(op, checked_mul(op, a.batch, a.max_pages), 256);
  checked_mul(op, checked_mul(op, a.max_pages, a.page_size), 64);
}

}  // namespace kn
