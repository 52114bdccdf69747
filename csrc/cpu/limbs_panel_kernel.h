// The tile of limbs_kernel.h for many tokens, AVX-512: a block of weights is decoded once into
// cache, transposed so that a register holds 4 inputs of 16 rows, and used by every token.
//
//   block  = 2 panels x 16 rows x 512 inputs: 32 KB of bytes (one per weight) + 2 KB of scales
//   step   = 4 inputs x 32 rows x 4 tokens: 2 weight loads, 8 broadcasts, 16 vpdpbusd; lane = row
//   acc    [tokens][group % 4][32 rows] in cache between blocks, 512 B a token
//
// No horizontal sums, so VNNI is the only bottleneck: 16 of 22 vector instructions are vpdpbusd.
// The integers are exact and the fma order is that of limbs.h: same bits as the few-token kernel.
#pragma once
#include "cpu/limbs_kernel.h"

namespace kn::cpu::KN_ISA {

#if KN_TIER < 2

static constexpr int64_t kPanelMinTokens = INT64_MAX;  // two registers of madd gain nothing
template <typename Format, typename Finish>
static void panel_tile(const LimbTile& tile) {
  quad_tile<Format, Finish>(tile);
}

#else

// From here on decoding a block pays: it costs about as much as the dots of one or two tokens.
static constexpr int64_t kPanelMinTokens = 8;
static constexpr int kPanelTokens = 64;  // their sums are 32 KB
static constexpr int kBlockGroups = kBlockChunks * kChunkGroups;
static constexpr int kGroupSteps = 8;  // 4-input steps of a group, those of `first` first

struct alignas(64) PanelBlock {
  uint8_t weight[kBlockGroups][kGroupSteps][kPanelRows][4];
  float scale[kBlockGroups][kPanelRows];
};

// r[i] lane j becomes r[j] lane i.
KN_INLINE void transpose(__m512i r[16]) {
  __m512i t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  // r[4 b + k]: 128-bit lane m holds dword 4 m + k of rows 4 b .. 4 b + 3.
#pragma GCC unroll 4
  for (int k = 0; k < 4; ++k) {
    const __m512i even01 = _mm512_shuffle_i32x4(r[k], r[4 + k], 0x88);
    const __m512i odd01 = _mm512_shuffle_i32x4(r[k], r[4 + k], 0xdd);
    const __m512i even23 = _mm512_shuffle_i32x4(r[8 + k], r[12 + k], 0x88);
    const __m512i odd23 = _mm512_shuffle_i32x4(r[8 + k], r[12 + k], 0xdd);
    t[k] = _mm512_shuffle_i32x4(even01, even23, 0x88);
    t[8 + k] = _mm512_shuffle_i32x4(even01, even23, 0xdd);
    t[4 + k] = _mm512_shuffle_i32x4(odd01, odd23, 0x88);
    t[12 + k] = _mm512_shuffle_i32x4(odd01, odd23, 0xdd);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) r[i] = t[i];
}

// One chunk of 16 rows to out[group][step][row].
KN_INLINE void decode_panel(Int4, const uint8_t* const row[kPanelRows],
                            uint8_t (*out)[kGroupSteps][kPanelRows][4]) {
  const __m512i low = _mm512_set1_epi8(15);
  __m512i r[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_si512(row[i]);
  transpose(r);
#pragma GCC unroll 16
  for (int j = 0; j < 16; ++j) {
    _mm512_store_si512(out[j / 4][j % 4], _mm512_and_si512(r[j], low));
    _mm512_store_si512(out[j / 4][4 + j % 4], _mm512_and_si512(_mm512_srli_epi16(r[j], 4), low));
  }
}
KN_INLINE void decode_panel(Int8 format, const uint8_t* const row[kPanelRows],
                            uint8_t (*out)[kGroupSteps][kPanelRows][4]) {
  for (int half = 0; half < 2; ++half) {
    __m512i r[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) {
      __m512i first, second;
      decode(format, row[i], first, second);
      r[i] = half ? second : first;
    }
    transpose(r);
#pragma GCC unroll 16
    for (int j = 0; j < 16; ++j) _mm512_store_si512(out[j / 4][4 * half + j % 4], r[j]);
  }
}

// Scales of up to 16 groups of 16 rows to out[group][row]; groups past the end are zero.
KN_INLINE void transpose_scales(const bf16* const row[kPanelRows], int groups,
                                float (*out)[kPanelRows]) {
  __m512i r[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) r[i] = _mm512_castps_si512(load(row[i], groups).v);
  transpose(r);
#pragma GCC unroll 16
  for (int g = 0; g < 16; ++g) _mm512_store_si512(out[g], r[g]);
}

// Inputs of one panel from chunk `start` on, `chunks` <= 4 of them. Rows past the end repeat row 0.
template <typename Format>
static void decode_block(const LimbTile& tile, int p, int64_t start, int chunks,
                         PanelBlock& block) {
  const int64_t bytes = row_bytes(Format{}, tile.in), groups = num_groups(tile.in);
  const uint8_t* row[kPanelRows];
  const bf16* scale[kPanelRows];
  for (int r = 0; r < kPanelRows; ++r) {
    const int64_t at = r < tile.rows[p] ? r : 0;
    row[r] = tile.weight[p] + at * bytes + start * Format::kChunkBytes;
    scale[r] = tile.scale[p] + at * groups + start * kChunkGroups;
  }
  const int64_t groups_left = groups - start * kChunkGroups;
  transpose_scales(scale, int(groups_left < kBlockGroups ? groups_left : kBlockGroups),
                   block.scale);
  uint8_t padded[kPanelRows][Format::kChunkBytes];
  for (int c = 0; c < chunks; ++c) {
    const int64_t left = bytes - (start + c) * Format::kChunkBytes;
    if (left < Format::kChunkBytes) {
      std::memset(padded, 0, sizeof padded);
      for (int r = 0; r < kPanelRows; ++r) {
        std::memcpy(padded[r], row[r], left);
        row[r] = padded[r];
      }
    }
    decode_panel(Format{}, row, block.weight + c * kChunkGroups);
    for (int r = 0; r < kPanelRows; ++r) {
      row[r] += Format::kChunkBytes;
      // The next block of this row, 4 chunks on, arrives while this one is multiplied.
      for (int b = 0; b < Format::kChunkBytes; b += 64)
        __builtin_prefetch(row[r] + (kBlockChunks - 1) * Format::kChunkBytes + b);
    }
  }
}

KN_INLINE __m512i broadcast_dword(const uint8_t* p) {
  int32_t dword;
  std::memcpy(&dword, p, sizeof dword);
  return _mm512_set1_epi32(dword);
}

// A block times T tokens: x and params point at the block's first chunk, acc is [T][4][32].
template <int T>
static void panel_sums(const PanelBlock block[2], const uint8_t* const x[T],
                       const GroupParams* const params[T], int chunks, float* acc) {
  for (int group = 0; group < chunks * kChunkGroups; ++group) {
    const int c = group / kChunkGroups, g = group % kChunkGroups;
    __m512i high[2][T], low[2][T];
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) {
      high[0][t] = high[1][t] = _mm512_setzero_si512();
      low[0][t] = low[1][t] = _mm512_set1_epi32(params[t][c].offset[g]);
    }
#pragma GCC unroll 8
    for (int k = 0; k < kGroupSteps; ++k) {
      const __m512i w0 = _mm512_load_si512(block[0].weight[group][k]);
      const __m512i w1 = _mm512_load_si512(block[1].weight[group][k]);
      const int64_t at = c * kChunkValueBytes + k / 4 * 64 + g * 16 + k % 4 * 4;
#pragma GCC unroll 4
      for (int t = 0; t < T; ++t) {
        const __m512i h = broadcast_dword(x[t] + at), l = broadcast_dword(x[t] + at + 128);
        high[0][t] = _mm512_dpbusd_epi32(high[0][t], w0, h);
        high[1][t] = _mm512_dpbusd_epi32(high[1][t], w1, h);
        low[0][t] = _mm512_dpbusd_epi32(low[0][t], w0, l);
        low[1][t] = _mm512_dpbusd_epi32(low[1][t], w1, l);
      }
    }
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t)
#pragma GCC unroll 2
      for (int p = 0; p < 2; ++p) {
        float* at = acc + (t * kChunkGroups + g) * kTileRows + p * kPanelRows;
        const __m512i d = _mm512_add_epi32(_mm512_slli_epi32(high[p][t], 8), low[p][t]);
        const f32x16 scale = mul(load(block[p].scale[group]), splat(params[t][c].step[g]));
        store(at, fma(to_f32({d}), scale, load(at)));
      }
  }
}

