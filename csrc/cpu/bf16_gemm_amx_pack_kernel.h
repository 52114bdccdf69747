// The B side of bf16_gemm's tiles: x as pairs of columns, fp32 numbers as three bf16 limbs in three
// columns of a tile. Per group [in / 32][tiles][16 pairs][columns][2]; a tile has 16 columns, or 1,
// 2, 4, 8 if one holds the whole call; 16 bf16 tokens or 5 fp32 ones fill it.
#pragma once

namespace kn::cpu::KN_ISA {

static constexpr int64_t kGemmStep = 32;       // columns of a product
static constexpr int64_t kGemmGroupTiles = 2;  // of x, where there are several groups
static constexpr int64_t kGemmLongRow = 4096, kGemmOneGroupBytes = 1 << 20;

KN_INLINE int64_t gemm_ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
KN_INLINE int64_t gemm_min(int64_t a, int64_t b) { return a < b ? a : b; }

// How a call's groups are packed.
struct GemmGroups {
  int64_t limbs, tile_tokens, columns, steps;  // columns: of a tile

  GemmGroups(int64_t group, int64_t in, DType x_dtype)
      : limbs(x_dtype == DType::kBf16 ? 1 : 3),
        tile_tokens(16 / limbs),
        columns(1),
        steps(gemm_ceil_div(in, kGemmStep)) {
    while (columns < gemm_min(group, tile_tokens) * limbs) columns *= 2;
    if (group > tile_tokens) columns = 16;
  }
  int64_t tiles(int64_t tokens) const { return gemm_ceil_div(tokens, tile_tokens); }
  int64_t tile_bytes() const { return 64 * columns; }
};

// Two tiles; up to four, the whole call, where rows are so long that blocks of 32 of them and the
// next 32 crowd L2, while x still fits.
static int64_t bf16_gemm_group(int64_t tokens, int64_t in, DType x_dtype) {
  const GemmGroups g(tokens, in, x_dtype);
  const int64_t tiles = g.tiles(tokens);
  if (in >= kGemmLongRow && tiles <= 4 && tiles * g.steps * kTileBytes <= kGemmOneGroupBytes)
    return tokens;
  return gemm_min(tokens, kGemmGroupTiles * g.tile_tokens);
}

static int64_t bf16_gemm_packed_bytes(int64_t tokens, int64_t in, DType x_dtype) {
  const GemmGroups g(tokens, in, x_dtype);
  return g.tiles(tokens) * g.steps * g.tile_bytes();
}

// 32 numbers, of which `columns` exist, as limbs.
KN_INLINE void gemm_limbs(const bf16* x, int columns, __m512i* limbs) {
  limbs[0] = load_pairs(x, columns);
}
KN_INLINE __m256i narrow_limb(__m512i bits) {
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(bits, 16));
}
// x = high + mid + low; infinity and NaN are all in the high limb.
KN_INLINE void gemm_limbs(const float* x, int columns, __m512i* limbs) {
  __m256i part[3][2];
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    const int lanes = columns - i * 16 < 0 ? 0 : columns - i * 16 < 16 ? columns - i * 16 : 16;
    const __m512 v = load(x + i * 16, lanes).v;
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    const __mmask16 finite =
        _mm512_cmp_ps_mask(_mm512_abs_ps(v), _mm512_set1_ps(__FLT_MAX__), _CMP_LE_OQ);
    const __m512i quiet = _mm512_set1_epi32(0x400000);
    const __m512i high = _mm512_mask_or_epi32(limb_bits(v), nan, _mm512_castps_si512(v), quiet);
    const __m512 rest = _mm512_maskz_sub_ps(finite, v, upper_half(high));
    const __m512i mid = limb_bits(rest);
    part[0][i] = narrow_limb(high);
    part[1][i] = narrow_limb(mid);
    part[2][i] = narrow_limb(limb_bits(_mm512_sub_ps(rest, upper_half(mid))));
  }
#pragma GCC unroll 3
  for (int l = 0; l < 3; ++l)
    limbs[l] = _mm512_inserti64x4(_mm512_castsi256_si512(part[l][0]), part[l][1], 1);
}

// One step of the tokens of a tile.
template <typename T>
static void gemm_pack_tile(const T* x, int64_t stride, int tokens, int columns, int tile_columns,
                           char* to) {
  constexpr int kLimbs = sizeof(T) == 2 ? 1 : 3;
  __m512i r[16];
#pragma GCC unroll 16
  for (int t = 0; t < 16 / kLimbs; ++t) {
    if (t < tokens)
      gemm_limbs(x + t * stride, columns, r + t * kLimbs);
    else
      for (int l = 0; l < kLimbs; ++l) r[t * kLimbs + l] = _mm512_setzero_si512();
  }
  if (kLimbs == 3) r[15] = _mm512_setzero_si512();
  if (tile_columns == 1) return _mm512_storeu_si512(to, r[0]);  // pairs follow each other as it is
  transpose16(r);
  const __mmask16 there = first(tile_columns);
#pragma GCC unroll 16
  for (int p = 0; p < 16; ++p) _mm512_mask_storeu_epi32(to + p * tile_columns * 4, there, r[p]);
}

template <typename T>
static void gemm_pack(const Bf16GemmPack& a) {
  const GemmGroups g(a.group, a.in, a.x_dtype);
  const int64_t tiles = g.tiles(a.tokens);
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t token = tile * g.tile_tokens;
    const T* x = (const T*)a.x + token * a.x_token_stride;
    const int tokens = int(gemm_min(a.tokens - token, g.tile_tokens));
    for (int64_t s = 0; s < g.steps; ++s)
      gemm_pack_tile<T>(x + s * kGemmStep, a.x_token_stride, tokens,
                        int(gemm_min(a.in - s * kGemmStep, kGemmStep)), int(g.columns),
                        (char*)a.packed + (s * tiles + tile) * g.tile_bytes());
  }
}

static void bf16_gemm_pack(const Bf16GemmPack& a) {
  if (a.x_dtype == DType::kBf16)
    gemm_pack<bf16>(a);
  else
    gemm_pack<float>(a);
}

}  // namespace kn::cpu::KN_ISA
