// Activations to 16-bit block fixed point, or to bytes (limbs.h), one token at a time, chunk by
// chunk. A tier may bring its own prepare_chunk (KN_OWN_PREPARE_CHUNK); the numbers are the same,
// the order of the values its own.
#pragma once

namespace kn::cpu::KN_ISA {

#if !defined(KN_OWN_PREPARE_CHUNK)

KN_INLINE float float_of_bits(uint32_t bits) {
  float f;
  std::memcpy(&f, &bits, sizeof f);
  return f;
}
KN_INLINE float power_of_two(uint32_t biased_exponent) {
  return float_of_bits(biased_exponent << 23);
}

// The step for a group's largest magnitude, finite and by its bits, and the step's reciprocal.
struct Step {
  float step, inverse;
};
template <typename Format>
KN_INLINE Step step_of(Format, uint32_t largest) {
  const uint32_t exponent = largest >> 23;
  uint32_t step = exponent > 15 ? exponent - 14 : 1;  // biased; 1 is 2^-126, the smallest normal
  if (float_of_bits(largest) * power_of_two(254 - step) >= kLimbLimit + 0.5f) ++step;
  return {power_of_two(step), power_of_two(254 - step)};
}
KN_INLINE Step step_of(Int4OneLimb, uint32_t largest) {
  const float at_least =
      float_of_bits(largest) > kSmallestByteMax ? float_of_bits(largest) : kSmallestByteMax;
  return {at_least / kByteLimit, kByteLimit / at_least};
}

// One group to fixed point; returns its step.
template <typename Format, typename T>
KN_INLINE float fix_group(Format format, const T* x, int16_t v[kGroupSize]) {
  float f[kGroupSize];
  store(f, load(x));
  store(f + 16, load(x + 16));
  uint32_t bits[kGroupSize], largest = 0;
  std::memcpy(bits, f, sizeof bits);
  for (int i = 0; i < kGroupSize; ++i) {
    const uint32_t magnitude = bits[i] & 0x7fffffff;
    largest = magnitude > largest ? magnitude : largest;
  }
  if (largest >= 0x7f800000) {
    std::memset(v, 0, kGroupSize * sizeof *v);
    return float_of_bits(0x7fc00000);
  }
  const Step s = step_of(format, largest);
  // Adding and taking away 1.5 * 2^23 rounds to an integer, ties to even.
  const float shift = 12582912.0f;
  for (int i = 0; i < kGroupSize; ++i) v[i] = int16_t((f[i] * s.inverse + shift) - shift);
  return s.step;
}

template <typename Format, typename T>
KN_INLINE void prepare_chunk(Format format, const T* x, uint8_t* values, int32_t* offset,
                             float* step) {
  int16_t v[kChunkInputs];
  for (int g = 0; g < kChunkGroups; ++g) {
    int16_t* group = v + g * kGroupSize;
    step[g] = fix_group(format, x + g * kGroupSize, group);
    int32_t sum = 0;
    for (int i = 0; i < kGroupSize; ++i) sum += group[i];
    offset[g] = -zero_point(format) * sum;
  }
  pack_chunk(format, v, values);
}

#endif

// Chunk c of a token, with zeros past its end.
template <typename Format, typename T>
KN_INLINE void prepare_chunk_of(const T* x, int64_t in, int64_t c, uint8_t* values, int32_t* offset,
                                float* step) {
  const int64_t left = in - c * kChunkInputs;
  const T* from = x + c * kChunkInputs;
  T last[kChunkInputs] = {};
  if (left < kChunkInputs) {
    if (left > 0) std::memcpy(last, from, left * sizeof(T));
    from = last;
  }
  prepare_chunk(Format{}, from, values, offset, step);
}

template <typename Format, typename T>
static void prepare_chunks(const T* x, int64_t in, uint8_t* out) {
  const int64_t padded = padded_chunks(in);
  int32_t* offset = (int32_t*)(out + padded * kChunkValueBytes);
  float* step = (float*)(offset + padded * kChunkGroups);
  for (int64_t c = 0; c < padded; ++c)
    prepare_chunk_of<Format>(x, in, c, out + c * kChunkValueBytes, offset + c * kChunkGroups,
                             step + c * kChunkGroups);
}

}  // namespace kn::cpu::KN_ISA
