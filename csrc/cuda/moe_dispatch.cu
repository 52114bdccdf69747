// moe_dispatch: a stable counting sort of the (token, slot) pairs by expert, in one block and one
// launch. The rows are cut into one segment for each warp; a warp goes through its segment 32 rows
// at a time.
//
//   counts[warp][expert]   1. each warp counts its segment: lanes with the same expert meet
//                             (__match_any_sync), the first of them adds their number
//                          2. per expert: warps ascending, then experts ascending (a block scan):
//                             counts become the first row of (warp, expert)
//                          3. again through the segment: a row's place is that plus its rank
//
// Every word of `counts` is written by one lane of its own warp: no atomics, and the same result in
// every run. Bytes: ids twice, 8 bytes a row out; nothing next to the experts. Up to 4096 experts.
#include "core/op_checks.h"
#include "cuda/elements.h"
#include "cuda/reduce.cuh"

namespace kn::cuda {
namespace {

constexpr int kSharedLimit = 96 * 1024;  // what every GPU since sm_80 gives a block

struct DispatchPlan {
  int warps;  // of the block; those with a segment come first
  int segments;
  int64_t segment_rows;  // a multiple of 32
};

// Lanes below this one.
__device__ __forceinline__ unsigned lanes_before() { return (1u << (threadIdx.x % 32)) - 1; }

// f(row, expert, lanes of the warp with the same expert), for the rows of this warp's segment.
template <typename F>
__device__ __forceinline__ void each_row(const MoeDispatchArgs& a, const DispatchPlan& plan, F f) {
  const int64_t rows = a.tokens * a.topk, begin = int64_t(threadIdx.x / 32) * plan.segment_rows;
  const int64_t end = min(begin + plan.segment_rows, rows);
  for (int64_t first = begin; first < end; first += 32) {
    const int64_t row = first + threadIdx.x % 32;
    const bool present = row < end;
    const int32_t expert = present ? a.topk_ids[row] : -1;
    device_require(!present || (expert >= 0 && expert < a.experts),
                   "moe_dispatch: topk_ids must be in [0, experts)");
    const unsigned same = __match_any_sync(kAllLanes, expert);
    f(row, expert, same, present);
    __syncwarp();
  }
}

// counts[segment][expert] becomes the first row of that expert in that segment.
__device__ void turn_counts_into_rows(const MoeDispatchArgs& a, const DispatchPlan& plan,
                                      SharedPtr<int32_t> counts, SharedPtr<int32_t> partial) {
  const int experts = int(a.experts), threads = plan.warps * 32;
  const int each = (experts + threads - 1) / threads;  // neighbouring experts of one thread
  const int begin = min(int(threadIdx.x) * each, experts), end = min(begin + each, experts);
  int32_t total = 0;
  for (int e = begin; e < end; ++e)
    for (int s = 0; s < plan.segments; ++s) total += counts[s * experts + e];
  int32_t row = exclusive_scan(total, partial);
  for (int e = begin; e < end; ++e) {
    a.expert_offsets[e] = row;
    for (int s = 0; s < plan.segments; ++s) {
      const int32_t count = counts[s * experts + e];
      counts[s * experts + e] = row;
      row += count;
    }
  }
  if (threadIdx.x == 0) a.expert_offsets[experts] = int32_t(a.tokens * a.topk);
}

__global__ void __launch_bounds__(1024, 1)
    moe_dispatch_kernel(MoeDispatchArgs a, DispatchPlan plan) {
  KN_SHARED(shared);
  const auto partial = shared_at<int32_t>(shared, 0);
  const auto counts = shared_at<int32_t>(shared, 4 * plan.warps);
  const int experts = int(a.experts), warp = int(threadIdx.x) / 32;
  for (int i = int(threadIdx.x); i < plan.segments * experts; i += plan.warps * 32) counts[i] = 0;
  __syncthreads();
  const auto mine = counts + warp * experts;
  if (warp < plan.segments)
    each_row(a, plan, [&](int64_t, int32_t expert, unsigned same, bool present) {
      if (present && (same & lanes_before()) == 0) mine[expert] += __popc(same);
    });
  __syncthreads();
  turn_counts_into_rows(a, plan, counts, partial);
  __syncthreads();
  if (warp < plan.segments)
    each_row(a, plan, [&](int64_t i, int32_t expert, unsigned same, bool present) {
      const int32_t first = present ? int32_t(mine[expert]) : 0;
      __syncwarp();
      if (!present) return;
      const int32_t row = first + __popc(same & lanes_before());
      a.row_index[i] = row;
      a.token_index[row] = int32_t(i / a.topk);
      if ((same & lanes_before()) == 0) mine[expert] = first + __popc(same);
    });
}

DispatchPlan make_plan(int64_t rows, int64_t experts) {
  const int64_t fit = (kSharedLimit - 32 * 4) / (4 * experts);  // segments that shared memory holds
  const int64_t wanted = (rows + 31) / 32;
  const int64_t segments = std::max<int64_t>(1, std::min<int64_t>({32, fit, wanted}));
  // At least eight warps share the scan over the experts.
  const int warps = int(std::max<int64_t>(8, segments));
  const int64_t pieces = (std::max<int64_t>(rows, 1) + 31) / 32;
  return {warps, int(segments), (pieces + segments - 1) / segments * 32};
}

}  // namespace

void moe_dispatch(const MoeDispatchArgs& a, void* stream) {
  const int64_t rows = check_op(a);
  KN_REQUIRE(a.experts <= kMaxExperts, "moe_dispatch: experts must be 1 to ", kMaxExperts,
             " on a GPU (got ", a.experts, ")");
  check_elements("moe_dispatch",
                 {{a.topk_ids, 4}, {a.token_index, 4}, {a.row_index, 4}, {a.expert_offsets, 4}});
  const DispatchPlan plan = make_plan(rows, a.experts);
  const size_t shared_bytes = 4 * (size_t(plan.warps) + size_t(plan.segments) * size_t(a.experts));
  launch({"moe_dispatch", dim3(1), dim3(unsigned(plan.warps) * 32), shared_bytes, stream},
         moe_dispatch_kernel, a, plan);
}

}  // namespace kn::cuda
