// int8_gemm: the dense projections of K2 and Moonlight with 8-bit weights.
#include "harness.h"
#include "kimi_native/layout.h"
#include "kimi_native/ops.h"

using namespace kn;
using namespace kn::bench;

namespace {

struct Shape {
  const char* name;
  int64_t out, in;
};
const Shape kShapes[] = {{"k2 q_a", 1536, 7168},           {"k2 q_b", 12288, 1536},
                         {"k2 o_proj", 7168, 8192},        {"k2 shared gate", 2048, 7168},
                         {"moonlight q_proj", 3072, 2048}, {"moonlight dense gate", 11264, 2048}};

struct Matrix {
  Buffer<int8_t> weight;  // [out, in]
  Buffer<bf16> scale;     // [out, in / 32]

  Matrix(const Shape& s, Random& random) : weight(s.out * s.in), scale(s.out * num_groups(s.in)) {
    fill(weight, [&] { return int8_t(random.bits() % 255 - 127); });
    fill(scale, [&] { return to_bf16(0.001f + 0.001f * random.unit()); });
  }
};

void check(Buffer<bf16>& x, Matrix& w, Buffer<float>& y, int64_t tokens, const Shape& s) {
  for (int64_t i = 0; i < 64; ++i) {
    const int64_t t = i * 7 % tokens, o = i * 131 % s.out;
    double sum = 0.0, magnitude = 0.0;
    for (int64_t k = 0; k < s.in; ++k) {
      const double scale = to_float(w.scale[o * num_groups(s.in) + k / kGroupSize]);
      const double term = to_float(x[t * s.in + k]) * w.weight[o * s.in + k] * scale;
      sum += term;
      magnitude += std::fabs(term);
    }
    expect_close("int8_gemm", y[t * s.out + o], sum, 1e-4 * magnitude);
  }
}

void bench_shape(const Shape& s, const Options& options, Report& report) {
  Random random;
  const int64_t matrix_bytes = s.out * s.in + s.out * num_groups(s.in) * 2;
  std::vector<Matrix> weights;
  for (int64_t i = num_copies(matrix_bytes); i > 0; --i) weights.emplace_back(s, random);
  for (const int64_t tokens : token_counts(options)) {
    Buffer<bf16> x(tokens * s.in);
    Buffer<float> y(tokens * s.out);
    fill(x, [&] { return to_bf16(random.sign()); });
    Int8GemmArgs a{x.data(), nullptr, nullptr, y.data(),   DType::kBf16, DType::kFp32,
                   tokens,   s.out,   s.in,    kGroupSize, nullptr,      0};
    Buffer<uint8_t> workspace(cpu::int8_gemm_workspace_bytes(a));
    a.workspace = workspace.data();
    a.workspace_bytes = workspace.size();
    const auto run = [&](int64_t call) {
      Matrix& w = weights[call % weights.size()];
      a.weight = w.weight.data();
      a.weight_scale = w.scale.data();
      cpu::int8_gemm(a);
    };
    run(0);
    check(x, weights[0], y, tokens, s);
    const Work work{.bytes = double(matrix_bytes + tokens * (2 * s.in + 4 * s.out)),
                    .flops = 2.0 * double(tokens * s.out * s.in),
                    .int8 = true};
    report.line("int8_gemm",
                concat("tokens=", tokens, " out=", s.out, " in=", s.in, " g=32 (", s.name, ")"),
                measure(run), work);
  }
}

void program(const Options& options) {
  Report report(options);
  for (const int threads : thread_counts()) {
    set_num_threads(threads);
    for (const Shape& s : kShapes) bench_shape(s, options, report);
  }
}

}  // namespace

int main(int argc, char** argv) { return run_main(argc, argv, program); }
