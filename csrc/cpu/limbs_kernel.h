// The tile that int4_gemm, int4_grouped_gemm, int4_grouped_swiglu and int8_gemm share: up to 2 x 16
// weight rows times some prepared tokens (limbs.h has the arithmetic).
//
//   tokens | one step = 1 chunk (128 inputs) x 4 rows x up to 4 tokens
//      x   |   weights  64 B per row, decoded to registers, used by every token of the step
//    rows  |   d[group][row] = exact integer dots, 4 groups x 4 rows = one register of 16 lanes
//          |   acc[group % 4][row] += float(d) * (weight_scale * step): one fma serves 4 rows
//
// Few tokens: each weight byte is read from memory once, prefetched, and this is bandwidth-bound.
// Many tokens (AVX-512): limbs_panel_kernel.h decodes a block to cache first; same bits.
// Bytes: 0.5625 per INT4 weight, 1.0625 per INT8 weight, once. Multiply-adds: 2 byte-wide (VNNI)
// or 1 word-wide (AVX2) per weight and token. Not supported: groups other than 32, zero points.
#pragma once

namespace kn::cpu::KN_ISA {

static constexpr int kQuadRows = 4;
static constexpr int kQuadTokens = 4;   // tokens of one step
static constexpr int kSumTokens = 16;   // tokens whose sums are kept until their row tile is done
static constexpr int kBlockChunks = 4;  // chunks whose scales are loaded together: 16 groups
static constexpr int kTileRows = 2 * kPanelRows;

// Bytes from use to prefetch in each row's stream. Rows are contiguous, so this also covers the
// rows that come next; about bandwidth x latency of one core (25 GB/s x 300 ns) once spread over
// the 8 streams of a step.
static constexpr int64_t kPrefetchBytes = 8192;

// ---- activations ----

KN_INLINE float float_of_bits(uint32_t bits) {
  float f;
  std::memcpy(&f, &bits, sizeof f);
  return f;
}
KN_INLINE float power_of_two(uint32_t biased_exponent) {
  return float_of_bits(biased_exponent << 23);
}

// One group to fixed point; returns its step.
template <typename T>
KN_INLINE float fix_group(const T* x, int16_t v[kGroupSize]) {
  float f[kGroupSize];
  store(f, load(x));
  store(f + 16, load(x + 16));
  uint32_t bits[kGroupSize], largest = 0;
  std::memcpy(bits, f, sizeof bits);
  for (int i = 0; i < kGroupSize; ++i) {
    const uint32_t magnitude = bits[i] & 0x7fffffff;
    largest = magnitude > largest ? magnitude : largest;
  }
  if (largest >= 0x7f800000) {
    std::memset(v, 0, kGroupSize * sizeof *v);
    return float_of_bits(0x7fc00000);
  }
  const uint32_t exponent = largest >> 23;
  uint32_t step = exponent > 15 ? exponent - 14 : 1;  // biased; 1 is 2^-126, the smallest normal
  if (float_of_bits(largest) * power_of_two(254 - step) >= kLimbLimit + 0.5f) ++step;
  // Adding and taking away 1.5 * 2^23 rounds to an integer, ties to even.
  const float inverse = power_of_two(254 - step), shift = 12582912.0f;
  for (int i = 0; i < kGroupSize; ++i) v[i] = int16_t((f[i] * inverse + shift) - shift);
  return power_of_two(step);
}

template <typename Format, typename T>
static void prepare_typed(const T* x, int64_t in, uint8_t* out) {
  const int64_t chunks = num_chunks(in), groups = num_groups(in);
  GroupParams* params = (GroupParams*)(out + chunks * kChunkValueBytes);
  for (int64_t c = 0; c < chunks; ++c) {
    int16_t v[kChunkInputs] = {};
    params[c] = GroupParams{};
    for (int g = 0; g < kChunkGroups && c * kChunkGroups + g < groups; ++g) {
      int16_t* group = v + g * kGroupSize;
      params[c].step[g] = fix_group(x + c * kChunkInputs + g * kGroupSize, group);
      int32_t sum = 0;
      for (int i = 0; i < kGroupSize; ++i) sum += group[i];
      params[c].offset[g] = -zero_point(Format{}) * sum;
    }
    pack_chunk(Format{}, v, out + c * kChunkValueBytes);
  }
}

template <typename Format>
static void prepare_token(const void* x, DType dtype, int64_t in, void* out) {
  if (dtype == DType::kBf16)
    prepare_typed<Format>((const bf16*)x, in, (uint8_t*)out);
  else
    prepare_typed<Format>((const float*)x, in, (uint8_t*)out);
}

// ---- what happens to the sums of a token: a for panel 0, b for panel 1 ----

struct StoreRows {};

KN_INLINE void store_values(void* y, DType dtype, int64_t at, f32x16 a, int n) {
  if (n == 16 && dtype == DType::kBf16) return store((bf16*)y + at, a);
  if (n == 16) return store((float*)y + at, a);
  if (dtype == DType::kBf16) return store((bf16*)y + at, a, n);
  store((float*)y + at, a, n);
}
KN_INLINE void finish(StoreRows, const LimbTile& tile, int64_t token, f32x16 a, f32x16 b) {
  store_values(tile.y, tile.y_dtype, token * tile.y_stride, a, tile.rows[0]);
  if (tile.rows[1])
    store_values(tile.y, tile.y_dtype, token * tile.y_stride + kPanelRows, b, tile.rows[1]);
}

KN_INLINE const uint8_t* token_values(const LimbTile& tile, int64_t token) {
  return tile.x + (tile.x_index ? tile.x_index[token] : token) * prepared_bytes(tile.in);
}

// ---- few tokens ----

// Two quads of rows, one of each panel. Rows past the end repeat the panel's last row.
struct QuadPair {
  const uint8_t* weight[2][kQuadRows];
  const bf16* scale[2][kQuadRows];
};

template <typename Format>
KN_INLINE QuadPair quad_pair(const LimbTile& tile, int quad) {
  QuadPair rows;
  for (int p = 0; p < 2; ++p)
    for (int r = 0; r < kQuadRows; ++r) {
      const int last = tile.rows[p] > 0 ? tile.rows[p] - 1 : 0, want = quad * kQuadRows + r;
      const int64_t row = want < last ? want : last;
      rows.weight[p][r] = tile.weight[p] + row * row_bytes(Format{}, tile.in);
      rows.scale[p][r] = tile.scale[p] + row * num_groups(tile.in);
    }
  return rows;
}

// Scales of the 4 chunks from `chunk` on; groups past the end are zero.
KN_INLINE void quad_scales(const bf16* const p[kQuadRows], int64_t chunk, int64_t groups,
                           f32x16 scale[kBlockChunks]) {
  const int64_t first = chunk * kChunkGroups, left = groups - first;
  const bf16* at[kQuadRows];
  bf16 padded[kQuadRows][16] = {};
  for (int r = 0; r < kQuadRows; ++r) {
    at[r] = p[r] + first;
    if (left >= 16) continue;
    std::memcpy(padded[r], at[r], left * sizeof(bf16));
    at[r] = padded[r];
  }
  load_quad_scales(at, scale);
}

// The sums of 8 rows and T tokens to sums[t][panel * 16 + r].
template <typename Format, int T>
static void quad_sums(const QuadPair& rows, const uint8_t* const x[T], int64_t in, bool stream,
                      float (*sums)[kTileRows]) {
  const int64_t groups = num_groups(in), chunks = num_chunks(in), whole = groups / kChunkGroups;
  f32x16 acc[2][T], scale[2][kBlockChunks];
  for (int p = 0; p < 2; ++p)
    for (int t = 0; t < T; ++t) acc[p][t] = zero_f32();
  for (int64_t c = 0; c < chunks; ++c) {
    if (c % kBlockChunks == 0)
      for (int p = 0; p < 2; ++p) quad_scales(rows.scale[p], c, groups, scale[p]);
    const uint8_t* values[T];
    for (int t = 0; t < T; ++t) values[t] = x[t] + c * kChunkValueBytes;
#pragma GCC unroll 2
    for (int p = 0; p < 2; ++p) {
      const uint8_t* w[kQuadRows];
      uint8_t padded[kQuadRows][Format::kChunkBytes];
      for (int r = 0; r < kQuadRows; ++r) {
        w[r] = rows.weight[p][r] + c * Format::kChunkBytes;
        if (stream)
          for (int b = 0; b < Format::kChunkBytes; b += 64)
            __builtin_prefetch(w[r] + b + kPrefetchBytes);
      }
      if (c >= whole) {
        std::memset(padded, 0, sizeof padded);
        for (int r = 0; r < kQuadRows; ++r) {
          std::memcpy(padded[r], w[r], row_bytes(Format{}, in) - c * Format::kChunkBytes);
          w[r] = padded[r];
        }
      }
      i32x16 d[T];
      quad_dots<T>(Format{}, w, values, d);
#pragma GCC unroll 4
      for (int t = 0; t < T; ++t) {
        const GroupParams& params = ((const GroupParams*)(x[t] + chunks * kChunkValueBytes))[c];
        acc[p][t] = fma(to_f32(add(d[t], spread(params.offset))),
                        mul(scale[p][c % kBlockChunks], spread(params.step)), acc[p][t]);
      }
    }
  }
  for (int p = 0; p < 2; ++p)
    for (int t = 0; t < T; ++t) store_row_sums(sums[t] + p * kPanelRows, acc[p][t]);
}

template <typename Format, typename Finish>
static void quad_tile(const LimbTile& tile) {
  alignas(64) float sums[kSumTokens][kTileRows];
  for (int64_t first = 0; first < tile.tokens; first += kSumTokens) {
    const int64_t left = tile.tokens - first;
    const int tokens = int(left < kSumTokens ? left : kSumTokens);
    const uint8_t* x[kSumTokens];
    for (int t = 0; t < tokens; ++t) x[t] = token_values(tile, first + t);
    for (int quad = 0; quad * kQuadRows < tile.rows[0]; ++quad) {
      const QuadPair rows = quad_pair<Format>(tile, quad);
      float (*out)[kTileRows] = (float (*)[kTileRows])(sums[0] + quad * kQuadRows);
      for (int t = 0; t < tokens; t += kQuadTokens) {
        const bool stream = first + t == 0;
        switch (tokens - t) {
          case 1:
            quad_sums<Format, 1>(rows, x + t, tile.in, stream, out + t);
            break;
          case 2:
            quad_sums<Format, 2>(rows, x + t, tile.in, stream, out + t);
            break;
          case 3:
            quad_sums<Format, 3>(rows, x + t, tile.in, stream, out + t);
            break;
          default:
            quad_sums<Format, 4>(rows, x + t, tile.in, stream, out + t);
            break;
        }
      }
    }
    for (int t = 0; t < tokens; ++t)
      finish(Finish{}, tile, first + t, load(sums[t]), load(sums[t] + kPanelRows));
  }
}

}  // namespace kn::cpu::KN_ISA
