// Byte layouts of quantized weights, as index arithmetic. Everything here is `static constexpr`, so
// that translation units compiled for different instruction sets never share a weak symbol.
//
// INT4, the layout of the published checkpoints (compressed-tensors "pack-quantized"), read in
// place:
//
//   weight_packed  [out, in / 2] bytes  byte b of a row holds column 2b in its low nibble, 2b + 1
//   in its high one;
//                                       a nibble u stands for q = u - 8, q in [-8, 7]
//   weight_scale   [out, in / 32] bf16  w[o, i] = q[o, i] * weight_scale[o, i / 32]
//
// INT8 (ours, made while loading): the same with one signed byte per weight.
#pragma once
#include <cstdint>

namespace kn {

static constexpr int64_t kGroupSize = 32;  // weights that share one scale, along `in`
static constexpr int kInt4ZeroPoint = 8;   // nibble = q + 8

static constexpr int64_t int4_row_bytes(int64_t in) { return in / 2; }
static constexpr int64_t num_groups(int64_t in) { return in / kGroupSize; }

// INT4 for a GPU, made on the device by int4_pack: tiles of 16 rows x 64 columns, row tile by row
// tile, 512 bytes each, in the order in which a warp's lanes hold them for mma m16n8k32.
// Lane l has 16 bytes, four words; with g = l / 4, t = l % 4 and j = 0, 1 for the two groups:
//   word 2j      byte i: low nibble row g, high nibble row g + 8, column 32j + 4t + i
//   word 2j + 1  the same, 16 columns on
// Scales follow the same tiles, 64 bytes each: word 2g + j is (row g, group j), (row g + 8, group
// j). Rows and columns past the matrix are zero.
static constexpr int64_t kTileRows = 16;
static constexpr int64_t kTileColumns = 64;
static constexpr int64_t kTileBytes = 512;
static constexpr int64_t kTileScaleBytes = 64;

static constexpr int64_t row_tiles(int64_t out) { return (out + kTileRows - 1) / kTileRows; }
static constexpr int64_t column_tiles(int64_t in) { return (in + kTileColumns - 1) / kTileColumns; }
static constexpr int64_t int4_tiled_bytes(int64_t out, int64_t in) {
  return row_tiles(out) * column_tiles(in) * kTileBytes;
}
static constexpr int64_t int4_tiled_scale_bytes(int64_t out, int64_t in) {
  return row_tiles(out) * column_tiles(in) * kTileScaleBytes;
}

}  // namespace kn
