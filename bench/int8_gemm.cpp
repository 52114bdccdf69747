// int8_gemm: the dense projections of K2 and Moonlight with 8-bit weights.
#include "harness.h"
#include "kimi_native/layout.h"
#include "kimi_native/ops.h"

namespace kn::bench {
namespace {

struct Shape {
  const char* name;
  int64_t out, in;
};
const Shape kShapes[] = {{"k2 q_a", 1536, 7168},
                         {"k2 q_b", 12288, 1536},
                         {"k2 o_proj", 7168, 8192},
                         {"k2 shared gate", 2048, 7168},
                         {"moonlight q_proj", 3072, 2048},
                         {"moonlight dense gate", 11264, 2048},
                         {"tiny", 64, 128}};

int64_t matrix_bytes(const Shape& s) { return s.out * s.in + s.out * num_groups(s.in) * 2; }
int8_t* weight_of(const Rotation& weights, int64_t i) {
  return reinterpret_cast<int8_t*>(weights.copy(i));
}
bf16* scale_of(const Shape& s, const Rotation& weights, int64_t i) {
  return reinterpret_cast<bf16*>(weights.copy(i) + s.out * s.in);
}

void check(const Shape& s, const Buffer<bf16>& x, const Rotation& weights, const Buffer<float>& y,
           int64_t tokens) {
  const int8_t* weight = weight_of(weights, 0);
  const bf16* scale = scale_of(s, weights, 0);
  for (int64_t i = 0; i < 64; ++i) {
    const int64_t t = i * 7 % tokens, o = i * 131 % s.out;
    double sum = 0.0, magnitude = 0.0;
    for (int64_t k = 0; k < s.in; ++k) {
      const double term = double(to_float(x[t * s.in + k])) * weight[o * s.in + k] *
                          to_float(scale[o * num_groups(s.in) + k / kGroupSize]);
      sum += term;
      magnitude += std::fabs(term);
    }
    expect_close("int8_gemm", y[t * s.out + o], sum, 1e-4 * magnitude);
  }
}

void time_tokens(const Shape& s, const std::string& text, int64_t tokens, const Rotation& weights,
                 Report& report) {
  Random random;
  const Buffer<bf16> x(tokens * s.in, [&] { return to_bf16(random.sign()); });
  const Buffer<float> y(tokens * s.out);
  Int8GemmArgs a{};
  a.x = x.data();
  a.y = y.data();
  a.x_dtype = DType::kBf16;
  a.y_dtype = DType::kFp32;
  a.tokens = tokens;
  a.out = s.out;
  a.in = s.in;
  a.group_size = kGroupSize;
  const auto workspace = give_workspace(a, cpu::int8_gemm_workspace_bytes(a));
  const auto run = [&](int64_t call) {
    a.weight = weight_of(weights, call);
    a.weight_scale = scale_of(s, weights, call);
    cpu::int8_gemm(a);
  };
  run(0);
  check(s, x, weights, y, tokens);
  const Work work{.bytes = double(matrix_bytes(s) + tokens * (2 * s.in + 4 * s.out)),
                  .flops = 2.0 * double(tokens * s.out * s.in),
                  .cached = weights.fits_cache(),
                  .limbs = true};
  report.time({"int8_gemm", text, tokens, work}, run);
}

}  // namespace

void programs::int8_gemm(Report& report) {
  for (const Shape& s : kShapes) {
    const std::string text = concat(s.name, " ", s.out, "x", s.in);
    if (!report.wants(text)) continue;
    const Rotation weights(num_copies(matrix_bytes(s)), matrix_bytes(s), report.options().pages);
    Random random;
    for (int64_t i = 0; i < weights.copies(); ++i) {
      fill(weight_of(weights, i), s.out * s.in, [&] { return int8_t(random.bits() % 255 - 127); });
      fill(scale_of(s, weights, i), s.out * num_groups(s.in),
           [&] { return to_bf16(0.001f + 0.001f * random.unit()); });
    }
    for (const int threads : report.thread_counts()) {
      set_num_threads(threads);
      for (const int64_t tokens : report.token_counts({1, 4, 16, 64, 256}))
        time_tokens(s, text, tokens, weights, report);
    }
  }
}

}  // namespace kn::bench
