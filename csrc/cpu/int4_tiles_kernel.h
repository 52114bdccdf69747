// int4_gemm, int4_grouped_gemm and int4_grouped_swiglu on matrix tiles (int4_tiles.h): 16 rows of
// each of two panels times up to 64 tokens.
//
//   A   16 tokens x 32 columns, as prepared                one group is one product
//   B   16 pairs of columns x 16 rows x 2: bytes of the    C[token][row] = sum of the group
//       packed rows, transposed, then nibbles to bf16
//
// A group's sums leave the tile for registers, where a multiply-add applies the scales of 16 rows:
// one load and one multiply-add for 16 outputs. A register per token holds a partial sum, so the
// groups of one partial sum (g % 16, a class) follow each other: they are decoded, then multiplied
// with all tokens. With one block of tokens a class is taken in spans of groups that stay in L1.
//
// Per product of 16 x 16 x 32: 16 cycles of the tile unit, 48 loads and 16 stores of 64 bytes.
// Decoding 16 rows of a group takes some 40 cycles, once for all tokens.
#pragma once
#include "cpu/int4_tiles_prepare_kernel.h"

namespace kn::cpu::KN_ISA {

// Tiles: 0 to 3 sums, 4 and 5 values, 6 and 7 weights. Of fewer than 16 tokens that are all of a
// tile, only as many rows are computed; a last block behind others has 16, some of them garbage.
static void open_int4_tiles(int64_t tokens) {
  const int rows = int(tokens < kBlockTokens ? tokens : kBlockTokens);
  open_tiles(rows, rows);
}

// ---- weights ----

// 16 rows of a panel. Rows past its end repeat one that is there; their sums are not stored.
struct TileRows {
  const void* weight[16];
  const void* scale[16];
};
static TileRows tile_rows(const LimbTile& tile, int p, int64_t row) {
  const int64_t bytes = int4_row_bytes(tile.in), groups = num_groups(tile.in);
  const int q = row < tile.rows[p] ? p : 0;
  TileRows rows;
  for (int64_t r = 0; r < 16; ++r) {
    const int64_t at = row + r < tile.rows[q] ? row + r : tile.rows[q] - 1;
    rows.weight[r] = tile.weight[q] + at * bytes;
    rows.scale[r] = tile.scale[q] + at * groups;
  }
  return rows;
}

// 16 bytes of each of 16 rows, `at` bytes into them: out[d] lane r is dword d of row r.
KN_INLINE void load_dwords(const void* const (&row)[16], int64_t at, __m512i (&out)[4]) {
  __m512i r[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const void* const p[4] = {(const char*)row[i] + at, (const char*)row[4 + i] + at,
                              (const char*)row[8 + i] + at, (const char*)row[12 + i] + at};
    r[i] = gather_lanes(p);
  }
  const __m512i lo01 = _mm512_unpacklo_epi32(r[0], r[1]), hi01 = _mm512_unpackhi_epi32(r[0], r[1]);
  const __m512i lo23 = _mm512_unpacklo_epi32(r[2], r[3]), hi23 = _mm512_unpackhi_epi32(r[2], r[3]);
  out[0] = _mm512_unpacklo_epi64(lo01, lo23), out[1] = _mm512_unpackhi_epi64(lo01, lo23);
  out[2] = _mm512_unpacklo_epi64(hi01, hi23), out[3] = _mm512_unpackhi_epi64(hi01, hi23);
}

// One group of 16 rows to the B side: a multishift puts the two nibbles of a byte where words are
// looked up.
KN_INLINE void decode_group(const TileRows& rows, int64_t group, char* to) {
  __m512i dwords[4];
  load_dwords(rows.weight, group * 16, dwords);
  // -8 .. 7 as bf16, twice: of an index only the low four bits count.
  const __m512i levels = _mm512_broadcast_i64x4(
      _mm256_setr_epi16(int16_t(0xc100), int16_t(0xc0e0), int16_t(0xc0c0), int16_t(0xc0a0),
                        int16_t(0xc080), int16_t(0xc040), int16_t(0xc000), int16_t(0xbf80), 0,
                        0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0));
#pragma GCC unroll 4
  for (int d = 0; d < 4; ++d)
#pragma GCC unroll 4
    for (int b = 0; b < 4; ++b) {
      const __m512i places = _mm512_set1_epi64(0x0101010101010101 * (8 * b) +
                                               0x2424202004040000);  // bits 8 b, + 4, + 32, + 36
      const __m512i nibbles = _mm512_multishift_epi64_epi8(places, dwords[d]);
      _mm512_store_si512(to + (4 * d + b) * 64, _mm512_permutexvar_epi16(nibbles, levels));
    }
}

// Scales of 16 rows to [group][row], fp32.
static void transpose_scales(const TileRows& rows, int64_t groups, float* to) {
  bf16 rest[16][8] = {};
  const void* rest_rows[16];
  for (int64_t g = 0; g < groups; g += 8) {
    const int64_t n = groups - g < 8 ? groups - g : 8;
    __m512i pairs[4];
    if (n == 8) {
      load_dwords(rows.scale, g * 2, pairs);
    } else {
      for (int r = 0; r < 16; ++r) {
        std::memcpy(rest[r], (const bf16*)rows.scale[r] + g, n * 2);
        rest_rows[r] = rest[r];
      }
      load_dwords(rest_rows, 0, pairs);
    }
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i)
      if (i < n)
        _mm512_store_ps(to + (g + i) * 16,
                        i % 2 ? odd_places(pairs[i / 2]).v : even_places(pairs[i / 2]).v);
  }
}

