// int4_quantize: dense matrices of K2 and Moonlight, from memory that has not been read before.
#include "harness.h"
#include "int4_weights.h"
#include "kimi_native/layout.h"
#include "kimi_native/ops.h"

namespace kn::bench {
namespace {

struct Shape {
  const char* name;
  int64_t out, in;
};
const Shape kShapes[] = {{"k2 q_a", 1536, 7168},
                         {"k2 shared gate", 2048, 7168},
                         {"moonlight q_proj", 3072, 2048},
                         {"moonlight dense gate", 11264, 2048},
                         {"tiny", 64, 128}};

// A weight is off by at most half a scale, and by the rounding of the quotient.
void check(const Shape& s, const bf16* w, const Int4Matrix& quantized) {
  for (int64_t i = 0; i < s.out * s.in; i += 61) {
    const float scale = to_float(quantized.scale[i / kGroupSize]);
    const uint8_t byte = quantized.packed[i / 2];
    const int q = (i % 2 ? byte >> 4 : byte & 15) - kInt4ZeroPoint;
    expect_close("int4_quantize", q * scale, to_float(w[i]), 0.50001 * scale);
  }
}

void time_shape(const Shape& s, const std::string& text, Report& report) {
  const Rotation matrices(num_copies(2 * s.out * s.in), 2 * s.out * s.in, report.options().pages);
  const auto matrix = [&](int64_t i) { return reinterpret_cast<bf16*>(matrices.copy(i)); };
  Random random;
  for (int64_t i = 0; i < matrices.copies(); ++i)
    fill(matrix(i), s.out * s.in, [&] { return to_bf16(random.sign()); });
  const Buffer<uint8_t> bytes(Int4Matrix::bytes(s.out, s.in));
  const Int4Matrix to(bytes.data(), s.out, s.in);
  const auto run = [&](int64_t call) {
    cpu::int4_quantize({matrix(call), to.packed, to.scale, s.out, s.in, kGroupSize});
  };
  run(0);
  check(s, matrix(0), to);
  const Work work{.bytes = double(2 * s.out * s.in + bytes.size()),
                  .cached = matrices.fits_cache()};
  report.time({"int4_quantize", text, s.out, work}, run);
}

}  // namespace

void programs::int4_quantize(Report& report) {
  for (const Shape& s : kShapes) {
    const std::string text = concat(s.name, " ", s.out, "x", s.in);
    if (!report.wants(text)) continue;
    for (const int threads : report.thread_counts()) {
      set_num_threads(threads);
      time_shape(s, text, report);
    }
  }
}

}  // namespace kn::bench
