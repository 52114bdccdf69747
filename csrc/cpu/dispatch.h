// The table of inner loops, one instance per instruction-set tier. Each entry does one tile on one
// thread: no checks, no allocation, no threads. The op's .cpp has done all of that once.
#pragma once
#include <cstdint>

#include "cpu/limbs.h"
#include "kimi_native/layout.h"
#include "kimi_native/types.h"

namespace kn::cpu {

struct Kernels {
  // rms_norm_kernel.h: one row.
  void (*rms_norm_row)(const void* x, const bf16* weight, void* y, DType dtype, int64_t hidden,
                       float eps);

  // limbs_kernel.h: one token of `in` inputs to prepared_bytes(in) bytes, for weights of a format;
  // and one tile of an op.
  void (*int4_prepare)(const void* x, DType dtype, int64_t in, void* out);
  void (*int8_prepare)(const void* x, DType dtype, int64_t in, void* out);
  void (*int4_gemm_tile)(const LimbTile&);
  void (*int4_swiglu_tile)(const LimbTile&);
  void (*int8_gemm_tile)(const LimbTile&);
};

// The active tier's table (runtime.h: force_isa, KIMI_NATIVE_CPU_ISA, else the best this machine
// supports).
const Kernels& kernels();

}  // namespace kn::cpu
