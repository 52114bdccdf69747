// The avx512_bf16 tier is the avx512 one but for this, compiled with AVX512-BF16: bf16_gemm
// of bf16 activations, mla_decode of a bf16 cache. As in kernels.cpp, nothing may leave a weak
// symbol.
#include "cpu/dispatch.h"

#define KN_INLINE static inline __attribute__((always_inline))
#define KN_TIER 2
#define KN_BF16_DOTS

#include "cpu/simd/avx512.h"
//
#include "cpu/simd/bf16_limbs.h"
//
#include "cpu/bf16_gemm_kernel.h"
#include "cpu/mla_decode_dots_kernel.h"

namespace kn::cpu::KN_ISA {

extern const DotKernels table;
const DotKernels table = {
    .bf16_gemm = kBf16Gemm,
    .mla_decode_bf16 = kMlaDecodeDots,
};

}  // namespace kn::cpu::KN_ISA
