// rms_norm, add_rms_norm, rope_append and swiglu at K2's widths: small, in cache, a launch each.
#include "../latent_rows.h"
#include "programs.h"

namespace kn::bench::gpu {
namespace {

struct Shape {
  const char* name;
  int64_t hidden, intermediate, heads;
};
const Shape kShapes[] = {{"k2", 7168, 2048, 64}, {"tiny", 256, 64, 4}};

void check_norm(const char* op, const std::vector<float>& x, const std::vector<bf16>& y,
                const RandomBuffer<bf16>& weight) {
  double squares = 0.0;
  for (const float v : x) squares += double(v) * v;
  for (size_t i = 0; i < x.size(); i += 61) {
    const double expected =
        x[i] / std::sqrt(squares / double(x.size()) + 1e-6) * to_float(weight[i]);
    expect_close(op, to_float(y[i]), expected, 0x1p-7 * std::fabs(expected));
  }
}

void time_norms(const Shape& s, int64_t tokens, Report& report) {
  Random random;
  const int64_t n = s.hidden, last = (tokens - 1) * n;
  const RandomBuffer<bf16> x = random_bf16(tokens * n, random), weight = random_bf16(n, random);
  const RandomBuffer<bf16> residual = random_bf16(tokens * n, random);
  const DeviceBuffer<bf16> y(tokens * n), sum(tokens * n);
  const auto norm = [&](int64_t) {
    cuda::rms_norm({x.data(), weight.data(), y.data(), DType::kBf16, tokens, n, n, 1e-6f},
                   stream());
  };
  const auto add_norm = [&](int64_t) {
    cuda::add_rms_norm({x.data(), residual.data(), weight.data(), y.data(), sum.data(),
                        DType::kBf16, tokens, n, 1e-6f},
                       stream());
  };
  std::vector<float> row(n);
  norm(0);
  synchronize("rms_norm");
  for (int64_t i = 0; i < n; ++i) row[i] = to_float(x[last + i]);
  check_norm("rms_norm", row, y.read(last, n), weight);
  add_norm(0);
  synchronize("add_rms_norm");
  for (int64_t i = 0; i < n; ++i)
    row[i] = to_float(to_bf16(to_float(x[last + i]) + to_float(residual[last + i])));
  check_norm("add_rms_norm", row, y.read(last, n), weight);
  const std::string text = concat(s.name, " hidden=", n);
  report.time({"rms_norm", text, tokens, {.bytes = double(4 * tokens * n), .cached = true}}, 1,
              norm);
  report.time({"add_rms_norm", text, tokens, {.bytes = double(8 * tokens * n), .cached = true}}, 1,
              add_norm);
}

void time_swiglu(const Shape& s, int64_t tokens, Report& report) {
  Random random;
  const int64_t n = tokens * s.intermediate;
  const RandomBuffer<bf16> gate = random_bf16(n, random), up = random_bf16(n, random);
  const DeviceBuffer<bf16> y(n);
  const auto run = [&](int64_t) {
    cuda::swiglu({gate.data(), up.data(), y.data(), DType::kBf16, tokens, s.intermediate},
                 stream());
  };
  run(0);
  synchronize("swiglu");
  for (int64_t i = n - 1; i >= 0; i -= 1 + n / 32) {
    const double g = to_float(gate[i]), expected = g / (1 + std::exp(-g)) * to_float(up[i]);
    expect_close("swiglu", to_float(y.read(i, 1)[0]), expected,
                 0x1p-8 * std::fabs(expected) + 1e-6);
  }
  report.time({"swiglu",
               concat(s.name, " width=", s.intermediate),
               tokens,
               {.bytes = double(6 * n), .cached = true}},
              1, run);
}

void time_rope(const Shape& s, int64_t tokens, Report& report) {
  Random random;
  const int64_t q_width = s.heads * kRope, pairs = kRope / 2;
  const RandomBuffer<bf16> q = random_bf16(tokens * q_width, random);
  const RandomBuffer<bf16> kv = random_bf16(tokens * kWidth, random);
  const auto angle = [&] { return random.sign(); };
  const RandomBuffer<float> cos(tokens * pairs, angle), sin(tokens * pairs, angle);
  const DeviceBuffer<bf16> out(tokens * q_width), cache(tokens * kWidth);
  std::vector<int64_t> order(tokens);
  for (int64_t t = 0; t < tokens; ++t) order[t] = tokens - 1 - t;
  const DeviceBuffer<int64_t> slots(order);
  RopeAppendArgs a{};
  a.q = q.data();
  a.latent = kv.data();
  a.k_rope = kv.data() + kLatent;
  a.cos = cos.data();
  a.sin = sin.data();
  a.slots = slots.data();
  a.q_out = out.data();
  a.cache = cache.data();
  a.dtype = a.cache_dtype = a.q_out_dtype = DType::kBf16;
  a.tokens = a.cache_rows = tokens;
  a.heads = s.heads;
  a.kv_lora_rank = kLatent;
  a.qk_rope_head_dim = kRope;
  a.q_token_stride = a.q_out_token_stride = q_width;
  a.q_head_stride = a.q_out_head_stride = kRope;
  a.latent_token_stride = a.k_rope_token_stride = kWidth;
  const auto run = [&](int64_t) { cuda::rope_append(a, stream()); };
  run(0);
  synchronize("rope_append");
  const std::vector<bf16> key = cache.read((tokens - 1) * kWidth, kWidth), turned = out.read(0, 2);
  for (int64_t j = 0; j < pairs; ++j) {  // the first token, which goes to the last cache row
    const double k = to_float(kv[kLatent + 2 * j]), l = to_float(kv[kLatent + 2 * j + 1]);
    expect_close("rope_append: key", to_float(key[kLatent + 2 * j]), k * cos[j] - l * sin[j],
                 0x1p-7);
  }
  expect_close("rope_append", to_float(turned[1]),
               double(to_float(q[0])) * sin[0] + double(to_float(q[1])) * cos[0], 0x1p-7);
  report.time({"rope_append",
               concat(s.name, " heads=", s.heads),
               tokens,
               {.bytes = double(4 * tokens * (q_width + kWidth)), .cached = true}},
              1, run);
}

}  // namespace

void programs::elementwise(Report& report) {
  for (const Shape& s : kShapes) {
    if (!report.wants(s.name)) continue;
    for (const int64_t tokens : report.token_counts({1, 128})) {
      time_norms(s, tokens, report);
      time_swiglu(s, tokens, report);
      time_rope(s, tokens, report);
    }
  }
}

}  // namespace kn::bench::gpu
