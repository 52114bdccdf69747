// Random values, bf16 on the host, and the check of a result against plain arithmetic: what the
// benchmark programs of every device share.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <sstream>
#include <stdexcept>
#include <string>

#include "kimi_native/types.h"

namespace kn::bench {

// A small generator: the same data on every run and machine.
struct Random {
  uint64_t state = 0x9e3779b97f4a7c15;
  uint32_t bits() {
    state = state * 6364136223846793005 + 1442695040888963407;
    return uint32_t(state >> 32);
  }
  float unit() { return float(bits() >> 8) * 0x1p-24f; }
  float sign() { return 2.0f * unit() - 1.0f; }  // uniform in [-1, 1)
};

template <typename... Parts>
std::string concat(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  return text.str();
}

inline float to_float(bf16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline bf16 to_bf16(float x) {  // finite x, to nearest even
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

// Fills n entries with a random block of 64 Ki, repeated: filling gigabytes stays quick.
template <typename T, typename F>
void fill(T* data, int64_t n, F&& entry) {
  const int64_t block = std::min<int64_t>(n, 65536);
  for (int64_t i = 0; i < block; ++i) data[i] = entry();
  for (int64_t i = block; i < n; i += block)
    std::memcpy(data + i, data, std::min(block, n - i) * sizeof(T));
}

// Throws unless |actual - expected| <= bound: a wrong kernel is not worth timing.
inline void expect_close(const std::string& what, double actual, double expected, double bound) {
  if (std::fabs(actual - expected) <= bound) return;
  throw std::runtime_error(concat(what, ": the result is wrong (got ", actual, ", expected ",
                                  expected, " ± ", bound, ")"));
}

// A sum of products, and of their magnitudes, which scale every error bound.
struct Product {
  double value = 0.0, magnitude = 0.0;
  void add(double term) {
    value += term;
    magnitude += std::fabs(term);
  }
};

}  // namespace kn::bench
