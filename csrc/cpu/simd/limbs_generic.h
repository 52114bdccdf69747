// Integer dot products of the INT4 and INT8 ops in plain C. The prepared values of a chunk are its
// 128 int16 in order; weights are decoded to signed ones.
#pragma once

namespace kn::cpu::KN_ISA {

struct i32x16 {
  int32_t v[16];
};

KN_INLINE f32x16 to_f32(i32x16 a) {
  f32x16 r;
  for (int i = 0; i < 16; ++i) r.v[i] = float(a.v[i]);
  return r;
}
KN_INLINE i32x16 add(i32x16 a, i32x16 b) {
  for (int i = 0; i < 16; ++i) a.v[i] += b.v[i];
  return a;
}

// [0..3] of memory to lanes 0000 1111 2222 3333.
KN_INLINE f32x16 spread(const float* p) {
  f32x16 r;
  for (int i = 0; i < 16; ++i) r.v[i] = p[i / 4];
  return r;
}
KN_INLINE i32x16 spread(const int32_t* p) {
  i32x16 r;
  for (int i = 0; i < 16; ++i) r.v[i] = p[i / 4];
  return r;
}

// acc lane 4 p + r to out[r]: (p0 + p2) + (p1 + p3).
KN_INLINE void store_row_sums(float* out, f32x16 acc) {
  for (int r = 0; r < 4; ++r) out[r] = (acc.v[r] + acc.v[8 + r]) + (acc.v[4 + r] + acc.v[12 + r]);
}

// Scales of 4 rows x 16 groups to scale[c] lane 4 g + r = row r, group 4 c + g.
KN_INLINE void load_quad_scales(const bf16* const p[4], f32x16 scale[4]) {
  for (int r = 0; r < 4; ++r) {
    const f32x16 row = load(p[r]);
    for (int g = 0; g < 16; ++g) scale[g / 4].v[g % 4 * 4 + r] = row.v[g];
  }
}

KN_INLINE int zero_point(Int4) { return 0; }
KN_INLINE int zero_point(Int8) { return 0; }

KN_INLINE void decode(Int4, const uint8_t* w, int16_t q[kChunkInputs]) {
  for (int i = 0; i < kChunkInputs / 2; ++i) {
    q[2 * i] = int16_t((w[i] & 15) - kInt4ZeroPoint);
    q[2 * i + 1] = int16_t((w[i] >> 4) - kInt4ZeroPoint);
  }
}
KN_INLINE void decode(Int8, const uint8_t* w, int16_t q[kChunkInputs]) {
  for (int i = 0; i < kChunkInputs; ++i) q[i] = int8_t(w[i]);
}

template <typename Format>
KN_INLINE void pack_chunk(Format, const int16_t* v, uint8_t* out) {
  std::memcpy(out, v, kChunkValueBytes);
}

// One chunk of 4 weight rows times T tokens: d[t] lane 4 g + r is the dot product of row r and
// token t over group g.
template <int T, typename Format>
KN_INLINE void quad_dots(Format format, const uint8_t* const w[4], const uint8_t* const x[T],
                         i32x16 d[T]) {
  for (int r = 0; r < 4; ++r) {
    int16_t q[kChunkInputs];
    decode(format, w[r], q);
    for (int t = 0; t < T; ++t) {
      const int16_t* v = (const int16_t*)x[t];
      for (int g = 0; g < kChunkGroups; ++g) {
        int32_t sum = 0;
        for (int i = 0; i < kGroupSize; ++i) sum += q[32 * g + i] * v[32 * g + i];
        d[t].v[4 * g + r] = sum;
      }
    }
  }
}

}  // namespace kn::cpu::KN_ISA
