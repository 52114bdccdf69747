// The loops of limbs_kernel.h for many tokens, AVX-512: a lane is a row, 16 rows of each panel at a
// time. The 16 partial sums of a row (limbs.h) are taken one after the other, so that the sums of
// 4 tokens stay in registers over the groups of a piece of columns that go into one of them.
//
//   piece     16 chunks, 64 groups: 4 for each of the 16 partial sums
//   weights   16 groups of a piece are decoded to L1, once for all tokens: {first, second} x dword
//             of 16 rows each
//   x         4 bytes of a token are broadcast to 16 rows by the load ports
//   one step  of 2 panels, 4 tokens and a group: 128 vpdpbusd, 40 other vector instructions
//
// Loops: pieces > quarters (chunks of equal number mod 4) > 4 tokens > the 4 groups of a chunk, a
// partial sum each > the quarter's chunks.
#pragma once

namespace kn::cpu::KN_ISA {

static constexpr int kPieceChunks = 16, kPieceGroups = kPieceChunks * kChunkGroups;
static constexpr int kQuarterChunks = kPieceChunks / kBlockChunks;
static constexpr int kStepTokens = 4;

// The sums of a token: [g % 16][panel][row].
struct alignas(64) RowSums {
  float of[kBlockGroups][2][16];
};

// The prepared tokens of a tile, and how far behind the values their offsets and steps are.
struct BlockTokens {
  const uint8_t* at[kTileTokens];
  int64_t offset_at, step_at;
};

// Decoded weights of a quarter and the scales of a piece.
struct alignas(64) DecodedRows {
  uint8_t weight[kQuarterChunks][kChunkGroups][8][2][64];  // dword {first, second} x 4, panel, row
  float scale[kPieceGroups][2][16];
};

// 16 rows of each panel; rows that do not exist repeat the first.
struct BlockRows {
  const uint8_t* weight[2][kPanelRows];
  const bf16* scale[2][kPanelRows];
};

// The weights of the rows after these, to be read into L2 while tokens are multiplied: `lines` are
// left of each panel, `per_step` at a time.
struct RowsAhead {
  const uint8_t* weight[2];
  int64_t lines, per_step;
};

KN_INLINE void prefetch_rows(RowsAhead& ahead) {
  for (int64_t i = 0; i < ahead.per_step && ahead.lines > 0; ++i, --ahead.lines)
#pragma GCC unroll 2
    for (int p = 0; p < 2; ++p) {
      __builtin_prefetch(ahead.weight[p], 0, 2);
      ahead.weight[p] += 64;
    }
}

// 16 bytes at `at` of 16 rows: lane r of out[k] is dword k of row r.
KN_INLINE void load_row_dwords(const uint8_t* const rows[kPanelRows], int64_t at, __m512i out[4]) {
  __m512i in[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const void* const p[4] = {rows[i] + at, rows[4 + i] + at, rows[8 + i] + at, rows[12 + i] + at};
    in[i] = gather_lanes(p);
  }
  transpose_dwords(in, out);
}

// One group of 16 rows to to[half * 4 + k][panel][row].
KN_INLINE void decode_group(Int4, const uint8_t* const rows[kPanelRows], int64_t group, int p,
                            uint8_t (*to)[2][64]) {
  const __m512i nibble = _mm512_set1_epi8(15);
  __m512i dword[4];
  load_row_dwords(rows, group * 16, dword);
#pragma GCC unroll 4
  for (int k = 0; k < 4; ++k) {
    _mm512_store_si512(to[k][p], _mm512_and_si512(dword[k], nibble));
    _mm512_store_si512(to[4 + k][p], _mm512_and_si512(_mm512_srli_epi16(dword[k], 4), nibble));
  }
}
KN_INLINE void decode_group(Int8, const uint8_t* const rows[kPanelRows], int64_t group, int p,
                            uint8_t (*to)[2][64]) {
  const __m512i flip = _mm512_set1_epi8(-128);  // signed q to unsigned q + 128
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    __m512i dword[4];
    load_row_dwords(rows, group * 32 + i * 16, dword);
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k)
      _mm512_store_si512(to[k % 2 * 4 + i * 2 + k / 2][p], _mm512_xor_si512(dword[k], flip));
  }
}

// Scales begin .. begin + n - 1 of 16 rows, n <= 64, as floats to to[..][p]. Those `ahead` of them
// are fetched into L2.
static void load_scales(const bf16* const rows[kPanelRows], int64_t begin, int64_t n, int64_t ahead,
                        int p, float (*to)[2][16]) {
  for (int64_t g = 0; g < n; g += 32) {
    const int64_t left = n - g;
    const __mmask32 there = left >= 32 ? 0xffffffff : __mmask32((1u << left) - 1);
    __m512i pairs[16];
#pragma GCC unroll 16
    for (int r = 0; r < 16; ++r) {
      pairs[r] = _mm512_maskz_loadu_epi16(there, rows[r] + begin + g);
      __builtin_prefetch(rows[r] + begin + g + ahead, 0, 2);
    }
    transpose16(pairs);
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) {
      _mm512_store_ps(to[g + 2 * i][p], even_places(pairs[i]).v);
      _mm512_store_ps(to[g + 2 * i + 1][p], odd_places(pairs[i]).v);
    }
  }
}

