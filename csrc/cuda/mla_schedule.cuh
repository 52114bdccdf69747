// The schedule of mla_decode: where it lies and how large it is.
#pragma once
#include <algorithm>

#include "core/op_checks.h"
#include "cuda/device.cuh"
#include "kimi_native/ops.h"

namespace kn::cuda {

constexpr int kSplitTokens = 512;

// The splits of all sequences, in order.
struct Schedule {
  int32_t* first;  // [batch + 1]: sequence b has splits first[b] .. first[b + 1]
  int2* splits;    // sequence, first token
};

// Splits that there is room for: max_splits, or those of any lengths.
inline int64_t split_capacity(const char* op, int64_t batch, int64_t max_tokens,
                              int64_t max_splits) {
  KN_REQUIRE(max_splits >= 0, op, ": max_splits must be >= 0 (got ", max_splits, ")");
  KN_REQUIRE(max_tokens <= 0x7fffffff - kSplitTokens, op,
             ": max_pages * page_size must be below 2^31 - 512 on a GPU (got ", max_tokens, ")");
  const int64_t all = checked_mul(op, batch, (max_tokens + kSplitTokens - 1) / kSplitTokens);
  return std::min<int64_t>(max_splits > 0 ? std::min(all, max_splits) : all, 0x7fffffff);
}

inline int64_t first_bytes(int64_t batch) { return ((batch + 1) * 4 + 15) / 16 * 16; }

inline int64_t schedule_bytes(const char* op, int64_t batch, int64_t capacity) {
  return first_bytes(batch) + (checked_mul(op, capacity, sizeof(int2)) + 15) / 16 * 16;
}

inline Schedule schedule_at(void* p, int64_t batch) {
  auto* at = static_cast<uint8_t*>(p);
  return {reinterpret_cast<int32_t*>(at), reinterpret_cast<int2*>(at + first_bytes(batch))};
}

}  // namespace kn::cuda
