// AMX on top of the AVX-512 tier: eight tiles of 16 rows of 64 bytes.
//
//   tdpbf16ps  C[16][16] fp32  += A[16][32] bf16 * B[16][16][2] bf16    B: pairs of the inner index
//   tdpbusd    C[16][16] int32 += A[16][64] u8   * B[16][16][4] s8      B: quadruples of it
//
// 16 cycles each. An element of C depends on its row of A and column of B alone. tdpbf16ps adds up
// the products of the even and of the odd inner indices by multiply-add, 16 each in ascending order
// from zero, then both sums, then C; it rounds to nearest even and takes subnormals for zero. Tile
// numbers are literals: the compiler's tile intrinsics are macros.
#pragma once
#include <immintrin.h>

#include <cstdint>

namespace kn::cpu::KN_ISA {

struct alignas(64) TileConfig {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};

// Each thread configures its tiles before a task and releases them after it, so that the system
// has no tile state to save for a thread that waits.
KN_INLINE void open_tiles() {
  TileConfig config = {};
  config.palette = 1;
  for (int i = 0; i < 8; ++i) config.row_bytes[i] = 64, config.rows[i] = 16;
  _tile_loadconfig(&config);
}
KN_INLINE void close_tiles() { _tile_release(); }

// The tile intrinsics do not tell the compiler that they read memory: stores that a tile load
// must see come before this.
KN_INLINE void before_tile_load() { __atomic_signal_fence(__ATOMIC_SEQ_CST); }

}  // namespace kn::cpu::KN_ISA
