// rms_norm, one row: two passes over a row that stays in L1 (7168 floats = 28 KB). Bytes: row in,
// weight, row out. Sum of squares in 16 fp32 lanes (lane = column mod 16), lanes added as a fixed
// tree: the order depends on nothing but `hidden`. The result is rounded to the activation dtype
// before the weight is applied, as the published model does.
#pragma once

namespace kn::cpu::KN_ISA {

KN_INLINE f32x16 round_as(const float*, f32x16 a) { return a; }
KN_INLINE f32x16 round_as(const bf16*, f32x16 a) { return round_to_bf16(a); }

template <typename T>
static void rms_norm_typed_row(const T* x, const bf16* weight, T* y, int64_t hidden, float eps) {
  const int64_t whole = hidden / 16 * 16;
  const int rest = int(hidden - whole);
  f32x16 squares = zero_f32();
  for (int64_t i = 0; i < whole; i += 16) {
    const f32x16 v = load(x + i);
    squares = fma(v, v, squares);
  }
  if (rest) {
    const f32x16 v = load(x + whole, rest);
    squares = fma(v, v, squares);
  }
  const f32x16 scale = splat(1.0f / __builtin_sqrtf(sum_lanes(squares) / float(hidden) + eps));
  for (int64_t i = 0; i < whole; i += 16)
    store(y + i, mul(round_as(x, mul(load(x + i), scale)), load(weight + i)));
  if (rest)
    store(y + whole,
          mul(round_as(x, mul(load(x + whole, rest), scale)), load(weight + whole, rest)), rest);
}

static void rms_norm_row(const void* x, const bf16* weight, void* y, DType dtype, int64_t hidden,
                         float eps) {
  if (dtype == DType::kBf16)
    rms_norm_typed_row((const bf16*)x, weight, (bf16*)y, hidden, eps);
  else
    rms_norm_typed_row((const float*)x, weight, (float*)y, hidden, eps);
}

// sum = x + residual, rounded to their dtype; sum may be residual.
template <typename T>
static void add_typed_row(const T* x, const T* residual, T* sum, int64_t hidden) {
  const int64_t whole = hidden / 16 * 16;
  for (int64_t i = 0; i < whole; i += 16) store(sum + i, add(load(x + i), load(residual + i)));
  if (const int rest = int(hidden - whole))
    store(sum + whole, add(load(x + whole, rest), load(residual + whole, rest)), rest);
}

static void add_row(const void* x, const void* residual, void* sum, DType dtype, int64_t hidden) {
  if (dtype == DType::kBf16)
    add_typed_row((const bf16*)x, (const bf16*)residual, (bf16*)sum, hidden);
  else
    add_typed_row((const float*)x, (const float*)residual, (float*)sum, hidden);
}

}  // namespace kn::cpu::KN_ISA
