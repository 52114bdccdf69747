// Dot products of R rows with V packed vectors: the tile under bf16_gemm (weight rows x tokens) and
// under the scores of mla_decode (cache rows x heads).
//
//              vectors, fp32, packed [in / 16][V][16]
//   rows  r0   16 lanes  16 lanes  ...     every output owns one accumulator of 16 lanes: lane j
//   bf16  r1   16 lanes  16 lanes  ...     sums columns k = j mod 16, ascending; the lanes are then
//   or    ..                               summed as a fixed tree (sum_lanes)
//   fp32
//
// An output's order thus depends on `in` only, whatever the tile. Per step of 16 columns: R row
// loads (bf16 widened by a shift), V packed loads, R * V fused multiply-adds. The packed vectors
// are zero past `in`. Prefetches while it goes: kDotLines cache lines per step from `ahead` on.
#pragma once

namespace kn::cpu::KN_ISA {

// Accumulators fill the registers, less R widened rows and one packed vector.
#if KN_TIER >= 2
static constexpr int kDotRows = 4, kDotVectors = 6;  // 24 of 32 zmm
#elif KN_TIER == 1
static constexpr int kDotRows = 2, kDotVectors = 3;  // 12 of 16 ymm
#else
static constexpr int kDotRows = 1, kDotVectors = 2;
#endif

// What to fetch during a tile; `step` 0 keeps touching one line that is there already.
struct Prefetch {
  const char* ahead;
  int64_t step;
};

KN_INLINE int64_t round_up16(int64_t n) { return (n + 15) / 16 * 16; }

// Packs `vectors` <= kDotVectors rows of x as above.
template <typename T>
static void pack_vectors(const T* x, int64_t stride, int vectors, int64_t in, float* packed) {
  const int64_t whole = in / 16 * 16;
  for (int v = 0; v < vectors; ++v) {
    const T* row = x + v * stride;
    float* to = packed + v * 16;
    for (int64_t k = 0; k < whole; k += 16) store(to + k * vectors, load(row + k));
    if (whole < in) store(to + whole * vectors, load(row + whole, int(in - whole)));
  }
}

template <int V, typename W>
KN_INLINE void dot_step(const W* const (&row)[kDotRows], int64_t k, const float* packed,
                        f32x16 (&acc)[V][kDotRows], int lanes) {
  f32x16 w[kDotRows];
#pragma GCC unroll 8
  for (int r = 0; r < kDotRows; ++r)
    w[r] = lanes == 16 ? load(row[r] + k) : load(row[r] + k, lanes);
#pragma GCC unroll 8
  for (int v = 0; v < V; ++v) {
    const f32x16 x = load(packed + v * 16);
#pragma GCC unroll 8
    for (int r = 0; r < kDotRows; ++r) acc[v][r] = fma(w[r], x, acc[v][r]);
  }
}

#if KN_TIER == 1
// The same, one half of the lanes after the other: two widened rows are then two registers, not
// four, and the accumulators keep theirs.
template <int V, typename W>
KN_INLINE void dot_step(const W* const (&row)[kDotRows], int64_t k, const float* packed,
                        f32x16 (&acc)[V][kDotRows]) {
#pragma GCC unroll 2
  for (int half = 0; half < 2; ++half) {
    __m256 w[kDotRows];
#pragma GCC unroll 8
    for (int r = 0; r < kDotRows; ++r) w[r] = load8(row[r] + k + half * 8);
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      const __m256 x = load8(packed + v * 16 + half * 8);
#pragma GCC unroll 8
      for (int r = 0; r < kDotRows; ++r) {
        __m256& sum = half ? acc[v][r].hi : acc[v][r].lo;
        sum = _mm256_fmadd_ps(w[r], x, sum);
      }
    }
  }
}
#else
template <int V, typename W>
KN_INLINE void dot_step(const W* const (&row)[kDotRows], int64_t k, const float* packed,
                        f32x16 (&acc)[V][kDotRows]) {
  dot_step<V>(row, k, packed, acc, 16);
}
#endif

// out[v * out_stride + r] = rows[r] . vector v
template <int V, typename W>
static void dot_tile(const W* const* rows, const float* packed, int64_t in, Prefetch prefetch,
                     float* out, int64_t out_stride) {
  constexpr int kDotLines = kDotRows * 16 * sizeof(W) > 64 ? kDotRows * 16 * sizeof(W) / 64 : 1;
  const W* row[kDotRows];
  for (int r = 0; r < kDotRows; ++r) row[r] = rows[r];
  f32x16 acc[V][kDotRows];
#pragma GCC unroll 8
  for (int v = 0; v < V; ++v)
#pragma GCC unroll 8
    for (int r = 0; r < kDotRows; ++r) acc[v][r] = zero_f32();
  const int64_t whole = in / 16 * 16;
  for (int64_t k = 0; k < whole; k += 16) {
#pragma GCC unroll 8
    for (int line = 0; line < kDotLines; ++line)
      __builtin_prefetch(prefetch.ahead + line * 64, 0, 2);
    prefetch.ahead += prefetch.step;
    dot_step<V>(row, k, packed, acc);
    packed += V * 16;
  }
  if (whole < in) dot_step<V>(row, whole, packed, acc, int(in - whole));
  float sums[(V * kDotRows + 3) / 4 * 4];
#pragma GCC unroll 8
  for (int i = 0; i < V * kDotRows; i += 4) {
    const auto at = [&](int j) {
      return j < V * kDotRows ? acc[j / kDotRows][j % kDotRows] : zero_f32();
    };
    store_sum_lanes4(sums + i, at(i), at(i + 1), at(i + 2), at(i + 3));
  }
#pragma GCC unroll 8
  for (int v = 0; v < V; ++v)
    for (int r = 0; r < kDotRows; ++r) out[v * out_stride + r] = sums[v * kDotRows + r];
}

// dot_tile for a number of vectors known only at run time.
template <int V = kDotVectors, typename W>
KN_INLINE void dot_tile_of(int vectors, const W* const* rows, const float* packed, int64_t in,
                           Prefetch prefetch, float* out, int64_t out_stride) {
  if constexpr (V > 1)
    if (vectors < V)
      return dot_tile_of<V - 1>(vectors, rows, packed, in, prefetch, out, out_stride);
  dot_tile<V>(rows, packed, in, prefetch, out, out_stride);
}

}  // namespace kn::cpu::KN_ISA
