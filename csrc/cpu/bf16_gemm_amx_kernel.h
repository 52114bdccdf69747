// bf16_gemm on matrix tiles, one task: a block of tokens times a block of weight rows.
//
//   A = 16 weight rows x 32 columns    B = x [16 pairs of columns][16 tokens][2]    C[row][token]
//
// Every output adds 32 products at a time, ascending, and depends on its row of A and its column
// of B alone: neither the shape of a tile nor what is beside an output shows in its bits. fp32
// activations become three bf16 limbs, which take three columns; their sums meet in the end.
//
//   x packed, per group of up to four tiles   [in / 32][tiles][16 pairs][columns][2]; columns: 16,
//                                             or 1, 2, 4, 8 if one tile holds the whole call
//   one group     16 weight rows at a time where they lie, all of their columns; memory sets the
//                 pace, and what comes next is fetched in runs of each row
//   more          32 rows x 32 tokens in four tiles of sums, weights where they lie, in L2 for all
//                 groups. Columns are cut into pieces whose x fits there too; between pieces the
//                 sums of all rows wait in scratch, as they are
//
// Bytes: 2 * rows * in of weights. FLOPs: 2 * tokens * rows * in, fp32 activations three times.
#pragma once
#include "cpu/bf16_gemm_amx_pack_kernel.h"

namespace kn::cpu::KN_ISA {

static constexpr int64_t kGemmTaskGroups = 8;
static constexpr int64_t kGemmSums = 4 * 256;  // of a block and a group
// Columns are cut into pieces for which x, a block of weights and the next one share a 2 MB L2; the
// sums of so many rows wait there between pieces.
static constexpr int64_t kGemmPieceBytes = 21 << 16, kGemmPieceRows = 512;
// Steps of a panel, what is fetched at once of 16 rows: short rows into L1, so many bytes of them;
// long ones into L2, whole up to so many bytes of them.
static constexpr int64_t kGemmL1Panel = 4, kGemmL1Rows = 16 << 10;
static constexpr int64_t kGemmPanel = 8, kGemmL2Rows = 64 << 10;
static constexpr int64_t kGemmAhead = 8 << 10;  // bytes, at least

// How a task goes over its rows and columns.
struct GemmPlan {
  int64_t groups;
  int64_t block;       // rows
  int64_t piece;       // columns, whole steps
  int64_t piece_rows;  // done before the next piece
  int64_t sums;        // bytes of scratch: blocks x groups of 2 x 2 tiles

