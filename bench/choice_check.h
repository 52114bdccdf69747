// The experts that moe_route should choose, by plain arithmetic.
#pragma once
#include <algorithm>
#include <cmath>
#include <functional>
#include <vector>

#include "harness.h"
#include "kimi_native/ops.h"

namespace kn::bench {

// One token's choice, `ids` and `weights`, from its logits, as `a` says (sigmoid, no bias, groups
// by the sum of their two best, weights that sum to 1). Scores that fp32 cannot tell apart may
// change places.
inline void check_choice(const MoeRouteArgs& a, const float* logits, const int32_t* ids,
                         const float* weights) {
  constexpr double kClose = 1e-6;
  const int64_t each = a.experts / a.n_group;
  std::vector<double> scores(a.experts), groups, best;
  for (int64_t e = 0; e < a.experts; ++e) scores[e] = 1 / (1 + std::exp(-double(logits[e])));
  for (int64_t g = 0; g < a.n_group; ++g) {
    std::vector<double> own(&scores[g * each], &scores[g * each] + each);
    std::sort(own.begin(), own.end(), std::greater<>());
    groups.push_back(own[0] + (each > 1 ? own[1] : 0.0));
  }
  std::vector<double> order = groups;
  std::sort(order.begin(), order.end(), std::greater<>());
  const auto kept = [&](int64_t e) { return groups[e / each] >= order[a.topk_group - 1] - kClose; };
  for (int64_t e = 0; e < a.experts; ++e)
    if (kept(e)) best.push_back(scores[e]);
  std::sort(best.begin(), best.end(), std::greater<>());
  double sum = 0.0;
  for (int64_t j = 0; j < a.topk; ++j) sum += best[j];
  for (int64_t j = 0; j < a.topk; ++j) {
    const bool chosen = ids[j] >= 0 && ids[j] < a.experts && kept(ids[j]) &&
                        std::find(ids, ids + j, ids[j]) == ids + j;
    expect_close("moe_route", chosen ? scores[ids[j]] : -1.0, best[j], kClose);
    expect_close("moe_route", weights[j], best[j] / sum, kClose);
  }
}

}  // namespace kn::bench
