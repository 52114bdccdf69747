// Random rows of the latent cache, in bf16 and in fp8, and their values.
#pragma once
#include <cmath>
#include <cstring>

#include "kimi_native/cache_layout.h"
#include "values.h"

namespace kn::bench {

inline constexpr int64_t kLatent = 512, kRope = 64, kWidth = kLatent + kRope;

inline int64_t row_bytes(DType cache) { return cache_row_bytes(cache, kLatent, kRope); }

// A row with values in [-1, 1]; an fp8 one with scales of 1.
inline void fill_row(DType cache, uint8_t* row, Random& random) {
  const int64_t latents = cache == DType::kFp8 ? kLatent : 0;
  for (int64_t i = 0; i < latents; ++i) row[i] = e4m3_of(random.sign());
  const float one = 1.0f;
  for (int64_t i = 0; i < latents; i += kFp8Group)
    std::memcpy(row + fp8_scale_offset(kLatent) + i / kFp8Group * 4, &one, 4);
  uint8_t* key = latents ? row + fp8_rope_offset(kLatent) : row;
  for (int64_t i = latents; i < kWidth; ++i, key += 2) {
    const bf16 value = to_bf16(random.sign());
    std::memcpy(key, &value, 2);
  }
}

inline double value_of(DType cache, const uint8_t* row, int64_t i) {
  if (cache == DType::kFp8 && i < kLatent) {
    const int exponent = row[i] >> 3 & 15, fraction = row[i] & 7;
    const double value = std::ldexp(fraction + (exponent ? 8 : 0), (exponent ? exponent : 1) - 10);
    return row[i] & 0x80 ? -value : value;
  }
  bf16 value;
  const int64_t at = cache == DType::kFp8 ? fp8_rope_offset(kLatent) + 2 * (i - kLatent) : 2 * i;
  std::memcpy(&value, row + at, 2);
  return to_float(value);
}

}  // namespace kn::bench
