// moe_dispatch: expert choice to rows sorted by expert.
#include "routed_shapes.h"

namespace kn::bench {

void programs::moe_dispatch(Report& report) {
  for_routed_shapes(report, [&](const RoutedShape& s, int64_t tokens) {
    const Routed routed(s, tokens);
    const int64_t rows = tokens * s.topk;
    std::vector<int32_t> token_index(rows), row_index(rows), offsets(s.experts + 1);
    const MoeDispatchArgs a{
        routed.ids.data(), token_index.data(), row_index.data(), offsets.data(), tokens, s.topk,
        s.experts};
    cpu::moe_dispatch(a);
    for (int64_t i = 0; i < rows; ++i) {
      const int32_t row = row_index[i], e = routed.ids[i];
      expect_close("moe_dispatch", token_index[row], double(i / s.topk), 0.0);
      expect_close("moe_dispatch", row >= offsets[e] && row < offsets[e + 1], 1.0, 0.0);
    }
    const Work work{.bytes = double(12 * rows + 4 * s.experts), .cached = true};
    report.time({"moe_dispatch", s.text(), tokens, work}, [&](int64_t) { cpu::moe_dispatch(a); });
  });
}

}  // namespace kn::bench
