// bf16_gemm by fp32 multiply-add, one task: a block of tokens times a block of weight rows.
//
//   x packed, fp32, per group of V tokens     every output owns one accumulator of 16 lanes: lane j
//     [in / 32][V][even 16 | odd 16]          sums columns 2j + 1 and 2j of every 32, ascending in
//   weight rows, bf16, in place               32s; the lanes are then summed as a fixed tree
//     even = pair << 16, odd = pair & mask    (sum_lanes)
//
// Per step of 32 columns: R row loads, 2V packed loads, 2RV multiply-adds, 2R instructions that
// widen. With KN_BF16_DOTS (bf16_dots.cpp) bf16 tokens are packed as they are, [in / 32][V][32],
// and one dot instruction is the two multiply-adds of a pair, odd one first: R + V loads, RV dots,
// the same bits unless something is subnormal, which it takes for zero. How the rows are read
// depends on whether the packed tokens fit L1:
//
//   gemm_stream   they do: one row after the other, the order that memory gives fastest
//   gemm_blocks   16 rows at a time, fetched in that order into L2 while the 16 before are at work
//                 there: per group, a piece of columns whose x stays in L1, two rows after two;
//                 between pieces the accumulators wait in scratch, which does not show in the bits
//
// Bytes: 2 * rows * in of weights. FLOPs: 2 * tokens * rows * in.
#pragma once

namespace kn::cpu::KN_ISA {

// Most tokens of a group and rows of a tile: accumulators fill the registers.
#if KN_TIER >= 2
static constexpr int kGemmTokens = 12, kGemmRows = 2;  // 24 of 32 zmm
#elif KN_TIER == 1
static constexpr int kGemmTokens = 3, kGemmRows = 2;  // 12 of 16 ymm
#else
static constexpr int kGemmTokens = 2, kGemmRows = 1;
#endif
// Packed tokens that stay in L1 beside a row; beside the accumulators of 16 rows. Two tokens are
// streamed in any case: at in = 7168 reading x from L2 cost no more than fetching blocks did.
static constexpr int64_t kStreamX = 32 << 10, kBlockX = 16 << 10;
static constexpr int64_t kStreamTokens = 2;

// One token needs a line at once; not on AMD (CpuFeatures::far_prefetch), whose tiles these are.
#ifdef KN_BF16_DOTS
static constexpr bool kNearToken = false;
#else
static constexpr bool kNearToken = true;
#endif

// Packed tokens of a task: half of a 1 MB L2.
static constexpr int64_t kGemmTaskGroups = 256 / kGemmTokens, kGemmTaskBytes = 512 << 10;

// Groups of nearly equal size.
static int64_t bf16_gemm_group(int64_t tokens, int64_t, DType) {
  const int64_t groups = (tokens + kGemmTokens - 1) / kGemmTokens;
  return (tokens + groups - 1) / groups;
}

// Scratch of a task: accumulators of 16 rows and one group.
static int64_t bf16_gemm_scratch_bytes(int64_t, int64_t, int64_t) { return 16 * kGemmTokens * 64; }

KN_INLINE int64_t round_up32(int64_t n) { return (n + 31) / 32 * 32; }

// Bytes of a packed entry.
static int64_t packed_item([[maybe_unused]] DType x_dtype) {
#ifdef KN_BF16_DOTS
  if (x_dtype == DType::kBf16) return 2;
#endif
  return 4;
}

static int64_t bf16_gemm_packed_bytes(int64_t tokens, int64_t in, DType x_dtype) {
  return tokens * round_up32(in) * packed_item(x_dtype);
}

template <typename T>
static void gemm_pack(const Bf16GemmPack& a) {
  const int64_t whole = a.in / 32 * 32;
  for (int64_t v = 0; v < a.tokens; ++v) {
    const T* row = (const T*)a.x + v * a.x_token_stride;
    float* to = (float*)a.packed + v * 32;
    for (int64_t k = 0; k < whole; k += 32) {
      store(to + k * a.tokens, load_even(row + k));
      store(to + k * a.tokens + 16, load_odd(row + k));
    }
    if (whole == a.in) continue;
    T rest[32] = {};
    std::memcpy(rest, row + whole, (a.in - whole) * sizeof(T));  // rows may be unaligned
    store(to + whole * a.tokens, load_even(rest));
    store(to + whole * a.tokens + 16, load_odd(rest));
  }
}

#ifdef KN_BF16_DOTS
static void gemm_pack_pairs(const Bf16GemmPack& a) {
  for (int64_t v = 0; v < a.tokens; ++v) {
    const bf16* row = (const bf16*)a.x + v * a.x_token_stride;
    bf16* to = (bf16*)a.packed + v * 32;
    for (int64_t k = 0; k < a.in; k += 32) {
      const int columns = a.in - k < 32 ? int(a.in - k) : 32;
      _mm512_storeu_si512(to + k * a.tokens, load_pairs(row + k, columns));
    }
  }
}
#endif

static void bf16_gemm_pack(const Bf16GemmPack& a) {
#ifdef KN_BF16_DOTS
  if (a.x_dtype == DType::kBf16) return gemm_pack_pairs(a);
#endif
  if (a.x_dtype == DType::kBf16)
    gemm_pack<bf16>(a);
  else
    gemm_pack<float>(a);
}

// Weights to fetch while a tile works: two lines per step of 32 columns, `step` bytes further each
// time. Step 64 thus touches every line twice, step 0 keeps touching two that are there already.
struct Fetch {
  const char* next;
  int64_t step;
};

// One step of 32 columns, of which `columns` exist.
template <int R, int V>
KN_INLINE void gemm_step(const bf16* const (&row)[R], const float* x, f32x16 (&acc)[V][R],
                         int columns) {
#pragma GCC unroll 2
  for (int odd = 1; odd >= 0; --odd) {
    f32x16 w[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      if (columns == 32)
        w[r] = odd ? load_odd(row[r]) : load_even(row[r]);
      else
        w[r] = odd ? load_odd(row[r], columns) : load_even(row[r], columns);
    }
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) {
      const f32x16 t = load(x + v * 32 + odd * 16);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) acc[v][r] = fma(w[r], t, acc[v][r]);
    }
  }
}
#if KN_TIER == 1
// The same, one half of the lanes after the other: widened rows then take half the registers.
template <int R, int V>
KN_INLINE void gemm_step(const bf16* const (&row)[R], const float* x, f32x16 (&acc)[V][R]) {
#pragma GCC unroll 4
  for (int part = 0; part < 4; ++part) {
    const int half = part / 2, odd = 1 - part % 2;
    __m256 w[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
      w[r] = odd ? load8_odd(row[r] + half * 16) : load8_even(row[r] + half * 16);
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      const __m256 t = load8(x + v * 32 + odd * 16 + half * 8);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        __m256& sum = half ? acc[v][r].hi : acc[v][r].lo;
        sum = _mm256_fmadd_ps(w[r], t, sum);
      }
    }
  }
}
#else
template <int R, int V>
KN_INLINE void gemm_step(const bf16* const (&row)[R], const float* x, f32x16 (&acc)[V][R]) {
  gemm_step<R, V>(row, x, acc, 32);
}
#endif

