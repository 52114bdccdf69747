// Scalar types and the few enums that cross the seam between callers and kernels.
#pragma once
#include <cstdint>

namespace kn {

// A bfloat16 by its bits: the upper half of an IEEE float. Arithmetic happens in fp32, inside
// kernels.
struct bf16 {
  uint16_t bits;
};

// Element type of an activation or cache buffer. The values are part of the Python seam (ops.py).
// kFp8 is of caches alone: rows of e4m3 latents, their scales and a bf16 key (cache_layout.h).
enum class DType : int32_t { kBf16 = 0, kFp32 = 1, kFp8 = 2 };

// Of an element; not of kFp8, whose rows have elements of several sizes.
constexpr int64_t dtype_bytes(DType t) { return t == DType::kBf16 ? 2 : 4; }

// What activations become before they meet INT4 weights: 16-bit fixed point, exact to rounding
// error, or 8 bits, half the dot products and not exact.
enum class Compute : int32_t { kExact = 0, kInt8 = 1 };

// How router logits become scores (kimi-k2: sigmoid; DeepSeek-V2: softmax).
enum class Scoring : int32_t { kSigmoid = 0, kSoftmax = 1 };

// How a group of experts is scored in group-limited routing (V3: sum of its two best; V2: its
// best).
enum class GroupScore : int32_t { kTop2Sum = 0, kMax = 1 };

}  // namespace kn
