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

struct alignas(64) TileConfig {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};

// Each thread configures its tiles before a task and releases them after it, so that the system
// has no tile state to save for a thread that waits. Tiles `first` .. `last` have `rows` rows, the
// others 16. (The intrinsic claims to read eight bytes only, hence volatile.)
KN_INLINE void open_tiles(int first = 0, int last = 7, int rows = 16) {
  volatile TileConfig config = {};
  config.palette = 1;
  for (int i = 0; i < 8; ++i) {
    config.row_bytes[i] = 64;
    config.rows[i] = uint8_t(i >= first && i <= last ? rows : 16);
  }
  _tile_loadconfig(const_cast<TileConfig*>(&config));
}
KN_INLINE void close_tiles() { _tile_release(); }

// The tile intrinsics do not tell the compiler that they read memory: stores that a tile load
// must see come before this.
KN_INLINE void before_tile_load() { __atomic_signal_fence(__ATOMIC_SEQ_CST); }

// 16 rows of 16 32-bit entries become columns.
KN_INLINE void transpose16(__m512i (&r)[16]) {
  __m512i t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {  // r[i + j]: entry j of each quarter, of rows i .. i + 3
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const __m512i lo0 = _mm512_shuffle_i32x4(r[j], r[4 + j], 0x44);
    const __m512i lo1 = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0x44);
    const __m512i hi0 = _mm512_shuffle_i32x4(r[j], r[4 + j], 0xee);
    const __m512i hi1 = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0xee);
    t[j] = _mm512_shuffle_i32x4(lo0, lo1, 0x88);
    t[4 + j] = _mm512_shuffle_i32x4(lo0, lo1, 0xdd);
    t[8 + j] = _mm512_shuffle_i32x4(hi0, hi1, 0x88);
    t[12 + j] = _mm512_shuffle_i32x4(hi0, hi1, 0xdd);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) r[i] = t[i];
}

}  // namespace kn::cpu::KN_ISA
