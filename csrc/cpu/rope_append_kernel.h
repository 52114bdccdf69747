// rope_append, one token: the rope part of each head and of the shared key is rotated, latent and
// key go to the token's cache row. Bytes: the rope parts in and out, the row once. Products and sum
// of a pair are three fp32 roundings (no fused multiply-add, in every tier alike), then one to the
// activation dtype: the bits are those of the published model's own arithmetic. An fp8 row takes
// integer arithmetic and one exact product a latent: the same bits in every tier too.
#pragma once
#include "cpu/rms_norm_kernel.h"

namespace kn::cpu::KN_ISA {

static constexpr int kRopeRun = 32;  // values of a run: two registers

KN_INLINE int run_length(int64_t left, int most) { return left < most ? int(left) : most; }

// n <= 16 values as fp32, and back.
template <typename T>
KN_INLINE f32x16 load_run(const T* p, int n) {
  return n == 16 ? load(p) : load(p, n);
}
template <typename T>
KN_INLINE void store_run(T* p, f32x16 v, int n) {
  if (n == 16) return store(p, v);
  store(p, v, n);
}

// y = rotate(x), rounded to T, then to O. All of a run is read before any of it is written: y may
// be x.
template <typename T, typename O>
static void rotate_row(const T* x, const float* cos, const float* sin, O* y, int64_t rope) {
  for (int64_t i = 0; i < rope; i += kRopeRun) {
    const int n = run_length(rope - i, kRopeRun);
    float in[kRopeRun], out[kRopeRun] = {};
    for (int j = 0; j < n; j += 16) store(in + j, load_run(x + i + j, run_length(n - j, 16)));
    for (int j = 0; j < n; j += 2) {
      const float c = cos[(i + j) / 2], s = sin[(i + j) / 2];
      out[j] = in[j] * c - in[j + 1] * s;
      out[j + 1] = in[j] * s + in[j + 1] * c;
    }
    for (int j = 0; j < n; j += 16)
      store_run(y + i + j, round_as(x, load(out + j)), run_length(n - j, 16));
  }
}

template <typename T, typename O>
static void rotate_heads(const RopeAppendToken& a) {
  for (int64_t h = 0; h < a.heads; ++h)
    rotate_row((const T*)a.q + h * a.q_head_stride, a.cos, a.sin,
               (O*)a.q_out + h * a.q_out_head_stride, a.rope);
}

template <typename T, typename C>
static void append_row(const RopeAppendToken& a) {
  const T* latent = (const T*)a.latent;
  C* row = (C*)a.row;
  for (int64_t i = 0; i < a.latent_width; i += 16) {
    const int n = run_length(a.latent_width - i, 16);
    store_run(row + i, load_run(latent + i, n), n);
  }
  rotate_row((const T*)a.k_rope, a.cos, a.sin, row + a.latent_width, a.rope);
}

// The latent part of an fp8 row (cache_layout.h): bytes, their padding, scales.
template <typename T>
static void append_fp8_latent(const T* latent, int64_t width, uint8_t* row) {
  uint8_t* scales = row + fp8_scale_offset(width);
  for (int64_t i = width; i < fp8_scale_offset(width); ++i) row[i] = 0;
  for (int64_t first = 0; first < width; first += kFp8Group, scales += 4) {
    const int n = run_length(width - first, kFp8Group);
    float x[kFp8Group] = {};
    for (int i = 0; i < n; i += 16)
      store(x + i, load_run(latent + first + i, run_length(n - i, 16)));
    uint32_t bits[kFp8Group], largest = 0;
    __builtin_memcpy(bits, x, sizeof x);
    for (int i = 0; i < kFp8Group; ++i) {
      const uint32_t magnitude = bits[i] & 0x7fffffff;
      largest = largest > magnitude ? largest : magnitude;
    }
    const uint32_t scale = fp8_scale_bits(largest);
    const float inverse = __builtin_bit_cast(float, fp8_inverse_bits(scale));
    __builtin_memcpy(scales, &scale, 4);
    uint8_t bytes[kFp8Group];
    for (int i = 0; i < kFp8Group; ++i) bytes[i] = e4m3_of(x[i] * inverse);
    __builtin_memcpy(row + first, bytes, n);
  }
}

template <typename T>
static void append_fp8_row(const RopeAppendToken& a) {
  uint8_t* row = (uint8_t*)a.row;
  const int64_t used = fp8_rope_offset(a.latent_width) + 2 * a.rope;
  append_fp8_latent((const T*)a.latent, a.latent_width, row);
  bf16* key = (bf16*)(row + fp8_rope_offset(a.latent_width));
  rotate_row((const T*)a.k_rope, a.cos, a.sin, key, a.rope);
  for (int64_t i = used; i < fp8_row_bytes(a.latent_width, a.rope); ++i) row[i] = 0;
}

template <typename T>
static void rope_append_typed(const RopeAppendToken& a) {
  if (a.q_out_dtype == DType::kBf16)
    rotate_heads<T, bf16>(a);
  else
    rotate_heads<T, float>(a);
  if (a.cache_dtype == DType::kFp8)
    append_fp8_row<T>(a);
  else if (a.cache_dtype == DType::kBf16)
    append_row<T, bf16>(a);
  else
    append_row<T, float>(a);
}

static void rope_append_token(const RopeAppendToken& a) {
  if (a.dtype == DType::kBf16)
    rope_append_typed<bf16>(a);
  else
    rope_append_typed<float>(a);
}

}  // namespace kn::cpu::KN_ISA
