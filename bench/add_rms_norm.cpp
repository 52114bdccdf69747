// add_rms_norm: the residual stream's step at the widths of K2 and Moonlight. Activations stay in
// cache in a running model, hence no share of the memory limit.
#include "harness.h"
#include "kimi_native/ops.h"

namespace kn::bench {
namespace {

struct Shape {
  const char* name;
  int64_t hidden;
};
const Shape kShapes[] = {{"k2", 7168}, {"moonlight", 2048}, {"tiny", 128}};

void check(const Shape& s, int64_t tokens, const Buffer<bf16>& x, const Buffer<bf16>& residual,
           const Buffer<bf16>& weight, const Buffer<bf16>& y, const Buffer<bf16>& sum) {
  const auto at = [&](int64_t i) {
    return to_float(to_bf16(to_float(x[i]) + to_float(residual[i])));
  };
  const int64_t first = (tokens - 1) * s.hidden;
  double squares = 0.0;
  for (int64_t i = 0; i < s.hidden; ++i) squares += std::pow(double(at(first + i)), 2);
  const double norm = std::sqrt(squares / double(s.hidden) + 1e-6);
  for (int64_t i = 0; i < s.hidden; i += 61) {
    const double expected = at(first + i) / norm * to_float(weight[i]);
    expect_close("add_rms_norm: sum", to_float(sum[first + i]), at(first + i), 0.0);
    expect_close("add_rms_norm", to_float(y[first + i]), expected, 0x1p-7 * std::fabs(expected));
  }
}

void time_tokens(const Shape& s, const std::string& text, int64_t tokens, Report& report) {
  Random random;
  const int64_t n = tokens * s.hidden;
  const auto entry = [&] { return to_bf16(random.sign()); };
  const Buffer<bf16> x(n, entry), residual(n, entry), weight(s.hidden, entry), y(n), sum(n);
  const AddRmsNormArgs a{x.data(),     residual.data(), weight.data(), y.data(), sum.data(),
                         DType::kBf16, tokens,          s.hidden,      1e-6f};
  cpu::add_rms_norm(a);
  check(s, tokens, x, residual, weight, y, sum);
  const Work work{.bytes = double(8 * n + 2 * s.hidden), .cached = true};
  report.time({"add_rms_norm", text, tokens, work}, [&](int64_t) { cpu::add_rms_norm(a); });
}

}  // namespace

void programs::add_rms_norm(Report& report) {
  for (const Shape& s : kShapes) {
    const std::string text = concat(s.name, " hidden=", s.hidden);
    if (!report.wants(text)) continue;
    for (const int threads : report.thread_counts()) {
      set_num_threads(threads);
      for (const int64_t tokens : report.token_counts({1, 16, 256}))
        time_tokens(s, text, tokens, report);
    }
  }
}

}  // namespace kn::bench
