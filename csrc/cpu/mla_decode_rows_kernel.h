// What every kernel of mla_decode does with the paged cache: find a token's row, fetch what is
// next.
#pragma once

namespace kn::cpu::KN_ISA {

KN_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
KN_INLINE int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
KN_INLINE int64_t round_up16(int64_t n) { return round_up(n, 16); }

// What to fetch during a tile; `step` 0 keeps touching one line that is there already.
struct Prefetch {
  const char* ahead;
  int64_t step;
};

// A byte of an fp8 row (cache_layout.h).
struct fp8 {
  uint8_t bits;
};

// The cache row of a token. Only used page ids are read.
template <typename T>
KN_INLINE const T* cache_row(const MlaDecodeChunk& a, int64_t token) {
  const int64_t page = a.page_table[token / a.page_size];
  return (const T*)((const char*)a.cache +
                    (page * a.page_size + token % a.page_size) * a.row_bytes);
}

// The rows of a tile of up to N tokens, and of the one after it.
template <typename T, int N>
struct CachedRows {
  int tokens, next_tokens;
  const T *rows[N], *next_rows[N];
};
template <typename T, int N>
KN_INLINE void find_next_rows(const MlaDecodeChunk& a, int64_t first, CachedRows<T, N>& m) {
  m.next_tokens = int(a.end - first < N ? a.end - first : N);
  for (int t = 0; t < m.next_tokens; ++t) m.next_rows[t] = cache_row<T>(a, first + t);
}
// On to the next tile, whose first token is `first`.
template <typename T, int N>
KN_INLINE void take_next_rows(const MlaDecodeChunk& a, int64_t first, CachedRows<T, N>& m) {
  m.tokens = m.next_tokens;
  __builtin_memcpy(m.rows, m.next_rows, sizeof m.rows);
  find_next_rows(a, first + m.tokens, m);
}

// The next tile is fetched evenly over the time this one takes: the memory serves a few lines at
// once. The first half of its rows comes with the scores of the first block of heads, the second
// with the values. Rows of a page follow each other, so the first address of a few stands for all.
// Without a row to fetch, `idle` is touched, which is there already.
template <typename T, int N>
KN_INLINE Prefetch fetch_rows(const CachedRows<T, N>& m, int row, int64_t offset, int64_t step,
                              const void* idle) {
  if (row >= m.next_tokens) return {(const char*)idle, 0};
  return {(const char*)m.next_rows[row] + offset, step};
}

}  // namespace kn::cpu::KN_ISA
