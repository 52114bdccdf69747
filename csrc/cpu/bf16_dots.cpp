// bf16_gemm of bf16 activations by dot instructions: the avx512 tier's tiles again, compiled with
// AVX512-BF16. As in kernels.cpp, nothing may leave a weak symbol.
#include "cpu/dispatch.h"

#define KN_INLINE static inline __attribute__((always_inline))
#define KN_TIER 2
#define KN_BF16_DOTS

#include "cpu/simd/avx512.h"
//
#include "cpu/bf16_gemm_kernel.h"

namespace kn::cpu::KN_ISA {

extern const Bf16GemmKernels table;
const Bf16GemmKernels table = kBf16Gemm;

}  // namespace kn::cpu::KN_ISA