// ---- sums ----

#define KN_MEMBER inline __attribute__((always_inline))

// The products of one class, or of a span of it: for every block of tokens and both panels, group
// after group. Product i is multiplied while i - 2 is stored and i - 4 added, without a gap between
// blocks and panels: a result takes three times as long as the next product, and a store that waits
// for one blocks the others.
struct ClassSums {
  const TokenBlock* blocks;
  const char* weights[2];  // B tiles
  const float* scales[2];  // [group / 16][row], kClasses * 16 floats apart
  int64_t groups, start;   // how many, and where the first one lies in a block
  int64_t tokens, limbs;
  float* products;  // [4] tiles of C
  float* sums;      // [block][panel][token][row]
  bool goes_on;     // with the sums that are there
};

// Where multiplying is: `left` groups of a panel of a block.
struct Multiplying {
  const char *values, *weights;
  int64_t left, token_bytes, step;
  int panel = 0, block = 0;

  KN_MEMBER explicit Multiplying(const ClassSums& a) { start(a); }
  KN_MEMBER void start(const ClassSums& a) {
    const int64_t tokens = a.tokens - block * 16 < 16 ? a.tokens - block * 16 : 16;
    token_bytes = tokens * 64, step = a.limbs * token_bytes;
    values = a.blocks[block].values + a.start * step;
    weights = a.weights[panel];
    left = a.groups;
  }
  KN_MEMBER void next(const ClassSums& a) {
    values += step, weights += 1024;
    if (--left > 0) return;
    block += panel, panel ^= 1;
    if (block * 16 < a.tokens) start(a);
  }
};

#define KN_MULTIPLY_GROUP(C, A, B)                    \
  {                                                   \
    _tile_zero(C);                                    \
    _tile_loadd(B, at.weights, 64);                   \
    _tile_loadd(A, at.values, 64);                    \
    _tile_dpbf16ps(C, A, B);                          \
    if (limbs == 2) {                                 \
      _tile_loadd(A, at.values + at.token_bytes, 64); \
      _tile_dpbf16ps(C, A, B);                        \
    }                                                 \
  }
template <int kTile>
KN_INLINE void multiply_group(const Multiplying& at, int64_t limbs) {
  if constexpr (kTile == 0) KN_MULTIPLY_GROUP(0, 4, 6)
  if constexpr (kTile == 1) KN_MULTIPLY_GROUP(1, 5, 7)
  if constexpr (kTile == 2) KN_MULTIPLY_GROUP(2, 4, 6)
  if constexpr (kTile == 3) KN_MULTIPLY_GROUP(3, 5, 7)
}
#undef KN_MULTIPLY_GROUP
template <int kTile>
KN_INLINE void store_product(float* products) {
  if constexpr (kTile == 0) _tile_stored(0, products, 64);
  if constexpr (kTile == 1) _tile_stored(1, products + 256, 64);
  if constexpr (kTile == 2) _tile_stored(2, products + 512, 64);
  if constexpr (kTile == 3) _tile_stored(3, products + 768, 64);
}

