// moe_route: router logits to expert choice.
#include "choice_check.h"
#include "routed_shapes.h"

namespace kn::bench {

void programs::moe_route(Report& report) {
  for_routed_shapes(report, [&](const RoutedShape& s, int64_t tokens) {
    Routed routed(s, tokens);
    for (int64_t t = 0; t < tokens; ++t)
      check_choice(routed.args, &routed.logits[t * s.experts], &routed.ids[t * s.topk],
                   &routed.weights[t * s.topk]);
    const Work work{.bytes = double(4 * tokens * s.experts + 8 * tokens * s.topk), .cached = true};
    // Fresh logits in every call: a branch predictor learns by heart what it sees twice.
    report.time({"moe_route", s.text(), tokens, work}, [&](int64_t call) {
      routed.args.logits = &routed.logits[call % routed.sets * tokens * s.experts];
      cpu::moe_route(routed.args);
    });
  });
}

}  // namespace kn::bench
