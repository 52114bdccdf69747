// The torch-free C++ API: one Args struct and one function per op and device.
//
// Shapes are in words and row-major. Activations, weights, scales, caches and outputs (void*,
// bf16*, uint8_t*) may be unaligned; int32_t* and float* are aligned to 4 bytes. An op checks every
// size relation once, throws std::invalid_argument("op: what must hold (got ...)"), allocates
// nothing, and takes scratch from the caller: `<op>_workspace_bytes` says how much, 64-byte
// aligned. Zero tokens or rows is valid and does nothing.
//
// Fixed reduction order: an output row depends on its own inputs only, to the last bit. Neither the
// number of rows in the call, nor the thread count, nor which kernel variant a row count selects
// may change it.
#pragma once
#include <cstdint>

#include "kimi_native/types.h"

namespace kn {

// Router scores to expert choice. Selection uses score + correction_bias, the weights never see the
// bias. Ties go to the lowest index. A row with a NaN logit gets NaN weights (and valid ids).
struct MoeRouteArgs {
  const float* logits;           // [tokens, experts]
  const float* correction_bias;  // [experts] or null
  int32_t* topk_ids;             // [tokens, topk], best first
  float* topk_weights;           // [tokens, topk]
  int64_t tokens, experts, topk;
  int64_t n_group, topk_group;  // 1, 1: no group limit
  Scoring scoring;
  GroupScore group_score;
  bool norm_topk_prob;
  float routed_scaling_factor;
};

// Expert choice to rows sorted by expert: stable (token order within an expert), no atomics.
struct MoeDispatchArgs {
  const int32_t* topk_ids;  // [tokens, topk], each in [0, experts)
  int32_t* token_index;     // [tokens * topk]  row -> token
  int32_t* row_index;       // [tokens, topk]   (token, slot) -> row
  int32_t* expert_offsets;  // [experts + 1]    rows of expert e: expert_offsets[e] ..
                            // expert_offsets[e + 1]
  int64_t tokens, topk, experts;
};

// Weighted sum of a token's expert rows, slot 0 first, in fp32, plus the shared expert, rounded
// once.
struct MoeCombineArgs {
  const void* rows;           // [tokens * topk, hidden]
  const int32_t* row_index;   // [tokens, topk]
  const float* topk_weights;  // [tokens, topk]
  const void* shared;         // [tokens, hidden] of out_dtype, or null
  void* out;                  // [tokens, hidden]
  DType rows_dtype, out_dtype;
  int64_t tokens, topk, hidden;
};

// y = x * Wt with INT4 weights in the checkpoint layout (layout.h).
struct Int4GemmArgs {
  const void* x;                 // [tokens, in]
  const uint8_t* weight_packed;  // [out, in / 2]
  const bf16* weight_scale;      // [out, in / 32]
  void* y;                       // [tokens, out]
  DType x_dtype, y_dtype;
  int64_t tokens, out, in;
  int32_t group_size;  // 32
  Compute compute;
  void* workspace;
  int64_t workspace_bytes;
};

// The same for rows grouped by expert; one pointer per expert, experts without rows are never
// touched.
struct Int4GroupedGemmArgs {
  const void* x;                        // [x_rows, in]
  const int32_t* x_index;               // [rows] in [0, x_rows), or null: row r reads x[r]
  const int32_t* expert_offsets;        // [experts + 1], ascending from 0 to rows
  const uint8_t* const* weight_packed;  // [experts] -> [out, in / 2]
  const bf16* const* weight_scale;      // [experts] -> [out, in / 32]
  void* y;                              // [rows, out]
  DType x_dtype, y_dtype;
  int64_t x_rows, rows, experts, out, in;
  int32_t group_size;
  Compute compute;
  void* workspace;
  int64_t workspace_bytes;
};

// y = silu(x * Wgate_t) * (x * Wup_t) per expert, both halves in one pass over x; products and silu
// in fp32.
struct Int4GroupedSwigluArgs {
  const void* x;                      // [x_rows, in]
  const int32_t* x_index;             // [rows] or null
  const int32_t* expert_offsets;      // [experts + 1]
  const uint8_t* const* gate_packed;  // [experts] -> [out, in / 2]
  const bf16* const* gate_scale;      // [experts] -> [out, in / 32]
  const uint8_t* const* up_packed;
  const bf16* const* up_scale;
  void* y;  // [rows, out]
  DType x_dtype, y_dtype;
  int64_t x_rows, rows, experts, out, in;
  int32_t group_size;
  Compute compute;
  void* workspace;
  int64_t workspace_bytes;
};

// y = x * Wt with BF16 weights, optionally one matrix per head: y[t, h] = x[t, h] * W[h]t. Products
// and sums in fp32.
struct Bf16GemmArgs {
  const void* x;       // [tokens, heads, in], strides in elements
  const bf16* weight;  // [heads, out, in], rows of `in` contiguous
  void* y;             // [tokens, heads, out], rows contiguous, strides in elements
  DType x_dtype, y_dtype;
  int64_t tokens, heads, out, in;
  int64_t x_token_stride, x_head_stride, weight_head_stride;
  int64_t y_token_stride, y_head_stride;
  void* workspace;
  int64_t workspace_bytes;
};

// y = x * Wt with signed 8-bit weights and one bf16 scale per 32.
struct Int8GemmArgs {
  const void* x;             // [tokens, in]
  const int8_t* weight;      // [out, in], values in [-127, 127]
  const bf16* weight_scale;  // [out, in / 32]
  void* y;                   // [tokens, out]
  DType x_dtype, y_dtype;
  int64_t tokens, out, in;
  int32_t group_size;
  void* workspace;
  int64_t workspace_bytes;
};

// A bf16 matrix to INT4 in the checkpoint layout: per group of 32, scale = bf16(max|w| / 7), at
// least 2^-126, and q = w / scale (in fp32) to the nearest integer, halves to even; -7 .. 7. Throws
// std::invalid_argument, after writing, if a weight is NaN or infinite.
struct Int4QuantizeArgs {
  const bf16* w;           // [out, in]
  uint8_t* weight_packed;  // [out, in / 2]
  bf16* weight_scale;      // [out, in / 32]
  int64_t out, in;
  int32_t group_size;  // 32
};

// Attention of one new token per sequence over the paged latent cache (absorbed MLA). The key is
// the whole cache row, the value its first kv_lora_rank entries. seq_lens counts the tokens to
// attend to; 0 gives a zero row. Rows of the cache: cache_layout.h.
struct MlaDecodeArgs {
  const void* q;              // [batch, heads, kv_lora_rank + qk_rope_head_dim]
  const void* cache;          // [pages, page_size] rows of kv_lora_rank + qk_rope_head_dim values
  const int32_t* page_table;  // [batch, max_pages]; entries past the last used page are never read
  const int32_t* seq_lens;    // [batch]
  void* out;                  // [batch, heads, kv_lora_rank], of q_dtype
  DType q_dtype, cache_dtype;
  int64_t batch, heads, kv_lora_rank, qk_rope_head_dim;
  int64_t pages, page_size, max_pages;
  float softmax_scale;
  const void* splits;  // on a GPU: of mla_schedule, or null: they are made for this call
  int64_t max_splits;  // on a GPU: see MlaScheduleArgs
  void* workspace;
  int64_t workspace_bytes;
};

// y = round(x / sqrt(mean(x^2) + eps)) * weight, the cast to the activation dtype before the weight
// as published.
struct RmsNormArgs {
  const void* x;       // [tokens, hidden], x_token_stride elements from row to row
  const bf16* weight;  // [hidden]
  void* y;             // [tokens, hidden] contiguous
  DType dtype;         // of x and y
  int64_t tokens, hidden, x_token_stride;
  float eps;
};

// The residual stream's step: sum = round(x + residual), then rms_norm of sum. `sum` may be
// `residual` itself.
struct AddRmsNormArgs {
  const void* x;         // [tokens, hidden]
  const void* residual;  // [tokens, hidden]
  const bf16* weight;    // [hidden]
  void* y;               // [tokens, hidden]
  void* sum;             // [tokens, hidden]
  DType dtype;           // of all but the weight
  int64_t tokens, hidden;
  float eps;
};

// Rotary embedding of queries and of the shared key, and the append to the latent cache. Pairs
// (2j, 2j + 1) turn by (cos, sin)[j]: fp32, rounded once to the activation dtype.
//   q_out = rotate(q);  cache[slots[t]] = latent[t], rotate(k_rope[t])
// Rows of the cache: cache_layout.h.
struct RopeAppendArgs {
  const void* q;         // [tokens, heads, rope], strides in elements
  const void* latent;    // [tokens, kv_lora_rank]
  const void* k_rope;    // [tokens, rope]
  const float* cos;      // [tokens, rope / 2]
  const float* sin;      // [tokens, rope / 2]
  const int64_t* slots;  // [tokens], distinct, in [0, cache_rows)
  void* q_out;           // [tokens, heads, rope], strides in elements; may be q itself
  void* cache;           // [cache_rows] rows of kv_lora_rank + rope values
  DType dtype, q_out_dtype, cache_dtype;
  int64_t tokens, heads, kv_lora_rank, qk_rope_head_dim, cache_rows;
  int64_t q_token_stride, q_head_stride, q_out_token_stride, q_out_head_stride;
  int64_t latent_token_stride, k_rope_token_stride;
};

// y = silu(gate) * up, elementwise, in fp32 and rounded once.
struct SwigluArgs {
  const void* gate;  // [tokens, width]
  const void* up;    // [tokens, width]
  void* y;           // [tokens, width]
  DType dtype;       // of all three
  int64_t tokens, width;
};

namespace cpu {

void moe_route(const MoeRouteArgs&);
void moe_dispatch(const MoeDispatchArgs&);
void moe_combine(const MoeCombineArgs&);

int64_t int4_gemm_workspace_bytes(const Int4GemmArgs&);
void int4_gemm(const Int4GemmArgs&);
int64_t int4_grouped_gemm_workspace_bytes(const Int4GroupedGemmArgs&);
void int4_grouped_gemm(const Int4GroupedGemmArgs&);
int64_t int4_grouped_swiglu_workspace_bytes(const Int4GroupedSwigluArgs&);
void int4_grouped_swiglu(const Int4GroupedSwigluArgs&);

int64_t bf16_gemm_workspace_bytes(const Bf16GemmArgs&);
void bf16_gemm(const Bf16GemmArgs&);
int64_t int8_gemm_workspace_bytes(const Int8GemmArgs&);
void int8_gemm(const Int8GemmArgs&);
void int4_quantize(const Int4QuantizeArgs&);

int64_t mla_decode_workspace_bytes(const MlaDecodeArgs&);
void mla_decode(const MlaDecodeArgs&);

void rms_norm(const RmsNormArgs&);
void add_rms_norm(const AddRmsNormArgs&);
void rope_append(const RopeAppendArgs&);
void swiglu(const SwigluArgs&);

}  // namespace cpu

// The same ops on a GPU (sm_80 and up), in a library of its own that is opened at first use. Every
// pointer is a device pointer, `stream` a cudaStream_t. A call checks sizes, enqueues kernels and
// returns: nothing is allocated and nothing waits for the device, so it can be captured in a CUDA
// graph. Throws std::invalid_argument on sizes, std::runtime_error if the launch fails. An index
// out of range in a device buffer ends the kernel with an error that this or a later call reports.
// What kernels there are, and so the bytes of a workspace, depends on the current device.
namespace cuda {

// From the checkpoint's INT4 layout to tiles (layout.h), once, while loading.
struct Int4PackArgs {
  const uint8_t* weight_packed;  // [out, in / 2]
  const bf16* weight_scale;      // [out, in / 32]
  uint8_t* tiles;                // int4_tiled_bytes(out, in), 16-byte aligned
  uint8_t* tile_scales;          // int4_tiled_scale_bytes(out, in), 16-byte aligned
  int64_t out, in;
  int32_t group_size;  // 32
};
void int4_pack(const Int4PackArgs&, void* stream);

// Weights and scales are tiles and tile_scales of int4_pack; arrays of pointers are on the device
// too.
int64_t int4_gemm_workspace_bytes(const Int4GemmArgs&);
void int4_gemm(const Int4GemmArgs&, void* stream);
int64_t int4_grouped_gemm_workspace_bytes(const Int4GroupedGemmArgs&);
void int4_grouped_gemm(const Int4GroupedGemmArgs&, void* stream);
int64_t int4_grouped_swiglu_workspace_bytes(const Int4GroupedSwigluArgs&);
void int4_grouped_swiglu(const Int4GroupedSwigluArgs&, void* stream);

// weight and the rows of a bf16 x 16-byte aligned, `in` and weight_head_stride multiples of 8.
int64_t bf16_gemm_workspace_bytes(const Bf16GemmArgs&);
void bf16_gemm(const Bf16GemmArgs&, void* stream);

// weight 16-byte aligned.
int64_t int8_gemm_workspace_bytes(const Int8GemmArgs&);
void int8_gemm(const Int8GemmArgs&, void* stream);

// The splits of the sequences that mla_decode attends to one by one: they depend on seq_lens alone,
// so one schedule serves all layers of a step. The workspace, 16-byte aligned, gets it.
struct MlaScheduleArgs {
  const int32_t* seq_lens;  // [batch], 0 .. max_tokens
  int64_t batch;
  int64_t max_tokens;  // max_pages * page_size
  int64_t max_splits;  // that there is room for, of 512 tokens each; 0: of any seq_lens
  void* workspace;
  int64_t workspace_bytes;
};
int64_t mla_schedule_workspace_bytes(const MlaScheduleArgs&);
void mla_schedule(const MlaScheduleArgs&, void* stream);

// kv_lora_rank 512 and qk_rope_head_dim 64, bf16 with a cache in bf16 or fp8, pages of a multiple
// of 32 tokens; q, cache and out 16-byte aligned. Splits given must be of the same seq_lens, batch,
// max_pages * page_size and max_splits.
int64_t mla_decode_workspace_bytes(const MlaDecodeArgs&);
void mla_decode(const MlaDecodeArgs&, void* stream);

// One id from each row of logits, as sampling.sample chooses it. Of what is allowed: the lowest of
// equal maxima at temperature 0; else min_p, top_k (0: off) and top_p leave a set of ids, and the
// first whose running sum of weights exceeds uniform * (their sum) is chosen. Ties go to the lowest
// id. -1 for a row with a logit that is not finite, or with nothing allowed.
struct SampleArgs {
  const float* logits;     // [rows, vocab]
  const uint8_t* allowed;  // [rows, ceil(vocab / 8)] bits, id i in bit i % 8 of byte i / 8, or null
  const double* options;   // [rows, 4] temperature, top_p, min_p, uniform in [0, 1)
  const int32_t* top_k;    // [rows]
  int32_t* ids;            // [rows]
  int64_t rows, vocab;     // vocab up to 2^22
  void* workspace;
  int64_t workspace_bytes;
};
int64_t sample_workspace_bytes(const SampleArgs&);
void sample(const SampleArgs&, void* stream);

void moe_route(const MoeRouteArgs&, void* stream);
void moe_dispatch(const MoeDispatchArgs&, void* stream);
void moe_combine(const MoeCombineArgs&, void* stream);

void rms_norm(const RmsNormArgs&, void* stream);
void add_rms_norm(const AddRmsNormArgs&, void* stream);
void rope_append(const RopeAppendArgs&, void* stream);  // an fp8 cache 4-byte aligned
void swiglu(const SwigluArgs&, void* stream);

}  // namespace cuda
}  // namespace kn
