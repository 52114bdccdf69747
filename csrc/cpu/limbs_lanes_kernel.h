// The loops of limbs_kernel.h for three tokens or more, AVX-512 (on AMD up to eleven): lane 4 r + g
// of a register belongs to row r of a quad and group g of its chunk, so that nothing is summed
// across lanes until a row is done.
//
//   weights   4 rows x 64 B are shuffled once to 8 registers, each 4 bytes of every row and group
//   x         16 B (4 bytes of each group) are broadcast to the four rows by the load ports
//   one step  of 2 quads and 2 tokens: 64 vpdpbusd, 20 other vector instructions, 45 to decode
//
// Loops: 16 tokens > blocks of chunks whose tokens stay in L1 > pairs of quads > chunks > 2 tokens.
#pragma once

namespace kn::cpu::KN_ISA {

static constexpr int kQuadRows = 4;
static constexpr int kPanelQuads = kPanelRows / kQuadRows;
static constexpr int kLaneBytes = 20480;  // values of the prepared tokens in L1 while rows pass
static constexpr int kLaneChunks = 32;    // at most as many in a block; a multiple of 4

// Partial sum 4 c + g of a token's row 4 quad + r is at lane 4 r + g.
struct alignas(64) LaneSums {
  float of[kSumTokens][2][kPanelQuads][kBlockChunks][16];
};
static constexpr int64_t kPanelSums = kPanelQuads * kBlockChunks * 16, kTokenSums = 2 * kPanelSums;

// The prepared tokens of a step, and how far behind the values their offsets and steps are.
struct LaneTokens {
  const uint8_t* at[kSumTokens];
  int64_t offset_at, step_at;
};

struct LaneQuad {
  __m512i weight[2][4];  // {first, second} x dword
  __m512 scale;
};

// Rows of two quads, one of each panel, from one chunk on; all 4 rows and whole chunks exist.
struct LaneRows {
  const uint8_t* weight[2];
  const bf16* scale[2];
  int64_t weight_stride, scale_stride;  // bytes; elements
};

// The rows that come after those of a tile, as far as they belong to the current step, to be read
// into L2 meanwhile: the rows at hand are eight streams that end every kilobyte or so, which no
// hardware prefetcher follows. Null: nothing to read ahead.
struct NextRows {
  const uint8_t* weight[2];
  const uint8_t* scale[2];
};

template <typename Format>
KN_INLINE void prefetch_next(NextRows& next) {
  if (!next.weight[0]) return;
  constexpr int kWeightBytes = kQuadRows * Format::kChunkBytes;
  constexpr int kScaleBytes = kQuadRows * kChunkGroups * int(sizeof(bf16));
#pragma GCC unroll 2
  for (int p = 0; p < 2; ++p) {
#pragma GCC unroll 8
    for (int b = 0; b < kWeightBytes; b += 64) __builtin_prefetch(next.weight[p] + b, 0, 2);
    __builtin_prefetch(next.scale[p], 0, 2);
    next.weight[p] += kWeightBytes;
    next.scale[p] += kScaleBytes;
  }
}

// Chunk c of 2 quads times the tokens t .. t + T - 1; acc: sums of the first of them.
template <int kLimbs, int T>
KN_INLINE void lane_step(const LaneQuad quad[2], const LaneTokens& x, int t, int64_t c,
                         float* acc) {
  __m512i high[2][T], low[2][T];
#pragma GCC unroll 2
  for (int i = 0; i < T; ++i)
#pragma GCC unroll 2
    for (int p = 0; p < 2; ++p) {
      high[p][i] = _mm512_setzero_si512();
      low[p][i] = broadcast_lane(x.at[t + i] + x.offset_at + c * 16);
    }
#pragma GCC unroll 2
  for (int half = 0; half < 2; ++half)
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k)
#pragma GCC unroll 2
      for (int i = 0; i < T; ++i) {
        const uint8_t* values = x.at[t + i] + c * kChunkValueBytes + half * 128 + k * 16;
        const __m512i l = broadcast_lane(values);
#pragma GCC unroll 2
        for (int p = 0; p < 2; ++p)
          low[p][i] = _mm512_dpbusd_epi32(low[p][i], quad[p].weight[half][k], l);
        if constexpr (kLimbs == 2) {
          const __m512i h = broadcast_lane(values + 64);
#pragma GCC unroll 2
          for (int p = 0; p < 2; ++p)
            high[p][i] = _mm512_dpbusd_epi32(high[p][i], quad[p].weight[half][k], h);
        }
      }
#pragma GCC unroll 2
  for (int i = 0; i < T; ++i) {
    const __m512 step = _mm512_castsi512_ps(broadcast_lane(x.at[t + i] + x.step_at + c * 16));
#pragma GCC unroll 2
    for (int p = 0; p < 2; ++p) {
      __m512i d = low[p][i];
      if constexpr (kLimbs == 2) d = _mm512_add_epi32(_mm512_slli_epi32(high[p][i], 8), d);
      float* at = acc + i * kTokenSums + p * kPanelSums;
      _mm512_store_ps(at, _mm512_fmadd_ps(_mm512_cvtepi32_ps(d), _mm512_mul_ps(quad[p].scale, step),
                                          _mm512_load_ps(at)));
    }
  }
}

