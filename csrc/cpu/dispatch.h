// The table of inner loops, one instance per instruction-set tier. Each entry does one tile on one
// thread: no checks, no allocation, no threads. The op's .cpp has done all of that once.
#pragma once
#include <cstdint>

#include "kimi_native/layout.h"
#include "kimi_native/types.h"

namespace kn::cpu {

// One task of bf16_gemm: tokens x rows of one head.
struct Bf16GemmTile {
  const void* x;           // first token of the block
  const bf16* weight;      // first row of the block, rows of `in` contiguous
  const bf16* weight_end;  // of the head's matrix: nothing is prefetched past it
  void* y;                 // first output of the block
  int64_t x_token_stride, y_token_stride;
  DType x_dtype, y_dtype;
  int64_t tokens, rows, in;
  float* packed;  // scratch: tokens * (in rounded up to 16)
  float* sums;    // scratch: tokens * 16
};

struct Kernels {
  // rms_norm_kernel.h: one row.
  void (*rms_norm_row)(const void* x, const bf16* weight, void* y, DType dtype, int64_t hidden,
                       float eps);
  // swiglu_kernel.h: a run of elements.
  void (*swiglu_run)(const void* gate, const void* up, void* y, DType dtype, int64_t n);
  // moe_combine_kernel.h: one token; row_index and weights are its own topk entries.
  void (*moe_combine_row)(const void* rows, DType rows_dtype, const int32_t* row_index,
                          const float* weights, int64_t topk, const void* shared, void* out,
                          DType out_dtype, int64_t hidden);

  // dot_kernel.h: the number of packed vectors (tokens, heads) that share a register tile.
  int dot_vectors;
  // bf16_gemm_kernel.h
  void (*bf16_gemm_tile)(const Bf16GemmTile&);
};

// The active tier's table (runtime.h: force_isa, KIMI_NATIVE_CPU_ISA, else the best this machine
// supports).
const Kernels& kernels();

}  // namespace kn::cpu
