// mla_decode, one task: a block of heads of one sequence over one chunk of its tokens, 64 tokens (a
// tile) at a time, with the running maximum of online softmax.
//
//   scores  dot_kernel.h     cache rows x heads, over latent + rope    S[head][64]
//   softmax per head         m' = max(m, S), P = exp(S - m'), l = l exp(m - m') + sum P
//   values  64 tokens x 6 heads x 4 vectors of latent columns:
//                  P[head][token] splat * cache[token][16 columns] -> O[head][columns]
//
// The cache is read in its own dtype, widened in registers, once from memory: the second product
// finds the tile in L2. Bytes: chunk * (latent + rope) of cache. FLOPs: 2 * heads * chunk * (2 *
// latent + rope), 121 a byte for 64 heads and bf16. Every output sums its tokens in ascending
// order, one accumulator per output, so neither the number of heads nor their split shows in the
// bits.
//
// Source: online softmax, arXiv 1805.02867; absorbed attention, arXiv 2405.04434, section 2.1.
#pragma once
#include "cpu/dot_kernel.h"
#include "cpu/exp_kernel.h"

namespace kn::cpu::KN_ISA {

// Heads x vectors of columns that accumulate in registers.
#if KN_TIER >= 2
static constexpr int kValueHeads = 6, kValueVectors = 4;
#elif KN_TIER == 1
static constexpr int kValueHeads = 6, kValueVectors = 1;
#else
static constexpr int kValueHeads = 2, kValueVectors = 1;
#endif
static constexpr int kTile = kMlaTileTokens;

// The row of each token of a tile; `n` tokens from `first` on. Only used page ids are read. Repeats
// the last row up to a whole register tile of the scores.
template <typename T>
static void find_rows(const MlaDecodeChunk& a, int64_t first, int n, const T** rows) {
  for (int t = 0; t < n; ++t) {
    const int64_t page = a.page_table[(first + t) / a.page_size];
    rows[t] = (const T*)a.cache + (page * a.page_size + (first + t) % a.page_size) * a.width;
  }
  for (int t = n; t < kTile && t % kDotRows; ++t) rows[t] = rows[n - 1];
}

// scores[head][token]; -inf for the tokens a tile lacks. The next tile is fetched meanwhile, at the
// address of the first of every kDotRows tokens (rows of a page follow each other).
template <typename T>
static void mla_scores(const MlaDecodeChunk& a, const T* const* rows, int n,
                       const T* const* next_rows, int next_n) {
  const int64_t packed_width = round_up16(a.width);
  for (int64_t h = 0; h < a.heads; h += kDotVectors) {
    const int vectors = int(a.heads - h < kDotVectors ? a.heads - h : kDotVectors);
    const float* packed = a.packed + h * packed_width;
    for (int t = 0; t < n; t += kDotRows) {
      const bool fetch = h == 0 && t + kDotRows <= next_n;
      const Prefetch prefetch = {fetch ? (const char*)next_rows[t] : (const char*)packed,
                                 fetch ? int64_t(kDotRows * 16 * sizeof(T)) : 0};
      dot_tile_of(vectors, rows + t, packed, a.width, prefetch, a.scores + h * kTile + t, kTile);
    }
  }
  for (int64_t h = 0; h < a.heads; ++h)
    for (int t = n; t < kTile; ++t) a.scores[h * kTile + t] = -__builtin_inff();
}

// Scores to probabilities under the new maximum, in place; rescale[head] = exp(old - new maximum).
// A NaN score may be missed by the maximum, but its own probability, hence the sum, is NaN.
static void mla_softmax(const MlaDecodeChunk& a) {
  constexpr int kVectors = kTile / 16;
  for (int64_t h = 0; h < a.heads; ++h) {
    float* row = a.scores + h * kTile;
    f32x16 s[kVectors], largest = splat(a.max[h]), sum = zero_f32();
    for (int i = 0; i < kVectors; ++i) {
      s[i] = load(row + i * 16);
      largest = max(largest, s[i]);
    }
    const float new_max = max_lanes(largest);
    for (int i = 0; i < kVectors; ++i) {
      const f32x16 p = exp_f32(sub(s[i], splat(new_max)));
      store(row + i * 16, p);
      sum = add(sum, p);
    }
    a.rescale[h] = exp_f32(a.max[h] - new_max);
    a.sum[h] = a.sum[h] * a.rescale[h] + sum_lanes(sum);
    a.max[h] = new_max;
  }
}

// O[h][column ..] = O * rescale + sum over tokens of P[h][token] * row[token][column ..]
template <int H, int C, typename T>
static void value_tile(const MlaDecodeChunk& a, int64_t h, int64_t column, int lanes,
                       const T* const* rows, int n) {
  const int64_t stride = round_up16(a.latent);
  const float* p = a.scores + h * kTile;
  float* out = a.out + h * stride + column;
  f32x16 acc[H][C];
#pragma GCC unroll 8
  for (int i = 0; i < H; ++i)
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c)
      acc[i][c] = mul(load(out + i * stride + c * 16), splat(a.rescale[h + i]));
  for (int t = 0; t < n; ++t) {
    const T* row = rows[t] + column;
    f32x16 v[C];
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) v[c] = lanes == 16 ? load(row + c * 16) : load(row, lanes);
#pragma GCC unroll 8
    for (int i = 0; i < H; ++i) {
      const f32x16 weight = splat(p[i * kTile + t]);
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) acc[i][c] = fma(weight, v[c], acc[i][c]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < H; ++i)
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) store(out + i * stride + c * 16, acc[i][c]);
}

