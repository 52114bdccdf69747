// mla_decode on matrix tiles, for a bf16 cache: one chunk of up to 512 tokens with one maximum, so
// nothing is rescaled inside it.
//
//   q and the probabilities are fp32: each becomes two bf16 limbs, x = high + low, within 2^-17 |x|
//   scores   A = 16 cache rows x 32 columns, as they lie    B = q limbs [16 pairs of columns][16
//            heads][2]                                       S[token][head] = high sum + low sum
//   softmax  lanes are heads; the limbs of 32 tokens are transposed into tiles
//   values   A = P limbs [16 heads][32 tokens]              B = V [16 pairs of tokens][16
//   columns][2]
//            made once a chunk, used by all heads           O[head][column] = high sum + low sum
//
// Two row tiles meet two column tiles: four loads for four products. A block is 16 heads, whose
// high and low limbs are two tiles; up to 8 heads that remain share one tile, high and low halves.
// High and low products are summed apart in either case, so the bits of a head do not depend on
// which block it is in. Memory is read once: pages are fetched 32 tokens ahead.
#pragma once
#include "cpu/exp_kernel.h"
#include "cpu/mla_decode_rows_kernel.h"

namespace kn::cpu::KN_ISA {

static constexpr int kAmxTokens = kMlaChunkTokens;
static constexpr int kStep = 32;  // tokens or columns of a product
static constexpr int kSteps = kAmxTokens / kStep;

// Blocks of heads: `whole` ones with two limb tiles, then `packed` (0 or 1) with one.
struct AmxHeads {
  int64_t whole = 0, packed = 0;
  AmxHeads() = default;
  explicit AmxHeads(int64_t heads)
      : whole(heads / 16 + (heads % 16 > 8)), packed(heads % 16 >= 1 && heads % 16 <= 8) {}
  int64_t blocks() const { return whole + packed; }
  int64_t tiles() const { return 2 * whole + packed; }
};

struct AmxChunk {
  AmxHeads heads;
  int64_t width_steps, strips;  // of 32 columns: of a row, of the latent part
  int tokens, steps;
  char* q;           // [limb tile pair][width step][1 or 2] tiles
  char* values;      // [strip][step][2] tiles
  char* weights;     // [limb tile pair][step][1 or 2] tiles
  float* scores;     // [block][kAmxTokens][16]
  float *max, *sum;  // [block][16]
  char* rows;        // [kStep][width_steps * 64 bytes], rows that cannot be used where they lie
  float* sums;       // [4] tiles of results
};

static int64_t amx_scratch_bytes(int64_t heads, int64_t latent, int64_t width) {
  const AmxHeads h(heads);
  const int64_t width_steps = ceil_div(width, kStep), strips = ceil_div(latent, kStep);
  return h.tiles() * (width_steps + kSteps) * kTileBytes + strips * kSteps * 2 * kTileBytes +
         h.blocks() * (kAmxTokens + 2) * 64 + kStep * width_steps * 64 + 4 * kTileBytes;
}

static AmxChunk lay_out(const MlaDecodeChunk& a) {
  AmxChunk c;
  c.heads = AmxHeads(a.heads);
  c.width_steps = ceil_div(a.width, kStep), c.strips = ceil_div(a.latent, kStep);
  c.tokens = int(a.end - a.begin), c.steps = int(ceil_div(c.tokens, kStep));
  char* at = (char*)a.scratch;
  const auto take = [&at](int64_t bytes) { return at += bytes, at - bytes; };
  c.q = take(c.heads.tiles() * c.width_steps * kTileBytes);
  c.values = take(c.strips * kSteps * 2 * kTileBytes);
  c.weights = take(c.heads.tiles() * kSteps * kTileBytes);
  c.scores = (float*)take(c.heads.blocks() * kAmxTokens * 64);
  c.max = (float*)take(c.heads.blocks() * 64);
  c.sum = (float*)take(c.heads.blocks() * 64);
  c.rows = take(kStep * c.width_steps * 64);
  c.sums = (float*)take(4 * kTileBytes);
  return c;
}

// One step of 32 columns of a block's queries as limb tiles; lanes past the last head are zero.
// Rows of pairs: limbs of 16 heads x 16 pairs of columns, transposed.
template <typename Q>
static void pack_query_step(const Q* q, int64_t stride, int heads, int columns, bool packed,
                            char* to) {
  __m512i high[16], low[16];
#pragma GCC unroll 16
  for (int h = 0; h < 16; ++h) {
    const int source = packed ? h % 8 : h;
    f32x16 half[2] = {zero_f32(), zero_f32()};
    for (int i = 0; i < 2 && source < heads; ++i) {
      const int lanes = columns - i * 16 < 0 ? 0 : columns - i * 16 < 16 ? columns - i * 16 : 16;
      half[i] = load(q + source * stride + i * 16, lanes);
    }
    __m512i bits[2], rest[2];
    for (int i = 0; i < 2; ++i) {
      bits[i] = limb_bits(half[i].v);
      rest[i] = limb_bits(_mm512_sub_ps(half[i].v, upper_half(bits[i])));
    }
    const auto narrow = [](const __m512i(&x)[2]) {
      return _mm512_inserti64x4(
          _mm512_castsi256_si512(_mm512_cvtepi32_epi16(_mm512_srli_epi32(x[0], 16))),
          _mm512_cvtepi32_epi16(_mm512_srli_epi32(x[1], 16)), 1);
    };
    low[h] = narrow(rest);
    high[h] = packed && h >= 8 ? low[h] : narrow(bits);
  }
  transpose16(high);
  for (int i = 0; i < 16; ++i) _mm512_store_si512(to + i * 64, high[i]);
  if (packed) return;
  transpose16(low);
  for (int i = 0; i < 16; ++i) _mm512_store_si512(to + kTileBytes + i * 64, low[i]);
}

template <typename Q>
static void pack_query_limbs(const MlaDecodeChunk& a, const AmxChunk& c) {
  for (int64_t b = 0; b < c.heads.blocks(); ++b) {
    const bool packed = b == c.heads.whole;
    const int heads = int(a.heads - b * 16 < 16 ? a.heads - b * 16 : 16);
    char* to = c.q + b * 2 * c.width_steps * kTileBytes;
    for (int64_t k = 0; k < c.width_steps; ++k, to += (packed ? 1 : 2) * kTileBytes) {
      const int64_t left = a.width - k * kStep;
      pack_query_step((const Q*)a.q + b * 16 * a.width + k * kStep, a.width, heads,
                      int(left < kStep ? left : kStep), packed, to);
    }
  }
}

KN_INLINE __m512i load_columns(const bf16* row, int64_t columns) {
  return columns >= kStep ? _mm512_loadu_si512(row)
                          : _mm512_maskz_loadu_epi16(__mmask32((1u << columns) - 1), row);
}

// The latent columns of up to 32 rows as pairs of tokens. A strip's tiles hold columns 0-3, 8-11,
// .. and 4-7, 12-15, ..: what one unpacking of two rows gives; add_limb_values puts them in order.
static void pair_values(const AmxChunk& c, const bf16* const* rows, int count, int64_t width,
                        int step) {
  for (int64_t s = 0; s < c.strips; ++s) {
    char* to = c.values + (s * kSteps + step) * 2 * kTileBytes;
    for (int t = 0; t < kStep; t += 2, to += 64) {
      const int64_t left = width - s * kStep;
      const __m512i none = _mm512_setzero_si512();
      const __m512i even = t < count ? load_columns(rows[t] + s * kStep, left) : none;
      const __m512i odd = t + 1 < count ? load_columns(rows[t + 1] + s * kStep, left) : none;
      _mm512_store_si512(to, _mm512_unpacklo_epi16(even, odd));
      _mm512_store_si512(to + kTileBytes, _mm512_unpackhi_epi16(even, odd));
    }
  }
}

// 16 rows as the A side of the scores: where they lie if they follow each other, are whole steps
// wide and all there; else copied, zeros where nothing is.
struct RowBlock {
  const char* at;
  int64_t stride;
};
static RowBlock row_block(const AmxChunk& c, const bf16* const* rows, int count, int64_t width,
                          char* copy) {
  bool in_place = count >= 16 && width % kStep == 0;
  for (int t = 1; t < 16 && in_place; ++t) in_place = rows[t] == rows[t - 1] + width;
  if (in_place) return {(const char*)rows[0], width * 2};
  const int64_t stride = c.width_steps * 64;
  for (int t = 0; t < 16; ++t)
    for (int64_t k = 0; k < c.width_steps; ++k)
      _mm512_store_si512(copy + t * stride + k * 64,
                         t < count ? load_columns(rows[t] + k * kStep, width - k * kStep)
                                   : _mm512_setzero_si512());
  return {copy, stride};
}

// A block of heads over 32 tokens: sums of products with the high and low limbs of q, in tiles
// [token half][high, low]. `ahead`: the rows to fetch, 16 and 16 after each other.
static void score_tiles(const AmxChunk& c, const RowBlock (&r)[2], const char* q, bool packed,
                        const char* const (&ahead)[2], int64_t fetch_bytes) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t k = 0; k < c.width_steps; ++k) {
    _tile_loadd(4, r[0].at + k * 64, r[0].stride);
    _tile_loadd(5, r[1].at + k * 64, r[1].stride);
    _tile_loadd(6, q, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(2, 5, 6);
    if (!packed) {
      _tile_loadd(7, q + kTileBytes, 64);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(3, 5, 7);
    }
    q += (packed ? 1 : 2) * kTileBytes;
    for (int64_t i = k * fetch_bytes; i < (k + 1) * fetch_bytes; i += 64) {
      __builtin_prefetch(ahead[0] + i, 0, 2);
      __builtin_prefetch(ahead[1] + i, 0, 2);
    }
  }
  _tile_stored(0, c.sums, 64);
  _tile_stored(2, c.sums + 512, 64);
  if (packed) return;
  _tile_stored(1, c.sums + 256, 64);
  _tile_stored(3, c.sums + 768, 64);
}

