// int8_gemm: K2's dense projections with 8-bit weights.
#include "int4_matrices.h"
#include "programs.h"

namespace kn::bench::gpu {
namespace {

struct Shape {
  const char* name;
  int64_t out, in;

  int64_t bytes() const { return out * (in + num_groups(in) * 2); }
};
const Shape kShapes[] = {{"k2 q_b", 12288, 1536},
                         {"k2 o_proj", 7168, 8192},
                         {"k2 shared gate", 2048, 7168},
                         {"tiny", 64, 128}};

struct Weights {
  RandomBuffer<int8_t> weight;
  RandomBuffer<bf16> scale;
};

void check(const Shape& s, const RandomBuffer<bf16>& x, const Weights& w,
           const DeviceBuffer<bf16>& y, int64_t tokens) {
  for (int64_t i = 0; i < 32; ++i) {
    const int64_t t = (i * 7 + tokens - 1) % tokens, o = i * 131 % s.out;
    Product p;
    for (int64_t k = 0; k < s.in; ++k)
      p.add(double(to_float(x[t * s.in + k])) * w.weight[o * s.in + k] *
            to_float(w.scale[o * num_groups(s.in) + k / kGroupSize]));
    expect_close("int8_gemm", to_float(y.read(t * s.out + o, 1)[0]), p.value,
                 0x1p-8 * std::fabs(p.value) + 1e-4 * p.magnitude);
  }
}

void time_tokens(const Shape& s, const std::string& text, int64_t tokens, const Weights& weights,
                 Report& report) {
  Random random;
  const RandomBuffer<bf16> x = random_bf16(tokens * s.in, random);
  const DeviceBuffer<bf16> y(tokens * s.out);
  const int64_t copies = weights.weight.size() / (s.out * s.in);
  Int8GemmArgs a{};
  a.x = x.data();
  a.y = y.data();
  a.x_dtype = a.y_dtype = DType::kBf16;
  a.tokens = tokens;
  a.out = s.out;
  a.in = s.in;
  a.group_size = kGroupSize;
  const auto workspace = give_workspace(a, cuda::int8_gemm_workspace_bytes(a));
  const auto run = [&](int64_t call) {
    a.weight = weights.weight.data() + call % copies * s.out * s.in;
    a.weight_scale = weights.scale.data() + call % copies * s.out * num_groups(s.in);
    cuda::int8_gemm(a, stream());
  };
  run(0);
  synchronize("int8_gemm");
  check(s, x, weights, y, tokens);
  const Work work{.bytes = double(s.bytes() + tokens * 2 * (s.in + s.out)),
                  .flops = 2.0 * double(tokens * s.out * s.in)};
  report.time({"int8_gemm", text, tokens, work}, copies, run);
}

}  // namespace

void programs::int8_gemm(Report& report) {
  for (const Shape& s : kShapes) {
    const std::string text = concat(s.name, " ", s.out, "x", s.in);
    if (!report.wants(text)) continue;
    Random random;
    const int64_t copies = report.num_copies(s.bytes());
    const Weights weights{
        {copies * s.out * s.in, [&] { return int8_t(int(random.bits() % 255) - 127); }},
        {copies * s.out * num_groups(s.in),
         [&] { return to_bf16(0.001f + 0.001f * random.unit()); }}};
    for (const int64_t tokens : report.token_counts({1, 16, 64}))
      time_tokens(s, text, tokens, weights, report);
  }
}

}  // namespace kn::bench::gpu
