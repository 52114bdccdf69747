// mla_decode of a bf16 cache by bf16 dot instructions, one task: a block of heads of one sequence
// over one chunk of its tokens, 128 tokens (a tile) at a time, with the running maximum of online
// softmax. A dot instruction is two multiply-adds a lane at the price of one, so queries and
// softmax weights can be two bf16 limbs (simd/bf16_limbs.h) and nothing is widened.
//
//   scores   8 tokens x 8 heads; a register holds 4 heads x 8 columns of q:
//              key[token][8 columns], where it lies, repeated for 4 heads . q -> acc[token][4
//              heads]
//            four partial sums an output, by pairs of columns mod 4; the low limb's first, then on
//            top of them the high one's; bf16 queries have no low limb
//   softmax  lanes are heads; the weights of two tokens become pairs of limbs
//   values   pairs of tokens, 64 columns at a time, are interleaved in a buffer in L1, once for all
//            heads; 6 heads x 4 vectors of columns:
//              P limb[pair][head] splat . value[pair][16 columns] -> O[head][columns]
//
// Neither the number of heads nor their split shows in the bits.
#pragma once
#include "cpu/exp_kernel.h"
#include "cpu/mla_decode_rows_kernel.h"

namespace kn::cpu::KN_ISA {

static constexpr int kDotTokens = 128;                    // of a tile
static constexpr int kScoreTokens = 8, kScoreGroups = 2;  // groups of 4 heads
static constexpr int kBlockHeads = 4 * kScoreGroups;
static constexpr int kFirstTokens = 2 * kScoreTokens;     // fetched before anything else
static constexpr int kValueHeads = 6, kValueVectors = 4;  // accumulators of the values
static constexpr int kStrip = 16 * kValueVectors;         // columns
static constexpr int kPairs = kDotTokens / 2;

// A tile: `tokens` <= kDotTokens rows and what is known of them.
struct DotTile : CachedRows<bf16, kDotTokens> {
  int64_t heads, heads16, latent, width, row_bytes, steps;  // of 8 columns
  int limbs;                                                // of the queries
  bool first;                  // tile of the chunk: nothing in `out` yet
  float scale;                 // of the scores
  bf16* q;                     // packed
  bf16* copies;                // [kScoreTokens][steps * 8]: rows whose width is no multiple of 8
  uint32_t* pairs;             // [kPairs][kStrip]: a strip of values
  uint32_t* weights;           // [kPairs][low, high][heads16]
  float* scores;               // [kDotTokens][heads16]
  float *max, *sum, *rescale;  // [heads16]
  float* out;                  // [heads][latent rounded up to 16]
};

static int64_t dots_scratch_bytes(int64_t heads, int64_t, int64_t width) {
  const int64_t q = 2 * round_up(heads, 4) * round_up(width, 8);
  const int64_t copies = kScoreTokens * round_up(width, 8), heads16 = round_up16(heads);
  return 2 * (round_up(q, 32) + copies) + 4 * (kPairs * kStrip + (2 * kDotTokens + 3) * heads16);
}

// Eight columns of each of the heads of a group, for all groups of a block, low limbs first:
// [limb][step][G][4 heads][8]. Heads past the last and columns past the width are zero.
template <typename Q>
static void pack_query_pairs(const Q* q, const DotTile& m) {
  const int64_t whole = m.width / 16 * 16;
  for (int64_t h = 0; h < round_up(m.heads, 4); ++h) {
    const int64_t block = h / kBlockHeads * kBlockHeads;
    const int64_t step = m.heads - block <= 4 ? 32 : 32 * kScoreGroups;
    bf16* to = m.q + block * m.limbs * m.steps * 8 + (h - block) * 8;
    const auto put = [&](int64_t k, f32x16 x, bool both) {
      __m512i bits = limb_bits(x.v);
      for (int l = m.limbs - 1; l >= 0; --l) {
        const __m256i limb = _mm512_cvtepi32_epi16(_mm512_srli_epi32(bits, 16));
        bf16* first = to + (l * m.steps + k / 8) * step;
        _mm_store_si128((__m128i*)first, _mm256_castsi256_si128(limb));
        if (both) _mm_store_si128((__m128i*)(first + step), _mm256_extracti128_si256(limb, 1));
        bits = limb_bits(_mm512_sub_ps(x.v, upper_half(bits)));
      }
    };
    const Q* row = q + h * m.width;
    const bool there = h < m.heads;
    for (int64_t k = 0; k < whole; k += 16) put(k, there ? load(row + k) : zero_f32(), true);
    if (const int rest = int(m.width - whole))
      put(whole, there ? load(row + whole, rest) : zero_f32(), rest > 8);
  }
}

static void start_dots(const MlaDecodeChunk& a, DotTile& m) {
  m.heads = a.heads, m.heads16 = round_up16(a.heads), m.latent = a.latent, m.width = a.width;
  m.steps = ceil_div(a.width, 8);
  m.limbs = a.q_dtype == DType::kBf16 ? 1 : 2, m.first = true, m.scale = a.softmax_scale;
  m.q = (bf16*)a.scratch;
  m.copies = m.q + round_up(2 * round_up(a.heads, 4) * m.steps * 8, 32);
  m.pairs = (uint32_t*)(m.copies + kScoreTokens * m.steps * 8);
  m.weights = m.pairs + kPairs * kStrip;
  m.scores = (float*)(m.weights + kDotTokens * m.heads16);
  m.max = m.scores + kDotTokens * m.heads16;
  m.sum = m.max + m.heads16;
  m.rescale = m.sum + m.heads16;
  m.out = a.out;
  if (a.q_dtype == DType::kBf16)
    pack_query_pairs((const bf16*)a.q, m);
  else
    pack_query_pairs((const float*)a.q, m);
  // Finite, so that a tile of -inf scores (q . row overflowed) leaves no NaN behind.
  for (int64_t h = 0; h < m.heads16; ++h) m.max[h] = -__FLT_MAX__, m.sum[h] = 0;
  // So that no lane of softmax meets what the scratch held, which could be slow.
  if (m.heads < m.heads16)
    for (int64_t i = 0; i < kDotTokens * m.heads16; i += 16) store(m.scores + i, zero_f32());
}

// Scores of 8 tokens and one block of heads.
template <int G>
static void dot_scores(const DotTile& m, const bf16* const* rows, const bf16* q, Prefetch prefetch,
                       float* scores) {
  f32x16 acc[kScoreTokens * G];
#pragma GCC unroll 16
  for (int i = 0; i < kScoreTokens * G; ++i) acc[i] = zero_f32();
  for (int l = 0; l < m.limbs; ++l) {
    const bf16* row[kScoreTokens];
#pragma GCC unroll 8
    for (int t = 0; t < kScoreTokens; ++t) row[t] = rows[t];
    for (int64_t s = 0; s < m.steps; ++s, q += G * 32) {
      __m512bh query[G];
#pragma GCC unroll 2
      for (int g = 0; g < G; ++g) query[g] = (__m512bh)_mm512_load_si512(q + g * 32);
#pragma GCC unroll 8
      for (int t = 0; t < kScoreTokens; ++t) {
        const auto key =
            (__m512bh)_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)(row[t] + s * 8)));
#pragma GCC unroll 2
        for (int g = 0; g < G; ++g)
          acc[t * G + g].v = _mm512_dpbf16_ps(acc[t * G + g].v, key, query[g]);
      }
      __builtin_prefetch(prefetch.ahead, 0, 2);
      prefetch.ahead += prefetch.step;
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < kScoreTokens * G; i += 4) {
    float lanes[16];
    store(lanes, mul(sum_quads(acc[i], acc[i + 1], acc[i + 2], acc[i + 3]), splat(m.scale)));
#pragma GCC unroll 4
    for (int j = 0; j < 4 / G; ++j)
      __builtin_memcpy(scores + (i / G + j) * m.heads16, lanes + j * G * 4, G * 16);
  }
}

