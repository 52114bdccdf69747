// Generic tier: 16 lanes as a plain array. Same names as the other tiers; no fused multiply-add is
// assumed.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "kimi_native/types.h"

namespace kn::cpu::KN_ISA {

struct f32x16 {
  float v[16];
};

KN_INLINE f32x16 zero_f32() { return {}; }
KN_INLINE f32x16 splat(float x) {
  f32x16 r;
  for (int i = 0; i < 16; ++i) r.v[i] = x;
  return r;
}
KN_INLINE f32x16 load(const float* p) {
  f32x16 r;
  std::memcpy(r.v, p, sizeof r.v);
  return r;
}
KN_INLINE void store(float* p, f32x16 a) { std::memcpy(p, a.v, sizeof a.v); }
KN_INLINE f32x16 load(const bf16* p) {
  uint16_t bits[16];
  std::memcpy(bits, p, sizeof bits);
  f32x16 r;
  for (int i = 0; i < 16; ++i) {
    const uint32_t u = uint32_t(bits[i]) << 16;
    std::memcpy(&r.v[i], &u, 4);
  }
  return r;
}
// Round to nearest even; NaN stays NaN.
KN_INLINE uint16_t bf16_bits(float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  const uint32_t rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  return uint16_t((u & 0x7fffffff) > 0x7f800000 ? 0x7fc0 | (u >> 16 & 0x8000) : rounded);
}
KN_INLINE void store(bf16* p, f32x16 a) {
  uint16_t bits[16];
  for (int i = 0; i < 16; ++i) bits[i] = bf16_bits(a.v[i]);
  std::memcpy(p, bits, sizeof bits);
}
KN_INLINE f32x16 round_to_bf16(f32x16 a) {
  for (int i = 0; i < 16; ++i) {
    const uint32_t u = uint32_t(bf16_bits(a.v[i])) << 16;
    std::memcpy(&a.v[i], &u, 4);
  }
  return a;
}
KN_INLINE f32x16 add(f32x16 a, f32x16 b) {
  for (int i = 0; i < 16; ++i) a.v[i] += b.v[i];
  return a;
}
KN_INLINE f32x16 mul(f32x16 a, f32x16 b) {
  for (int i = 0; i < 16; ++i) a.v[i] *= b.v[i];
  return a;
}
KN_INLINE f32x16 div(f32x16 a, f32x16 b) {
  for (int i = 0; i < 16; ++i) a.v[i] /= b.v[i];
  return a;
}
// a * b + c; fused where the tier has it.
KN_INLINE f32x16 fma(f32x16 a, f32x16 b, f32x16 c) {
  for (int i = 0; i < 16; ++i) c.v[i] += a.v[i] * b.v[i];
  return c;
}
// Sum of the lanes as a fixed tree: halves, quarters, ... (lane i + lane i + 8 first).
KN_INLINE float sum_lanes(f32x16 a) {
  for (int w = 8; w; w /= 2)
    for (int i = 0; i < w; ++i) a.v[i] += a.v[i + w];
  return a.v[0];
}

KN_INLINE f32x16 sub(f32x16 a, f32x16 b) {
  for (int i = 0; i < 16; ++i) a.v[i] -= b.v[i];
  return a;
}
// Where either is NaN: b.
KN_INLINE f32x16 max(f32x16 a, f32x16 b) {
  for (int i = 0; i < 16; ++i) a.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i];
  return a;
}
KN_INLINE f32x16 min(f32x16 a, f32x16 b) {
  for (int i = 0; i < 16; ++i) a.v[i] = a.v[i] < b.v[i] ? a.v[i] : b.v[i];
  return a;
}
// Largest lane; a NaN lane may or may not be seen.
KN_INLINE float max_lanes(f32x16 a) {
  for (int w = 8; w; w /= 2)
    for (int i = 0; i < w; ++i) a.v[i] = a.v[i] > a.v[i + w] ? a.v[i] : a.v[i + w];
  return a.v[0];
}
// a * 2^n for integral n, rounded once; a in [0.5, 2], n in [-200, 200].
KN_INLINE f32x16 scale_by_pow2(f32x16 a, f32x16 n) {
  // In two halves: 2^n alone may lie outside of the normal range.
  for (int i = 0; i < 16; ++i) {
    const int32_t whole = int32_t(n.v[i]), half = whole >> 1;
    const uint32_t bits[2] = {uint32_t(half + 127) << 23, uint32_t(whole - half + 127) << 23};
    float factor[2];
    std::memcpy(factor, bits, sizeof factor);
    a.v[i] = a.v[i] * factor[0] * factor[1];
  }
  return a;
}
// sum_lanes of four registers at once, bit for bit.
KN_INLINE void store_sum_lanes4(float* p, f32x16 a, f32x16 b, f32x16 c, f32x16 d) {
  p[0] = sum_lanes(a);
  p[1] = sum_lanes(b);
  p[2] = sum_lanes(c);
  p[3] = sum_lanes(d);
}

