// The routers of the family, for what surrounds the experts of a layer: moe_route, moe_dispatch,
// moe_combine. Activations stay in cache in a running model, hence no share of the memory limit.
#pragma once
#include "harness.h"
#include "kimi_native/ops.h"

namespace kn::bench {

struct RoutedShape {
  const char* name;
  int64_t experts, topk, hidden, n_group, topk_group;

  std::string text() const { return concat(name, " experts=", experts, " topk=", topk); }
};

inline const RoutedShape kRoutedShapes[] = {{"k2", 384, 8, 7168, 1, 1},
                                            {"deepseek v3", 256, 8, 7168, 8, 4},
                                            {"moonlight", 64, 6, 2048, 1, 1},
                                            {"tiny", 8, 2, 128, 1, 1}};

// Many tokens' logits and the experts that moe_route chooses from them.
struct Routed {
  int64_t sets;  // of `tokens` tokens each
  std::vector<float> logits;
  std::vector<int32_t> ids;    // of the first set
  std::vector<float> weights;  // likewise
  MoeRouteArgs args;

  Routed(const RoutedShape& s, int64_t tokens)
      : sets(std::max<int64_t>(2, 2048 / tokens)),
        logits(sets * tokens * s.experts),
        ids(tokens * s.topk),
        weights(tokens * s.topk),
        args{logits.data(),
             nullptr,
             ids.data(),
             weights.data(),
             tokens,
             s.experts,
             s.topk,
             s.n_group,
             s.topk_group,
             Scoring::kSigmoid,
             GroupScore::kTop2Sum,
             true,
             1.0f} {
    Random random;
    for (float& x : logits) x = 3.0f * random.sign();
    cpu::moe_route(args);
  }
  Routed(const Routed&) = delete;
};

// Calls time_tokens(shape, tokens) for every case the report wants.
template <typename F>
void for_routed_shapes(Report& report, F&& time_tokens) {
  for (const RoutedShape& s : kRoutedShapes) {
    if (!report.wants(s.text())) continue;
    for (const int threads : report.thread_counts()) {
      set_num_threads(threads);
      for (const int64_t tokens : report.token_counts({1, 16, 256})) time_tokens(s, tokens);
    }
  }
}

}  // namespace kn::bench