#ifdef KN_BF16_DOTS
template <int R, int V>
KN_INLINE void gemm_step(const bf16* const (&row)[R], const bf16* x, f32x16 (&acc)[V][R],
                         int columns = 32) {
  __m512bh w[R];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
    w[r] = (__m512bh)(columns == 32 ? _mm512_loadu_si512(row[r]) : load_pairs(row[r], columns));
#pragma GCC unroll 16
  for (int v = 0; v < V; ++v) {
    const __m512bh t = (__m512bh)_mm512_loadu_si512(x + v * 32);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) acc[v][r].v = _mm512_dpbf16_ps(acc[v][r].v, w[r], t);
  }
}
#endif

// Adds `columns` columns of R rows times a group of V tokens to sums[v][r][16 lanes], or starts
// them. X: float or bf16, as packed.
template <int R, int V, typename X>
static void gemm_piece(const bf16* const* rows, const X* x, int64_t columns, bool start,
                       Fetch& fetch, float* sums) {
  const bf16* row[R];
  for (int r = 0; r < R; ++r) row[r] = rows[r];
  f32x16 acc[V][R];
#pragma GCC unroll 16
  for (int v = 0; v < V; ++v)
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) acc[v][r] = start ? zero_f32() : load(sums + v * 256 + r * 16);
  const char* next = fetch.next;
  for (int64_t k = 0; k + 32 <= columns; k += 32) {
    __builtin_prefetch(next, 0, kNearToken && R == 1 && V == 1 ? 3 : 2);
    if (R > 1) __builtin_prefetch(next + 64, 0, 2);
    next += fetch.step;
    gemm_step<R, V>(row, x, acc);
    for (int r = 0; r < R; ++r) row[r] += 32;
    x += V * 32;
  }
  if (columns % 32) gemm_step<R, V>(row, x, acc, int(columns % 32));
  fetch.next = next;
#pragma GCC unroll 16
  for (int v = 0; v < V; ++v)
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) store(sums + v * 256 + r * 16, acc[v][r]);
}

// gemm_piece for a number of tokens known only at run time.
template <int R, int V = kGemmTokens, typename X>
KN_INLINE void gemm_piece_of(int64_t tokens, const bf16* const* rows, const X* x, int64_t columns,
                             bool start, Fetch& fetch, float* sums) {
  if constexpr (V > 1)
    if (tokens < V) return gemm_piece_of<R, V - 1>(tokens, rows, x, columns, start, fetch, sums);
  gemm_piece<R, V>(rows, x, columns, start, fetch, sums);
}

// Columns of a piece of x: `bytes` of packed tokens, in whole steps, pieces of nearly equal size.
static int64_t piece_columns(int64_t in, int64_t tokens, int64_t item, int64_t bytes) {
  const int64_t width = round_up32(in);
  const int64_t pieces = (width * tokens * item + bytes - 1) / bytes;
  return round_up32((in + pieces - 1) / pieces);
}

