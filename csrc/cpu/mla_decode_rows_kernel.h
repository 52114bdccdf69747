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

}  // namespace kn::cpu::KN_ISA