// scores = scale * (high + low), and their maximum. A packed block has both in one register; its
// upper half then repeats the lower one.
static void add_limb_scores(const AmxChunk& c, int64_t block, int first, int count, bool packed,
                            float scale) {
  float* scores = c.scores + (block * kAmxTokens + first) * 16;
  f32x16 largest = load(c.max + block * 16);
  for (int t = 0; t < count; ++t) {
    const float* sums = c.sums + t / 16 * 512 + t % 16 * 16;
    const f32x16 high = load(sums);
    const f32x16 low =
        packed ? f32x16{_mm512_shuffle_f32x4(high.v, high.v, 0x4e)} : load(sums + 256);
    const f32x16 s = mul(add(high, low), splat(scale));
    largest = max(s, largest);
    store(scores + t * 16, s);
  }
  store(c.max + block * 16, largest);
}

// Probabilities of 32 tokens of a block, as limb tiles; their sum is added to `sum`.
static void weight_tiles(const float* scores, int count, f32x16 largest, bool packed, f32x16& sum,
                         char* to) {
  __m512i high[16], low[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) {
    f32x16 p[2];
    for (int j = 0; j < 2; ++j) {
      const int t = i * 2 + j;
      p[j] = t < count ? exp_f32(sub(load(scores + t * 16), largest)) : zero_f32();
      sum = add(sum, p[j]);
    }
    const WeightLimbs limbs = weight_limbs(p[0], p[1]);
    high[i] = limbs.high, low[i] = limbs.low;
    if (packed) high[i] = _mm512_mask_mov_epi32(high[i], 0xff00, low[i]);
  }
  transpose16(high);
  for (int i = 0; i < 16; ++i) _mm512_store_si512(to + i * 64, high[i]);
  if (packed) return;
  transpose16(low);
  for (int i = 0; i < 16; ++i) _mm512_store_si512(to + kTileBytes + i * 64, low[i]);
}