// Outputs `first` .. of 16 rows for `tokens` tokens from `token` on.
template <typename Y>
static void gemm_store(const Bf16GemmTile& a, int64_t first, int64_t token, int64_t tokens,
                       const float* sums) {
  const int n = int(a.rows - first < 16 ? a.rows - first : 16);
  for (int64_t t = 0; t < tokens; ++t) {
    Y* y = (Y*)a.y + (token + t) * a.y_token_stride + first;
    const f32x16 row_sums = sum_lanes16(sums + t * 256);
    if (n == 16)
      store(y, row_sums);
    else
      store(y, row_sums, n);
  }
}
static void gemm_store(const Bf16GemmTile& a, int64_t first, int64_t token, int64_t tokens,
                       const float* sums) {
  if (a.y_dtype == DType::kBf16)
    gemm_store<bf16>(a, first, token, tokens, sums);
  else
    gemm_store<float>(a, first, token, tokens, sums);
}

template <typename X>
static void gemm_stream(const Bf16GemmTile& a) {
  // How far ahead of its use a row is fetched, in entries: 3 KB to L1 or 8 KB to L2. Good in noisy
  // measurements of two machines, not proven best.
  const int64_t ahead = kNearToken && a.tokens == 1 ? 1536 : 4096;
  for (int64_t first = 0; first < a.rows; first += 16) {
    for (int64_t r = first; r < a.rows && r < first + 16; ++r) {
      const bf16* row = a.weight + r * a.in;
      const bool inside = row + ahead + a.in <= a.weight_end;
      Fetch fetch = {(const char*)(inside ? row + ahead : row), inside ? 64 : 0};
      gemm_piece_of<1>(a.tokens, &row, (const X*)a.packed, a.in, true, fetch,
                       a.scratch + (r - first) * 16);
    }
    gemm_store(a, first, 0, a.tokens, a.scratch);
  }
}

// 16 rows for one group; the last tile may repeat a row, whose sums are not stored.
template <typename X>
static void gemm_block(const Bf16GemmTile& a, int64_t first, const X* x, int64_t tokens,
                       Fetch& fetch) {
  const int64_t columns = piece_columns(a.in, tokens, sizeof(X), kBlockX);
  for (int64_t k = 0; k < a.in; k += columns) {
    const int64_t here = a.in - k < columns ? a.in - k : columns;
    for (int64_t r = 0; r < 16 && first + r < a.rows; r += kGemmRows) {
      const bf16* rows[kGemmRows];
      for (int64_t i = 0; i < kGemmRows; ++i)
        rows[i] = a.weight + (first + r + i < a.rows ? first + r + i : a.rows - 1) * a.in + k;
      gemm_piece_of<kGemmRows>(tokens, rows, x + k * tokens, here, k == 0, fetch,
                               a.scratch + r * 16);
    }
  }
}

// The next 16 rows are fetched during the first two groups of these, or during the only one.
template <typename X>
static void gemm_blocks(const Bf16GemmTile& a) {
  const int64_t step = a.tokens > a.group ? 64 : 128;
  for (int64_t first = 0; first < a.rows; first += 16) {
    const bf16* ahead = a.weight + (first + 16) * a.in;
    const bool inside = ahead + 16 * a.in <= a.weight_end;
    Fetch fetch = {(const char*)(inside ? ahead : a.weight + first * a.in), inside ? step : 0};
    for (int64_t t = 0; t < a.tokens; t += a.group) {
      const int64_t tokens = a.tokens - t < a.group ? a.tokens - t : a.group;
      if (t == 2 * a.group) fetch.step = 0;
      const char* x = (const char*)a.packed + t / a.group * a.group_bytes;
      gemm_block(a, first, (const X*)x, tokens, fetch);
      gemm_store(a, first, t, tokens, a.scratch);
    }
  }
}

template <typename X>
static void gemm_tile(const Bf16GemmTile& a) {
  const bool one_group = a.tokens <= a.group;
  const int64_t bytes = a.tokens * a.in * int64_t(sizeof(X));
  if (one_group && (a.tokens <= kStreamTokens || bytes <= kStreamX))
    gemm_stream<X>(a);
  else
    gemm_blocks<X>(a);
}

static void bf16_gemm_tile(const Bf16GemmTile& a) {
#ifdef KN_BF16_DOTS
  if (packed_item(a.x_dtype) == 2) return gemm_tile<bf16>(a);
#endif
  gemm_tile<float>(a);
}

static constexpr Bf16GemmKernels kBf16Gemm = {
    .group = bf16_gemm_group,
    .task_groups = kGemmTaskGroups,
    .task_bytes = kGemmTaskBytes,
    .task_weight_bytes = 2 << 20,
    .packed_bytes = bf16_gemm_packed_bytes,
    .scratch_bytes = bf16_gemm_scratch_bytes,
    .pack = bf16_gemm_pack,
    .tile = bf16_gemm_tile,
};

}  // namespace kn::cpu::KN_ISA