// What is fetched with the scores of a block of heads for the tokens from t on: of the next tile,
// as above; of the first one, which nobody has fetched, itself, two blocks of tokens ahead of its
// use.
static Prefetch fetch_with_scores(const DotTile& m, int t, int64_t block) {
  const int64_t blocks = m.first ? ceil_div(m.heads, kBlockHeads) : 1;
  if (block >= blocks) return {(const char*)m.q, 0};
  const int64_t bytes = (m.first ? kScoreTokens : kScoreTokens / 2) * m.row_bytes / blocks;
  const int64_t step = bytes / (m.limbs * m.steps);
  if (!m.first) return fetch_rows(m, t / 2, 0, step, m.pairs);
  const int ahead = t + kFirstTokens < m.tokens ? t + kFirstTokens : t;
  return {(const char*)m.rows[ahead] + block * bytes, step};
}

static void mla_dot_scores(const DotTile& m) {
  for (int t = 0; t < m.tokens; t += kScoreTokens) {
    const bf16* rows[kScoreTokens];
    for (int i = 0; i < kScoreTokens; ++i) {
      rows[i] = m.rows[t + i < m.tokens ? t + i : t];
      if (m.width % 8 == 0) continue;
      bf16* copy = m.copies + i * m.steps * 8;
      __builtin_memset(copy + m.width, 0, (m.steps * 8 - m.width) * 2);
      __builtin_memcpy(copy, rows[i], m.width * 2);
      rows[i] = copy;
    }
    for (int64_t h = 0; h < m.heads; h += kBlockHeads) {
      const Prefetch prefetch = fetch_with_scores(m, t, h / kBlockHeads);
      const bf16* q = m.q + h * m.limbs * m.steps * 8;
      float* scores = m.scores + t * m.heads16 + h;
      if (m.heads - h <= 4)
        dot_scores<1>(m, rows, q, prefetch, scores);
      else
        dot_scores<kScoreGroups>(m, rows, q, prefetch, scores);
    }
  }
}

