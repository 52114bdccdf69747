// Byte layout of a row of the latent cache: one token of one layer. Everything here is `static
// constexpr`, as in layout.h.
//
// bf16 and fp32: kv_lora_rank latent values, then qk_rope_head_dim values of the rotated key.
// fp8 (656 bytes at 512 + 64, against 1152 in bf16; at that shape, FlashMLA's rows):
//
//   latent  kv_lora_rank e4m3 bytes, then zeros up to a multiple of 4 bytes
//   scales  one fp32 for each kFp8Group latent values, the last group may be shorter
//   key     qk_rope_head_dim bf16, then zeros up to a multiple of 4 bytes
//
// value = e4m3 * scale. rope_append writes the smallest power of two with max|group| <= 448 *
// scale, at least 2^-110: e4m3 rounds relatively, so this costs no precision against max / 448 but
// at the small end, and value is exact in fp32 and in bf16, on every device. A group with NaN,
// infinity or a magnitude above 1.75 * 2^127 has the scale NaN and the bytes 0x7f. Readers take any
// scale whose 256-fold is finite, and rely on the scale for NaN: no other group may hold 0x7f or
// 0xff.
#pragma once
#include <cstdint>

#include "kimi_native/types.h"

namespace kn {

static constexpr int64_t kFp8Group = 128;  // latent values that share a scale

static constexpr int64_t round_up4(int64_t bytes) { return (bytes + 3) / 4 * 4; }
static constexpr int64_t fp8_scale_offset(int64_t kv_lora_rank) { return round_up4(kv_lora_rank); }
static constexpr int64_t fp8_rope_offset(int64_t kv_lora_rank) {
  return fp8_scale_offset(kv_lora_rank) + (kv_lora_rank + kFp8Group - 1) / kFp8Group * 4;
}
static constexpr int64_t fp8_row_bytes(int64_t kv_lora_rank, int64_t qk_rope_head_dim) {
  return round_up4(fp8_rope_offset(kv_lora_rank) + qk_rope_head_dim * 2);
}
static constexpr int64_t cache_row_bytes(DType dtype, int64_t kv_lora_rank,
                                         int64_t qk_rope_head_dim) {
  if (dtype == DType::kFp8) return fp8_row_bytes(kv_lora_rank, qk_rope_head_dim);
  return (kv_lora_rank + qk_rope_head_dim) * dtype_bytes(dtype);
}

// The bits of a group's scale; `largest` has those of its largest |x| (a NaN's are above all).
static constexpr uint32_t fp8_scale_bits(uint32_t largest) {
  if (largest > 0x7f600000) return 0x7fc00000;           // 1.75 * 2^127; NaN
  const uint32_t exponent = (largest + 0x1fffff) >> 23;  // one more if above 1.75 * 2^e
  return (exponent < 17 + 8 ? 17 : exponent - 8) << 23;  // 448 = 1.75 * 2^8; 2^-110
}
// The bits of 1 / scale: a power of two's exponent mirrored; NaN stays NaN.
static constexpr uint32_t fp8_inverse_bits(uint32_t scale) {
  return scale == 0x7fc00000 ? scale : 0x7f000000 - scale;
}

// x, at most 448 in magnitude, to e4m3: nearest, ties to even. NaN becomes 0x7f.
static constexpr uint8_t e4m3_of(float x) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, x);
  const uint32_t sign = bits >> 24 & 0x80, magnitude = bits & 0x7fffffff;
  const uint32_t normal = (magnitude + 0x7ffff + (magnitude >> 20 & 1)) >> 20;  // bias 127, not 7
  // Below 2^-6 values are multiples of 2^-9, the step of floats at 2^14.
  const float shifted = __builtin_bit_cast(float, magnitude) + 16384.0f;
  const uint32_t small = __builtin_bit_cast(uint32_t, shifted) - 0x46800000;
  const uint32_t rounded = magnitude < 0x3c800000 ? small : normal - (120 << 3);
  return uint8_t(magnitude > 0x7f800000 ? 0x7f : sign | rounded);
}

}  // namespace kn
