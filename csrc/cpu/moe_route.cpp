// Router: one token at a time. Scores (one exp per expert), then one scan that keeps the topk best
// in a sorted list: a new entry is rare once the list is good, so a row costs about its exps (2 us
// for 384 experts). Everything a row needs lives on the stack. Not compiled per tier: every
// instruction set gives the same ids and weights, bit for bit.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "core/op_checks.h"
#include "core/threads.h"
#include "kimi_native/ops.h"

namespace kn::cpu {
namespace {

constexpr int64_t kTokensPerTask = 16;  // about 40 us at 384 experts: worth waking a thread

constexpr int32_t kNanKey = std::numeric_limits<int32_t>::min();

// Scratch of one row. A key is a float as an integer that orders the same way, NaN below all.
struct RowBuffers {
  float scores[kMaxExperts];
  int32_t keys[kMaxExperts];
  int32_t group_keys[kMaxExperts];
  int32_t groups[kMaxExperts];
};

int32_t order_key(float x) {
  x += 0.0f;  // -0 becomes +0: equal scores tie
  int32_t bits;
  std::memcpy(&bits, &x, 4);
  return x != x ? kNanKey : bits ^ (bits >> 31 & 0x7fffffff);
}

float key_value(int32_t key) {
  const int32_t bits = key ^ (key >> 31 & 0x7fffffff);
  float x;
  std::memcpy(&x, &bits, 4);
  return x;  // kNanKey gives a NaN
}

// 1 / (1 + e) or e / (1 + e) with e = exp(-|x|): exp never overflows and tiny scores keep their
// precision. A loop of its own for the choice, so that it becomes a select: as a branch it is
// mispredicted for half of the experts.
void sigmoid(const float* logits, int64_t n, float* scores) {
  for (int64_t i = 0; i < n; ++i) scores[i] = std::exp(-std::fabs(logits[i]));
  for (int64_t i = 0; i < n; ++i)
    scores[i] = (logits[i] >= 0.0f ? 1.0f : scores[i]) / (1.0f + scores[i]);
}

void softmax(const float* logits, int64_t n, float* scores) {
  float largest = logits[0];
  for (int64_t i = 1; i < n; ++i) largest = std::max(largest, logits[i]);
  double sum = 0.0;  // in double, so that its error does not grow with the number of experts
  for (int64_t i = 0; i < n; ++i) sum += scores[i] = std::exp(logits[i] - largest);
  const float scale = float(1.0 / sum);
  for (int64_t i = 0; i < n; ++i) scores[i] *= scale;
}

// ids[0 .. k): the k largest keys, best first, ties to the lowest index.
void top(const int32_t* keys, int64_t n, int64_t k, int32_t* ids) {
  int64_t found = 0;
  for (int64_t i = 0; i < n; ++i) {
    if (found == k && keys[i] <= keys[ids[k - 1]]) continue;
    int64_t at = found < k ? found++ : k - 1;
    for (; at > 0 && keys[ids[at - 1]] < keys[i]; --at) ids[at] = ids[at - 1];
    ids[at] = int32_t(i);
  }
}

int32_t group_key(const int32_t* keys, int64_t n, GroupScore score) {
  int32_t best = keys[0], second = kNanKey;
  for (int64_t i = 1; i < n; ++i) {
    second = std::max(second, std::min(best, keys[i]));
    best = std::max(best, keys[i]);
  }
  if (score == GroupScore::kMax || n == 1) return best;
  return order_key(key_value(best) + key_value(second));
}

// Only the topk_group best groups stay; the experts of the others rank as -inf.
void limit_groups(const MoeRouteArgs& a, RowBuffers& b) {
  const int64_t size = a.experts / a.n_group;
  for (int64_t g = 0; g < a.n_group; ++g)
    b.group_keys[g] = group_key(b.keys + g * size, size, a.group_score);
  top(b.group_keys, a.n_group, a.topk_group, b.groups);
  std::sort(b.groups, b.groups + a.topk_group);
  const int32_t masked = order_key(-std::numeric_limits<float>::infinity());
  const int32_t* kept = b.groups;
  for (int64_t g = 0; g < a.n_group; ++g) {
    if (kept < b.groups + a.topk_group && *kept == g)
      ++kept;
    else
      std::fill_n(b.keys + g * size, size, masked);
  }
}

void weigh(const MoeRouteArgs& a, const float* scores, const int32_t* ids, bool spoiled,
           float* weights) {
  float sum = 0.0f;
  for (int64_t j = 0; j < a.topk; ++j) sum += scores[ids[j]];
  const float divisor = a.norm_topk_prob && a.topk > 1 ? sum + 1e-20f : 1.0f;
  for (int64_t j = 0; j < a.topk; ++j)
    weights[j] = spoiled ? std::numeric_limits<float>::quiet_NaN()
                         : scores[ids[j]] / divisor * a.routed_scaling_factor;
}

void route_token(const MoeRouteArgs& a, int64_t token, RowBuffers& b) {
  const float* logits = a.logits + token * a.experts;
  int32_t* ids = a.topk_ids + token * a.topk;
  bool spoiled = false;
  for (int64_t i = 0; i < a.experts; ++i) spoiled |= logits[i] != logits[i];
  if (a.scoring == Scoring::kSoftmax)
    softmax(logits, a.experts, b.scores);
  else
    sigmoid(logits, a.experts, b.scores);
  for (int64_t i = 0; i < a.experts; ++i)
    b.keys[i] = order_key(a.correction_bias ? b.scores[i] + a.correction_bias[i] : b.scores[i]);
  if (a.n_group > 1) limit_groups(a, b);
  top(b.keys, a.experts, a.topk, ids);
  weigh(a, b.scores, ids, spoiled, a.topk_weights + token * a.topk);
}

}  // namespace

void moe_route(const MoeRouteArgs& a) {
  check_op(a);
  const int64_t tasks = a.tokens / kTokensPerTask + (a.tokens % kTokensPerTask != 0);
  parallel_for(tasks, [&](int64_t task, int) {
    RowBuffers buffers;
    const int64_t begin = task * kTokensPerTask;
    const int64_t end = std::min(begin + kTokensPerTask, a.tokens);
    for (int64_t t = begin; t < end; ++t) route_token(a, t, buffers);
  });
}

}  // namespace kn::cpu
