// bf16_gemm: the dense projections of K2 and Moonlight, and their absorbed per-head matrices.
#include "harness.h"
#include "kimi_native/ops.h"

namespace kn::bench {
namespace {

struct Shape {
  const char* name;
  int64_t heads, out, in;

  int64_t weights() const { return heads * out * in; }
};
const Shape kShapes[] = {{"k2 q_a", 1, 1536, 7168},
                         {"k2 q_b", 1, 12288, 1536},
                         {"k2 o_proj", 1, 7168, 8192},
                         {"k2 shared gate", 1, 2048, 7168},
                         {"k2 router", 1, 384, 7168},
                         {"k2 absorbed key", 64, 512, 128},
                         {"k2 absorbed value", 64, 128, 512},
                         {"moonlight q_proj", 1, 3072, 2048},
                         {"moonlight dense gate", 1, 11264, 2048},
                         {"moonlight head", 1, 163840, 2048},
                         {"moonlight absorbed key", 16, 512, 128},
                         {"tiny", 2, 64, 128}};

bf16* weight_of(const Rotation& weights, int64_t i) {
  return reinterpret_cast<bf16*>(weights.copy(i));
}

void check(const Shape& s, const Buffer<bf16>& x, const bf16* w, const Buffer<float>& y,
           int64_t tokens) {
  for (int64_t i = 0; i < 64; ++i) {
    const int64_t t = i * 7 % tokens, h = i * 5 % s.heads, o = i * 131 % s.out;
    double sum = 0.0, magnitude = 0.0;
    for (int64_t k = 0; k < s.in; ++k) {
      const double term = double(to_float(x[(t * s.heads + h) * s.in + k])) *
                          to_float(w[(h * s.out + o) * s.in + k]);
      sum += term;
      magnitude += std::fabs(term);
    }
    expect_close("bf16_gemm", y[(t * s.heads + h) * s.out + o], sum,
                 2 * double(s.in) * 0x1p-24 * magnitude);
  }
}

void time_tokens(const Shape& s, const std::string& text, int64_t tokens, const Rotation& weights,
                 Report& report) {
  Random random;
  const Buffer<bf16> x(tokens * s.heads * s.in, [&] { return to_bf16(random.sign()); });
  const Buffer<float> y(tokens * s.heads * s.out);
  Bf16GemmArgs a{};
  a.x = x.data();
  a.y = y.data();
  a.x_dtype = DType::kBf16;
  a.y_dtype = DType::kFp32;
  a.tokens = tokens;
  a.heads = s.heads;
  a.out = s.out;
  a.in = s.in;
  a.x_token_stride = s.heads * s.in;
  a.x_head_stride = s.in;
  a.weight_head_stride = s.out * s.in;
  a.y_token_stride = s.heads * s.out;
  a.y_head_stride = s.out;
  const auto workspace = give_workspace(a, cpu::bf16_gemm_workspace_bytes(a));
  const auto run = [&](int64_t call) {
    a.weight = weight_of(weights, call);
    cpu::bf16_gemm(a);
  };
  run(0);
  check(s, x, weight_of(weights, 0), y, tokens);
  const Work work{.bytes = double(2 * s.weights() + tokens * s.heads * (2 * s.in + 4 * s.out)),
                  .flops = 2.0 * double(tokens * s.weights()),
                  .cached = weights.fits_cache(),
                  .dots = true};
  report.time({"bf16_gemm", text, tokens, work}, run);
}

}  // namespace

void programs::bf16_gemm(Report& report) {
  for (const Shape& s : kShapes) {
    std::string text = concat(s.name, " ", s.out, "x", s.in);
    if (s.heads > 1) text += concat(" heads=", s.heads);
    if (!report.wants(text)) continue;
    const Rotation weights(num_copies(2 * s.weights()), 2 * s.weights(), report.options().pages);
    Random random;
    for (int64_t i = 0; i < weights.copies(); ++i)
      fill(weight_of(weights, i), s.weights(), [&] { return to_bf16(random.sign()); });
    for (const int threads : report.thread_counts()) {
      set_num_threads(threads);
      for (const int64_t tokens : report.token_counts({1, 4, 16, 64, 256}))
        time_tokens(s, text, tokens, weights, report);
    }
  }
}

}  // namespace kn::bench
