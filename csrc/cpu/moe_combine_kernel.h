// moe_combine, one token: out = sum over slots of weight * row, plus the shared expert.
//
//   columns ->   [ 64 | 64 | ... | rest ]     four accumulators of 16 lanes per tile
//   slot 0..     fma   fma         fma        slot order, then the shared row, one rounding
//
// Bytes: topk rows and the shared row in, one row out, each once. FLOPs: 2 per row element. Every
// column is summed alone in slot order, so the tile width does not enter the result. Rows are
// streams of their own: topk + 2 of them, what the hardware prefetchers can follow.
#pragma once

namespace kn::cpu::KN_ISA {

template <typename R, typename O>
struct CombineRow {
  const R* rows;
  const int32_t* row_index;
  const float* weights;
  const O* shared;
  O* out;
  int64_t topk, hidden;
};

template <int kVectors, typename R, typename O>
static void combine_tile(const CombineRow<R, O>& a, int64_t column) {
  f32x16 sums[kVectors];
  for (int v = 0; v < kVectors; ++v) sums[v] = zero_f32();
  for (int64_t slot = 0; slot < a.topk; ++slot) {
    const R* row = a.rows + a.row_index[slot] * a.hidden + column;
    const f32x16 weight = splat(a.weights[slot]);
    for (int v = 0; v < kVectors; ++v) sums[v] = fma(weight, load(row + 16 * v), sums[v]);
  }
  for (int v = 0; v < kVectors; ++v) {
    if (a.shared) sums[v] = add(sums[v], load(a.shared + column + 16 * v));
    store(a.out + column + 16 * v, sums[v]);
  }
}

template <typename R, typename O>
static void combine_rest(const CombineRow<R, O>& a, int64_t column) {
  const int n = int(a.hidden - column);
  f32x16 sum = zero_f32();
  for (int64_t slot = 0; slot < a.topk; ++slot)
    sum = fma(splat(a.weights[slot]), load(a.rows + a.row_index[slot] * a.hidden + column, n), sum);
  if (a.shared) sum = add(sum, load(a.shared + column, n));
  store(a.out + column, sum, n);
}

template <typename R, typename O>
static void combine_typed_row(const CombineRow<R, O>& a) {
  int64_t column = 0;
  for (; column + 64 <= a.hidden; column += 64) combine_tile<4>(a, column);
  for (; column + 16 <= a.hidden; column += 16) combine_tile<1>(a, column);
  if (column < a.hidden) combine_rest(a, column);
}

template <typename R, typename O>
static void combine_cast_row(const void* rows, const int32_t* row_index, const float* weights,
                             int64_t topk, const void* shared, void* out, int64_t hidden) {
  combine_typed_row(CombineRow<R, O>{(const R*)rows, row_index, weights, (const O*)shared, (O*)out,
                                     topk, hidden});
}

static void moe_combine_row(const void* rows, DType rows_dtype, const int32_t* row_index,
                            const float* weights, int64_t topk, const void* shared, void* out,
                            DType out_dtype, int64_t hidden) {
  const bool rows_bf16 = rows_dtype == DType::kBf16, out_bf16 = out_dtype == DType::kBf16;
  auto* run = rows_bf16
                  ? (out_bf16 ? combine_cast_row<bf16, bf16> : combine_cast_row<bf16, float>)
                  : (out_bf16 ? combine_cast_row<float, bf16> : combine_cast_row<float, float>);
  run(rows, row_index, weights, topk, shared, out, hidden);
}

}  // namespace kn::cpu::KN_ISA