// Stores product `i` and multiplies product `i + 2`, as far as there are such. A step of its own
// for each of the four tiles.
template <int kTile>
KN_INLINE void advance_tile(const ClassSums& a, Multiplying& at, int64_t i, int64_t products) {
  if (i >= 0 && i < products) store_product<kTile>(a.products);
  before_tile_load();
  if (i + 2 >= products) return;
  multiply_group<(kTile + 2) % 4>(at, a.limbs);
  at.next(a);
}
KN_INLINE void advance(const ClassSums& a, Multiplying& at, int64_t i, int64_t products) {
  before_tile_load();
  switch (i & 3) {
    case 0:
      return advance_tile<0>(a, at, i, products);
    case 1:
      return advance_tile<1>(a, at, i, products);
    case 2:
      return advance_tile<2>(a, at, i, products);
    default:
      return advance_tile<3>(a, at, i, products);
  }
}

template <int R, bool kByStep>
static void class_sums(const ClassSums& a) {
  const int64_t panels = (a.tokens + 15) / 16 * 2, products = panels * a.groups;
  Multiplying at(a);
  for (int64_t i = -2; i < 2; ++i) advance(a, at, i, products);
  int64_t i = 0;
  for (int64_t panel = 0; panel < panels; ++panel) {
    const TokenBlock& block = a.blocks[panel / 2];
    const int64_t left = a.tokens - panel / 2 * 16, tokens = left < 16 ? left : 16;
    const float *scales = a.scales[panel % 2], *steps = block.steps + a.start * tokens;
    float* sums = a.sums + panel * 256;
    __m512 acc[R];
#pragma GCC unroll 16
    for (int t = 0; t < R; ++t)
      acc[t] = a.goes_on ? _mm512_load_ps(sums + t * 16) : _mm512_setzero_ps();
    for (int64_t g = 0; g < a.groups; ++g, ++i) {
      const float* product = a.products + (i & 3) * 256;
      const __m512 scale = _mm512_load_ps(scales + g * kClasses * 16);
#pragma GCC unroll 16
      for (int t = 0; t < R; ++t) {
        __m512 factor = scale;
        if (kByStep)
          factor = _mm512_mul_ps(scale, _mm512_set1_ps(steps[g * tokens + (t < tokens ? t : 0)]));
        acc[t] = _mm512_fmadd_ps(_mm512_load_ps(product + t * 16), factor, acc[t]);
      }
      advance(a, at, i + 2, products);
    }
#pragma GCC unroll 16
    for (int t = 0; t < R; ++t) _mm512_store_ps(sums + t * 16, acc[t]);
  }
}

template <bool kByStep>
static void class_sums_of(const ClassSums& a) {
  if (a.tokens > 12) return class_sums<16, kByStep>(a);
  if (a.tokens > 8) return class_sums<12, kByStep>(a);
  if (a.tokens > 4) return class_sums<8, kByStep>(a);
  class_sums<4, kByStep>(a);
}

// ---- a tile ----

struct TilesScratch {
  char* weights[2];  // B tiles of a class, as many as are done at once
  float* scales[2];  // [group][16]
  float* sums;       // [class][block][panel][token][16]
  float* products;
};
static TilesScratch lay_out(const Int4Tile& tile) {
  const int64_t groups = num_groups(tile.in);
  char* at = tile.scratch;
  const auto take = [&at](int64_t bytes) { return at += bytes, at - bytes; };
  TilesScratch s;
  for (int p = 0; p < 2; ++p) s.weights[p] = take(class_groups(groups, 0) * 1024);
  for (int p = 0; p < 2; ++p) s.scales[p] = (float*)take(groups * 64);
  s.sums = (float*)take(kClasses * kTileTokens * 2 * 64);
  s.products = (float*)take(4096);
  return s;
}

// The rows that come next, fetched into L2 while these are multiplied; null: none.
struct FetchRows {
  const char* weight[2];
  const char* scale[2];
};
KN_INLINE void fetch_some(FetchRows& f, int p, bool scales) {
  if (!f.weight[p]) return;
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) __builtin_prefetch(f.weight[p] + i * 64, 0, 2);
  f.weight[p] += 256;
  if (!scales) return;
  __builtin_prefetch(f.scale[p], 0, 2);
  f.scale[p] += 64;
}
static FetchRows rows_to_fetch(const LimbTile& tile, int64_t row) {
  FetchRows f = {};
  for (int p = 0; p < 2 && row + 32 <= tile.rows[1]; ++p) {
    f.weight[p] = (const char*)tile.weight[p] + (row + 16) * int4_row_bytes(tile.in);
    f.scale[p] = (const char*)(tile.scale[p] + (row + 16) * num_groups(tile.in));
  }
  return f;
}

