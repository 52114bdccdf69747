// Compiled once per instruction-set tier, with KN_ISA naming the tier and the matching compiler
// flags. Exports one symbol, `table`. Nothing here or in the headers below may leave a weak symbol
// (no std containers, no templates or inline functions that are not static): the linker could hand
// this tier's copy to an older processor.
#include "cpu/dispatch.h"

#define KN_CONCAT_(a, b) a##b
#define KN_CONCAT(a, b) KN_CONCAT_(a, b)
#define KN_INLINE static inline __attribute__((always_inline))

#define KN_ISA_generic 0
#define KN_ISA_avx2 1
#define KN_ISA_avx512 2
#define KN_ISA_amx 3  // the avx512 tier with matrix tiles where they win
#define KN_TIER KN_CONCAT(KN_ISA_, KN_ISA)

#if KN_TIER >= 2
#include "cpu/simd/avx512.h"
#include "cpu/simd/limbs_avx512.h"
#if KN_TIER == 3
#include "cpu/simd/amx.h"
#include "cpu/simd/bf16_limbs.h"
#endif
#elif KN_TIER == 1
#include "cpu/simd/avx2.h"
#include "cpu/simd/limbs_avx2.h"
#else
#include "cpu/simd/generic.h"
#include "cpu/simd/limbs_generic.h"
#endif

#if KN_TIER == 3
#include "cpu/bf16_gemm_amx_kernel.h"
#else
#include "cpu/bf16_gemm_kernel.h"
#endif
#include "cpu/int4_gemm_kernel.h"
#include "cpu/int4_grouped_swiglu_kernel.h"
#include "cpu/int4_quantize_kernel.h"
#include "cpu/int8_gemm_kernel.h"
#if KN_TIER == 3
#include "cpu/mla_decode_amx_kernel.h"
#endif
#include "cpu/mla_decode_kernel.h"
#include "cpu/moe_combine_kernel.h"
#include "cpu/rms_norm_kernel.h"
#include "cpu/rope_append_kernel.h"
#include "cpu/swiglu_kernel.h"
#if KN_TIER == 3
#include "cpu/int4_tiles_kernel.h"
#endif

namespace kn::cpu::KN_ISA {

extern const Kernels table;
const Kernels table = {
    .rms_norm_row = rms_norm_row,
    .add_row = add_row,
    .rope_append_token = rope_append_token,
    .swiglu_run = swiglu_run,
    .moe_combine_row = moe_combine_row,
    .bf16_gemm = kBf16Gemm,
    .mla_decode = kMlaDecode,
#if KN_TIER == 3
    .mla_decode_bf16 = kMlaDecodeAmx,
#else
    .mla_decode_bf16 = kMlaDecode,
#endif
    .mla_decode_combine = mla_decode_combine,
    .int4_prepare = int4_prepare,
    .int8_prepare = int8_prepare,
    .int4_gemm_tile = int4_gemm_tile,
    .int4_swiglu_tile = int4_swiglu_tile,
    .int8_gemm_tile = int8_gemm_tile,
    .int4_prepare_one_limb = int4_prepare_one_limb,
    .int4_gemm_tile_one_limb = int4_gemm_tile_one_limb,
    .int4_swiglu_tile_one_limb = int4_swiglu_tile_one_limb,
#if KN_TIER == 3
    .int4_tiles = kInt4Tiles,
#else
    .int4_tiles = {},
#endif
    .int4_quantize_run = int4_quantize_run,
};

}  // namespace kn::cpu::KN_ISA