static void amx_softmax(const AmxChunk& c) {
  for (int64_t b = 0; b < c.heads.blocks(); ++b) {
    const bool packed = b == c.heads.whole;
    const f32x16 largest = load(c.max + b * 16);
    f32x16 sum = zero_f32();
    char* to = c.weights + b * 2 * kSteps * kTileBytes;
    for (int t = 0; t < c.tokens; t += kStep, to += (packed ? 1 : 2) * kTileBytes)
      weight_tiles(c.scores + (b * kAmxTokens + t) * 16, c.tokens - t, largest, packed, sum, to);
    store(c.sum + b * 16, sum);
  }
}

// A block of heads, one strip of columns, all tokens: tiles [high, low][columns half].
static void value_tiles(const AmxChunk& c, const char* weights, const char* values, bool packed) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int t = 0; t < c.steps; ++t, values += 2 * kTileBytes) {
    _tile_loadd(4, weights, 64);
    _tile_loadd(6, values, 64);
    _tile_loadd(7, values + kTileBytes, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if (!packed) {
      _tile_loadd(5, weights + kTileBytes, 64);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    weights += (packed ? 1 : 2) * kTileBytes;
  }
  _tile_stored(0, c.sums, 64);
  _tile_stored(1, c.sums + 256, 64);
  if (packed) return;
  _tile_stored(2, c.sums + 512, 64);
  _tile_stored(3, c.sums + 768, 64);
}

// out[head][32 columns] = high + low, quarters of the two tiles in the order of the columns; the
// second 16 of them only if there are that many.
static void add_limb_values(const AmxChunk& c, int heads, bool packed, bool both, float* out,
                            int64_t stride) {
  const float* low = c.sums + (packed ? 8 * 16 : 512);
  for (int h = 0; h < heads; ++h, out += stride) {
    const f32x16 first = add(load(c.sums + h * 16), load(low + h * 16));
    const f32x16 second = add(load(c.sums + 256 + h * 16), load(low + 256 + h * 16));
    const __m512i front = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11);
    const __m512i back = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
    const __m512d x = _mm512_castps_pd(first.v), y = _mm512_castps_pd(second.v);
    _mm512_storeu_ps(out, _mm512_castpd_ps(_mm512_permutex2var_pd(x, front, y)));
    if (both) _mm512_storeu_ps(out + 16, _mm512_castpd_ps(_mm512_permutex2var_pd(x, back, y)));
  }
}

