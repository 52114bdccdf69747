// moe_route and moe_dispatch, each and together: what stands between the router's product and the
// experts of a layer. Small and in cache: launches are what it costs.
#include "programs.h"
#include "routed.h"

namespace kn::bench::gpu {
namespace {

// The chosen experts, best first, weights that sum to one, and rows in their expert's range.
void check(const Routing& r) {
  const std::vector<int32_t> ids = r.ids.read(), token_index = r.token_index.read();
  const std::vector<int32_t> row_index = r.row_index.read(), offsets = r.offsets.read();
  const std::vector<float> weights = r.weights.read();
  for (int64_t t = 0; t < r.tokens; ++t) {
    const int64_t first = t * r.topk, last = first + r.topk;
    std::vector<int32_t> got(ids.begin() + first, ids.begin() + last);
    std::vector<int32_t> expected(r.chosen.begin() + first, r.chosen.begin() + last);
    std::sort(got.begin(), got.end());
    std::sort(expected.begin(), expected.end());
    expect_close("moe_route: ids", got == expected, 1.0, 0.0);
    double sum = 0.0;
    for (int64_t i = first; i < last; ++i) {
      sum += weights[i];
      expect_close("moe_route: order", i == first || weights[i - 1] >= weights[i], 1.0, 0.0);
      const int32_t row = row_index[i], e = ids[i];
      expect_close("moe_dispatch: row", row >= offsets[e] && row < offsets[e + 1], 1.0, 0.0);
      expect_close("moe_dispatch: token", token_index[row], double(t), 0.0);
    }
    expect_close("moe_route: sum", sum, 1.0, 1e-5);
  }
}

}  // namespace

void programs::moe_routing(Report& report) {
  for (const RoutedShape& s : kRoutedShapes) {
    const std::string text = concat(s.name, " experts=", s.experts, " topk=", s.topk);
    if (!report.wants(text)) continue;
    for (const int64_t tokens : report.token_counts({1, 16, 128, 4096})) {
      Random random;
      std::vector<Routing> routings;
      for (int i = 0; i < 4; ++i) {
        routings.push_back(make_routing(s, tokens, i, random));
        routings[i].route();
        routings[i].dispatch();
      }
      synchronize("moe_route, moe_dispatch");
      check(routings.back());
      const auto of = [&](int64_t call) -> const Routing& { return routings[call % 4]; };
      const int64_t rows = tokens * s.topk;
      const double route = double(4 * tokens * s.experts + 8 * rows);
      const double dispatch = double(12 * rows + 4 * s.experts);
      const auto time = [&](const char* op, double bytes, const std::function<void(int64_t)>& run) {
        report.time({op, text, tokens, {.bytes = bytes, .cached = true}}, 4, run);
      };
      time("moe_route", route, [&](int64_t call) { of(call).route(); });
      time("moe_dispatch", dispatch, [&](int64_t call) { of(call).dispatch(); });
      time("moe_routing", route + dispatch, [&](int64_t call) {
        of(call).route();
        of(call).dispatch();
      });
    }
  }
}

}  // namespace kn::bench::gpu
