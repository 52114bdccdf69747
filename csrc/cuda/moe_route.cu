// moe_route: one block for a token. All threads compute scores and selection keys into shared
// memory; one warp then picks, topk times, the best key left.
//
//   logits [experts] -> scores, keys (shared) -> keep the best groups -> topk x (max over a warp)
//
// A key is score + bias as an integer that orders like the float, -0 equal to +0, NaN below every
// number. A lane owns experts lane, lane + 32, ...: a pick is one maximum over the lanes' best keys
// and one minimum over the indices that have it, so ties go to the lowest index; only the lane that
// lost its best looks at its experts again. Bytes: one row of logits. Up to 4096 experts (32 KB).
//
// Order: softmax sums in double, each thread ascending, then block_sum; the chosen scores best
// first.
#include "core/op_checks.h"
#include "cuda/elements.h"
#include "cuda/order_key.cuh"
#include "cuda/reduce.cuh"

namespace kn::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;
constexpr int32_t kTaken = INT32_MIN;  // below kNanKey

// Shared memory of a block.
struct Shared {
  SharedPtr<float> scores;     // [experts]
  SharedPtr<int32_t> keys;     // [experts]
  SharedPtr<int32_t> groups;   // [n_group] keys of the groups; then, of those kept, kTaken
  SharedPtr<double> partial;   // [kWarps]
  SharedPtr<float> largest;    // [kWarps]
  SharedPtr<int32_t> spoiled;  // [kWarps]
  SharedPtr<int32_t> chosen;   // [topk]
};

int64_t shared_bytes(const MoeRouteArgs& a) {
  return kWarps * 16 + 4 * (2 * a.experts + a.n_group + a.topk);
}

template <typename Bytes>
__device__ __forceinline__ Shared carve(Bytes shared, const MoeRouteArgs& a) {
  const int experts = int(a.experts), start = kWarps * 16;
  return {shared_at<float>(shared, start),
          shared_at<int32_t>(shared, start + 4 * experts),
          shared_at<int32_t>(shared, start + 8 * experts),
          shared_at<double>(shared, 0),
          shared_at<float>(shared, kWarps * 8),
          shared_at<int32_t>(shared, kWarps * 12),
          shared_at<int32_t>(shared, start + 4 * (2 * experts + int(a.n_group)))};
}

// e / (1 + e) or 1 / (1 + e) with e = exp(-|x|): exp never overflows, tiny scores keep their
// digits.
__device__ __forceinline__ float sigmoid(float x) {
  const float e = expf(-fabsf(x));
  return __fdiv_rn(x >= 0.0f ? 1.0f : e, __fadd_rn(1.0f, e));
}

__device__ __forceinline__ float block_max(float x, SharedPtr<float> partial) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, step));
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = x;
  __syncthreads();
  x = partial[0];
  for (int w = 1; w < kWarps; ++w) x = fmaxf(x, partial[w]);
  return x;
}

__device__ void softmax(const float* logits, int experts, const Shared& s) {
  float largest = logits[0];
  for (int i = int(threadIdx.x); i < experts; i += kThreads) largest = fmaxf(largest, logits[i]);
  largest = block_max(largest, s.largest);
  double sum = 0.0;
  for (int i = int(threadIdx.x); i < experts; i += kThreads) {
    const float score = expf(__fsub_rn(logits[i], largest));
    s.scores[i] = score;
    sum += double(score);
  }
  const float scale = float(1.0 / block_sum<kWarps>(sum, s.partial));
  for (int i = int(threadIdx.x); i < experts; i += kThreads)
    s.scores[i] = __fmul_rn(s.scores[i], scale);
}

// The best key of lane's elements, and its index.
struct Best {
  int32_t key;
  uint32_t index;
};

__device__ __forceinline__ Best best_of_lane(SharedPtr<int32_t> keys, int n) {
  Best best{kTaken, 0xffffffffu};
  for (int i = int(threadIdx.x) % 32; i < n; i += 32) {
    const int32_t key = keys[i];
    if (key > best.key) best = {key, uint32_t(i)};
  }
  return best;
}

// Called by one whole warp: the index of the best of n keys, which is taken out.
__device__ __forceinline__ uint32_t pick(SharedPtr<int32_t> keys, int n, Best& mine) {
  const int32_t key = __reduce_max_sync(kAllLanes, mine.key);
  const uint32_t index = __reduce_min_sync(kAllLanes, mine.key == key ? mine.index : 0xffffffffu);
  if (mine.key == key && mine.index == index) {
    keys[index] = kTaken;
    mine = best_of_lane(keys, n);
  }
  return index;
}

