// The loops of limbs_kernel.h for one or two tokens, AVX-512: one row of each panel at a time, so
// that the weights are two long streams read in the order of their addresses, which the hardware
// prefetcher follows, and each line goes straight to L1.
//
//   one step  = 2 rows x 4 chunks: 2 x 256 B of INT4 weights, 2 x 32 B of scales (16 groups)
//     4 chunks  -> {first, second} registers, lane 4 k + g: dword k of group g
//     4 x 4 vpdpbusd per row and token, then the dwords of each group are summed across lanes
//     acc[16 groups] += float(d) * (scale * step): one register for a whole row
//
// About 50 vector instructions a row and token: 40 GB/s of weights per core from L1 at 3.5 GHz,
// above what a core reads from memory.
#pragma once

namespace kn::cpu::KN_ISA {

// Bytes ahead of use that a line is asked for, into L1: enough to start the hardware prefetcher on
// the next page before its first use; from there on it runs ahead by itself. Four kilobytes lose 15
// % on Intel: then the few lines that a core can ask for at once wait for memory instead of for the
// cache. On AMD (far_prefetch) these bound the whole, and lines are asked for into L2 first.
static constexpr int64_t kAheadBytes = 1024, kNearBytes = 512, kFarBytes = 4096;

// For a step that uses `bytes` of a row.
KN_INLINE void prefetch_weights(const uint8_t* weight, int64_t bytes, bool far) {
  const int64_t ahead = far ? kNearBytes : kAheadBytes;
#pragma GCC unroll 8
  for (int64_t b = 0; b < bytes; b += 64) __builtin_prefetch(weight + ahead + b);
  if (!far) return;
#pragma GCC unroll 8
  for (int64_t b = 0; b < bytes; b += 64) __builtin_prefetch(weight + kFarBytes + b, 0, 2);
}

KN_INLINE void prefetch_scales(const bf16* scale, bool far) {
  const auto* bytes = (const uint8_t*)scale;
  if (far)
    __builtin_prefetch(bytes + kFarBytes / 4, 0, 2);
  else
    __builtin_prefetch(bytes + kAheadBytes / 4);
}

// Rows of both panels, from one block on.
struct RowPair {
  const uint8_t* weight[2];
  const bf16* scale[2];
};

// kTail: the block has only `left` inputs. Both rows use a token's values while they are in
// registers: a core of a Zen 4 loads one register a cycle.
template <typename Format, int T, bool kTail>
KN_INLINE void row_step(const RowPair& rows, const uint8_t* const values[T],
                        const PreparedToken x[T], int64_t group, int64_t left, __m512 (*acc)[T]) {
  __m512i a[2][T][kBlockChunks];
#pragma GCC unroll 4
  for (int c = 0; c < kBlockChunks; ++c) {
    const int64_t at = c * int64_t(Format::kChunkBytes);
    const int64_t bytes = kTail ? row_bytes(Format{}, left) - at : int64_t(Format::kChunkBytes);
    __m512i u[2][2];
    decode_row(Format{}, rows.weight[0] + at, bytes, u[0]);
    decode_row(Format{}, rows.weight[1] + at, bytes, u[1]);
#pragma GCC unroll 2
    for (int t = 0; t < T; ++t) {
      const uint8_t* v = values[t] + c * kChunkValueBytes;
      __m512i d[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
      if constexpr (Format::kLimbs == 2) {
        const __m512i first = _mm512_load_si512(v + 64), second = _mm512_load_si512(v + 192);
#pragma GCC unroll 2
        for (int p = 0; p < 2; ++p) {
          d[p] = _mm512_dpbusd_epi32(d[p], u[p][0], first);
          d[p] = _mm512_slli_epi32(_mm512_dpbusd_epi32(d[p], u[p][1], second), 8);
        }
      }
      const __m512i first = _mm512_load_si512(v), second = _mm512_load_si512(v + 128);
#pragma GCC unroll 2
      for (int p = 0; p < 2; ++p) {
        d[p] = _mm512_dpbusd_epi32(d[p], u[p][0], first);
        a[p][t][c] = _mm512_dpbusd_epi32(d[p], u[p][1], second);
      }
    }
  }
#pragma GCC unroll 2
  for (int p = 0; p < 2; ++p) {
    const f32x16 s = kTail ? load(rows.scale[p], int(num_groups(left))) : load(rows.scale[p]);
#pragma GCC unroll 2
    for (int t = 0; t < T; ++t) {
      const __m512i d =
          _mm512_add_epi32(reduce_chunks(a[p][t]), _mm512_load_si512(x[t].offset + group));
      const __m512 f = _mm512_cvtepi32_ps(d);
      const __m512 factor = _mm512_mul_ps(s.v, _mm512_load_ps(x[t].step + group));
      // Chunks that are not there leave their sums alone: adding zero could turn a -0 into a 0.
      acc[p][t] = kTail ? _mm512_mask3_fmadd_ps(f, factor, acc[p][t],
                                                first(kChunkGroups * int(num_chunks(left))))
                        : _mm512_fmadd_ps(f, factor, acc[p][t]);
    }
  }
}

template <typename Format, int T>
static void row_sums(RowPair rows, const PreparedToken x[T], int64_t in, bool far,
                     float (*sums)[2 * kPanelRows]) {
  constexpr int kBytes = kBlockChunks * Format::kChunkBytes;
  constexpr int64_t kInputs = kBlockChunks * kChunkInputs;
  const uint8_t* values[T];
  __m512 acc[2][T];
  for (int t = 0; t < T; ++t) {
    values[t] = x[t].values;
    acc[0][t] = acc[1][t] = _mm512_setzero_ps();
  }
  int64_t group = 0;
  for (; group + kBlockGroups <= num_groups(in); group += kBlockGroups) {
#pragma GCC unroll 2
    for (int p = 0; p < 2; ++p) {
      prefetch_weights(rows.weight[p], kBytes, far);
      prefetch_scales(rows.scale[p], far);
    }
    row_step<Format, T, false>(rows, values, x, group, kInputs, acc);
    for (int p = 0; p < 2; ++p) rows.weight[p] += kBytes, rows.scale[p] += kBlockGroups;
    for (int t = 0; t < T; ++t) values[t] += kBlockChunks * kChunkValueBytes;
  }
  if (const int64_t left = in - group * kGroupSize; left > 0) {
    for (int p = 0; p < 2; ++p) prefetch_weights(rows.weight[p], row_bytes(Format{}, left), far);
    row_step<Format, T, true>(rows, values, x, group, left, acc);
  }
  for (int p = 0; p < 2; ++p)
    for (int t = 0; t < T; ++t) sums[t][p * kPanelRows] = sum_lanes({acc[p][t]});
}

// All rows of a tile times T tokens.
template <typename Format, typename Finish, int T>
static void rows_tile(const LimbTile& tile) {
  const int64_t bytes = row_bytes(Format{}, tile.in), groups = num_groups(tile.in);
  PreparedToken x[T];
  for (int t = 0; t < T; ++t) x[t] = tile_token(tile, t);
  for (int64_t row = 0; row < tile.rows[0]; row += kPanelRows) {
    alignas(64) float sums[T][2 * kPanelRows] = {};
    for (int r = 0; r < rows_left(tile, 0, row); ++r) {
      RowPair rows;
      for (int p = 0; p < 2; ++p) {
        const int q = row + r < tile.rows[p] ? p : 0;  // a row that panel 1 lacks: that of panel 0
        rows.weight[p] = tile.weight[q] + (row + r) * bytes;
        rows.scale[p] = tile.scale[q] + (row + r) * groups;
      }
      row_sums<Format, T>(rows, x, tile.in, tile.far_prefetch,
                          (float (*)[2 * kPanelRows])(sums[0] + r));
    }
    for (int t = 0; t < T; ++t)
      finish(Finish{}, tile, t, row, load(sums[t]), load(sums[t] + kPanelRows));
  }
}

}  // namespace kn::cpu::KN_ISA
