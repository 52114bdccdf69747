// mla_decode, the two products of a tile of 64 tokens on fp32 multiply-add. Pieces of the tile's
// rows are widened to fp32 in a buffer that stays in L1, once for all heads of the task.
//
//   scores   T tokens x 4 G heads; a register holds 4 heads x 4 columns of q:
//              key[token][4 columns] repeated for 4 heads * q -> acc[token][group of 4 heads]
//            four partial sums an output, by column mod 4; kSegment columns, then added to the
//            score
//   values   6 heads x 4 vectors of columns:
//              P[token][head] splat * value[token][16 columns] -> O[head][columns]
//
// Neither product shuffles, and both load less than one register per two multiply-adds. A score
// sums columns as above, an output its tokens in ascending order, whatever the tile: neither the
// number of heads nor their split shows in the bits.
#pragma once

namespace kn::cpu::KN_ISA {

static constexpr int kTile = 64;   // tokens
static constexpr int kPiece = 16;  // tokens widened at once for the scores
static constexpr int kStrip = 64;  // columns widened at once for the values

// Groups of 4 heads in a block of the scores; accumulators of a tile; columns of a segment, fewer
// where a multiply-add rounds twice; heads x vectors of columns that accumulate for the values.
#if KN_TIER >= 2
static constexpr int kScoreGroups = 4, kScoreSums = 16, kSegment = 288;
static constexpr int kValueHeads = 6, kValueVectors = 4;
#elif KN_TIER == 1
static constexpr int kScoreGroups = 2, kScoreSums = 4, kSegment = 288;
static constexpr int kValueHeads = 6, kValueVectors = 1;
#else
static constexpr int kScoreGroups = 1, kScoreSums = 4, kSegment = 144;
static constexpr int kValueHeads = 2, kValueVectors = 1;
#endif
static constexpr int kWideFloats =
    kPiece * kSegment > kTile* kStrip ? kPiece * kSegment : kTile * kStrip;

// A tile: `tokens` <= kTile rows and what is known of them.
template <typename T>
struct MlaTile : CachedRows<T, kTile> {
  int64_t heads, heads16, latent, width, row_bytes;
  const float* q;              // packed, softmax scale applied
  float* wide;                 // kWideFloats of scratch
  float* scores;               // [kTile][heads16]; then probabilities
  float *max, *sum, *rescale;  // [heads16]
  float* out;                  // [heads][latent rounded up to 16]
};

// Four columns of each of the heads of a group, for all groups of a block: [step][G][4 heads][4].
// Heads past the last are zero.
template <typename Q>
static void pack_queries(const Q* q, int64_t heads, int64_t width, float scale, float* packed) {
  const int64_t steps = ceil_div(width, 4);
  for (int64_t h = 0; h < round_up(heads, 4); ++h) {
    const int64_t block = h / (4 * kScoreGroups) * (4 * kScoreGroups), left = heads - block;
    const int64_t groups = left < 4 * kScoreGroups ? ceil_div(left, 4) : kScoreGroups;
    float* to = packed + block * steps * 4 + (h - block) * 4;
    for (int64_t k = 0; k < width; k += 16) {
      const int lanes = int(width - k < 16 ? width - k : 16);
      float row[16];
      store(row, h < heads ? mul(load(q + h * width + k, lanes), splat(scale)) : zero_f32());
      for (int64_t s = k / 4; s < steps && s < k / 4 + 4; ++s)
        __builtin_memcpy(to + s * groups * 16, row + (s * 4 - k), 16);
    }
  }
}

// Columns [column, column + n) of a row of a tile, zero up to 16 columns.
template <typename T>
static void widen_row(const MlaTile<T>&, const T* row, int64_t column, int64_t n, float* wide) {
  const T* from = row + column;
  const int64_t whole = n / 16 * 16;
  for (int64_t i = 0; i < whole; i += 16) store(wide + i, load(from + i));
  if (whole < n) store(wide + whole, load(from + whole, int(n - whole)));
}

// The same of an fp8 row: e4m3 times scale, then the key. `column` is a multiple of 16, so 16
// latents share a scale.
static void widen_row(const MlaTile<fp8>& m, const fp8* row, int64_t column, int64_t n,
                      float* wide) {
  const char* scales = (const char*)row + fp8_scale_offset(m.latent);
  const bf16* key = (const bf16*)((const char*)row + fp8_rope_offset(m.latent));
  const int64_t end = column + n, latents = end < m.latent ? end : m.latent;
  if (n % 16) store(wide + n / 16 * 16, zero_f32());
  int64_t c = column;
  while (c < latents) {
    const int64_t group = c / kFp8Group, group_end = (group + 1) * kFp8Group;
    const int64_t last = latents < group_end ? latents : group_end;
    float scale;
    __builtin_memcpy(&scale, scales + group * 4, 4);
    const f32x16 factor = splat(scale * kE4m3Parts);
    for (; c + 16 <= last; c += 16, wide += 16) store(wide, mul(load_e4m3(&row[c].bits), factor));
    const int rest = int(last - c);
    if (rest) store(wide, mul(load_e4m3(&row[c].bits, rest), factor), rest);
    c += rest, wide += rest;
  }
  if (c == end) return;
  key += c - m.latent;
  for (; c + 16 <= end; c += 16, wide += 16, key += 16) store(wide, load(key));
  if (c < end) store(wide, load(key, int(end - c)), int(end - c));
}

// Columns [column, column + n) of some rows to wide[row][stride], zero up to 16 columns and up to
// `padded` rows.
template <typename T>
static void widen(const MlaTile<T>& m, const T* const* rows, int count, int padded, int64_t column,
                  int64_t n, float* wide, int64_t stride) {
  for (int r = 0; r < count; ++r, wide += stride) widen_row(m, rows[r], column, n, wide);
  for (int r = count; r < padded; ++r, wide += stride)
    for (int64_t i = 0; i < n; i += 16) store(wide + i, zero_f32());
}

// Scores of T tokens and one block of heads over `steps` steps of 4 columns: written if `first`,
// else added.
template <int G, int T>
static void score_tile(const float* keys, const float* q, int64_t steps, Prefetch prefetch,
                       bool first, float* scores, int64_t heads16) {
  f32x16 acc[T * G];
#pragma GCC unroll 16
  for (int i = 0; i < T * G; ++i) acc[i] = zero_f32();
  for (int64_t s = 0; s < steps; ++s) {
    f32x16 key[T];
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t) key[t] = splat4(keys + t * kSegment + s * 4);
#pragma GCC unroll 4
    for (int g = 0; g < G; ++g) {
      const f32x16 query = load(q + g * 16);
#pragma GCC unroll 16
      for (int t = 0; t < T; ++t) acc[t * G + g] = fma(key[t], query, acc[t * G + g]);
    }
    q += G * 16;
    __builtin_prefetch(prefetch.ahead, 0, 2);
    prefetch.ahead += prefetch.step;
  }
#pragma GCC unroll 4
  for (int i = 0; i < T * G; i += 4) {
    const f32x16 sums = sum_quads(acc[i], acc[i + 1], acc[i + 2], acc[i + 3]);
    if constexpr (G == 4) {
      float* to = scores + i / 4 * heads16;
      store(to, first ? sums : add(load(to), sums));
    } else {
      float lanes[16];
      store(lanes, sums);
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        float* to = scores + (i + j) / G * heads16 + (i + j) % G * 4;
        for (int h = 0; h < 4; ++h) to[h] = first ? lanes[j * 4 + h] : to[h] + lanes[j * 4 + h];
      }
    }
  }
}

