// Random INT4 matrices in the checkpoint layout, and one product of one in plain double.
#pragma once
#include "harness.h"
#include "kimi_native/layout.h"

namespace kn::bench {

struct Int4Matrix {
  Buffer<uint8_t> packed;  // [out, in / 2]
  Buffer<bf16> scale;      // [out, in / 32]

  Int4Matrix(int64_t out, int64_t in, Random& random)
      : packed(out * int4_row_bytes(in)), scale(out * num_groups(in)) {
    fill(packed, [&] { return uint8_t(random.bits()); });
    fill(scale, [&] { return to_bf16(0.01f + 0.01f * random.unit()); });
  }
  static int64_t bytes(int64_t out, int64_t in) {
    return out * (int4_row_bytes(in) + num_groups(in) * int64_t(sizeof(bf16)));
  }
};

struct Product {
  double value;
  double magnitude;  // the sum of the absolute terms, which scales every error bound
};

inline Product int4_dot(const bf16* x, Int4Matrix& w, int64_t row, int64_t in) {
  Product p{0.0, 0.0};
  for (int64_t i = 0; i < in; ++i) {
    const uint8_t byte = w.packed[row * int4_row_bytes(in) + i / 2];
    const int q = (i % 2 ? byte >> 4 : byte & 15) - kInt4ZeroPoint;
    const double term =
        to_float(x[i]) * q * to_float(w.scale[row * num_groups(in) + i / kGroupSize]);
    p.value += term;
    p.magnitude += std::fabs(term);
  }
  return p;
}

}  // namespace kn::bench
