// What the INT4 ops ask of the kernel for many tokens on Hopper (int4_sm90.cu), compiled for sm_90a
// alone: the rest of an op runs on every device.
#pragma once
#include "cuda/int4_tile.cuh"

namespace kn::cuda {

// By expert, or one matrix alone.
struct Int4Experts {
  const uint8_t* const* tiles;  // null: there is one, `alone`
  const bf16* const* scales;
  Matrix alone;
};

// y of `ranges`; the rest of y is left as it is.
struct Int4Sm90Args {
  const void* x;  // [x_rows, in]
  DType x_dtype, y_dtype;
  const int32_t* x_index;   // [rows], or null: row r reads x[r]
  int num_matrices;         // 1; or 2: y = silu(x * first) * (x * second)
  Int4Experts matrices[2];  // of the same shape
  const RowRange* ranges;   // of at most kManyTokens rows, the empty ones last
  int64_t num_ranges;       // without `ranges`, all rows belong to expert 0
  void* y;                  // [rows, out]
  int64_t x_rows, rows, out, in;
  void* workspace;  // int4_sm90_bytes of it, 16-byte aligned
};

// x as int4_sm90.cuh wants it.
inline int64_t int4_sm90_bytes(DType x_dtype, int64_t x_rows, int64_t in) {
  const int limbs = x_dtype == DType::kBf16 ? 1 : 2;
  return x_rows * limbs * column_tiles(in) * kTileColumns * 2;
}

void int4_sm90(const char* op, const Int4Sm90Args& a, void* stream);

}  // namespace kn::cuda