// The tokens of a tile with G groups: as many as there are accumulators for; divides kPiece.
static constexpr int score_tokens(int groups) {
  int tokens = 1;
  while (tokens * 2 * groups <= kScoreSums) tokens *= 2;
  return tokens;
}

// A piece of the tile's tokens from `first` on, one block of heads, one segment.
template <int G, typename T>
static void score_block(const MlaTile<T>& m, int first, int64_t head, int64_t column,
                        int64_t columns) {
  constexpr int kTokens = score_tokens(G);
  constexpr int64_t kStep = kTokens * 2 * sizeof(T);  // half of the bytes of 4 columns
  const float* q = m.q + head * round_up(m.width, 4) + column * G * 4;
  for (int t = first; t < first + kPiece && t < m.tokens; t += kTokens) {
    const Prefetch prefetch =
        fetch_rows(m, head == 0 ? t / 2 : kTile, column / 4 * kStep, kStep, m.wide);
    score_tile<G, kTokens>(m.wide + (t - first) * kSegment, q, ceil_div(columns, 4), prefetch,
                           column == 0, m.scores + t * m.heads16 + head, m.heads16);
  }
}

template <int G = kScoreGroups, typename T>
KN_INLINE void score_block_of(int64_t groups, const MlaTile<T>& m, int first, int64_t head,
                              int64_t column, int64_t columns) {
  if constexpr (G > 1)
    if (groups < G) return score_block_of<G - 1>(groups, m, first, head, column, columns);
  score_block<G>(m, first, head, column, columns);
}

