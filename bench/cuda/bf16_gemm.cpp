// bf16_gemm: K2's dense projections, its router and head, and the absorbed per-head matrices.
#include "programs.h"

namespace kn::bench::gpu {
namespace {

struct Shape {
  const char* name;
  int64_t heads, out, in;

  int64_t weights() const { return heads * out * in; }
};
const Shape kShapes[] = {{"k2 q_a", 1, 1536, 7168},
                         {"k2 q_b", 1, 12288, 1536},
                         {"k2 o_proj", 1, 7168, 8192},
                         {"k2 shared gate", 1, 2048, 7168},
                         {"k2 router", 1, 384, 7168},
                         {"k2 absorbed key", 64, 512, 128},
                         {"k2 absorbed value", 64, 128, 512},
                         {"k2 head", 1, 163840, 7168},
                         {"tiny", 2, 64, 128}};

// Rounding to bf16, and 2 * ceil(in / 8) + 8 roundings of a sum in a tensor core that may truncate.
void check(const Shape& s, const RandomBuffer<bf16>& x, const RandomBuffer<bf16>& w,
           const DeviceBuffer<bf16>& y, int64_t tokens) {
  for (int64_t i = 0; i < 32; ++i) {
    const int64_t t = (i * 7 + tokens - 1) % tokens, h = i * 5 % s.heads, o = i * 131 % s.out;
    Product p;
    for (int64_t k = 0; k < s.in; ++k)
      p.add(double(to_float(x[(t * s.heads + h) * s.in + k])) *
            to_float(w[(h * s.out + o) * s.in + k]));
    const bf16 got = y.read((t * s.heads + h) * s.out + o, 1)[0];
    expect_close("bf16_gemm", to_float(got), p.value,
                 0x1p-8 * std::fabs(p.value) + double(s.in / 4 + 10) * 0x1p-24 * p.magnitude);
  }
}

void time_tokens(const Shape& s, const std::string& text, int64_t tokens,
                 const RandomBuffer<bf16>& weights, Report& report) {
  Random random;
  const RandomBuffer<bf16> x = random_bf16(tokens * s.heads * s.in, random);
  const DeviceBuffer<bf16> y(tokens * s.heads * s.out);
  const int64_t copies = weights.size() / s.weights();
  Bf16GemmArgs a{};
  a.x = x.data();
  a.y = y.data();
  a.x_dtype = a.y_dtype = DType::kBf16;
  a.tokens = tokens;
  a.heads = s.heads;
  a.out = s.out;
  a.in = s.in;
  a.x_token_stride = s.heads * s.in;
  a.x_head_stride = s.in;
  a.weight_head_stride = s.out * s.in;
  a.y_token_stride = s.heads * s.out;
  a.y_head_stride = s.out;
  const auto workspace = give_workspace(a, cuda::bf16_gemm_workspace_bytes(a));
  const auto run = [&](int64_t call) {
    a.weight = weights.data() + call % copies * s.weights();
    cuda::bf16_gemm(a, stream());
  };
  run(0);
  synchronize("bf16_gemm");
  check(s, x, weights, y, tokens);
  const Work work{.bytes = double(2 * s.weights() + tokens * s.heads * 2 * (s.in + s.out)),
                  .flops = 2.0 * double(tokens * s.weights())};
  report.time({"bf16_gemm", text, tokens, work}, copies, run);
}

}  // namespace

void programs::bf16_gemm(Report& report) {
  for (const Shape& s : kShapes) {
    std::string text = concat(s.name, " ", s.out, "x", s.in);
    if (s.heads > 1) text += concat(" heads=", s.heads);
    if (!report.wants(text)) continue;
    Random random;
    const int64_t copies = report.num_copies(2 * s.weights());
    const RandomBuffer<bf16> weights = random_bf16(copies * s.weights(), random);
    for (const int64_t tokens : report.token_counts({1, 16, 64, 256, 4096})) {
      if (tokens * s.weights() > int64_t(1) << 40) continue;  // a prefill's head is of one token
      time_tokens(s, text, tokens, weights, report);
    }
  }
}

}  // namespace kn::bench::gpu
