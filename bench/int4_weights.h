// Random INT4 matrices in the checkpoint layout, and one product of one in plain double.
#pragma once
#include "harness.h"
#include "kimi_native/layout.h"

namespace kn::bench {

// Where one matrix lies: the scales follow the packed nibbles.
struct Int4Matrix {
  uint8_t* packed;  // [out, in / 2]
  bf16* scale;      // [out, in / 32]
  int64_t out, in;

  Int4Matrix(uint8_t* at, int64_t out, int64_t in)
      : packed(at),
        scale(reinterpret_cast<bf16*>(at + out * int4_row_bytes(in))),
        out(out),
        in(in) {}
  static int64_t bytes(int64_t out, int64_t in) {
    return out * (int4_row_bytes(in) + num_groups(in) * int64_t(sizeof(bf16)));
  }
  void fill_random(Random& random) const {
    fill(packed, out * int4_row_bytes(in), [&] { return uint8_t(random.bits()); });
    fill(scale, out * num_groups(in), [&] { return to_bf16(0.01f + 0.01f * random.unit()); });
  }
};

// Matrices of one shape that rotate through more than the cache.
class Int4Matrices {
 public:
  Int4Matrices(int64_t out, int64_t in, const Options& options)
      : out_(out),
        in_(in),
        rotation_(num_copies(Int4Matrix::bytes(out, in)), Int4Matrix::bytes(out, in),
                  options.pages) {
    Random random;
    for (int64_t i = 0; i < rotation_.copies(); ++i) (*this)[i].fill_random(random);
  }
  Int4Matrix operator[](int64_t i) const { return {rotation_.copy(i), out_, in_}; }
  int64_t bytes() const { return Int4Matrix::bytes(out_, in_); }
  bool fits_cache() const { return rotation_.fits_cache(); }

 private:
  int64_t out_, in_;
  Rotation rotation_;
};

// How far a product may be off, as a part of its magnitude. In 8 bits an entry of x is off by up to
// 1/254 of its group's largest, below 1; those of the benchmarks are 1/2 on average.
inline double int4_tolerance(Compute compute) { return compute == Compute::kInt8 ? 1e-2 : 1e-4; }

// silu(gate) * up, and how far it may be off: silu's slope is below 1.1.
struct Swiglu {
  double value, tolerance;
  Swiglu(const Product& gate, const Product& up, Compute compute) {
    const double silu = gate.value / (1 + std::exp(-gate.value));
    const double off_gate = int4_tolerance(compute) * gate.magnitude;
    const double off_up = int4_tolerance(compute) * up.magnitude;
    value = silu * up.value;
    tolerance = 1.1 * off_gate * (std::fabs(up.value) + off_up) + std::fabs(silu) * off_up;
  }
};

inline Product int4_dot(const bf16* x, const Int4Matrix& w, int64_t row) {
  Product p;
  for (int64_t i = 0; i < w.in; ++i) {
    const uint8_t byte = w.packed[row * int4_row_bytes(w.in) + i / 2];
    const int q = (i % 2 ? byte >> 4 : byte & 15) - kInt4ZeroPoint;
    p.add(to_float(x[i]) * q * to_float(w.scale[row * num_groups(w.in) + i / kGroupSize]));
  }
  return p;
}

}  // namespace kn::bench