  GemmPlan(int64_t rows, int64_t in, int64_t groups) : groups(groups) {
    const int64_t steps = gemm_ceil_div(in, kGemmStep);
    block = groups == 1 ? 16 : 32;
    const int64_t bytes = steps * (groups * kGemmGroupTiles + 4) * kTileBytes;
    const int64_t pieces = groups == 1 ? 1 : gemm_ceil_div(bytes, kGemmPieceBytes);
    piece = gemm_ceil_div(steps, pieces) * kGemmStep;
    piece_rows = pieces > 1 ? gemm_min(rows, kGemmPieceRows) : rows;
    sums = (pieces > 1 ? gemm_ceil_div(piece_rows, block) * groups : 1) * kGemmSums * 4;
  }
};

static int64_t bf16_gemm_scratch_bytes(int64_t rows, int64_t in, int64_t groups) {
  return GemmPlan(rows, in, groups).sums + 2 * kTileBytes;  // and the columns past the last step
}

// One block and one group, `steps` steps of them.
struct GemmBlock {
  const char* weights;  // of the first row
  int64_t row_bytes;
  const char* x;
  int64_t x_row_bytes;  // of a tile of x: 64 if there are two
  int64_t steps;
  const char* rest;  // weights of one more step, as tiles; or null
  bool start;        // sums from zero
  float* sums;       // [row tile][column tile]
  int64_t sums_row_bytes = 64;
};

// Tiles 0 to 3: sums of one row tile and V column tiles, or of two and two; 4, 5: weights; 6, 7: x.
template <int R, int V>
KN_INLINE void gemm_step(const char* w0, const char* w1, int64_t row_bytes, const char* x,
                         int64_t x_row_bytes) {
  _tile_loadd(6, x, V >= 2 ? 64 : x_row_bytes);
  _tile_loadd(4, w0, row_bytes);
  _tile_dpbf16ps(0, 4, 6);
  if constexpr (V >= 2) {
    _tile_loadd(7, x + kTileBytes, 64);
    _tile_dpbf16ps(1, 4, 7);
  }
  if constexpr (R == 2) {
    _tile_loadd(5, w1, row_bytes);
    _tile_dpbf16ps(2, 5, 6);
    if constexpr (V == 2) _tile_dpbf16ps(3, 5, 7);
  }
  if constexpr (V >= 3) {
    _tile_loadd(6, x + 2 * kTileBytes, 64);
    _tile_dpbf16ps(2, 4, 6);
  }
  if constexpr (V >= 4) {
    _tile_loadd(7, x + 3 * kTileBytes, 64);
    _tile_dpbf16ps(3, 4, 7);
  }
}

template <int R, int V>
KN_INLINE void gemm_start(const GemmBlock& b) {
  if (b.start) {
    _tile_zero(0);
    if (V >= 2) _tile_zero(1);
    if (R * V >= 3 || R == 2) _tile_zero(2);
    if (R * V >= 4) _tile_zero(3);
    return;
  }
  _tile_loadd(0, b.sums, 64);
  if (V >= 2) _tile_loadd(1, b.sums + 256, 64);
  if (R * V >= 3 || R == 2) _tile_loadd(2, b.sums + 512, 64);
  if (R * V >= 4) _tile_loadd(3, b.sums + 768, 64);
}

template <int R, int V>
KN_INLINE void gemm_end(const GemmBlock& b, const char* x) {
  if (b.rest) gemm_step<R, V>(b.rest, b.rest + kTileBytes, 64, x, b.x_row_bytes);
  _tile_stored(0, b.sums, V >= 2 ? 64 : b.sums_row_bytes);
  if (V >= 2) _tile_stored(1, b.sums + 256, 64);
  if (R * V >= 3 || R == 2) _tile_stored(2, b.sums + 512, 64);
  if (R * V >= 4) _tile_stored(3, b.sums + 768, 64);
}

// One group of several. Meanwhile `count` rows from `ahead` on, which follow each other, are
// fetched into L2.
template <int R, int V>
static void gemm_steps(const GemmBlock& b, const char* ahead, int64_t count) {
  gemm_start<R, V>(b);
  const char *w0 = b.weights, *w1 = w0 + 16 * b.row_bytes, *x = b.x;
  const int64_t row_bytes = b.row_bytes, x_row_bytes = b.x_row_bytes;
  for (int64_t s = 0; s < b.steps; ++s) {
    const char* line = ahead + s * 64;
    for (int64_t i = 0; i < count; ++i, line += row_bytes) __builtin_prefetch(line, 0, 2);
    gemm_step<R, V>(w0, w1, row_bytes, x, x_row_bytes);
    w0 += 64, w1 += 64, x += V * 16 * (V >= 2 ? 64 : x_row_bytes);
  }
  gemm_end<R, V>(b, x);
}

// The only group: the weights are read once, as fast as memory gives them. Fetched meanwhile is the
// next panel of 16 rows, run after run; `ahead`: that of the block that follows the last panel of
// this one, or null.
template <int V, bool Near>
static void gemm_stream(const GemmBlock& b, const char* ahead) {
  gemm_start<1, V>(b);
  const char *w = b.weights, *x = b.x;
  const int64_t row_bytes = b.row_bytes, x_row_bytes = b.x_row_bytes;
  const int64_t long_panel = 16 * row_bytes <= kGemmL2Rows ? b.steps : kGemmPanel;
  const int64_t panel = Near ? gemm_min(b.steps, kGemmL1Panel) : long_panel;
  for (int64_t s = 0; s < b.steps; s += panel) {
    const int64_t size = gemm_min(panel, b.steps - s);
    const char* run = s + panel < b.steps ? w + size * 64 : ahead;
    const int64_t hop = run ? row_bytes - panel * 64 : 0, step = run ? 64 : 0;
    if (!run) run = w;
    for (int64_t i = 0, line = 0; i < size; ++i) {
      for (int j = 0; j < 16; ++j, run += step) {
        __builtin_prefetch(run, 0, Near ? 3 : 2);
        if (++line == panel) line = 0, run += hop;
      }
      gemm_step<1, V>(w, w, row_bytes, x, x_row_bytes);
      w += 64, x += V * 16 * (V >= 2 ? 64 : x_row_bytes);
    }
  }
  gemm_end<1, V>(b, x);
}

// One tile of sums, transposed: a token's rows follow each other. Those of limbs are added; where
// the high ones alone give infinity or NaN, that is the sum.
static void gemm_transpose(const float* sums, int limbs, float* to) {
  __m512i r[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_si512(sums + i * 16);
  transpose16(r);
  const auto column = [&r](int i) { return f32x16{_mm512_castsi512_ps(r[i])}; };
  if (limbs == 1) {
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) store(to + i * 16, column(i));
    return;
  }
#pragma GCC unroll 5
  for (int t = 0; t < 5; ++t) {
    const f32x16 high = column(3 * t);
    const f32x16 all = add(high, add(column(3 * t + 1), column(3 * t + 2)));
    const __mmask16 finite =
        _mm512_cmp_ps_mask(_mm512_abs_ps(high.v), _mm512_set1_ps(__FLT_MAX__), _CMP_LE_OQ);
    store(to + t * 16, f32x16{_mm512_mask_mov_ps(high.v, finite, all.v)});
  }
}

// The outputs of one block and one group.
template <typename Y>
static void gemm_store(const Bf16GemmTile& a, const GemmGroups& g, int64_t row, int64_t rows,
                       int64_t token, int64_t tokens, const float* sums) {
  alignas(64) float columns[2][16 * 16];
  for (int64_t t = 0; t < tokens; t += g.tile_tokens, sums += 256) {
    gemm_transpose(sums, int(g.limbs), columns[0]);
    if (rows > 16) gemm_transpose(sums + 512, int(g.limbs), columns[1]);
    const int64_t here = gemm_min(g.tile_tokens, tokens - t);
    for (int64_t i = 0; i < here; ++i) {
      Y* y = (Y*)a.y + (token + t + i) * a.y_token_stride + row;
      for (int64_t r = 0; r < rows; r += 16) {
        const f32x16 sum = load(columns[r / 16] + i * 16);
        if (rows - r >= 16)
          store(y + r, sum);
        else
          store(y + r, sum, int(rows - r));
      }
    }
  }
}

// The outputs of one block and one bf16 token, whose sums follow each other.
static void gemm_store_one(const Bf16GemmTile& a, int64_t row, int64_t rows, const float* sums) {
  const f32x16 sum = load(sums, int(rows));
  if (a.y_dtype == DType::kBf16)
    store((bf16*)a.y + row, sum, int(rows));
  else
    store((float*)a.y + row, sum, int(rows));
}

// The last columns of up to 32 rows as tiles, zeros where a row ends.
static void gemm_copy_rest(const bf16* weight, int64_t in, int64_t rows, int columns, char* to) {
  for (int64_t r = 0; r < rows; ++r)
    _mm512_storeu_si512(to + r * 64, load_pairs(weight + r * in, columns));
}

// What to fetch during a block: the first columns of a block further on, of this task or the next,
// at least kGemmAhead bytes of whole rows; with several pieces, after the last block the next piece
// of the first.
static const char* gemm_ahead(const Bf16GemmTile& a, const GemmPlan& p, int64_t first, int64_t row,
                              int64_t k) {
  const int64_t end = gemm_min(first + p.piece_rows, a.rows);
  if (k + p.piece < a.in && row + p.block >= end)
    return (const char*)(a.weight + first * a.in + k + p.piece);
  const int64_t far = p.piece < a.in ? 1 : gemm_ceil_div(kGemmAhead, p.block * a.in * 2);
  const int64_t next = row + far * p.block, column = row + p.block < end ? k : 0;
  if (next < a.rows) return (const char*)(a.weight + next * a.in + column);
  return a.next ? (const char*)(a.next + (next - a.rows) * a.in + column) : nullptr;
}

static void gemm_one_group(const GemmBlock& b, int64_t tiles, const char* ahead) {
  const bool near = 16 * b.row_bytes <= kGemmL1Rows;
  if (tiles == 1)
    near ? gemm_stream<1, true>(b, ahead) : gemm_stream<1, false>(b, ahead);
  else if (tiles == 2)
    near ? gemm_stream<2, true>(b, ahead) : gemm_stream<2, false>(b, ahead);
  else if (tiles == 3)
    near ? gemm_stream<3, true>(b, ahead) : gemm_stream<3, false>(b, ahead);
  else
    near ? gemm_stream<4, true>(b, ahead) : gemm_stream<4, false>(b, ahead);
}

template <int R>
static void gemm_groups(const Bf16GemmTile& a, const GemmPlan& p, const GemmGroups& g, GemmBlock b,
                        const char* ahead, int64_t row, int64_t k) {
  const bool last = k + p.piece >= a.in;
  const int64_t count = gemm_ceil_div(p.block, p.groups);
  for (int64_t i = 0; i < p.groups; ++i) {
    const int64_t token = i * a.group, tokens = gemm_min(a.tokens - token, a.group);
    const int64_t tiles = g.tiles(tokens);
    b.x = (const char*)a.packed + i * a.group_bytes + k / kGemmStep * tiles * g.tile_bytes();
    if (p.groups == 1) {
      gemm_one_group(b, tiles, ahead);
    } else {
      const char* rows = ahead ? ahead + i * count * b.row_bytes : nullptr;
      const int64_t fetched = ahead ? gemm_min(count, p.block - i * count) : 0;  // may be negative
      if (tiles == 1)
        gemm_steps<R, 1>(b, rows, fetched);
      else
        gemm_steps<R, 2>(b, rows, fetched);
    }
    if (last) {
      const int64_t rows = gemm_min(p.block, a.rows - row);
      if (b.sums_row_bytes == 4)
        gemm_store_one(a, row, rows, b.sums);
      else if (a.y_dtype == DType::kBf16)
        gemm_store<bf16>(a, g, row, rows, token, tokens, b.sums);
      else
        gemm_store<float>(a, g, row, rows, token, tokens, b.sums);
    }
    if (p.piece < a.in) b.sums += kGemmSums;
  }
}

// One piece of a block, all groups.
static void gemm_rows(const Bf16GemmTile& a, const GemmPlan& p, const GemmGroups& g, int64_t first,
                      int64_t row, int64_t k) {
  const int64_t columns = gemm_min(p.piece, a.in - k), rows = gemm_min(p.block, a.rows - row);
  const bf16* weight = a.weight + row * a.in + k;
  const int64_t steps = columns / kGemmStep, rest = columns % kGemmStep;
  char* rest_tiles = (char*)a.scratch + p.sums;
  if (rest) gemm_copy_rest(weight + steps * kGemmStep, a.in, rows, int(rest), rest_tiles);
  if (rows < p.block)
    open_tiles(int(gemm_min(rows, 16)), int(rows > 16 ? rows - 16 : rows), int(g.columns));
  before_tile_load();
  const int64_t waiting = p.piece < a.in ? (row - first) / p.block * p.groups * kGemmSums : 0;
  const GemmBlock b = {.weights = (const char*)weight,
                       .row_bytes = a.in * 2,
                       .x = nullptr,
                       .x_row_bytes = 4 * g.columns,
                       .steps = steps,
                       .rest = rest ? rest_tiles : nullptr,
                       .start = k == 0,
                       .sums = a.scratch + waiting,
                       .sums_row_bytes = g.columns == 1 ? 4 : 64};
  if (rows > 16)
    gemm_groups<2>(a, p, g, b, gemm_ahead(a, p, first, row, k), row, k);
  else
    gemm_groups<1>(a, p, g, b, gemm_ahead(a, p, first, row, k), row, k);
  if (rows < p.block) open_tiles(16, 16, int(g.columns));
}

static void bf16_gemm_tile(const Bf16GemmTile& a) {
  const GemmGroups g(a.group, a.in, a.x_dtype);
  const GemmPlan p(a.rows, a.in, gemm_ceil_div(a.tokens, a.group));
  open_tiles(16, 16, int(g.columns));
  for (int64_t first = 0; first < a.rows; first += p.piece_rows)
    for (int64_t k = 0; k < a.in; k += p.piece)
      for (int64_t row = first; row < a.rows && row < first + p.piece_rows; row += p.block)
        gemm_rows(a, p, g, first, row, k);
  close_tiles();
}

static constexpr Bf16GemmKernels kBf16Gemm = {
    .group = bf16_gemm_group,
    .task_groups = kGemmTaskGroups,
    .task_bytes = int64_t(1) << 40,
    .task_weight_bytes = 8 << 20,
    .packed_bytes = bf16_gemm_packed_bytes,
    .scratch_bytes = bf16_gemm_scratch_bytes,
    .pack = bf16_gemm_pack,
    .tile = bf16_gemm_tile,
};

}  // namespace kn::cpu::KN_ISA