// Scores to limbs of probabilities under the new maximum; rescale[head] = exp(old - new maximum). A
// NaN score is missed by the maximum, but its own probability, hence the sum, is NaN.
static void mla_dot_softmax(const DotTile& m) {
  for (int64_t h = 0; h < m.heads16; h += 16) {
    const float* scores = m.scores + h;
    const f32x16 old = load(m.max + h);
    f32x16 largest = old, sum = zero_f32();
    for (int t = 0; t < m.tokens; ++t) largest = max(load(scores + t * m.heads16), largest);
    for (int t = 0; t < m.tokens; t += 2) {
      f32x16 p[2] = {zero_f32(), zero_f32()};
      for (int i = 0; i < 2 && t + i < m.tokens; ++i) {
        p[i] = exp_f32(sub(load(scores + (t + i) * m.heads16), largest));
        sum = add(sum, p[i]);
      }
      const WeightLimbs limbs = weight_limbs(p[0], p[1]);
      _mm512_store_si512(m.weights + t * m.heads16 + h, limbs.low);
      _mm512_store_si512(m.weights + (t + 1) * m.heads16 + h, limbs.high);
    }
    const f32x16 rescale = exp_f32(sub(old, largest));
    store(m.rescale + h, rescale);
    store(m.sum + h, add(mul(load(m.sum + h), rescale), sum));
    store(m.max + h, largest);
  }
}

// O[h][column ..] = O * rescale + sum over pairs of tokens of both limbs of their weights . values
template <int H, int C>
static void dot_values(const DotTile& m, const uint32_t* value, int64_t h, int64_t column,
                       Prefetch prefetch) {
  const int64_t stride = round_up16(m.latent);
  const uint32_t* weight = m.weights + h;
  float* out = m.out + h * stride + column;
  f32x16 acc[H][C];
#pragma GCC unroll 8
  for (int i = 0; i < H; ++i)
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c)
      acc[i][c] =
          m.first ? zero_f32() : mul(load(out + i * stride + c * 16), splat(m.rescale[h + i]));
  for (int t = 0; t < m.tokens; t += 2, value += kStrip) {
    __m512bh v[C];
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) v[c] = (__m512bh)_mm512_load_si512(value + c * 16);
#pragma GCC unroll 2
    for (int limb = 0; limb < 2; ++limb, weight += m.heads16) {
#pragma GCC unroll 8
      for (int i = 0; i < H; ++i) {
        const auto w = (__m512bh)_mm512_set1_epi32(int(weight[i]));
#pragma GCC unroll 8
        for (int c = 0; c < C; ++c) acc[i][c].v = _mm512_dpbf16_ps(acc[i][c].v, v[c], w);
      }
    }
    __builtin_prefetch(prefetch.ahead, 0, 2);
    prefetch.ahead += prefetch.step;
  }
