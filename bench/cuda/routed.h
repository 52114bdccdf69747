// Expert choices of several calls, on the device: tokens take topk different experts, all equally
// likely, and a call's hit experts are those that were hit longest ago, so that their weights are
// cold.
#pragma once
#include <numeric>

#include "device_buffer.h"
#include "kimi_native/ops.h"

namespace kn::bench::gpu {

struct RoutedShape {
  const char* name;
  int64_t experts, topk, hidden, intermediate;

  std::string text() const {
    return concat(name, " experts=", experts, " topk=", topk, " ", hidden, "x", intermediate);
  }
};

inline const RoutedShape kRoutedShapes[] = {{"k2", 384, 8, 7168, 2048}, {"tiny", 8, 2, 192, 96}};

// Of one call: what moe_route reads, and room for what it and moe_dispatch write.
struct Routing {
  std::vector<int32_t> chosen;  // [tokens, topk], in no order
  int64_t hit;                  // experts with rows
  DeviceBuffer<float> logits;   // [tokens, experts]
  DeviceBuffer<int32_t> ids, token_index, row_index, offsets;
  DeviceBuffer<float> weights;
  int64_t tokens, experts, topk;

  void route() const {
    cuda::moe_route({logits.data(), nullptr, ids.data(), weights.data(), tokens, experts, topk, 1,
                     1, Scoring::kSigmoid, GroupScore::kTop2Sum, true, 1.0f},
                    stream());
  }
  void dispatch() const {
    cuda::moe_dispatch(
        {ids.data(), token_index.data(), row_index.data(), offsets.data(), tokens, topk, experts},
        stream());
  }
};

// `read`: experts that earlier calls have hit.
inline Routing make_routing(const RoutedShape& s, int64_t tokens, int64_t read, Random& random) {
  std::vector<int32_t> deck(s.experts), name(s.experts, -1), chosen;
  std::iota(deck.begin(), deck.end(), 0);
  std::vector<float> logits(tokens * s.experts);
  for (float& x : logits) x = -3.0f + random.sign();
  int64_t hit = 0;
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t j = 0; j < s.topk; ++j) {
      std::swap(deck[j], deck[j + random.bits() % (s.experts - j)]);
      int32_t& expert = name[deck[j]];
      if (expert < 0) expert = int32_t((read + hit++) % s.experts);
      chosen.push_back(expert);
      logits[t * s.experts + expert] = 2.0f + random.sign();
    }
  const int64_t rows = tokens * s.topk;
  return {std::move(chosen),
          hit,
          DeviceBuffer<float>(logits),
          DeviceBuffer<int32_t>(rows),
          DeviceBuffer<int32_t>(rows),
          DeviceBuffer<int32_t>(rows),
          DeviceBuffer<int32_t>(s.experts + 1),
          DeviceBuffer<float>(rows),
          tokens,
          s.experts,
          s.topk};
}

// To be taken in turn: enough to hit every expert, routed and dispatched once.
inline std::vector<Routing> make_routings(const RoutedShape& s, int64_t tokens) {
  Random random;
  std::vector<Routing> routings;
  for (int64_t read = 0; read < s.experts || routings.size() < 2; read += routings.back().hit) {
    routings.push_back(make_routing(s, tokens, read, random));
    routings.back().route();
    routings.back().dispatch();
  }
  synchronize("moe_route, moe_dispatch");
  return routings;
}

}  // namespace kn::bench::gpu
