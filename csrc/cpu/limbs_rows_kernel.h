// The loops of limbs_kernel.h for few tokens, AVX-512: one row of each panel at a time, in the
// order of their addresses. A lane is a group: 16 of a row, one for each of its partial sums, so
// that nothing is summed across lanes before a row is done.
//
//   weights   a block of a row, 16 groups, is transposed to 8 registers: a dword of each group
//   x         prepared in that order
//   one step  of a block of 2 rows and 2 tokens: 64 vpdpbusd, 20 other vector instructions; 42 to
//             decode INT4, once for all tokens
//
// Loops: 16 rows of each panel > pieces of columns whose tokens stay in L1 > rows > blocks > 2
// tokens.
#pragma once

namespace kn::cpu::KN_ISA {

static constexpr int64_t kPieceBytes = 24576;  // of tokens in L1 while 16 rows pass

// Bytes ahead of use that a line is asked for into L1: enough to start the hardware prefetcher on
// the next page before its first use; from there on it runs ahead by itself. Four kilobytes lose 15
// % on Intel: then the few lines that a core can ask for at once wait for memory instead of for the
// cache. On AMD (far_prefetch) these bound the whole, and lines are asked for into L2 first.
static constexpr int64_t kNearBytes = 1024, kFarBytes = 8192;

// ---- tokens: block by block, 8 registers of each limb in the order of decode_block, then offsets
// and steps ----

template <typename Format>
constexpr int64_t kTokenBlockBytes = (8 * Format::kLimbs + 2) * 64;
static_assert(kTokenBlockBytes<Int4> == prepared_bytes(kBlockChunks * kChunkInputs));

template <typename Format, typename T>
static void prepare_blocks(const T* x, int64_t in, uint8_t* to) {
  constexpr int kLimbs = Format::kLimbs;
  alignas(64) uint8_t values[kBlockChunks][kChunkValueBytes];
  alignas(64) int32_t offset[kBlockChunks][kChunkGroups];
  alignas(64) float step[kBlockChunks][kChunkGroups];
  for (int64_t c = 0; c < padded_chunks(in); c += kBlockChunks, to += kTokenBlockBytes<Format>) {
    for (int i = 0; i < kBlockChunks; ++i)
      prepare_chunk_of<Format>(x, in, c + i, values[i], offset[i], step[i]);
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half)
#pragma GCC unroll 2
      for (int limb = 0; limb < kLimbs; ++limb) {
        __m512i chunk[4], dword[4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i)
          chunk[i] = to_block_order(_mm512_load_si512(values[i] + half * 128 + limb * 64));
        transpose_dwords(chunk, dword);
#pragma GCC unroll 4
        for (int k = 0; k < 4; ++k)
          _mm512_store_si512(to + ((half * 4 + k) * kLimbs + limb) * 64, dword[k]);
      }
    // By parts: a register that was just stored in parts would wait for them to reach the cache.
    const void* const offsets[4] = {offset[0], offset[1], offset[2], offset[3]};
    const void* const steps[4] = {step[0], step[1], step[2], step[3]};
    _mm512_store_si512(to + 8 * kLimbs * 64, to_block_order(gather_lanes(offsets)));
    _mm512_store_si512(to + (8 * kLimbs + 1) * 64, to_block_order(gather_lanes(steps)));
  }
}

// ---- rows ----

// Of a tile's tokens, as many as pass at once.
static constexpr int kRowTokens = 24;
struct RowTokens {
  const uint8_t* at[kRowTokens];
  int64_t count;
};