// Chunk c of 2 quads times all tokens; `rows` starts at chunk `begin`.
template <typename Format>
KN_INLINE void lane_chunk(const LaneRows& rows, int64_t begin, int64_t c, const __m512 scale[2],
                          const LaneTokens& x, int tokens, float* acc) {
  LaneQuad quad[2];
#pragma GCC unroll 2
  for (int p = 0; p < 2; ++p) {
    const uint8_t* w = rows.weight[p] + (c - begin) * Format::kChunkBytes;
    const int64_t stride = rows.weight_stride;
    const uint8_t* const row[4] = {w, w + stride, w + 2 * stride, w + 3 * stride};
    decode_quad(Format{}, row, quad[p].weight);
    quad[p].scale = scale[p];
  }
  acc += c % kBlockChunks * 16;
  int t = 0;
  for (; t + 2 <= tokens; t += 2) lane_step<Format::kLimbs, 2>(quad, x, t, c, acc + t * kTokenSums);
  if (t < tokens) lane_step<Format::kLimbs, 1>(quad, x, t, c, acc + t * kTokenSums);
}

// The chunks begin .. end - 1 of 2 quads times all tokens.
template <typename Format>
static void lane_block(const LaneRows& rows, int64_t begin, int64_t end, const LaneTokens& x,
                       int tokens, NextRows& next, float* acc) {
  const auto load_scales = [&](int64_t c, __m512 scale[2][2]) {
    for (int p = 0; p < 2; ++p) {
      const bf16* s = rows.scale[p] + (c - begin) * kChunkGroups;
      const int64_t stride = rows.scale_stride;
      const bf16* const row[4] = {s, s + stride, s + 2 * stride, s + 3 * stride};
      __m512 two[2];
      load_two_chunk_scales(row, two);
      for (int i = 0; i < 2; ++i) scale[i][p] = two[i];
    }
  };
  __m512 scale[2][2];  // [chunk][panel]
  int64_t c = begin;
  for (; c + 2 <= end; c += 2) {
    load_scales(c, scale);
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      prefetch_next<Format>(next);
      lane_chunk<Format>(rows, begin, c + i, scale[i], x, tokens, acc);
    }
  }
  if (c == end) return;
  load_scales(c - 1, scale);  // of the pair that ends with the last chunk: nothing past it is read
  prefetch_next<Format>(next);
  lane_chunk<Format>(rows, begin, c, scale[1], x, tokens, acc);
}

// Copies of rows that end inside the block, or of quads that have fewer than 4, padded with zeros.
template <typename Format>
struct PaddedRows {
  uint8_t weight[2][kQuadRows][kLaneChunks * Format::kChunkBytes];
  bf16 scale[2][kQuadRows][(1 + kLaneChunks) * kChunkGroups];  // after those of a chunk not there
};

