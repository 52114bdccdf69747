// The table of inner loops, one instance per instruction-set tier. Each entry does one tile on one
// thread: no checks, no allocation, no threads. The op's .cpp has done all of that once.
#pragma once
#include <cstdint>

#include "cpu/int4_tiles.h"
#include "cpu/limbs.h"
#include "kimi_native/cache_layout.h"
#include "kimi_native/layout.h"
#include "kimi_native/types.h"

namespace kn::cpu {

// One group of tokens of bf16_gemm, to be packed into the order its tiles read:
// packed_bytes in all.
struct Bf16GemmPack {
  const void* x;
  int64_t x_token_stride;
  DType x_dtype;
  int64_t tokens, group, in;  // a last group may have fewer tokens than the others
  void* packed;
};

// One task of bf16_gemm: tokens x rows of one head.
struct Bf16GemmTile {
  const void* packed;  // groups of `group` tokens, the last one may be smaller, each `group_bytes`
  const bf16* weight;  // first row of the block, rows of `in` contiguous
  const bf16* weight_end;  // of the head's matrix: nothing is read past it
  const bf16* next;        // first row of the task after this one, as many rows; or null
  void* y;                 // first output of the block
  int64_t y_token_stride;
  DType x_dtype, y_dtype;
  int64_t tokens, group, group_bytes, rows, in;
  float* scratch;  // Bf16GemmKernels::scratch_bytes
};

// bf16_gemm_kernel.h, bf16_gemm_amx_kernel.h
struct Bf16GemmKernels {
  int64_t (*group)(int64_t tokens, int64_t in, DType x_dtype);  // tokens packed side by side
  int64_t task_groups;  // most groups of a task, and bytes of them when packed
  int64_t task_bytes;
  int64_t task_weight_bytes;
  int64_t (*packed_bytes)(int64_t tokens, int64_t in, DType x_dtype);
  int64_t (*scratch_bytes)(int64_t rows, int64_t in, int64_t groups);  // of a task
  void (*pack)(const Bf16GemmPack&);
  void (*tile)(const Bf16GemmTile&);
};

// One task of mla_decode: a block of heads of one sequence over one chunk of its tokens. The result
// is unnormalized: out = sum of exp(score - max) * value, sum = sum of exp(score - max).
static constexpr int kMlaChunkTokens = 512;  // the longest chunk
struct MlaDecodeChunk {
  const void* q;  // first head of the block
  const void* cache;
  const int32_t* page_table;  // of this sequence
  DType q_dtype, cache_dtype;
  int64_t heads, latent, width;  // width: latent + rope
  int64_t row_bytes, page_size, begin, end;
  float softmax_scale;
  void* scratch;  // MlaDecodeKernels::scratch_bytes, 64-byte aligned
  float* out;     // [heads, latent rounded up to 16]
  float* max;     // [heads]
  float* sum;     // [heads]
};

// mla_decode_kernel.h, mla_decode_amx_kernel.h, mla_decode_dots_kernel.h
struct MlaDecodeKernels {
  int64_t (*scratch_bytes)(int64_t heads, int64_t latent, int64_t width);
  void (*chunk)(const MlaDecodeChunk&);
};

// The last step of mla_decode for one row of the result: its chunks, `chunk_stride` floats apart.
struct MlaDecodeRow {
  float* out;
  const float* max;
  const float* sum;
  int64_t chunk_stride, chunks, latent;
  void* to;
  DType dtype;
};

// One token of rope_append: its own row of everything.
struct RopeAppendToken {
  const void *q, *latent, *k_rope;
  const float *cos, *sin;
  void* q_out;
  void* row;  // of the cache
  DType dtype, q_out_dtype, cache_dtype;
  int64_t heads, latent_width, rope, q_head_stride, q_out_head_stride;
};

struct Kernels {
  // rms_norm_kernel.h: one row.
  void (*rms_norm_row)(const void* x, const bf16* weight, void* y, DType dtype, int64_t hidden,
                       float eps);
  void (*add_row)(const void* x, const void* residual, void* sum, DType dtype, int64_t hidden);
  // rope_append_kernel.h
  void (*rope_append_token)(const RopeAppendToken&);
  // swiglu_kernel.h: a run of elements.
  void (*swiglu_run)(const void* gate, const void* up, void* y, DType dtype, int64_t n);
  // moe_combine_kernel.h: one token; row_index and weights are its own topk entries.
  void (*moe_combine_row)(const void* rows, DType rows_dtype, const int32_t* row_index,
                          const float* weights, int64_t topk, const void* shared, void* out,
                          DType out_dtype, int64_t hidden);

  Bf16GemmKernels bf16_gemm;
  MlaDecodeKernels mla_decode, mla_decode_bf16;  // by the dtype of the cache
  void (*mla_decode_combine)(const MlaDecodeRow&);

  // limbs_kernel.h: one token of `in` inputs to prepared_bytes(in) bytes, for weights of a format
  // and tiles with that by_rows; and one tile of an op.
  void (*int4_prepare)(const void* x, DType dtype, int64_t in, void* out, bool by_rows);
  void (*int8_prepare)(const void* x, DType dtype, int64_t in, void* out, bool by_rows);
  void (*int4_gemm_tile)(const LimbTile&);
  void (*int4_swiglu_tile)(const LimbTile&);
  void (*int8_gemm_tile)(const LimbTile&);
  // The same for Compute::kInt8.
  void (*int4_prepare_one_limb)(const void* x, DType dtype, int64_t in, void* out, bool by_rows);
  void (*int4_gemm_tile_one_limb)(const LimbTile&);
  void (*int4_swiglu_tile_one_limb)(const LimbTile&);
  // int4_tiles_kernel.h: the same ops by matrix tiles; null where there are none.
  Int4TilesKernels int4_tiles;
  // int4_quantize_kernel.h
  int64_t (*int4_quantize_run)(const bf16* w, uint8_t* packed, bf16* scale, int64_t groups);
};

// bf16_dots.cpp: what the avx512_bf16 tier has in place of the avx512 tier's.
struct DotKernels {
  Bf16GemmKernels bf16_gemm;
  MlaDecodeKernels mla_decode_bf16;
};

// The active tier's table (runtime.h: force_isa, KIMI_NATIVE_CPU_ISA, else the best this machine
// supports).
const Kernels& kernels();

}  // namespace kn::cpu