#pragma GCC unroll 8
  for (int i = 0; i < H; ++i)
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) store(out + i * stride + c * 16, acc[i][c]);
}

template <int C, int H = kValueHeads>
KN_INLINE void dot_values_of(int64_t heads, const DotTile& m, const uint32_t* value, int64_t h,
                             int64_t column, Prefetch prefetch) {
  if constexpr (H > 1)
    if (heads < H) return dot_values_of<C, H - 1>(heads, m, value, h, column, prefetch);
  dot_values<H, C>(m, value, h, column, prefetch);
}

// Columns [column, column + 16 C) of all heads.
template <int C>
static void dot_value_columns(const DotTile& m, const uint32_t* value, int64_t column) {
  const int64_t strips = ceil_div(m.latent, kStrip), strip = column / kStrip;
  const int first = kDotTokens / 2 + int(kDotTokens / 2 * strip / strips);
  const int64_t bytes = kDotTokens / 2 * m.row_bytes / strips;
  const int64_t blocks = ceil_div(m.heads, kValueHeads), step = bytes / blocks / kPairs;
  for (int64_t h = 0; h < m.heads; h += kValueHeads)
    dot_values_of<C>(m.heads - h, m, value, h, column,
                     fetch_rows(m, first, h / kValueHeads * kPairs * step, step, m.pairs));
}

// Columns [column, column + n) of the tile's rows as pairs of tokens, zero up to 32 columns.
static void pair_values(const DotTile& m, int64_t column, int64_t n) {
  const __m512i front = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40,
                                         8, 39, 7, 38, 6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
  const __m512i back = _mm512_add_epi16(front, _mm512_set1_epi16(16));
  for (int t = 0; t < m.tokens; t += 2) {
    const bf16 *even = m.rows[t] + column, *odd = t + 1 < m.tokens ? m.rows[t + 1] + column : even;
    const __mmask32 there = t + 1 < m.tokens ? 0xffffffff : 0;
    uint32_t* to = m.pairs + t / 2 * kStrip;
    for (int64_t i = 0; i < n; i += 32) {
      const __mmask32 columns = n - i >= 32 ? 0xffffffff : __mmask32((1u << (n - i)) - 1);
      const __m512i x = _mm512_maskz_loadu_epi16(columns, even + i);
      const __m512i y = _mm512_maskz_loadu_epi16(columns & there, odd + i);
      _mm512_store_si512(to + i, _mm512_permutex2var_epi16(x, front, y));
      _mm512_store_si512(to + i + 16, _mm512_permutex2var_epi16(x, back, y));
    }
  }
}

static void mla_dot_values(const DotTile& m) {
  for (int64_t strip = 0; strip < m.latent; strip += kStrip) {
    const int64_t left = m.latent - strip, columns = left < kStrip ? left : kStrip;
    pair_values(m, strip, columns);
    if (columns > kStrip - 16)
      dot_value_columns<kValueVectors>(m, m.pairs, strip);
    else
      for (int64_t c = 0; c < columns; c += 16) dot_value_columns<1>(m, m.pairs + c, strip + c);
  }
}

static void mla_decode_dots_chunk(const MlaDecodeChunk& a) {
  DotTile m;
  m.row_bytes = a.row_bytes;
  find_next_rows(a, a.begin, m);
  for (int t = 0; t < kFirstTokens && t < m.next_tokens; ++t)
    for (int64_t i = 0; i < m.row_bytes; i += 64)
      __builtin_prefetch((const char*)m.next_rows[t] + i, 0, 2);
  start_dots(a, m);
  for (int64_t first = a.begin; first < a.end; first += kDotTokens) {
    take_next_rows(a, first, m);
    mla_dot_scores(m);
    mla_dot_softmax(m);
    mla_dot_values(m);
    m.first = false;
  }
  for (int64_t h = 0; h < a.heads; ++h) a.max[h] = m.max[h], a.sum[h] = m.sum[h];
}

static constexpr MlaDecodeKernels kMlaDecodeDots = {.scratch_bytes = dots_scratch_bytes,
                                                    .chunk = mla_decode_dots_chunk};

}  // namespace kn::cpu::KN_ISA
