// INT4 products on matrix tiles (tier amx), for more than a few tokens: what the doors prepare and
// what a kernel call does. The sums have the bits of limbs.h.
//
// x[i] = step * v[i] as in limbs.h. A tile holds bf16, and the numbers of a token become
//   x_dtype bf16   step * v, which is a bf16 again: v has no more bits than x
//   x_dtype fp32   two of them, 256 * step * high and step * low
//   kInt8          v
// Every product with a weight is then a multiple of step, a group's sum below 2^24 of it, so the
// tile's fp32 sums are exact in any order.
//   acc[g % 16] = fma(sum, weight_scale, acc[g % 16])
// has the bits of limbs.h unless weight_scale * step, of eight bits, has some below 2^-149: then
// weight_scale is below 2^-62, or the group below 2^-66. Blocks of tokens with a group below that,
// or above 2^119, whose sums could pass the largest float, hold v instead, and then
//   acc[g % 16] = fma(sum, weight_scale * step, acc[g % 16])     (kInt8: always)
#pragma once
#include "cpu/limbs.h"

namespace kn::cpu {

static constexpr int kBlockTokens = 16;  // rows of a tile
static constexpr int kClasses = 16;      // groups g with the same g % 16 share a partial sum
static constexpr float kTilesLargest = 0x1p119f, kTilesSmallest = 0x1p-66f;

// Groups of a class come after each other: [class][g / 16].
static constexpr int64_t class_groups(int64_t groups, int64_t c) { return (groups - c + 15) / 16; }
static constexpr int64_t class_start(int64_t groups, int64_t c) {
  return c * (groups / 16) + (c < groups % 16 ? c : groups % 16);
}

// A block of up to 16 prepared tokens, 64-byte aligned: a header, [group][limb][token][32 columns]
// bf16, [group][token] steps. Blocks of a segment follow each other.
struct TokenBlock {
  const char* values;
  const float* steps;
  bool by_step;
};
static constexpr int64_t block_limbs(DType x_dtype, Compute compute) {
  return x_dtype == DType::kFp32 && compute == Compute::kExact ? 2 : 1;
}
static constexpr int64_t block_token_bytes(int64_t in, int64_t limbs) {
  return 64 + num_groups(in) * limbs * 64 + (num_groups(in) * 4 + 63) / 64 * 64;
}
static inline TokenBlock token_block(const void* at, int64_t tokens, int64_t in, int64_t limbs) {
  const char* values = (const char*)at + 64;
  return {values, (const float*)(values + num_groups(in) * limbs * tokens * 64),
          *(const int32_t*)at != 0};
}

struct Int4TilesPrepare {
  const void* x;
  const int32_t* x_index;  // [tokens] rows of x, or null: in order
  DType x_dtype;
  int64_t tokens, in;
  void* out;
};

struct Int4Tile : LimbTile {  // x: blocks of prepared tokens; x_index is not used
  int64_t limbs;
  char* scratch;  // int4_tiles_scratch_bytes(in), 64-byte aligned
};

static constexpr int64_t kTileTokens = 64;  // most tokens of a tile
// Groups of a class that are decoded and multiplied at once if there is one block of tokens: L1.
static constexpr int64_t kSpanGroups = 5;
static constexpr int64_t int4_tiles_scratch_bytes(int64_t in) {
  return 2 * class_groups(num_groups(in), 0) * 1024 + 2 * num_groups(in) * 64 +
         kClasses * kTileTokens * 2 * 64 + 4096;
}

struct Int4TilesKernels {
  void (*prepare)(const Int4TilesPrepare&);
  void (*prepare_one_limb)(const Int4TilesPrepare&);
  void (*gemm)(const Int4Tile&);
  void (*swiglu)(const Int4Tile&);
};

}  // namespace kn::cpu