// One block times up to 64 tokens, 4 at a time.
static void panel_block_sums(const LimbTile& tile, const PanelBlock block[2], int64_t start,
                             int chunks, int64_t first, int tokens, float* acc) {
  const int64_t params_at = num_chunks(tile.in) * kChunkValueBytes;
  for (int t = 0; t < tokens; t += kQuadTokens) {
    const int n = tokens - t < kQuadTokens ? tokens - t : kQuadTokens;
    const uint8_t* x[kQuadTokens];
    const GroupParams* params[kQuadTokens];
    for (int i = 0; i < n; ++i) {
      const uint8_t* token = token_values(tile, first + t + i);
      x[i] = token + start * kChunkValueBytes;
      params[i] = (const GroupParams*)(token + params_at) + start;
    }
    float* at = acc + t * kChunkGroups * kTileRows;
    switch (n) {
      case 1:
        panel_sums<1>(block, x, params, chunks, at);
        break;
      case 2:
        panel_sums<2>(block, x, params, chunks, at);
        break;
      case 3:
        panel_sums<3>(block, x, params, chunks, at);
        break;
      default:
        panel_sums<4>(block, x, params, chunks, at);
        break;
    }
  }
}

template <typename Format, typename Finish>
static void panel_tile(const LimbTile& tile) {
  PanelBlock block[2];
  alignas(64) float acc[kPanelTokens][kChunkGroups][kTileRows];
  const int64_t chunks = num_chunks(tile.in);
  for (int64_t first = 0; first < tile.tokens; first += kPanelTokens) {
    const int64_t left = tile.tokens - first;
    const int tokens = int(left < kPanelTokens ? left : kPanelTokens);
    std::memset(acc, 0, tokens * sizeof acc[0]);
    for (int64_t start = 0; start < chunks; start += kBlockChunks) {
      const int n = int(chunks - start < kBlockChunks ? chunks - start : kBlockChunks);
      for (int p = 0; p < 2; ++p) decode_block<Format>(tile, p, start, n, block[p]);
      panel_block_sums(tile, block, start, n, first, tokens, acc[0][0]);
    }
    for (int t = 0; t < tokens; ++t) {
      const float* a = acc[t][0];
      f32x16 sum[2];
      for (int p = 0; p < 2; ++p, a += kPanelRows)
        sum[p] = add(add(load(a), load(a + 2 * kTileRows)),
                     add(load(a + kTileRows), load(a + 3 * kTileRows)));
      finish(Finish{}, tile, first + t, sum[0], sum[1]);
    }
  }
}

#endif

template <typename Format, typename Finish>
static void limb_tile(const LimbTile& tile) {
  if (tile.tokens >= kPanelMinTokens)
    panel_tile<Format, Finish>(tile);
  else
    quad_tile<Format, Finish>(tile);
}

}  // namespace kn::cpu::KN_ISA