// The tree of limbs.h over the partial sums of a token, `stride` floats apart.
KN_INLINE f32x16 sum_classes(const float* p, int64_t stride) {
  f32x16 s[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) s[i] = add(load(p + i * stride), load(p + (i + 8) * stride));
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) s[i] = add(s[i], s[i + 4]);
  return add(add(s[0], s[2]), add(s[1], s[3]));
}

template <typename Finish>
static void tiles_rows(const Int4Tile& tile, int64_t row, const TokenBlock* blocks, bool by_step,
                       const TilesScratch& s) {
  const int64_t groups = num_groups(tile.in);
  const TileRows rows[2] = {tile_rows(tile, 0, row), tile_rows(tile, 1, row)};
  for (int p = 0; p < 2; ++p) transpose_scales(rows[p], groups, s.scales[p]);
  FetchRows fetch = rows_to_fetch(tile, row);
  const int64_t class_floats = (tile.tokens + 15) / 16 * 512;
  const int64_t spans =
      tile.tokens > kBlockTokens ? 1 : (class_groups(groups, 0) + kSpanGroups - 1) / kSpanGroups;
  for (int64_t span = 0; span < spans; ++span)
    for (int64_t c = 0; c < kClasses; ++c) {
      const int64_t n = class_groups(groups, c), first = class_groups(groups, 0) * span / spans;
      const int64_t end = class_groups(groups, 0) * (span + 1) / spans, last = end < n ? end : n;
      for (int p = 0; p < 2; ++p)
        for (int64_t m = first; m < last; ++m) {
          fetch_some(fetch, p, m % 2);
          decode_group(rows[p], m * 16 + c, s.weights[p] + (m - first) * 1024);
        }
      before_tile_load();
      const int64_t start = class_start(groups, c) + first, at = (first * kClasses + c) * 16;
      const float* const scales[2] = {s.scales[0] + at, s.scales[1] + at};
      const ClassSums sums{.blocks = blocks,
                           .weights = {s.weights[0], s.weights[1]},
                           .scales = {scales[0], scales[1]},
                           .groups = last > first ? last - first : 0,
                           .start = start,
                           .tokens = tile.tokens,
                           .limbs = tile.limbs,
                           .products = s.products,
                           .sums = s.sums + c * class_floats,
                           .goes_on = span > 0};
      if (by_step)
        class_sums_of<true>(sums);
      else
        class_sums_of<false>(sums);
    }
  for (int64_t t = 0; t < tile.tokens; ++t) {
    const float* of = s.sums + (t / 16 * 32 + t % 16) * 16;
    finish(Finish{}, tile, t, row, sum_classes(of, class_floats),
           sum_classes(of + 256, class_floats));
  }
}

template <typename Finish>
static void int4_tiles(const Int4Tile& tile) {
  const TilesScratch s = lay_out(tile);
  TokenBlock blocks[kTileTokens / kBlockTokens];
  bool by_step = false;
  const char* at = (const char*)tile.x;
  for (int64_t first = 0; first < tile.tokens; first += kBlockTokens) {
    const int64_t tokens = tile.tokens - first < 16 ? tile.tokens - first : 16;
    blocks[first / 16] = token_block(at, tokens, tile.in, tile.limbs);
    by_step |= blocks[first / 16].by_step;
    at += tokens * block_token_bytes(tile.in, tile.limbs);
  }
  // What a block of fewer tokens leaves there is added too: it must not be subnormal, which is
  // slow.
  std::memset(s.products, 0, 4096);
  open_int4_tiles(tile.tokens);
  for (int64_t row = 0; row < tile.rows[0]; row += kPanelRows)
    tiles_rows<Finish>(tile, row, blocks, by_step, s);
  close_tiles();
}

static constexpr Int4TilesKernels kInt4Tiles = {.prepare = int4_tiles_prepare,
                                                .prepare_one_limb = int4_tiles_prepare_one_limb,
                                                .gemm = int4_tiles<StoreRows>,
                                                .swiglu = int4_tiles<StoreSwiglu>};

}  // namespace kn::cpu::KN_ISA
