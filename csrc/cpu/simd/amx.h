// AMX on top of the AVX-512 tier: eight tiles of 16 rows of 64 bytes.
//
//   tdpbf16ps  C[16][16] fp32  += A[16][32] bf16 * B[16][16][2] bf16    B: pairs of the inner index
//   tdpbusd    C[16][16] int32 += A[16][64] u8   * B[16][16][4] s8      B: quadruples of it
//
// 16 cycles each; tdpbf16ps sums the even and the odd terms of the inner index in two chains of 16
// fused multiply-adds, adds the two and then C, each rounded to nearest even, subnormals as zero.
// An element of C depends on its row of A and column of B alone. Tile numbers are literals: the
// compiler's tile intrinsics are macros.
#pragma once
#include <immintrin.h>

#include <cstdint>

namespace kn::cpu::KN_ISA {

static constexpr int64_t kTileBytes = 1024;

struct alignas(64) TileConfig {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};

// Each thread configures its tiles before a task and releases them after it, so that the system
// has no tile state to save for a thread that waits. Sums in 0 to 3 (first and second rows, by two
// column tiles), A in 4 and 5, of rows0 and rows1 rows; B in 6 and 7, of `columns` 32-bit columns.
// (The intrinsic claims to read eight bytes of the table only, hence volatile.)
KN_INLINE void open_tiles(int rows0 = 16, int rows1 = 16, int columns = 16) {
  volatile TileConfig config = {};
  config.palette = 1;
  for (int i = 0; i < 8; ++i) {
    const bool second = i == 2 || i == 3 || i == 5;
    config.row_bytes[i] = uint16_t(i == 4 || i == 5 ? 64 : columns * 4);
    config.rows[i] = uint8_t(i >= 6 ? 16 : second ? rows1 : rows0);
  }
  _tile_loadconfig(const_cast<TileConfig*>(&config));
}
KN_INLINE void close_tiles() { _tile_release(); }

// The tile intrinsics do not tell the compiler that they read memory: stores that a tile load
// must see come before this.
KN_INLINE void before_tile_load() { __atomic_signal_fence(__ATOMIC_SEQ_CST); }

}  // namespace kn::cpu::KN_ISA