static void amx_scores(const MlaDecodeChunk& a, const AmxChunk& c) {
  const bf16 *rows[kStep], *next[kStep];
  const auto find_rows = [&](int64_t first, const bf16** to) {
    const int n = int(a.end - first < kStep ? a.end - first : kStep);
    for (int t = 0; t < n; ++t) to[t] = cache_row<bf16>(a, first + t);
    return n;
  };
  int next_count = find_rows(a.begin, next);
  for (int step = 0; step < c.steps; ++step) {
    const int count = next_count;
    __builtin_memcpy(rows, next, sizeof rows);
    const int64_t ahead_token = a.begin + (step + 1) * kStep;
    next_count = ahead_token < a.end ? find_rows(ahead_token, next) : 0;
    pair_values(c, rows, count, a.width, step);
    const int64_t half_bytes = 16 * c.width_steps * 64;
    const RowBlock blocks[2] = {row_block(c, rows, count, a.width, c.rows),
                                row_block(c, rows + 16, count - 16, a.width, c.rows + half_bytes)};
    before_tile_load();
    for (int64_t b = 0; b < c.heads.blocks(); ++b) {
      const bool packed = b == c.heads.whole;
      const bool fetch = b == 0 && next_count > 16;
      const char* const ahead[2] = {(const char*)next[0], (const char*)next[16]};
      score_tiles(c, blocks, c.q + b * 2 * c.width_steps * kTileBytes, packed, ahead,
                  fetch ? 16 * 64 : 0);
      add_limb_scores(c, b, step * kStep, count, packed, a.softmax_scale);
    }
  }
}

static void amx_values(const MlaDecodeChunk& a, const AmxChunk& c) {
  const int64_t stride = round_up16(a.latent);
  for (int64_t s = 0; s < c.strips; ++s)
    for (int64_t b = 0; b < c.heads.blocks(); ++b) {
      const bool packed = b == c.heads.whole;
      const int heads = int(a.heads - b * 16 < 16 ? a.heads - b * 16 : 16);
      value_tiles(c, c.weights + b * 2 * kSteps * kTileBytes,
                  c.values + s * kSteps * 2 * kTileBytes, packed);
      add_limb_values(c, heads, packed, stride - s * kStep >= kStep,
                      a.out + b * 16 * stride + s * kStep, stride);
    }
}

static void mla_decode_amx_chunk(const MlaDecodeChunk& a) {
  const AmxChunk c = lay_out(a);
  open_tiles();
  if (a.q_dtype == DType::kBf16)
    pack_query_limbs<bf16>(a, c);
  else
    pack_query_limbs<float>(a, c);
  // Finite, so that scores of -inf alone (q . row overflowed) leave no NaN behind.
  for (int64_t i = 0; i < c.heads.blocks() * 16; ++i) c.max[i] = -__FLT_MAX__;
  amx_scores(a, c);
  amx_softmax(c);
  before_tile_load();
  amx_values(a, c);
  close_tiles();
  for (int64_t h = 0; h < a.heads; ++h) a.max[h] = c.max[h], a.sum[h] = c.sum[h];
}

static constexpr MlaDecodeKernels kMlaDecodeAmx = {.scratch_bytes = amx_scratch_bytes,
                                                   .chunk = mla_decode_amx_chunk};

}  // namespace kn::cpu::KN_ISA
