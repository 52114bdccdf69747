// rms_norm: the widths of K2 and Moonlight. Activations stay in cache in a running model, hence no
// share of the memory limit.
#include "harness.h"
#include "kimi_native/ops.h"

namespace kn::bench {
namespace {

struct Shape {
  const char* name;
  int64_t hidden;
};
const Shape kShapes[] = {
    {"k2", 7168}, {"moonlight", 2048}, {"k2 q_a", 1536}, {"k2 kv_a", 512}, {"tiny", 128}};

void time_tokens(const Shape& s, const std::string& text, int64_t tokens, Report& report) {
  Random random;
  const auto entry = [&] { return to_bf16(random.sign()); };
  const Buffer<bf16> x(tokens * s.hidden, entry), weight(s.hidden, entry), y(tokens * s.hidden);
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
  const Work work{.bytes = double(4 * tokens * s.hidden + 2 * s.hidden), .cached = true};
  report.time({"rms_norm", text, tokens, work}, [&](int64_t) { cpu::rms_norm(a); });
}

}  // namespace

void programs::rms_norm(Report& report) {
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
