// int4_pack: a warp makes one tile of 16 x 64 weights and its scales (layout.h). Bytes: the matrix
// in and out, once in a model's life.
#include "core/op_checks.h"
#include "cuda/device.cuh"

namespace kn::cuda {
namespace {

constexpr int kThreads = 128;

// Four neighbouring nibbles of a row, one in each byte; 0 past the matrix.
__device__ __forceinline__ uint32_t four_nibbles(const Int4PackArgs& a, int64_t row,
                                                 int64_t column) {
  if (row >= a.out || column >= a.in) return 0;
  const uint8_t* p = a.weight_packed + row * int4_row_bytes(a.in) + column / 2;
  const uint32_t v = uint32_t(p[0]) | uint32_t(p[1]) << 8;
  return (v & 0xf) | (v & 0xf0) << 4 | (v & 0xf00) << 8 | (v & 0xf000) << 12;
}

__device__ __forceinline__ uint32_t scale_bits(const Int4PackArgs& a, int64_t row, int64_t group) {
  if (row >= a.out || group >= num_groups(a.in)) return 0;
  return a.weight_scale[row * num_groups(a.in) + group].bits;
}

__global__ void __launch_bounds__(kThreads) int4_pack_kernel(Int4PackArgs a, int64_t tiles) {
  const int64_t tile = int64_t(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  if (tile >= tiles) return;
  const int lane = int(threadIdx.x) % 32, g = lane / 4, t = lane % 4;
  const int64_t row = tile / column_tiles(a.in) * kTileRows;
  const int64_t column = tile % column_tiles(a.in) * kTileColumns;
  uint32_t words[4];
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    const int64_t c = column + 16 * w + 4 * t;
    words[w] = four_nibbles(a, row + g, c) | four_nibbles(a, row + g + 8, c) << 4;
  }
  reinterpret_cast<uint4*>(a.tiles)[tile * 32 + lane] =
      make_uint4(words[0], words[1], words[2], words[3]);
  if (lane >= 16) return;
  const int64_t scale_row = row + lane / 2, group = column / kGroupSize + lane % 2;
  reinterpret_cast<uint32_t*>(a.tile_scales)[tile * 16 + lane] =
      scale_bits(a, scale_row, group) | scale_bits(a, scale_row + 8, group) << 16;
}

}  // namespace

void int4_pack(const Int4PackArgs& a, void* stream) {
  constexpr const char* op = "int4_pack";
  check_grouped_matrix(op, a.out, a.in, a.group_size);
  KN_REQUIRE(uintptr_t(a.tiles) % 16 == 0 && uintptr_t(a.tile_scales) % 16 == 0, op,
             ": tiles and tile_scales must be 16-byte aligned (got ", (const void*)a.tiles, ", ",
             (const void*)a.tile_scales, ")");
  const int64_t tiles = row_tiles(a.out) * column_tiles(a.in);
  if (tiles == 0) return;
  launch(
      {op, grid_of(op, (tiles + kThreads / 32 - 1) / (kThreads / 32)), dim3(kThreads), 0, stream},
      int4_pack_kernel, a, tiles);
}

}  // namespace kn::cuda
