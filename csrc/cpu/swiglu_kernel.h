// swiglu, a run of elements: silu(gate) * up = gate / (1 + exp(-gate)) * up. Bytes: two inputs and
// one output; about 20 FLOPs an element, most of them in exp. The same arithmetic in every lane,
// whole vector or tail, so that an element's result depends on nothing but its inputs.
#pragma once
#include "cpu/exp_kernel.h"

namespace kn::cpu::KN_ISA {

KN_INLINE f32x16 silu_mul(f32x16 gate, f32x16 up) {
  const f32x16 denominator = add(splat(1.0f), exp_f32(mul(gate, splat(-1.0f))));
  return mul(div(gate, denominator), up);
}

template <typename T>
static void swiglu_typed(const T* gate, const T* up, T* y, int64_t n) {
  const int64_t whole = n / 16 * 16;
  for (int64_t i = 0; i < whole; i += 16) store(y + i, silu_mul(load(gate + i), load(up + i)));
  if (const int rest = int(n - whole))
    store(y + whole, silu_mul(load(gate + whole, rest), load(up + whole, rest)), rest);
}

static void swiglu_run(const void* gate, const void* up, void* y, DType dtype, int64_t n) {
  if (dtype == DType::kBf16)
    swiglu_typed((const bf16*)gate, (const bf16*)up, (bf16*)y, n);
  else
    swiglu_typed((const float*)gate, (const float*)up, (float*)y, n);
}

}  // namespace kn::cpu::KN_ISA
