// mla_decode, one task: a block of heads of one sequence over one chunk of its tokens, 64 tokens (a
// tile) at a time, with the running maximum of online softmax.
//
//   scores   S[token][head]     mla_decode_tiles_kernel.h
//   softmax  lanes are heads    m' = max(m, S), P = exp(S - m'), l = l exp(m - m') + sum P
//   values   O[head][column]    mla_decode_tiles_kernel.h
//
// Bytes: chunk * (latent + rope) of cache. FLOPs: 2 * heads * chunk * (2 * latent + rope), 121 a
// byte for 64 heads and bf16.
//
// Source: online softmax, arXiv 1805.02867; absorbed attention, arXiv 2405.04434, section 2.1.
#pragma once
#include "cpu/exp_kernel.h"
#include "cpu/mla_decode_rows_kernel.h"
#include "cpu/mla_decode_tiles_kernel.h"

namespace kn::cpu::KN_ISA {

static int64_t mla_decode_scratch_bytes(int64_t heads, int64_t, int64_t width) {
  const int64_t q = round_up(heads, 4) * round_up(width, 4), heads16 = round_up16(heads);
  return 4 * (round_up16(q) + kWideFloats + (kTile + 3) * heads16);
}

template <typename T>
static void start_tiles(const MlaDecodeChunk& a, MlaTile<T>& m) {
  m.heads = a.heads, m.heads16 = round_up16(a.heads), m.latent = a.latent, m.width = a.width;
  m.row_bytes = a.row_bytes;
  float* q = (float*)a.scratch;
  m.q = q;
  m.wide = q + round_up16(round_up(a.heads, 4) * round_up(a.width, 4));
  m.scores = m.wide + kWideFloats;
  m.max = m.scores + kTile * m.heads16;
  m.sum = m.max + m.heads16;
  m.rescale = m.sum + m.heads16;
  m.out = a.out;
  if (a.q_dtype == DType::kBf16)
    pack_queries((const bf16*)a.q, a.heads, a.width, a.softmax_scale, q);
  else
    pack_queries((const float*)a.q, a.heads, a.width, a.softmax_scale, q);
  // Finite, so that a tile of -inf scores (q . row overflowed) leaves no NaN behind.
  for (int64_t h = 0; h < m.heads16; ++h) m.max[h] = -__FLT_MAX__, m.sum[h] = 0;
  for (int64_t i = 0; i < kTile * m.heads16; i += 16) store(m.scores + i, zero_f32());
  for (int64_t i = 0; i < a.heads * round_up16(a.latent); i += 16) store(m.out + i, zero_f32());
}

// Scores to probabilities under the new maximum, in place; rescale[head] = exp(old - new maximum).
// A NaN score is missed by the maximum, but its own probability, hence the sum, is NaN.
template <typename T>
static void mla_softmax(const MlaTile<T>& m) {
  for (int64_t h = 0; h < m.heads16; h += 16) {
    float* scores = m.scores + h;
    const f32x16 old = load(m.max + h);
    f32x16 largest = old, sum = zero_f32();
    for (int t = 0; t < m.tokens; ++t) largest = max(load(scores + t * m.heads16), largest);
    for (int t = 0; t < m.tokens; ++t) {
      const f32x16 p = exp_f32(sub(load(scores + t * m.heads16), largest));
      store(scores + t * m.heads16, p);
      sum = add(sum, p);
    }
    const f32x16 rescale = exp_f32(sub(old, largest));
    store(m.rescale + h, rescale);
    store(m.sum + h, add(mul(load(m.sum + h), rescale), sum));
    store(m.max + h, largest);
  }
}

template <typename T>
static void mla_decode_typed_chunk(const MlaDecodeChunk& a) {
  MlaTile<T> m;
  start_tiles(a, m);
  find_next_rows(a, a.begin, m);
  for (int64_t first = a.begin; first < a.end; first += kTile) {
    take_next_rows(a, first, m);
    mla_scores(m);
    mla_softmax(m);
    mla_values(m);
  }
  for (int64_t h = 0; h < a.heads; ++h) a.max[h] = m.max[h], a.sum[h] = m.sum[h];
}

static void mla_decode_chunk(const MlaDecodeChunk& a) {
  if (a.cache_dtype == DType::kFp8)
    mla_decode_typed_chunk<fp8>(a);
  else if (a.cache_dtype == DType::kBf16)
    mla_decode_typed_chunk<bf16>(a);
  else
    mla_decode_typed_chunk<float>(a);
}

static constexpr MlaDecodeKernels kMlaDecode = {.scratch_bytes = mla_decode_scratch_bytes,
                                                .chunk = mla_decode_chunk};

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
