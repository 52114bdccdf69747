// The table of inner loops, one instance per instruction-set tier. Each entry does one tile on one
// thread: no checks, no allocation, no threads. The op's .cpp has done all of that once.
#pragma once
#include <cstdint>

#include "kimi_native/layout.h"
#include "kimi_native/types.h"

namespace kn::cpu {

struct Kernels {
  // rms_norm_kernel.h: one row.
  void (*rms_norm_row)(const void* x, const bf16* weight, void* y, DType dtype, int64_t hidden,
                       float eps);
  // moe_combine_kernel.h: one token; row_index and weights are its own topk entries.
  void (*moe_combine_row)(const void* rows, DType rows_dtype, const int32_t* row_index,
                          const float* weights, int64_t topk, const void* shared, void* out,
                          DType out_dtype, int64_t hidden);
};

// The active tier's table (runtime.h: force_isa, KIMI_NATIVE_CPU_ISA, else the best this machine
// supports).
const Kernels& kernels();

}  // namespace kn::cpu
