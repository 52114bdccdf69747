// moe_route: router logits to expert choice.
#include "routed_shapes.h"

namespace kn::bench {

// Weights that do not sum to one, or an order that is not by score, would show here.
static void check(const Routed& routed, int64_t tokens, int64_t topk) {
  for (int64_t t = 0; t < tokens; ++t) {
    const float* weights = &routed.weights[t * topk];
    double sum = 0.0;
    for (int64_t j = 0; j < topk; ++j) {
      sum += weights[j];
      if (j) expect_close("moe_route", std::min(0.0f, weights[j - 1] - weights[j]), 0.0, 0.0);
    }
    expect_close("moe_route", sum, 1.0, 1e-6);
  }
}

void programs::moe_route(Report& report) {
  for_routed_shapes(report, [&](const RoutedShape& s, int64_t tokens) {
    Routed routed(s, tokens);
    check(routed, tokens, s.topk);
    const Work work{.bytes = double(4 * tokens * s.experts + 8 * tokens * s.topk), .cached = true};
    // Fresh logits in every call: a branch predictor learns by heart what it sees twice.
    report.time({"moe_route", s.text(), tokens, work}, [&](int64_t call) {
      routed.args.logits = &routed.logits[call % routed.sets * tokens * s.experts];
      cpu::moe_route(routed.args);
    });
  });
}

}  // namespace kn::bench
