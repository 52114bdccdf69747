// The experts of a layer and tokens routed to them at random: what the grouped ops and moe_layer
// are timed on.
//
// What a call reads is cold: experts are distinct matrices that together exceed the cache twice,
// and a call's hit experts are those read longest ago. A layer of K2 (9.5 GB) need not fit this
// machine: where it has more experts than matrices, they come round again within the call.
#pragma once
#include <numeric>

#include "int4_weights.h"
#include "kimi_native/ops.h"

namespace kn::bench {

struct MoeShape {
  const char* name;
  int64_t experts, topk, hidden, intermediate;

  std::string text() const {
    return concat(name, " experts=", experts, " topk=", topk, " ", hidden, "x", intermediate);
  }
  int64_t up_bytes() const { return Int4Matrix::bytes(intermediate, hidden); }  // or gate
  int64_t down_bytes() const { return Int4Matrix::bytes(hidden, intermediate); }
  int64_t expert_bytes() const { return 2 * up_bytes() + down_bytes(); }
};

inline const MoeShape kMoeShapes[] = {{"k2", 64, 8, 7168, 2048},
                                      {"k2", 384, 8, 7168, 2048},
                                      {"moonlight", 64, 6, 2048, 1408},
                                      {"tiny", 8, 2, 128, 64}};

class ExpertPool {
 public:
  ExpertPool(const MoeShape& s, Pages pages)
      : shape_(s), rotation_(num_copies(s.expert_bytes()), s.expert_bytes(), pages) {
    Random random;
    for (int64_t i = 0; i < count(); ++i)
      for (const Int4Matrix& m : {gate(i), up(i), down(i)}) m.fill_random(random);
  }
  int64_t count() const { return rotation_.copies(); }
  bool fits_cache() const { return rotation_.fits_cache(); }
  Int4Matrix gate(int64_t i) const {
    return {rotation_.copy(i), shape_.intermediate, shape_.hidden};
  }
  Int4Matrix up(int64_t i) const {
    return {rotation_.copy(i) + shape_.up_bytes(), shape_.intermediate, shape_.hidden};
  }
  Int4Matrix down(int64_t i) const {
    return {rotation_.copy(i) + 2 * shape_.up_bytes(), shape_.hidden, shape_.intermediate};
  }

 private:
  MoeShape shape_;
  Rotation rotation_;
};

// One projection of every expert, as the ops take it.
struct Projection {
  std::vector<const uint8_t*> packed;
  std::vector<const bf16*> scale;

  void add(const Int4Matrix& m) {
    packed.push_back(m.packed);
    scale.push_back(m.scale);
  }
};

// The expert choice of one call, dispatched, and the matrices that its experts are.
struct Routing {
  std::vector<int32_t> ids;                              // [tokens, topk]
  std::vector<float> logits;                             // [tokens, experts], which choose `ids`
  std::vector<int32_t> token_index, row_index, offsets;  // of moe_dispatch
  std::vector<int64_t> matrix;                           // expert -> index into the pool
  Projection gate, up, down;
  int64_t hit = 0;  // experts with rows

  // `read` counts the experts read by earlier calls; this call's hit ones take the next matrices.
  Routing(const MoeShape& s, int64_t tokens, const ExpertPool& pool, int64_t read, Random& random) {
    choose(s, tokens, read, random);
    token_index.resize(ids.size());
    row_index.resize(ids.size());
    offsets.resize(s.experts + 1);
    cpu::moe_dispatch({ids.data(), token_index.data(), row_index.data(), offsets.data(), tokens,
                       s.topk, s.experts});
    for (int64_t e = 0; e < s.experts; ++e) {
      gate.add(pool.gate(matrix[e]));
      up.add(pool.up(matrix[e]));
      down.add(pool.down(matrix[e]));
    }
  }

  int64_t expert_of(int64_t row) const {
    return std::upper_bound(offsets.begin(), offsets.end(), int32_t(row)) - offsets.begin() - 1;
  }

 private:
  // Every token takes topk different experts, all equally likely. They are then renamed so that
  // the hit ones are those read longest ago; how many are hit, and how often, stays random.
  void choose(const MoeShape& s, int64_t tokens, int64_t read, Random& random) {
    std::vector<int32_t> deck(s.experts), name(s.experts, -1);
    std::iota(deck.begin(), deck.end(), 0);
    matrix.assign(s.experts, 0);
    logits.resize(tokens * s.experts);
    for (float& x : logits) x = -3.0f + random.sign();
    for (int64_t t = 0; t < tokens; ++t)
      for (int64_t j = 0; j < s.topk; ++j) {
        std::swap(deck[j], deck[j + random.bits() % (s.experts - j)]);
        int32_t& expert = name[deck[j]];
        if (expert < 0) {
          expert = int32_t((read + hit) % s.experts);
          matrix[expert] = read + hit++;
        }
        ids.push_back(expert);
        logits[t * s.experts + expert] = 2.0f + random.sign();
      }
  }
};

// Routings to be taken in turn, enough of them to read the whole pool.
inline std::vector<Routing> make_routings(const MoeShape& s, int64_t tokens,
                                          const ExpertPool& pool) {
  Random random;
  std::vector<Routing> routings;
  for (int64_t read = 0; read < pool.count() || routings.size() < 4; read += routings.back().hit) {
    routings.emplace_back(s, tokens, pool, read, random);
    if (routings.size() == 64) break;
  }
  return routings;
}

inline double mean_hit(const std::vector<Routing>& routings) {
  double hit = 0.0;
  for (const Routing& r : routings) hit += double(r.hit) / double(routings.size());
  return hit;
}

}  // namespace kn::bench
