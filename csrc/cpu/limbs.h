// What the INT4 and INT8 ops multiply with: activations as 16-bit block fixed point, and the tile
// of work that one kernel call does.
//
// Per token and group of 32 inputs: x[i] ~ step * v[i] with an integer |v| <= 32639 and a power of
// two `step` = 2^(e - 14), where 2^e <= max|x| < 2^(e + 1); one more bit is given up if the largest
// |v| would pass 32639, the limit of two signed bytes (v = 256 * high + low). Ties round to even.
//   Error: at most max|x| / 32639 of the group; none for a bf16 entry above 2^-7 of that maximum.
//   Groups with max|x| < 2^-112: step is 2^-126, so their absolute error stays below 2^-126.
//   A group with a NaN or an infinity: step is NaN, and so is every output of the token.
// With one limb (Compute::kInt8) v = x * (127 / m) rounded, ties to even, and step = m / 127 with m
// = max|x| of the group, at least 2^-100; all in fp32. |x - step * v| <= m / 254, and a few
// roundings.
//
// A weight q in [-8, 7] or [-127, 127] gives the exact integer d = sum of q * v over a group. Then
//   acc[g % 16] = fma(float(d), weight_scale * step, acc[g % 16])     groups g ascending
//   y           = sum of the 16: i + (i + 8) first, then quarters, pairs, the last two
// in fp32, in every tier and kernel variant: the bits depend on nothing but x and w.
#pragma once
#include <cstdint>

#include "kimi_native/layout.h"
#include "kimi_native/types.h"

namespace kn::cpu {

static constexpr int kChunkGroups = 4;  // 4 groups of INT4 weights are one 64-byte register
static constexpr int kChunkInputs = kChunkGroups * int(kGroupSize);
static constexpr int kChunkValueBytes = 2 * kChunkInputs;
static constexpr int kLimbLimit = 32639;  // 127 * 256 + 127
static constexpr float kByteLimit = 127.0f;
static constexpr float kSmallestByteMax = 0x1p-100f;  // 127 / it is finite

static constexpr int64_t num_chunks(int64_t in) { return (in + kChunkInputs - 1) / kChunkInputs; }

// A prepared token, 64-byte aligned: for each chunk 128 values v as two signed bytes or 16 bits, in
// an order that the tier chooses; then what a tile needs to know about each group. `offset` is
// -zero_point * sum(v) for weights stored as unsigned q + zero_point, 0 for signed ones. There are
// as many chunks as fill whole blocks of four; everything past `in` is zero. limbs_rows_kernel.h
// has the same in another order and as many bytes.
static constexpr int kBlockChunks = 4;  // 16 groups: one register of scales
static constexpr int kBlockGroups = kBlockChunks * kChunkGroups;
static constexpr int64_t padded_chunks(int64_t in) {
  return (num_chunks(in) + kBlockChunks - 1) / kBlockChunks * kBlockChunks;
}
static constexpr int64_t prepared_bytes(int64_t in) {
  return padded_chunks(in) * (kChunkValueBytes + kChunkGroups * 8);
}
struct PreparedToken {
  const uint8_t* values;
  const int32_t* offset;
  const float* step;
};
static inline PreparedToken prepared_token(const uint8_t* at, int64_t in) {
  const int32_t* offset = (const int32_t*)(at + padded_chunks(in) * kChunkValueBytes);
  return {at, offset, (const float*)(offset + padded_chunks(in) * kChunkGroups)};
}

// The two weight formats (layout.h), as tags that kernels are templates on. kLimbs: bytes of a
// value. kBlocksFrom: tokens a segment from which limbs_blocks_kernel.h is the faster.
struct Int4 {
  enum : int { kChunkBytes = kChunkInputs / 2, kLimbs = 2, kBlocksFrom = 24 };
};
struct Int8 {
  enum : int { kChunkBytes = kChunkInputs, kLimbs = 2, kBlocksFrom = 16 };
};
// INT4 weights with values of one signed byte (Compute::kInt8). The layout of a prepared token is
// that of Int4; what would be the high limbs is not written and not read.
struct Int4OneLimb : Int4 {
  enum : int { kLimbs = 1 };
};
static constexpr int64_t row_bytes(Int4, int64_t in) { return int4_row_bytes(in); }
static constexpr int64_t row_bytes(Int8, int64_t in) { return in; }

// Two panels of weight rows times some tokens. gemm: the second panel follows the first in the same
// matrix and in y. swiglu: panel 0 is gate, panel 1 up, and y = silu(gate) * up.
static constexpr int kPanelRows = 16;  // of a panel, done together
struct LimbTile {
  const uint8_t* weight[2];  // first row of each panel
  const bf16* scale[2];
  int64_t rows[2];         // [0]: at least 1; [1]: at most as many
  const uint8_t* x;        // prepared tokens, prepared_bytes(in) apart
  const int32_t* x_index;  // [tokens] which of them, or null: in order
  void* y;                 // first row and token of the tile
  int64_t y_stride;        // elements from token to token
  DType y_dtype;
  int64_t tokens, in;
  bool far_prefetch;  // as in CpuFeatures
  bool by_rows;       // by limbs_rows_kernel.h; x is prepared for it
};

}  // namespace kn::cpu
