// int4_grouped_gemm: the down projection of the experts of one layer, tokens routed at random.
#include "experts.h"

namespace kn::bench {
namespace {

void check(const MoeShape& s, const Buffer<bf16>& x, const Buffer<float>& y, const Routing& r,
           const ExpertPool& pool, Compute compute) {
  const int64_t rows = int64_t(r.ids.size()), out = s.hidden, in = s.intermediate;
  for (int64_t i = 0; i < 32; ++i) {
    const int64_t row = i * 13 % rows, o = i * 131 % out;
    const Product p = int4_dot(&x[row * in], pool.down(r.matrix[r.expert_of(row)]), o);
    expect_close("int4_grouped_gemm", y[row * out + o], p.value,
                 int4_tolerance(compute) * p.magnitude);
  }
}

void time_tokens(const MoeShape& s, int64_t tokens, const ExpertPool& pool, Report& report) {
  Random random;
  const int64_t rows = tokens * s.topk, out = s.hidden, in = s.intermediate;
  const std::vector<Routing> routings = make_routings(s, tokens, pool);
  const Buffer<bf16> x(rows * in, [&] { return to_bf16(random.sign()); });
  const Buffer<float> y(rows * out);
  Int4GroupedGemmArgs a{};
  a.x = x.data();
  a.y = y.data();
  a.x_dtype = DType::kBf16;
  a.y_dtype = DType::kFp32;
  a.x_rows = a.rows = rows;
  a.experts = s.experts;
  a.out = out;
  a.in = in;
  a.group_size = kGroupSize;
  a.compute = report.options().compute;
  const auto take = [&](const Routing& r) {
    a.expert_offsets = r.offsets.data();
    a.weight_packed = r.down.packed.data();
    a.weight_scale = r.down.scale.data();
  };
  take(routings[0]);
  const auto workspace = give_workspace(a, cpu::int4_grouped_gemm_workspace_bytes(a));
  const auto run = [&](int64_t call) {
    take(routings[call % routings.size()]);
    cpu::int4_grouped_gemm(a);
  };
  run(0);
  check(s, x, y, routings[0], pool, a.compute);
  const Work work{
      .bytes = mean_hit(routings) * double(s.down_bytes()) + double(2 * rows * in + 4 * rows * out),
      .flops = 2.0 * double(rows * out * in),
      .cached = pool.fits_cache(),
      .limbs = true,
      .compute = a.compute};
  report.time({"int4_grouped_gemm", s.text(), tokens, work}, run);
}

}  // namespace

void programs::int4_grouped_gemm(Report& report) {
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
