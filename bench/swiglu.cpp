// swiglu: the widths of K2 and Moonlight. Activations stay in cache in a running model, hence no
// share of the memory limit.
#include "harness.h"
#include "kimi_native/ops.h"

namespace kn::bench {
namespace {

struct Shape {
  const char* name;
  int64_t width;
};
const Shape kShapes[] = {
    {"k2 dense", 18432}, {"k2 shared", 2048}, {"moonlight shared", 2816}, {"tiny", 128}};

void time_tokens(const Shape& s, const std::string& text, int64_t tokens, Report& report) {
  Random random;
  const int64_t n = tokens * s.width;
  const Buffer<bf16> gate(n, [&] { return to_bf16(4 * random.sign()); });
  const Buffer<bf16> up(n, [&] { return to_bf16(random.sign()); }), y(n);
  const SwigluArgs a{gate.data(), up.data(), y.data(), DType::kBf16, tokens, s.width};
  cpu::swiglu(a);
  for (int64_t i = 0; i < n; i += 61) {
    const double g = to_float(gate[i]), expected = g / (1 + std::exp(-g)) * to_float(up[i]);
    expect_close("swiglu", to_float(y[i]), expected, 0x1p-8 * std::fabs(expected));
  }
  const Work work{.bytes = double(6 * n), .cached = true};
  report.time({"swiglu", text, tokens, work}, [&](int64_t) { cpu::swiglu(a); });
}

}  // namespace

void programs::swiglu(Report& report) {
  for (const Shape& s : kShapes) {
    const std::string text = concat(s.name, " width=", s.width);
    if (!report.wants(text)) continue;
    for (const int threads : report.thread_counts()) {
      set_num_threads(threads);
      for (const int64_t tokens : report.token_counts({1, 16, 256}))
        time_tokens(s, text, tokens, report);
    }
  }
}

}  // namespace kn::bench