// By one whole warp: the key of a group, its best or the sum of its two best.
__device__ int32_t group_key(SharedPtr<int32_t> keys, int n, GroupScore score) {
  int32_t first = kNanKey, second = kNanKey;
  for (int i = int(threadIdx.x) % 32; i < n; i += 32) {
    const int32_t key = keys[i];
    second = max(second, min(first, key));
    first = max(first, key);
  }
  const int32_t best = __reduce_max_sync(kAllLanes, first);
  if (score == GroupScore::kMax || n == 1) return best;
  const uint32_t has = __ballot_sync(kAllLanes, first == best);
  const bool gives_best = int(threadIdx.x) % 32 == __ffs(int(has)) - 1;
  const int32_t next = __reduce_max_sync(kAllLanes, gives_best ? second : first);
  return order_key(__fadd_rn(key_value(best), key_value(next)));
}

// Only the topk_group best groups stay; the experts of the others rank as -inf.
__device__ void limit_groups(const MoeRouteArgs& a, const Shared& s) {
  const int groups = int(a.n_group), size = int(a.experts / a.n_group);
  for (int g = int(threadIdx.x) / 32; g < groups; g += kWarps) {
    const int32_t key = group_key(s.keys + g * size, size, a.group_score);
    if (threadIdx.x % 32 == 0) s.groups[g] = key;
  }
  __syncthreads();
  if (threadIdx.x < 32) {
    Best mine = best_of_lane(s.groups, groups);
    for (int i = 0; i < int(a.topk_group); ++i) pick(s.groups, groups, mine);
  }
  __syncthreads();
  const int32_t masked = order_key(__int_as_float(int32_t(0xff800000u)));
  for (int i = int(threadIdx.x); i < int(a.experts); i += kThreads)
    if (s.groups[i / size] != kTaken) s.keys[i] = masked;
  __syncthreads();
}

__device__ void choose(const MoeRouteArgs& a, const Shared& s, int64_t token) {
  const int experts = int(a.experts), topk = int(a.topk), lane = int(threadIdx.x);
  Best mine = best_of_lane(s.keys, experts);
  for (int j = 0; j < topk; ++j) {
    const uint32_t expert = pick(s.keys, experts, mine);
    if (lane == 0) s.chosen[j] = int32_t(expert);
  }
  __syncwarp();
  float sum = 0.0f;
  for (int j = 0; j < topk; ++j) sum = __fadd_rn(sum, s.scores[s.chosen[j]]);
  const float divisor = a.norm_topk_prob && topk > 1 ? __fadd_rn(sum, 1e-20f) : 1.0f;
  bool spoiled = false;
  for (int w = 0; w < kWarps; ++w) spoiled |= s.spoiled[w] != 0;
  for (int j = lane; j < topk; j += 32) {
    const int32_t expert = s.chosen[j];
    const float weight = __fmul_rn(__fdiv_rn(s.scores[expert], divisor), a.routed_scaling_factor);
    a.topk_ids[token * topk + j] = expert;
    a.topk_weights[token * topk + j] = spoiled ? __int_as_float(0x7fc00000) : weight;
  }
}

__global__ void __launch_bounds__(kThreads) moe_route_kernel(MoeRouteArgs a) {
  KN_SHARED(shared);
  const Shared s = carve(shared, a);
  const int64_t token = int64_t(blockIdx.x);
  const int experts = int(a.experts);
  const float* logits = a.logits + token * experts;
  int nan = 0;
  for (int i = int(threadIdx.x); i < experts; i += kThreads) nan |= logits[i] != logits[i];
  nan = __any_sync(kAllLanes, nan);
  if (threadIdx.x % 32 == 0) s.spoiled[threadIdx.x / 32] = nan;
  if (a.scoring == Scoring::kSoftmax) softmax(logits, experts, s);
  for (int i = int(threadIdx.x); i < experts; i += kThreads) {
    // Its own element again after a softmax: no barrier.
    const float score = a.scoring == Scoring::kSoftmax ? float(s.scores[i]) : sigmoid(logits[i]);
    s.scores[i] = score;
    s.keys[i] = order_key(a.correction_bias ? __fadd_rn(score, a.correction_bias[i]) : score);
  }
  __syncthreads();
  if (a.n_group > 1) limit_groups(a, s);
  if (threadIdx.x < 32) choose(a, s, token);
}

}  // namespace

void moe_route(const MoeRouteArgs& a, void* stream) {
  check_op(a);
  if (a.tokens == 0) return;
  check_elements("moe_route",
                 {{a.logits, 4}, {a.correction_bias, 4}, {a.topk_ids, 4}, {a.topk_weights, 4}});
  launch({"moe_route", grid_of("moe_route", a.tokens), dim3(kThreads), size_t(shared_bytes(a)),
          stream},
         moe_route_kernel, a);
}

}  // namespace kn::cuda
