// int4_gemm: dense INT4 matrices of K2's and Moonlight's experts.
#include "harness.h"
#include "int4_weights.h"
#include "kimi_native/ops.h"

using namespace kn;
using namespace kn::bench;

namespace {

struct Shape {
  const char* name;
  int64_t out, in;
};
const Shape kShapes[] = {{"k2 gate/up", 2048, 7168},
                         {"k2 down", 7168, 2048},
                         {"moonlight gate/up", 1408, 2048},
                         {"moonlight down", 2048, 1408}};

void check(Buffer<bf16>& x, Int4Matrix& w, Buffer<float>& y, int64_t tokens, const Shape& s) {
  for (int64_t i = 0; i < 64; ++i) {
    const int64_t t = i * 7 % tokens, o = i * 131 % s.out;
    const Product p = int4_dot(&x[t * s.in], w, o, s.in);
    expect_close("int4_gemm", y[t * s.out + o], p.value, 1e-4 * p.magnitude);
  }
}

void bench_shape(const Shape& s, const Options& options, Report& report) {
  Random random;
  const int64_t matrix_bytes = Int4Matrix::bytes(s.out, s.in);
  std::vector<Int4Matrix> weights;
  for (int64_t i = num_copies(matrix_bytes); i > 0; --i) weights.emplace_back(s.out, s.in, random);
  for (const int64_t tokens : token_counts(options)) {
    Buffer<bf16> x(tokens * s.in);
    Buffer<float> y(tokens * s.out);
    fill(x, [&] { return to_bf16(random.sign()); });
    Int4GemmArgs a{x.data(), nullptr, nullptr, y.data(),   DType::kBf16, DType::kFp32,
                   tokens,   s.out,   s.in,    kGroupSize, nullptr,      0};
    Buffer<uint8_t> workspace(cpu::int4_gemm_workspace_bytes(a));
    a.workspace = workspace.data();
    a.workspace_bytes = workspace.size();
    const auto run = [&](int64_t call) {
      Int4Matrix& w = weights[call % weights.size()];
      a.weight_packed = w.packed.data();
      a.weight_scale = w.scale.data();
      cpu::int4_gemm(a);
    };
    run(0);
    check(x, weights[0], y, tokens, s);
    const Work work{.bytes = double(matrix_bytes + tokens * (2 * s.in + 4 * s.out)),
                    .flops = 2.0 * double(tokens * s.out * s.in),
                    .int8 = true};
    report.line("int4_gemm",
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
