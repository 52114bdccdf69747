// What feeds bf16 tiles (amx.h): limbs (bf16_limbs.h) and 16 by 16 blocks of pairs, transposed.
#pragma once
#include <immintrin.h>

#include <cstdint>

#include "cpu/simd/bf16_limbs.h"

namespace kn::cpu::KN_ISA {

static constexpr int64_t kTileBytes = 1024;  // 16 rows of 64 bytes

}  // namespace kn::cpu::KN_ISA