// One group of both panels times T tokens, whose values, offset and step are at x[t] + `at`,
// offset_at, step_at.
template <int kLimbs, int T>
KN_INLINE void group_step(const uint8_t (*weight)[2][64], const float (*scale)[16],
                          const uint8_t* const* x, int64_t at, int64_t offset_at, int64_t step_at,
                          __m512 (&sum)[T][2]) {
  const auto splat_dword = [](const uint8_t* p) {
    int32_t dword;
    std::memcpy(&dword, p, 4);
    return _mm512_set1_epi32(dword);
  };
  __m512i high[T][2], low[T][2];
#pragma GCC unroll 4
  for (int t = 0; t < T; ++t)
#pragma GCC unroll 2
    for (int p = 0; p < 2; ++p) {
      high[t][p] = _mm512_setzero_si512();
      low[t][p] = splat_dword(x[t] + offset_at);
    }
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    const __m512i w0 = _mm512_load_si512(weight[i][0]), w1 = _mm512_load_si512(weight[i][1]);
    const int64_t value = at + i / 4 * 128 + i % 4 * 16;
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) {
      const __m512i l = splat_dword(x[t] + value);
      low[t][0] = _mm512_dpbusd_epi32(low[t][0], w0, l);
      low[t][1] = _mm512_dpbusd_epi32(low[t][1], w1, l);
      if constexpr (kLimbs == 2) {
        const __m512i h = splat_dword(x[t] + value + 64);
        high[t][0] = _mm512_dpbusd_epi32(high[t][0], w0, h);
        high[t][1] = _mm512_dpbusd_epi32(high[t][1], w1, h);
      }
    }
  }
#pragma GCC unroll 4
  for (int t = 0; t < T; ++t) {
    const __m512 step = _mm512_castsi512_ps(splat_dword(x[t] + step_at));
#pragma GCC unroll 2
    for (int p = 0; p < 2; ++p) {
      __m512i d = low[t][p];
      if constexpr (kLimbs == 2) d = _mm512_add_epi32(_mm512_slli_epi32(high[t][p], 8), d);
      sum[t][p] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(d),
                                  _mm512_mul_ps(_mm512_load_ps(scale[p]), step), sum[t][p]);
    }
  }
}

// What a quarter's groups are multiplied with: tokens now, and those that come next, from the chunk
// `next_chunk` on, which one limb has to have fetched to L1.
struct StepTokens {
  const uint8_t *now[kStepTokens], *next[kStepTokens];
  int64_t next_chunk;
};

// The quarter of a piece that starts with `chunk`, times T tokens; `left`: groups from there on.
template <typename Format, int T>
static void quarter_tokens(const DecodedRows& rows, int64_t chunk, int64_t left,
                           const BlockTokens& x, const StepTokens& tokens, RowsAhead& ahead,
                           RowSums* sums) {
  const int64_t quarter = chunk % kBlockChunks * kChunkGroups;
  for (int g = 0; g < kChunkGroups; ++g) {
    __m512 sum[T][2];
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t)
#pragma GCC unroll 2
      for (int p = 0; p < 2; ++p)
        sum[t][p] =
            chunk < kPieceChunks ? _mm512_setzero_ps() : _mm512_load_ps(sums[t].of[quarter + g][p]);
    for (int j = 0; j < kQuarterChunks && j * kBlockGroups + g < left; ++j) {
      const int64_t c = chunk + j * kBlockChunks, c_next = tokens.next_chunk + j * kBlockChunks;
      // Of four lines of a chunk's values, one limb reads every second; all four a processor
      // fetches better by itself.
      if (Format::kLimbs == 1 && g < 2)
#pragma GCC unroll 4
        for (int t = 0; t < kStepTokens; ++t)
          __builtin_prefetch(tokens.next[t] + c_next * kChunkValueBytes + g * 128);
      prefetch_rows(ahead);
      group_step<Format::kLimbs, T>(rows.weight[j][g], rows.scale[j * kBlockGroups + quarter + g],
                                    tokens.now, c * kChunkValueBytes + g * 4,
                                    x.offset_at + c * 16 + g * 4, x.step_at + c * 16 + g * 4, sum);
    }
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t)
#pragma GCC unroll 2
      for (int p = 0; p < 2; ++p) _mm512_store_ps(sums[t].of[quarter + g][p], sum[t][p]);
  }
}

