// rms_norm and swiglu: the widths of K2 and Moonlight. Activations stay in cache in a running
// model, hence no share of the memory limit.
#include "harness.h"
#include "kimi_native/ops.h"

using namespace kn;
using namespace kn::bench;

namespace {

struct Shape {
  const char* name;
  int64_t hidden;
};
const Shape kNorms[] = {{"k2", 7168}, {"moonlight", 2048}, {"k2 q_a", 1536}, {"k2 kv_a", 512}};
const Shape kGates[] = {{"k2 dense", 18432}, {"k2 shared", 2048}, {"moonlight shared", 2816}};

void bench_norm(const Shape& s, int64_t tokens, Report& report) {
  Random random;
  Buffer<bf16> x(tokens * s.hidden), weight(s.hidden), y(tokens * s.hidden);
  fill(x, [&] { return to_bf16(random.sign()); });
  fill(weight, [&] { return to_bf16(random.sign()); });
  const RmsNormArgs a{x.data(), weight.data(), y.data(), DType::kBf16,
                      tokens,   s.hidden,      s.hidden, 1e-6f};
  cpu::rms_norm(a);
  for (const int64_t t : {int64_t(0), tokens - 1}) {
    double squares = 0.0;
    for (int64_t i = 0; i < s.hidden; ++i)
      squares += std::pow(double(to_float(x[t * s.hidden + i])), 2);
    for (int64_t i = 0; i < s.hidden; i += 61) {
      const double expected = to_float(x[t * s.hidden + i]) /
                              std::sqrt(squares / double(s.hidden) + 1e-6) * to_float(weight[i]);
      expect_close("rms_norm", to_float(y[t * s.hidden + i]), expected,
                   0x1p-7 * std::fabs(expected));
    }
  }
  report.line("rms_norm", concat("tokens=", tokens, " hidden=", s.hidden, " (", s.name, ")"),
              measure([&](int64_t) { cpu::rms_norm(a); }),
              {.bytes = double(4 * tokens * s.hidden + 2 * s.hidden), .cached = true});
}

void bench_swiglu(const Shape& s, int64_t tokens, Report& report) {
  Random random;
  const int64_t n = tokens * s.hidden;
  Buffer<bf16> gate(n), up(n), y(n);
  fill(gate, [&] { return to_bf16(4 * random.sign()); });
  fill(up, [&] { return to_bf16(random.sign()); });
  const SwigluArgs a{gate.data(), up.data(), y.data(), DType::kBf16, tokens, s.hidden};
  cpu::swiglu(a);
  for (int64_t i = 0; i < n; i += 61) {
    const double g = to_float(gate[i]), expected = g / (1 + std::exp(-g)) * to_float(up[i]);
    expect_close("swiglu", to_float(y[i]), expected, 0x1p-8 * std::fabs(expected));
  }
  report.line("swiglu", concat("tokens=", tokens, " width=", s.hidden, " (", s.name, ")"),
              measure([&](int64_t) { cpu::swiglu(a); }), {.bytes = double(6 * n), .cached = true});
}

void program(const Options& options) {
  Report report(options);
  for (const int threads : thread_counts()) {
    set_num_threads(threads);
    for (const int64_t tokens : token_counts(options)) {
      for (const Shape& s : kNorms) bench_norm(s, tokens, report);
      for (const Shape& s : kGates) bench_swiglu(s, tokens, report);
    }
  }
}

}  // namespace

int main(int argc, char** argv) { return run_main(argc, argv, program); }