// Four floats, four times.
KN_INLINE f32x16 splat4(const float* p) {
  f32x16 r;
  for (int i = 0; i < 16; ++i) r.v[i] = p[i % 4];
  return r;
}
// Lane 4 i + j is the sum of the four lanes 4 j .. 4 j + 3 of register i: (0 + 2) + (1 + 3).
KN_INLINE f32x16 sum_quads(f32x16 a, f32x16 b, f32x16 c, f32x16 d) {
  f32x16 r;
  for (int j = 0; j < 4; ++j) {
    const auto sum = [j](const f32x16& x) {
      return (x.v[4 * j] + x.v[4 * j + 2]) + (x.v[4 * j + 1] + x.v[4 * j + 3]);
    };
    r.v[j] = sum(a), r.v[4 + j] = sum(b), r.v[8 + j] = sum(c), r.v[12 + j] = sum(d);
  }
  return r;
}

// The first n of 16 lanes from memory, the rest zero; and only the first n to memory.
KN_INLINE f32x16 load(const float* p, int n) {
  float t[16] = {};
  std::memcpy(t, p, n * sizeof(float));
  return load(t);
}
KN_INLINE f32x16 load(const bf16* p, int n) {
  bf16 t[16] = {};
  std::memcpy(t, p, n * sizeof(bf16));
  return load(t);
}
KN_INLINE void store(float* p, f32x16 a, int n) {
  float t[16];
  store(t, a);
  std::memcpy(p, t, n * sizeof(float));
}
KN_INLINE void store(bf16* p, f32x16 a, int n) {
  bf16 t[16];
  store(t, a);
  std::memcpy(p, t, n * sizeof(bf16));
}

// 16 e4m3 bytes as numbers, each divided by kE4m3Parts: what half precision makes of them.
static constexpr float kE4m3Parts = 256.0f;
KN_INLINE f32x16 load_e4m3(const uint8_t* p) {
  f32x16 r;
  for (int i = 0; i < 16; ++i) {
    const uint32_t u = uint32_t(p[i] & 0x80) << 24 | uint32_t(p[i] & 0x7f) << 20;
    std::memcpy(&r.v[i], &u, 4);
    r.v[i] *= 0x1p112f;  // the bias is 127, not 7 + 8
  }
  return r;
}
KN_INLINE f32x16 load_e4m3(const uint8_t* p, int n) {
  uint8_t t[16] = {};
  std::memcpy(t, p, n);
  return load_e4m3(t);
}

// The numbers at the even (odd) places of 32; of the first n of them, the rest zero.
KN_INLINE f32x16 every_second(const float* p, int from) {
  f32x16 r;
  for (int i = 0; i < 16; ++i) std::memcpy(&r.v[i], p + 2 * i + from, sizeof r.v[i]);
  return r;
}
KN_INLINE f32x16 every_second(const bf16* p, int from) {
  f32x16 r;
  for (int i = 0; i < 16; ++i) {
    uint16_t bits;
    std::memcpy(&bits, p + 2 * i + from, sizeof bits);
    const uint32_t u = uint32_t(bits) << 16;
    std::memcpy(&r.v[i], &u, 4);
  }
  return r;
}
KN_INLINE f32x16 every_second(const bf16* p, int n, int from) {
  bf16 t[32] = {};
  std::memcpy(t, p, n * sizeof(bf16));
  return every_second(t, from);
}
KN_INLINE f32x16 load_even(const float* p) { return every_second(p, 0); }
KN_INLINE f32x16 load_odd(const float* p) { return every_second(p, 1); }
KN_INLINE f32x16 load_even(const bf16* p) { return every_second(p, 0); }
KN_INLINE f32x16 load_odd(const bf16* p) { return every_second(p, 1); }
KN_INLINE f32x16 load_even(const bf16* p, int n) { return every_second(p, n, 0); }
KN_INLINE f32x16 load_odd(const bf16* p, int n) { return every_second(p, n, 1); }

// The largest of 32 magnitudes: NaN if one is NaN, else infinite if one is.
KN_INLINE float largest_magnitude(const bf16* p) {
  uint16_t bits[32], largest = 0;
  std::memcpy(bits, p, sizeof bits);
  for (int i = 0; i < 32; ++i) {
    const uint16_t magnitude = bits[i] & 0x7fff;
    largest = largest > magnitude ? largest : magnitude;
  }
  const uint32_t u = uint32_t(largest) << 16;
  float r;
  std::memcpy(&r, &u, 4);
  return r;
}
// The low four bits of each lane, those of `even` in the low half of a byte.
KN_INLINE void store_nibbles(uint8_t* p, f32x16 even, f32x16 odd) {
  uint32_t low[16], high[16];
  std::memcpy(low, even.v, sizeof low);
  std::memcpy(high, odd.v, sizeof high);
  for (int i = 0; i < 16; ++i) p[i] = uint8_t((low[i] & 15) | (high[i] & 15) << 4);
}

// sum_lanes of 16 registers, `p` and the next at 64 bytes: lane i is the sum of register i.
KN_INLINE f32x16 sum_lanes16(const float* p) {
  f32x16 r;
  for (int i = 0; i < 16; ++i) r.v[i] = sum_lanes(load(p + i * 16));
  return r;
}

}  // namespace kn::cpu::KN_ISA
