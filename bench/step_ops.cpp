// add_rms_norm and rope_append, the small ops of a decode step, at the widths of K2 and Moonlight.
// Activations stay in cache in a running model, hence no share of the memory limit.
#include "harness.h"
#include "kimi_native/ops.h"

using namespace kn;
using namespace kn::bench;

namespace {

struct Shape {
  const char* name;
  int64_t hidden, heads, rank, rope;
};
const Shape kShapes[] = {{"k2", 7168, 64, 512, 64}, {"moonlight", 2048, 16, 512, 64}};

void bench_norm(const Shape& s, int64_t tokens, Report& report) {
  Random random;
  const int64_t n = tokens * s.hidden;
  Buffer<bf16> x(n), residual(n), weight(s.hidden), y(n), sum(n);
  for (Buffer<bf16>* b : {&x, &residual, &weight}) fill(*b, [&] { return to_bf16(random.sign()); });
  const AddRmsNormArgs a{x.data(),     residual.data(), weight.data(), y.data(), sum.data(),
                         DType::kBf16, tokens,          s.hidden,      1e-6f};
  cpu::add_rms_norm(a);
  for (int64_t i = 0; i < n; i += 61)
    expect_close("add_rms_norm", to_float(sum[i]), to_float(x[i]) + to_float(residual[i]), 0x1p-7);
  report.line("add_rms_norm", concat("tokens=", tokens, " hidden=", s.hidden, " (", s.name, ")"),
              measure([&](int64_t) { cpu::add_rms_norm(a); }),
              {.bytes = double(8 * n + 2 * s.hidden), .cached = true});
}

void bench_rope(const Shape& s, int64_t tokens, Report& report) {
  Random random;
  const int64_t width = s.rank + s.rope;
  Buffer<bf16> q(tokens * s.heads * s.rope), kv(tokens * width), cache(tokens * width);
  Buffer<float> cos(tokens * s.rope / 2), sin(tokens * s.rope / 2), out(tokens * s.heads * s.rope);
  Buffer<int64_t> slots(tokens);
  for (Buffer<bf16>* b : {&q, &kv}) fill(*b, [&] { return to_bf16(random.sign()); });
  for (int64_t i = 0; i < tokens * s.rope / 2; ++i)
    cos[i] = std::cos(float(i)), sin[i] = std::sin(float(i));
  for (int64_t t = 0; t < tokens; ++t) slots[t] = tokens - 1 - t;
  const RopeAppendArgs a{q.data(),
                         kv.data(),
                         kv.data() + s.rank,
                         cos.data(),
                         sin.data(),
                         slots.data(),
                         out.data(),
                         cache.data(),
                         DType::kBf16,
                         DType::kFp32,
                         DType::kBf16,
                         tokens,
                         s.heads,
                         s.rank,
                         s.rope,
                         tokens,
                         s.heads * s.rope,
                         s.rope,
                         s.heads * s.rope,
                         s.rope,
                         width,
                         width};
  cpu::rope_append(a);
  for (int64_t j = 0; j < s.rope; j += 2)
    expect_close("rope_append", out[j],
                 to_float(q[j]) * cos[j / 2] - to_float(q[j + 1]) * sin[j / 2], 0x1p-7);
  report.line("rope_append", concat("tokens=", tokens, " heads=", s.heads, " (", s.name, ")"),
              measure([&](int64_t) { cpu::rope_append(a); }),
              {.bytes = double(tokens * (s.heads * s.rope * 6 + 4 * width)), .cached = true});
}

void program(const Options& options) {
  Report report(options);
  for (const int64_t tokens : token_counts(options))
    for (const Shape& s : kShapes) {
      bench_norm(s, tokens, report);
      bench_rope(s, tokens, report);
    }
}

}  // namespace

int main(int argc, char** argv) { return run_main(argc, argv, program); }