// The same for all tokens.
template <typename Format>
static void quarter_block(const DecodedRows& rows, int64_t chunk, int64_t left,
                          const BlockTokens& x, int tokens, RowsAhead& ahead, RowSums* sums) {
  StepTokens step;
  for (int t = 0; t < tokens; t += kStepTokens) {
    const int here = tokens - t < kStepTokens ? tokens - t : kStepTokens;
    const bool last = t + kStepTokens >= tokens;
    step.next_chunk = !last                             ? chunk
                      : (chunk + 1) % kBlockChunks != 0 ? chunk + 1
                                                        : chunk + 1 + kPieceChunks - kBlockChunks;
    const int next = last ? 0 : t + kStepTokens;
    for (int i = 0; i < kStepTokens; ++i) {
      step.now[i] = x.at[i < here ? t + i : t];
      step.next[i] = x.at[next + i < tokens ? next + i : next];
    }
    RowSums* at = sums + t;
    if (here == 4)
      quarter_tokens<Format, 4>(rows, chunk, left, x, step, ahead, at);
    else if (here == 3)
      quarter_tokens<Format, 3>(rows, chunk, left, x, step, ahead, at);
    else if (here == 2)
      quarter_tokens<Format, 2>(rows, chunk, left, x, step, ahead, at);
    else
      quarter_tokens<Format, 1>(rows, chunk, left, x, step, ahead, at);
  }
}

// The partial sums of 16 rows by the fixed tree: i + (i + 8) first, then quarters, pairs, the last
// two.
KN_INLINE f32x16 add_partial_sums(const RowSums& sums, int panel) {
  __m512 s[kBlockGroups];
  for (int i = 0; i < kBlockGroups; ++i) s[i] = _mm512_load_ps(sums.of[i][panel]);
#pragma GCC unroll 4
  for (int half = kBlockGroups / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) s[i] = _mm512_add_ps(s[i], s[i + half]);
  return {s[0]};
}

template <typename Format>
static BlockRows block_rows(const LimbTile& tile, int64_t row) {
  BlockRows rows;
  for (int p = 0; p < 2; ++p)
    for (int r = 0; r < kPanelRows; ++r) {
      // Without rows, a panel gets those of panel 0; what they give is not stored.
      const int q = rows_left(tile, p, row) > 0 ? p : 0;
      const int64_t at = row + (r < rows_left(tile, q, row) ? r : 0);
      rows.weight[p][r] = tile.weight[q] + at * row_bytes(Format{}, tile.in);
      rows.scale[p][r] = tile.scale[q] + at * num_groups(tile.in);
    }
  return rows;
}

// 16 rows of each panel, from `row` on, times all tokens of the tile.
template <typename Format, typename Finish>
static void blocks_tile(const LimbTile& tile, int64_t row) {
  const int tokens = int(tile.tokens);
  const int64_t chunks = num_chunks(tile.in), groups = num_groups(tile.in);
  const int64_t bytes = row_bytes(Format{}, tile.in);
  BlockTokens x;
  x.offset_at = padded_chunks(tile.in) * kChunkValueBytes;
  x.step_at = x.offset_at + padded_chunks(tile.in) * kChunkGroups * 4;
  for (int t = 0; t < tokens; ++t) x.at[t] = tile_token(tile, t);
  RowSums sums[kTileTokens];
  const BlockRows rows = block_rows<Format>(tile, row);
  const bool more = row + 2 * kPanelRows <= tile.rows[1];
  const int64_t steps = (tokens + kStepTokens - 1) / kStepTokens * groups;
  RowsAhead ahead = {};
  if (more) {
    ahead.lines = kPanelRows * bytes / 64, ahead.per_step = (ahead.lines + steps - 1) / steps;
    for (int p = 0; p < 2; ++p) ahead.weight[p] = tile.weight[p] + (row + kPanelRows) * bytes;
  }
  DecodedRows decoded;
  for (int64_t piece = 0; piece < chunks; piece += kPieceChunks) {
    const int64_t first = piece * kChunkGroups, left = groups - first;
    const int64_t here = left < kPieceGroups ? left : kPieceGroups;
    for (int p = 0; p < 2; ++p)
      load_scales(rows.scale[p], first, here, more ? kPanelRows * groups : 0, p, decoded.scale);
    // A row of fewer than 16 groups has partial sums of nothing: the first piece writes all.
    for (int64_t c = piece; c < piece + kBlockChunks && (c < chunks || piece == 0); ++c) {
      for (int j = 0; j < kQuarterChunks; ++j)
        for (int g = 0; g < kChunkGroups; ++g) {
          const int64_t group = (c + j * kBlockChunks) * kChunkGroups + g;
          if (group >= groups) break;
          for (int p = 0; p < 2; ++p)
            decode_group(Format{}, rows.weight[p], group, p, decoded.weight[j][g]);
        }
      quarter_block<Format>(decoded, c, groups - c * kChunkGroups, x, tokens, ahead, sums);
    }
  }
  for (int t = 0; t < tokens; ++t)
    finish(Finish{}, tile, t, row, add_partial_sums(sums[t], 0), add_partial_sums(sums[t], 1));
}

}  // namespace kn::cpu::KN_ISA
