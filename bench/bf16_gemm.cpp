// bf16_gemm: the dense projections of K2 and Moonlight, and K2's absorbed per-head matrices.
#include "harness.h"
#include "kimi_native/ops.h"

using namespace kn;
using namespace kn::bench;

namespace {

struct Shape {
  const char* name;
  int64_t heads, out, in;
};
const Shape kShapes[] = {{"k2 q_a", 1, 1536, 7168},
                         {"k2 q_b", 1, 12288, 1536},
                         {"k2 o_proj", 1, 7168, 8192},
                         {"k2 shared gate", 1, 2048, 7168},
                         {"k2 router", 1, 384, 7168},
                         {"k2 absorbed key", 64, 512, 128},
                         {"k2 absorbed value", 64, 128, 512},
                         {"moonlight q_proj", 1, 3072, 2048},
                         {"moonlight dense gate", 1, 11264, 2048}};

void check(Buffer<bf16>& x, Buffer<bf16>& w, Buffer<float>& y, int64_t tokens, const Shape& s) {
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

void bench_shape(const Shape& s, const Options& options, Report& report) {
  Random random;
  const int64_t matrix = s.heads * s.out * s.in;
  std::vector<Buffer<bf16>> weights;
  for (int64_t i = num_copies(2 * matrix); i > 0; --i) {
    weights.emplace_back(matrix);
    fill(weights.back(), [&] { return to_bf16(random.sign()); });
  }
  for (const int64_t tokens : token_counts(options)) {
    Buffer<bf16> x(tokens * s.heads * s.in);
    Buffer<float> y(tokens * s.heads * s.out);
    fill(x, [&] { return to_bf16(random.sign()); });
    Bf16GemmArgs a{x.data(), nullptr, y.data(),       DType::kBf16, DType::kFp32, tokens,  s.heads,
                   s.out,    s.in,    s.heads * s.in, s.in,         s.out * s.in, nullptr, 0};
    Buffer<uint8_t> workspace(cpu::bf16_gemm_workspace_bytes(a));
    a.workspace = workspace.data();
    a.workspace_bytes = workspace.size();
    const auto run = [&](int64_t call) {
      a.weight = weights[call % weights.size()].data();
      cpu::bf16_gemm(a);
    };
    run(0);
    check(x, weights[0], y, tokens, s);
    const Work work{.bytes = double(2 * matrix + tokens * s.heads * (2 * s.in + 4 * s.out)),
                    .flops = 2.0 * double(tokens * matrix)};
    report.line("bf16_gemm",
                concat("tokens=", tokens, " heads=", s.heads, " out=", s.out, " in=", s.in, " (",
                       s.name, ")"),
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