// One block of two rows times T tokens, `at` bytes into each, added to sums[token][row].
template <int kLimbs, int T, bool kEnd>
KN_INLINE void block_step(const __m512i (&weight)[2][8], const __m512 (&scale)[2],
                          const uint8_t* const* tokens, int64_t at, __mmask16 lanes,
                          float (*sums)[2][16]) {
  // Both rows use a value while it is in a register: a core of a Zen 4 loads one register a cycle.
  const auto load_once = [](const uint8_t* p) { return keep_in_register(_mm512_load_si512(p)); };
  __m512i high[T][2], low[T][2];
#pragma GCC unroll 2
  for (int t = 0; t < T; ++t)
#pragma GCC unroll 2
    for (int p = 0; p < 2; ++p) {
      high[t][p] = _mm512_setzero_si512();
      low[t][p] = _mm512_load_si512(tokens[t] + at + 8 * kLimbs * 64);
    }
#pragma GCC unroll 8
  for (int k = 0; k < 8; ++k)
#pragma GCC unroll 2
    for (int t = 0; t < T; ++t) {
      const uint8_t* value = tokens[t] + at + k * kLimbs * 64;
      const __m512i l = load_once(value);
#pragma GCC unroll 2
      for (int p = 0; p < 2; ++p) low[t][p] = _mm512_dpbusd_epi32(low[t][p], weight[p][k], l);
      if constexpr (kLimbs == 2) {
        const __m512i h = load_once(value + 64);
#pragma GCC unroll 2
        for (int p = 0; p < 2; ++p) high[t][p] = _mm512_dpbusd_epi32(high[t][p], weight[p][k], h);
      }
    }
#pragma GCC unroll 2
  for (int t = 0; t < T; ++t) {
    const __m512 step = _mm512_load_ps(tokens[t] + at + (8 * kLimbs + 1) * 64);
#pragma GCC unroll 2
    for (int p = 0; p < 2; ++p) {
      __m512i d = low[t][p];
      if constexpr (kLimbs == 2) d = _mm512_add_epi32(_mm512_slli_epi32(high[t][p], 8), d);
      const __m512 f = _mm512_cvtepi32_ps(d), factor = _mm512_mul_ps(scale[p], step);
      const __m512 sum = _mm512_load_ps(sums[t][p]);
      // Chunks that are not there leave their sums alone: adding zero could turn a -0 into a 0.
      _mm512_store_ps(sums[t][p], kEnd ? _mm512_mask3_fmadd_ps(f, factor, sum, lanes)
                                       : _mm512_fmadd_ps(f, factor, sum));
    }
  }
}

// A row of each panel, from one block on.
struct RowPair {
  const uint8_t* weight[2];
  const bf16* scale[2];
};

// Where prefetches go, in bytes of weights from use, into L1 and L2. Zero: nowhere.
struct Ahead {
  int64_t near, far;
};

template <typename Format>
KN_INLINE void prefetch_block(const RowPair& rows, const Ahead& ahead) {
  constexpr int kBytes = kBlockChunks * Format::kChunkBytes;
  constexpr int kScaleBytes = kBlockGroups * int(sizeof(bf16));
#pragma GCC unroll 2
  for (int p = 0; p < 2; ++p) {
    const auto* scale = (const uint8_t*)rows.scale[p];
    if (ahead.near != 0)
#pragma GCC unroll 8
      for (int b = 0; b < kBytes; b += 64) __builtin_prefetch(rows.weight[p] + ahead.near + b);
    if (ahead.far == 0) {
      __builtin_prefetch(scale + 256);
      continue;
    }
#pragma GCC unroll 8
    for (int b = 63; b < kBytes; b += 64) __builtin_prefetch(rows.weight[p] + ahead.far + b, 0, 2);
    __builtin_prefetch(scale + ahead.far / (kBytes / kScaleBytes) + kScaleBytes - 1, 0, 2);
  }
}

// One block of two rows times tokens, `at` bytes into each.
template <typename Format, bool kEnd>
KN_INLINE void row_block(const RowPair& rows, const RowTokens& tokens, int64_t at,
                         const BlockEnd& end, const Ahead& ahead, float (*sums)[2][16]) {
  constexpr int kLimbs = Format::kLimbs;
  __m512i weight[2][8];
  __m512 scale[2];
  prefetch_block<Format>(rows, ahead);
#pragma GCC unroll 2
  for (int p = 0; p < 2; ++p) {
    decode_block<kEnd>(Format{}, rows.weight[p], end, weight[p]);
    scale[p] = load_block_scales<kEnd>(rows.scale[p], end);
  }
  int64_t t = 0;
  for (; t + 2 <= tokens.count; t += 2)
    block_step<kLimbs, 2, kEnd>(weight, scale, tokens.at + t, at, end.lanes, sums + t);
  if (t < tokens.count)
    block_step<kLimbs, 1, kEnd>(weight, scale, tokens.at + t, at, end.lanes, sums + t);
}