template <typename Format>
static LaneRows pad_rows(const LimbTile& tile, int64_t row, int64_t begin, int64_t end,
                         PaddedRows<Format>& padded) {
  const int64_t bytes = row_bytes(Format{}, tile.in), groups = num_groups(tile.in);
  const int64_t b = begin * Format::kChunkBytes, g = begin * kChunkGroups;
  int64_t num_bytes = (end - begin) * Format::kChunkBytes, num = (end - begin) * kChunkGroups;
  if (bytes - b < num_bytes) num_bytes = bytes - b, num = groups - g;
  std::memset(&padded, 0, sizeof padded);
  for (int p = 0; p < 2; ++p)
    for (int64_t r = 0; r < kQuadRows && row + r < tile.rows[p]; ++r) {
      std::memcpy(padded.weight[p][r], tile.weight[p] + (row + r) * bytes + b, num_bytes);
      std::memcpy(padded.scale[p][r] + kChunkGroups, tile.scale[p] + (row + r) * groups + g,
                  num * sizeof(bf16));
    }
  return {{padded.weight[0][0], padded.weight[1][0]},
          {padded.scale[0][0] + kChunkGroups, padded.scale[1][0] + kChunkGroups},
          int64_t(sizeof padded.weight[0][0]),
          (1 + kLaneChunks) * kChunkGroups};
}

// One block of chunks of the 4 rows from `row` on of both panels.
template <typename Format>
static void quad_block(const LimbTile& tile, int64_t row, int64_t begin, int64_t end,
                       const LaneTokens& x, int tokens, NextRows& next, float* acc) {
  const int64_t bytes = row_bytes(Format{}, tile.in), groups = num_groups(tile.in);
  if (end * kChunkInputs > tile.in || end - begin == 1 || row + kQuadRows > tile.rows[1]) {
    PaddedRows<Format> padded;
    const LaneRows at = pad_rows(tile, row, begin, end, padded);
    return lane_block<Format>(at, begin, end, x, tokens, next, acc);
  }
  LaneRows at{{}, {}, bytes, groups};
  for (int p = 0; p < 2; ++p) {
    at.weight[p] = tile.weight[p] + row * bytes + begin * Format::kChunkBytes;
    at.scale[p] = tile.scale[p] + row * groups + begin * kChunkGroups;
  }
  lane_block<Format>(at, begin, end, x, tokens, next, acc);
}

template <typename Format>
KN_INLINE NextRows rows_after(const LimbTile& tile, int64_t row) {
  NextRows next = {};
  for (int p = 0; p < 2 && row + 2 * kPanelRows <= tile.rows[1]; ++p) {
    next.weight[p] = tile.weight[p] + (row + kPanelRows) * row_bytes(Format{}, tile.in);
    next.scale[p] = (const uint8_t*)(tile.scale[p] + (row + kPanelRows) * num_groups(tile.in));
  }
  return next;
}

// 16 rows of each panel, from `row` on, times up to 16 tokens, from `first` on.
template <typename Format, typename Finish>
static void lanes_tile(const LimbTile& tile, int64_t row, int64_t first, NextRows next) {
  LaneSums sums;
  const int64_t chunks = num_chunks(tile.in), left = tile.tokens - first;
  const int tokens = int(left < kSumTokens ? left : kSumTokens), rows = rows_left(tile, 0, row);
  LaneTokens x;
  x.offset_at = padded_chunks(tile.in) * kChunkValueBytes;
  x.step_at = x.offset_at + padded_chunks(tile.in) * kChunkGroups * 4;
  for (int t = 0; t < tokens; ++t) x.at[t] = tile_token(tile, first + t).values;
  std::memset(sums.of, 0, tokens * sizeof sums.of[0]);
  int64_t block = kLaneBytes / kChunkValueBytes / tokens / 4 * 4;
  if (block > kLaneChunks) block = kLaneChunks;
  for (int64_t begin = 0; begin < chunks; begin += block) {
    const int64_t end = begin + block < chunks ? begin + block : chunks;
    for (int quad = 0; quad * kQuadRows < rows; ++quad)
      quad_block<Format>(tile, row + quad * kQuadRows, begin, end, x, tokens, next,
                         sums.of[0][0][quad][0]);
  }
  for (int t = 0; t < tokens; ++t) {
    alignas(64) float out[2][kPanelRows];
    for (int p = 0; p < 2; ++p)
      for (int quad = 0; quad < kPanelQuads; ++quad)
        store_row_sums(out[p] + quad * kQuadRows, sums.of[t][p][quad]);
    finish(Finish{}, tile, first + t, row, load(out[0]), load(out[1]));
  }
}

}  // namespace kn::cpu::KN_ISA
