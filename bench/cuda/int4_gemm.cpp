// int4_gemm: K2's expert and attention matrices, dense.
#include "int4_matrices.h"
#include "programs.h"

namespace kn::bench::gpu {
namespace {

struct Shape {
  const char* name;
  int64_t out, in;
};
const Shape kShapes[] = {{"k2 gate/up", 2048, 7168},
                         {"k2 down", 7168, 2048},
                         {"k2 o_proj", 7168, 8192},
                         {"tiny", 80, 192}};

void check(const RandomBuffer<bf16>& x, const Int4Matrices& w, const DeviceBuffer<bf16>& y,
           int64_t tokens) {
  const std::vector<bf16> got = y.read();
  for (int64_t i = 0; i < 32; ++i) {
    const int64_t t = (i * 7 + tokens - 1) % tokens, o = i * 131 % w.out();
    const Product p = w.dot(host_row(x, t * w.in(), w.in()), 0, o);
    expect_close("int4_gemm", to_float(got[t * w.out() + o]), p.value,
                 0x1p-8 * std::fabs(p.value) + 1e-4 * p.magnitude);
  }
}

void time_tokens(const Shape& s, const std::string& text, int64_t tokens,
                 const Int4Matrices& weights, int64_t copies, Report& report) {
  Random random;
  const RandomBuffer<bf16> x = random_bf16(tokens * s.in, random);
  const DeviceBuffer<bf16> y(tokens * s.out);
  Int4GemmArgs a{};
  a.x = x.data();
  a.y = y.data();
  a.x_dtype = a.y_dtype = DType::kBf16;
  a.tokens = tokens;
  a.out = s.out;
  a.in = s.in;
  a.group_size = kGroupSize;
  const auto workspace = give_workspace(a, cuda::int4_gemm_workspace_bytes(a));
  const auto run = [&](int64_t call) {
    a.weight_packed = weights.tiles(call % copies);
    a.weight_scale = weights.scales(call % copies);
    cuda::int4_gemm(a, stream());
  };
  run(0);
  synchronize("int4_gemm");
  check(x, weights, y, tokens);
  const Work work{.bytes = double(Int4Matrices::bytes(s.out, s.in) + tokens * 2 * (s.in + s.out)),
                  .flops = 2.0 * double(tokens * s.out * s.in)};
  report.time({"int4_gemm", text, tokens, work}, copies, run);
}

}  // namespace

void programs::int4_gemm(Report& report) {
  for (const Shape& s : kShapes) {
    const std::string text = concat(s.name, " ", s.out, "x", s.in);
    if (!report.wants(text)) continue;
    Random random;
    const int64_t copies = report.num_copies(Int4Matrices::bytes(s.out, s.in));
    const Int4Matrices weights(copies, s.out, s.in, random);
    for (const int64_t tokens : report.token_counts({1, 16, 64, 256, 4096}))
      time_tokens(s, text, tokens, weights, copies, report);
  }
}

// Loading is this and a copy from the host; the bytes are those read and written.
void programs::int4_pack(Report& report) {
  for (const Shape& s : kShapes) {
    const std::string text = concat(s.name, " ", s.out, "x", s.in);
    if (!report.wants(text)) continue;
    Random random;
    const int64_t bytes = Int4Matrices::bytes(s.out, s.in), copies = report.num_copies(2 * bytes);
    const RandomBuffer<uint8_t> packed(copies * s.out * int4_row_bytes(s.in),
                                       [&] { return uint8_t(random.bits()); });
    const RandomBuffer<bf16> scale = random_bf16(copies * s.out * num_groups(s.in), random);
    const DeviceBuffer<uint8_t> tiles(copies * int4_tiled_bytes(s.out, s.in));
    const DeviceBuffer<uint8_t> scales(copies * int4_tiled_scale_bytes(s.out, s.in));
    report.time({"int4_pack", text, 0, {.bytes = 2.0 * double(bytes)}}, copies, [&](int64_t call) {
      const int64_t i = call % copies;
      cuda::int4_pack(
          {packed.data() + i * s.out * int4_row_bytes(s.in),
           scale.data() + i * s.out * num_groups(s.in),
           tiles.data() + i * int4_tiled_bytes(s.out, s.in),
           scales.data() + i * int4_tiled_scale_bytes(s.out, s.in), s.out, s.in, kGroupSize},
          stream());
    });
  }
}

}  // namespace kn::bench::gpu
