// int4_quantize, a run of groups: one pass over the bf16 weights, 16 groups at a time. The largest
// magnitude of a group comes from its bits as integers (they order like the magnitudes, NaN above
// all); 16 scales and their reciprocals are a register each; then each group's quotients are
// rounded and packed while it is in L1. Bytes: 64 in, 18 out a group. FLOPs: three a weight.
//
// Two additions round w / scale to an integer, halves to even, exactly, though w * (1 / scale) is
// off by up to 2^-19. The first rounds that to a multiple of 2^-12. A quotient of two bf16 numbers
// of at least 2^-2 either is a half of an odd number, which this restores, or is 2^-10 away from
// it: the difference is a multiple of 2^-2 / b, with 128 <= b < 256 the scale's significand.
#pragma once

namespace kn::cpu::KN_ISA {

static constexpr float kInt4Largest = 7.0f;         // q in -7 .. 7, as published
static constexpr float kSmallestScale = 0x1p-126f;  // keeps the quotients of a zero group finite

static constexpr float kTwelfthBit = 0x1.8p11f;  // what is added to this keeps 12 bits of fraction
// From there to where a float counts ones, and 8 more: the low four bits are the nibble q + 8.
static constexpr float kToNibble = 0x1.8p23f + 8 - kTwelfthBit;

KN_INLINE f32x16 nibble_of(f32x16 w, f32x16 reciprocal) {
  return add(fma(w, reciprocal, splat(kTwelfthBit)), splat(kToNibble));
}

// Returns how many groups hold a NaN or an infinity; what is written for those is without meaning.
static int64_t int4_quantize_run(const bf16* w, uint8_t* packed, bf16* scale, int64_t groups) {
  int64_t bad = 0;
  for (int64_t first = 0; first < groups; first += 16) {
    const int n = int(groups - first < 16 ? groups - first : 16);
    float largest[16] = {}, reciprocals[16];
    for (int g = 0; g < n; ++g) {
      largest[g] = largest_magnitude(w + (first + g) * kGroupSize);
      bad += !(largest[g] <= __FLT_MAX__);
    }
    const f32x16 wanted = max(div(load(largest), splat(kInt4Largest)), splat(kSmallestScale));
    store(scale + first, wanted, n);
    store(reciprocals, div(splat(1.0f), round_to_bf16(wanted)));
    for (int g = 0; g < n; ++g) {
      const bf16* group = w + (first + g) * kGroupSize;
      const f32x16 reciprocal = splat(reciprocals[g]);
      store_nibbles(packed + int4_row_bytes((first + g) * kGroupSize),
                    nibble_of(load_even(group), reciprocal),
                    nibble_of(load_odd(group), reciprocal));
    }
  }
  return bad;
}

}  // namespace kn::cpu::KN_ISA
