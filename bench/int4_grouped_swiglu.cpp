// int4_grouped_swiglu: gate and up of the experts of one layer, tokens routed at random.
#include "experts.h"

namespace kn::bench {
namespace {

void check(const MoeShape& s, const Buffer<bf16>& x, const Buffer<bf16>& y, const Routing& r,
           const ExpertPool& pool, Compute compute) {
  const int64_t rows = int64_t(r.ids.size()), out = s.intermediate;
  for (int64_t i = 0; i < 32; ++i) {
    const int64_t row = i * 13 % rows, o = i * 131 % out, m = r.matrix[r.expert_of(row)];
    const bf16* token = &x[r.token_index[row] * s.hidden];
    const Product g = int4_dot(token, pool.gate(m), o), u = int4_dot(token, pool.up(m), o);
    const Swiglu expected(g, u, compute);
    expect_close("int4_grouped_swiglu", to_float(y[row * out + o]), expected.value,
                 0x1p-8 * std::fabs(expected.value) + expected.tolerance);
  }
}

void time_tokens(const MoeShape& s, int64_t tokens, const ExpertPool& pool, Report& report) {
  Random random;
  const int64_t rows = tokens * s.topk, out = s.intermediate, in = s.hidden;
  const std::vector<Routing> routings = make_routings(s, tokens, pool);
  const Buffer<bf16> x(tokens * in, [&] { return to_bf16(random.sign()); }), y(rows * out);
  Int4GroupedSwigluArgs a{};
  a.x = x.data();
  a.y = y.data();
  a.x_dtype = a.y_dtype = DType::kBf16;
  a.x_rows = tokens;
  a.rows = rows;
  a.experts = s.experts;
  a.out = out;
  a.in = in;
  a.group_size = kGroupSize;
  a.compute = report.options().compute;
  const auto take = [&](const Routing& r) {
    a.x_index = r.token_index.data();
    a.expert_offsets = r.offsets.data();
    a.gate_packed = r.gate.packed.data();
    a.gate_scale = r.gate.scale.data();
    a.up_packed = r.up.packed.data();
    a.up_scale = r.up.scale.data();
  };
  take(routings[0]);
  const auto workspace = give_workspace(a, cpu::int4_grouped_swiglu_workspace_bytes(a));
  const auto run = [&](int64_t call) {
    take(routings[call % routings.size()]);
    cpu::int4_grouped_swiglu(a);
  };
  run(0);
  check(s, x, y, routings[0], pool, a.compute);
  const Work work{.bytes = mean_hit(routings) * double(2 * s.up_bytes()) +
                           double(2 * tokens * in + 2 * rows * out),
                  .flops = 4.0 * double(rows * out * in),
                  .cached = pool.fits_cache(),
                  .limbs = true,
                  .compute = a.compute};
  report.time({"int4_grouped_swiglu", s.text(), tokens, work}, run);
}

}  // namespace

void programs::int4_grouped_swiglu(Report& report) {
  for (const MoeShape& s : kMoeShapes) {
    if (!report.wants(s.text())) continue;
    const ExpertPool pool(s, report.options().pages);
    for (const int threads : report.thread_counts()) {
      set_num_threads(threads);
      for (const int64_t tokens : report.token_counts({1, 4, 16, 64, 256}))
        time_tokens(s, tokens, pool, report);
    }
  }
}

}  // namespace kn::bench
