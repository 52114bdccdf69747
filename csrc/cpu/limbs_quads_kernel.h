// The loops of limbs_kernel.h for the generic and avx2 tiers: 2 quads of rows at a time, one of
// each panel; the dwords of a row's dot products are summed across lanes per chunk and token
// (quad_dots of simd/limbs_*.h).
#pragma once

namespace kn::cpu::KN_ISA {

static constexpr int kQuadRows = 4;
static constexpr int kQuadTokens = 4;  // tokens of one step
static constexpr int kSumTokens = 16;  // tokens whose sums are kept until 16 rows are done

// Bytes from use to prefetch in each row's stream, which is followed by the rows that come next.
static constexpr int64_t kPrefetchBytes = 8192;

// Rows past the end repeat the panel's last row.
struct QuadPair {
  const uint8_t* weight[2][kQuadRows];
  const bf16* scale[2][kQuadRows];
};

template <typename Format>
KN_INLINE QuadPair quad_pair(const LimbTile& tile, int64_t row) {
  QuadPair rows;
  for (int p = 0; p < 2; ++p)
    for (int r = 0; r < kQuadRows; ++r) {
      const int64_t last = tile.rows[p] > 0 ? tile.rows[p] - 1 : 0;
      const int64_t at = row + r < last ? row + r : last;
      rows.weight[p][r] = tile.weight[p] + at * row_bytes(Format{}, tile.in);
      rows.scale[p][r] = tile.scale[p] + at * num_groups(tile.in);
    }
  return rows;
}

// The chunk's bytes of the 4 rows, or zero-padded copies of them where the rows end inside it.
template <typename Format>
KN_INLINE void chunk_rows(const uint8_t* const row[kQuadRows], int64_t chunk, int64_t in,
                          uint8_t (*padded)[Format::kChunkBytes], const uint8_t* w[kQuadRows]) {
  const int64_t start = chunk * Format::kChunkBytes, left = row_bytes(Format{}, in) - start;
  for (int r = 0; r < kQuadRows; ++r) w[r] = row[r] + start;
  if (left >= Format::kChunkBytes) return;
  for (int r = 0; r < kQuadRows; ++r) {
    std::memset(padded[r], 0, Format::kChunkBytes);
    std::memcpy(padded[r], w[r], left);
    w[r] = padded[r];
  }
}

// Scales of the 4 chunks from `chunk` on; groups past the end are zero.
KN_INLINE void quad_scales(const bf16* const p[kQuadRows], int64_t chunk, int64_t groups,
                           f32x16 scale[kBlockChunks]) {
  const int64_t first = chunk * kChunkGroups, left = groups - first;
  const bf16* at[kQuadRows];
  bf16 padded[kQuadRows][kBlockGroups] = {};
  for (int r = 0; r < kQuadRows; ++r) {
    at[r] = p[r] + first;
    if (left >= kBlockGroups) continue;
    std::memcpy(padded[r], at[r], left * sizeof(bf16));
    at[r] = padded[r];
  }
  load_quad_scales(at, scale);
}

// The sums of 8 rows and T tokens to sums[t][panel * 16 + r].
template <typename Format, int T>
static void quad_sums(const QuadPair& rows, const PreparedToken x[T], int64_t in, bool stream,
                      float (*sums)[2 * kPanelRows]) {
  const int64_t groups = num_groups(in), chunks = num_chunks(in);
  f32x16 acc[2][T][kBlockChunks], scale[2][kBlockChunks];
  for (int p = 0; p < 2; ++p)
    for (int t = 0; t < T; ++t)
      for (int i = 0; i < kBlockChunks; ++i) acc[p][t][i] = zero_f32();
  for (int64_t c = 0; c < chunks; ++c) {
    if (c % kBlockChunks == 0)
      for (int p = 0; p < 2; ++p) quad_scales(rows.scale[p], c, groups, scale[p]);
    const uint8_t* values[T];
    for (int t = 0; t < T; ++t) values[t] = x[t].values + c * kChunkValueBytes;
#pragma GCC unroll 2
    for (int p = 0; p < 2; ++p) {
      const uint8_t* w[kQuadRows];
      uint8_t padded[kQuadRows][Format::kChunkBytes];
      chunk_rows<Format>(rows.weight[p], c, in, padded, w);
      for (int r = 0; stream && r < kQuadRows; ++r)
        for (int b = 0; b < Format::kChunkBytes; b += 64)
          __builtin_prefetch(rows.weight[p][r] + c * Format::kChunkBytes + b + kPrefetchBytes);
      i32x16 d[T];
      quad_dots<T>(Format{}, w, values, d);
#pragma GCC unroll 4
      for (int t = 0; t < T; ++t) {
        f32x16& sum = acc[p][t][c % kBlockChunks];
        sum = fma(to_f32(add(d[t], spread(x[t].offset + c * kChunkGroups))),
                  mul(scale[p][c % kBlockChunks], spread(x[t].step + c * kChunkGroups)), sum);
      }
    }
  }
  for (int p = 0; p < 2; ++p)
    for (int t = 0; t < T; ++t) {
      const f32x16* a = acc[p][t];
      store_row_sums(sums[t] + p * kPanelRows, add(add(a[0], a[2]), add(a[1], a[3])));
    }
}

// 16 rows of each panel, from `row` on, times up to 16 tokens, from `first` on.
template <typename Format, typename Finish>
static void quads_tile(const LimbTile& tile, int64_t row, int64_t first) {
  alignas(64) float sums[kSumTokens][2 * kPanelRows];
  const int64_t left = tile.tokens - first;
  const int tokens = int(left < kSumTokens ? left : kSumTokens);
  PreparedToken x[kSumTokens];
  for (int t = 0; t < tokens; ++t) x[t] = prepared_token(tile_token(tile, first + t), tile.in);
  for (int r = 0; r < rows_left(tile, 0, row); r += kQuadRows) {
    const QuadPair rows = quad_pair<Format>(tile, row + r);
    float (*out)[2 * kPanelRows] = (float (*)[2 * kPanelRows])(sums[0] + r);
    for (int t = 0; t < tokens; t += kQuadTokens) {
      const bool stream = first + t == 0;
      switch (tokens - t) {
        case 1:
          quad_sums<Format, 1>(rows, x + t, tile.in, stream, out + t);
          break;
        case 2:
          quad_sums<Format, 2>(rows, x + t, tile.in, stream, out + t);
          break;
        case 3:
          quad_sums<Format, 3>(rows, x + t, tile.in, stream, out + t);
          break;
        default:
          quad_sums<Format, 4>(rows, x + t, tile.in, stream, out + t);
          break;
      }
    }
  }
  for (int t = 0; t < tokens; ++t)
    finish(Finish{}, tile, first + t, row, load(sums[t]), load(sums[t] + kPanelRows));
}

template <typename Format, typename Finish>
static void limb_tile(const LimbTile& tile) {
  for (int64_t row = 0; row < tile.rows[0]; row += kPanelRows)
    for (int64_t first = 0; first < tile.tokens; first += kSumTokens)
      quads_tile<Format, Finish>(tile, row, first);
}

}  // namespace kn::cpu::KN_ISA
