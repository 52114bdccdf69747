// int4_gemm: dense INT4 matrices of K2's and Moonlight's experts.
#include "int4_weights.h"
#include "kimi_native/ops.h"

namespace kn::bench {
namespace {

struct Shape {
  const char* name;
  int64_t out, in;
};
const Shape kShapes[] = {{"k2 gate/up", 2048, 7168},
                         {"k2 down", 7168, 2048},
                         {"moonlight gate/up", 1408, 2048},
                         {"moonlight down", 2048, 1408},
                         {"tiny", 64, 128}};

void check(const Buffer<bf16>& x, const Int4Matrix& w, const Buffer<float>& y, int64_t tokens,
           Compute compute) {
  for (int64_t i = 0; i < 64; ++i) {
    const int64_t t = i * 7 % tokens, o = i * 131 % w.out;
    const Product p = int4_dot(&x[t * w.in], w, o);
    expect_close("int4_gemm", y[t * w.out + o], p.value, int4_tolerance(compute) * p.magnitude);
  }
}

void time_tokens(const Shape& s, const std::string& text, int64_t tokens,
                 const Int4Matrices& weights, Report& report) {
  Random random;
  const Buffer<bf16> x(tokens * s.in, [&] { return to_bf16(random.sign()); });
  const Buffer<float> y(tokens * s.out);
  Int4GemmArgs a{};
  a.x = x.data();
  a.y = y.data();
  a.x_dtype = DType::kBf16;
  a.y_dtype = DType::kFp32;
  a.tokens = tokens;
  a.out = s.out;
  a.in = s.in;
  a.group_size = kGroupSize;
  a.compute = report.options().compute;
  const auto workspace = give_workspace(a, cpu::int4_gemm_workspace_bytes(a));
  const auto run = [&](int64_t call) {
    a.weight_packed = weights[call].packed;
    a.weight_scale = weights[call].scale;
    cpu::int4_gemm(a);
  };
  run(0);
  check(x, weights[0], y, tokens, a.compute);
  const Work work{.bytes = double(weights.bytes() + tokens * (2 * s.in + 4 * s.out)),
                  .flops = 2.0 * double(tokens * s.out * s.in),
                  .cached = weights.fits_cache(),
                  .limbs = true,
                  .compute = a.compute};
  report.time({"int4_gemm", text, tokens, work}, run);
}

}  // namespace

void programs::int4_gemm(Report& report) {
  for (const Shape& s : kShapes) {
    const std::string text = concat(s.name, " ", s.out, "x", s.in);
    if (!report.wants(text)) continue;
    const Int4Matrices weights(s.out, s.in, report.options());
    for (const int threads : report.thread_counts()) {
      set_num_threads(threads);
      for (const int64_t tokens : report.token_counts({1, 4, 16, 64, 256}))
        time_tokens(s, text, tokens, weights, report);
    }
  }
}

}  // namespace kn::bench