template <typename T>
static void mla_scores(const MlaTile<T>& m) {
  for (int64_t column = 0; column < m.width; column += kSegment) {
    const int64_t left = m.width - column, columns = left < kSegment ? left : kSegment;
    for (int t = 0; t < m.tokens; t += kPiece) {
      const int count = m.tokens - t < kPiece ? m.tokens - t : kPiece;
      widen(m, m.rows + t, count, kPiece, column, columns, m.wide, kSegment);
      for (int64_t h = 0; h < m.heads; h += 4 * kScoreGroups)
        score_block_of(ceil_div(m.heads - h, 4), m, t, h, column, columns);
    }
  }
}

// O[h][column ..] = O * rescale + sum over tokens of P[token][h] * value[token][column ..]
template <int H, int C, typename T>
static void value_tile(const MlaTile<T>& m, const float* value, int64_t h, int64_t column,
                       Prefetch prefetch) {
  const int64_t stride = round_up16(m.latent);
  const float* p = m.scores + h;
  float* out = m.out + h * stride + column;
  f32x16 acc[H][C];
#pragma GCC unroll 8
  for (int i = 0; i < H; ++i)
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c)
      acc[i][c] = mul(load(out + i * stride + c * 16), splat(m.rescale[h + i]));
  for (int t = 0; t < m.tokens; ++t, value += kStrip, p += m.heads16) {
    f32x16 v[C];
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) v[c] = load(value + c * 16);
#pragma GCC unroll 8
    for (int i = 0; i < H; ++i) {
      const f32x16 weight = splat(p[i]);
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) acc[i][c] = fma(weight, v[c], acc[i][c]);
    }
    __builtin_prefetch(prefetch.ahead, 0, 2);
    prefetch.ahead += prefetch.step;
  }
#pragma GCC unroll 8
  for (int i = 0; i < H; ++i)
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) store(out + i * stride + c * 16, acc[i][c]);
}

template <int C, int H = kValueHeads, typename T>
KN_INLINE void value_tile_of(int64_t heads, const MlaTile<T>& m, const float* value, int64_t h,
                             int64_t column, Prefetch prefetch) {
  if constexpr (H > 1)
    if (heads < H) return value_tile_of<C, H - 1>(heads, m, value, h, column, prefetch);
  value_tile<H, C>(m, value, h, column, prefetch);
}

// Columns [column, column + 16 C) of all heads.
template <int C, typename T>
static void value_columns(const MlaTile<T>& m, const float* value, int64_t column) {
  const int64_t strips = ceil_div(m.latent, kStrip), strip = column / kStrip;
  const int first = kTile / 2 + int(kTile / 2 * strip / strips);
  const int64_t bytes = kTile / 2 * m.row_bytes / strips;
  const int64_t blocks = ceil_div(m.heads, kValueHeads), step = bytes / blocks / kTile;
  for (int64_t h = 0; h < m.heads; h += kValueHeads)
    value_tile_of<C>(m.heads - h, m, value, h, column,
                     fetch_rows(m, first, h / kValueHeads * kTile * step, step, m.wide));
}

template <typename T>
static void mla_values(const MlaTile<T>& m) {
  for (int64_t strip = 0; strip < m.latent; strip += kStrip) {
    const int64_t left = m.latent - strip, columns = left < kStrip ? left : kStrip;
    widen(m, m.rows, m.tokens, m.tokens, strip, columns, m.wide, kStrip);
    int64_t c = 0;
    for (; c + kValueVectors * 16 <= columns; c += kValueVectors * 16)
      value_columns<kValueVectors>(m, m.wide + c, strip + c);
    for (; c < columns; c += 16) value_columns<1>(m, m.wide + c, strip + c);
  }
}

}  // namespace kn::cpu::KN_ISA