template <int C, int H = kValueHeads, typename T>
KN_INLINE void value_tile_of(int heads, const MlaDecodeChunk& a, int64_t h, int64_t column,
                             int lanes, const T* const* rows, int n) {
  if constexpr (H > 1)
    if (heads < H) return value_tile_of<C, H - 1>(heads, a, h, column, lanes, rows, n);
  value_tile<H, C>(a, h, column, lanes, rows, n);
}

// A strip of columns stays in L1 while every head passes over it.
template <typename T>
static void mla_values(const MlaDecodeChunk& a, const T* const* rows, int n) {
  for (int64_t column = 0; column < a.latent;) {
    const int64_t left = a.latent - column;
    const bool wide = left >= kValueVectors * 16;
    for (int64_t h = 0; h < a.heads; h += kValueHeads) {
      const int heads = int(a.heads - h < kValueHeads ? a.heads - h : kValueHeads);
      if (wide)
        value_tile_of<kValueVectors>(heads, a, h, column, 16, rows, n);
      else
        value_tile_of<1>(heads, a, h, column, left < 16 ? int(left) : 16, rows, n);
    }
    column += wide ? kValueVectors * 16 : 16;
  }
}

// The queries come with the softmax scale applied, so scores need no further product.
template <typename Q>
static void mla_pack_heads(const MlaDecodeChunk& a) {
  const int64_t width16 = round_up16(a.width);
  for (int64_t h = 0; h < a.heads; h += kDotVectors) {
    const int vectors = int(a.heads - h < kDotVectors ? a.heads - h : kDotVectors);
    pack_vectors((const Q*)a.q + h * a.width, a.width, vectors, a.width, a.packed + h * width16);
  }
  const f32x16 scale = splat(a.softmax_scale);
  for (int64_t i = 0; i < a.heads * width16; i += 16)
    store(a.packed + i, mul(load(a.packed + i), scale));
}

template <typename T>
static void mla_decode_typed_chunk(const MlaDecodeChunk& a) {
  const T* rows[2][kTile];
  int n = int(a.end - a.begin < kTile ? a.end - a.begin : kTile);
  find_rows(a, a.begin, n, rows[0]);
  int current = 0;
  for (int64_t first = a.begin; first < a.end; first += kTile) {
    const int64_t left = a.end - first - n;
    const int next_n = int(left < kTile ? left : kTile);
    if (next_n > 0) find_rows(a, first + n, next_n, rows[!current]);
    mla_scores(a, rows[current], n, rows[!current], next_n);
    mla_softmax(a);
    mla_values(a, rows[current], n);
    current = !current;
    n = next_n;
  }
}

static void mla_decode_chunk(const MlaDecodeChunk& a) {
  if (a.q_dtype == DType::kBf16)
    mla_pack_heads<bf16>(a);
  else
    mla_pack_heads<float>(a);
  // Finite, so that a tile of -inf scores (q . row overflowed) leaves no NaN behind.
  for (int64_t h = 0; h < a.heads; ++h) a.max[h] = -__FLT_MAX__, a.sum[h] = 0;
  for (int64_t i = 0; i < a.heads * round_up16(a.latent); i += 16) store(a.out + i, zero_f32());
  if (a.cache_dtype == DType::kBf16)
    mla_decode_typed_chunk<bf16>(a);
  else
    mla_decode_typed_chunk<float>(a);
}

template <typename T>
static void mla_store_row(const MlaDecodeRow& a, f32x16 scale) {
  T* to = (T*)a.to;
  const int64_t whole = a.latent / 16 * 16;
  for (int64_t i = 0; i < whole; i += 16) store(to + i, mul(load(a.out + i), scale));
  if (whole < a.latent) store(to + whole, mul(load(a.out + whole), scale), int(a.latent - whole));
}

// Adds up a row's chunks in ascending order, in place of the first one, and divides.
static void mla_decode_combine(const MlaDecodeRow& a) {
  float largest = -__FLT_MAX__, sum = 0;
  for (int64_t c = 0; c < a.chunks; ++c)
    if (a.max[c * a.chunk_stride] > largest) largest = a.max[c * a.chunk_stride];
  for (int64_t c = 0; c < a.chunks; ++c) {
    const float weight = exp_f32(a.max[c * a.chunk_stride] - largest);
    sum += a.sum[c * a.chunk_stride] * weight;
    const float* from = a.out + c * a.chunk_stride;
    for (int64_t i = 0; i < a.latent; i += 16) {
      const f32x16 part = mul(load(from + i), splat(weight));
      store(a.out + i, c ? add(load(a.out + i), part) : part);
    }
  }
  const f32x16 scale = splat(a.chunks ? 1.0f / sum : 0.0f);
  if (a.dtype == DType::kBf16)
    mla_store_row<bf16>(a, scale);
  else
    mla_store_row<float>(a, scale);
}

}  // namespace kn::cpu::KN_ISA