// Blocks begin .. stop - 1 of two rows, which start there, times tokens. Inlined: as a function it
// got the pair on the stack, where reading it waited for every instruction before it, 20 ns.
template <typename Format>
KN_INLINE void row_piece(RowPair rows, int64_t begin, int64_t stop, int64_t in,
                         const RowTokens& tokens, const BlockEnd& end, const Ahead& ahead,
                         float (*sums)[2][16]) {
  const int64_t whole = in / (kBlockGroups * kGroupSize);
  int64_t at = begin * kTokenBlockBytes<Format>;
  for (int64_t b = begin; b < stop && b < whole; ++b, at += kTokenBlockBytes<Format>) {
    row_block<Format, false>(rows, tokens, at, end, ahead, sums);
#pragma GCC unroll 2
    for (int p = 0; p < 2; ++p) {
      rows.weight[p] += kBlockChunks * Format::kChunkBytes;
      rows.scale[p] += kBlockGroups;
    }
  }
  if (whole < stop) row_block<Format, true>(rows, tokens, at, end, ahead, sums);
}

// 16 rows of each panel, from `row` on, times up to kRowTokens tokens, from `first` on.
template <typename Format, typename Finish>
static void rows_step(const LimbTile& tile, int64_t row, int64_t first, int64_t count) {
  constexpr int64_t kRowBlockBytes = kBlockChunks * Format::kChunkBytes;
  const int64_t bytes = row_bytes(Format{}, tile.in), groups = num_groups(tile.in);
  const int64_t blocks = padded_chunks(tile.in) / kBlockChunks;
  const BlockEnd end = block_end(Format{}, tile.in % (kBlockGroups * kGroupSize));
  RowTokens tokens;
  tokens.count = count;
  for (int64_t t = 0; t < count; ++t) tokens.at[t] = tile_token(tile, first + t);
  // Up to two tokens are read from L2 while the rows stay two long streams.
  int64_t piece = count <= 2 ? blocks : kPieceBytes / (kTokenBlockBytes<Format> * count);
  if (piece < 1) piece = 1;
  const int64_t pieces = (blocks + piece - 1) / piece;
  // A piece ends where no prefetcher expects it: its columns of the next 16 rows are fetched.
  const Ahead ahead = pieces > 1 ? Ahead{0, kPanelRows * bytes}
                                 : Ahead{kNearBytes, tile.far_prefetch ? kFarBytes : 0};
  alignas(64) float sums[kPanelRows * kRowTokens][2][16];  // [row][token][panel]
  std::memset(sums, 0, kPanelRows * count * sizeof sums[0]);
  for (int64_t i = 0; i < pieces; ++i) {
    const int64_t begin = blocks * i / pieces, stop = blocks * (i + 1) / pieces;
    for (int r = 0; r < rows_left(tile, 0, row); ++r) {
      RowPair rows;
      for (int p = 0; p < 2; ++p) {
        const int q = row + r < tile.rows[p] ? p : 0;  // a row that panel 1 lacks: that of panel 0
        rows.weight[p] = tile.weight[q] + (row + r) * bytes + begin * kRowBlockBytes;
        rows.scale[p] = tile.scale[q] + (row + r) * groups + begin * kBlockGroups;
      }
      row_piece<Format>(rows, begin, stop, tile.in, tokens, end, ahead, sums + r * count);
    }
  }
  for (int64_t t = 0; t < count; ++t)
    finish(Finish{}, tile, first + t, row, sum_rows(sums[t][0], 32 * count),
           sum_rows(sums[t][1], 32 * count));
}

template <typename Format, typename Finish>
static void rows_tile(const LimbTile& tile) {
  const int64_t steps = (tile.tokens + kRowTokens - 1) / kRowTokens;
  for (int64_t row = 0; row < tile.rows[0]; row += kPanelRows)
    for (int64_t i = 0; i < steps; ++i) {
      const int64_t first = tile.tokens * i / steps;
      rows_step<Format, Finish>(tile, row, first, tile.tokens * (i + 1) / steps - first);
    }
}

}  // namespace kn::cpu::KN_ISA
