// mla_decode: the schedule of splits, if none is given; attention over each split (mla_decode.cuh,
// on Hopper mla_decode_sm90.cuh where it suits); and the combination of a sequence's splits that no
// block has joined. Two blocks a multiprocessor share the schedule.
//
// Supports kv_lora_rank 512, qk_rope_head_dim 64, bf16 queries, a cache in bf16 or fp8 rows, pages
// of a multiple of 32 tokens.
#include "core/op_checks.h"
#include "cuda/mla_decode.cuh"
#include "cuda/mla_decode_sm90.h"

namespace kn::cuda {
namespace {

constexpr const char* kOp = "mla_decode";
constexpr int kCombineThreads = 128;
constexpr int kCombineColumns = kLatent / kCombineThreads;
constexpr int kCombineSplits = kCombineThreads * kFoldSplits;  // at a time, a group a thread
constexpr int kCombineAhead = 8;
static_assert(kCombineAhead % kFoldSplits == 0);

struct CombineLayout {
  static constexpr int kFactors = 0;
  static constexpr int kGroups = kFactors + kCombineSplits * int(sizeof(float2));
  static constexpr int kPartial = kGroups + kCombineThreads * int(sizeof(float2));
  static constexpr int kBytes = kPartial + kCombineThreads / 32 * 4;
};

int64_t blocks_of(int64_t n, int64_t each) { return (n + each - 1) / each; }

MlaScheduleArgs schedule_of(const MlaDecodeArgs& a) {
  return {a.seq_lens, a.batch, a.max_pages * a.page_size, a.max_splits, nullptr, 0};
}

int64_t capacity_of(const MlaDecodeArgs& a) {
  return split_capacity(kOp, a.batch, a.max_pages * a.page_size, a.max_splits);
}

// The workspace: the schedule, if it is made here, then of each split its values and stats.
int64_t own_schedule_bytes(const MlaDecodeArgs& a) {
  return a.splits ? 0 : mla_schedule_workspace_bytes(schedule_of(a));
}

// Block i: heads i % head_blocks of the splits of worker i / head_blocks.
template <int kGroups, bool kFp8>
__global__ void __launch_bounds__(kGroups * kGroupWarps * 32, 1)
    mla_decode_kernel(MlaProblem p, int head_blocks, int workers) {
  KN_SHARED(shared);
  const int group = int(threadIdx.x) / (kGroupWarps * 32);
  const int64_t head = (int64_t(blockIdx.x) % head_blocks * kGroups + group) * kMlaHeads;
  const int each = splits_each(p, workers), first = int(blockIdx.x) / head_blocks * each;
  const int end = min(first + each, p.schedule.first[p.batch]);
  for (int split = first; split < end; ++split)
    attend_split<kGroups, kFp8>(p, find_split(p, split, each), head, shared);
}

// What the splits of a sequence need to be added up, in shared memory.
struct CombineFactors {
  SharedPtr<float2> splits;  // of the group so far and of the split; x < 0: it has no row
  SharedPtr<float2> groups;  // factor to the largest maximum, and sum of the weights
};

// Of `count` splits, from `from` on: a group a thread, the first one's number a multiple of a
// group's.
__device__ __forceinline__ void make_factors(const MlaProblem& p, int begin, int from, int count,
                                             int each, int64_t head, float largest,
                                             const CombineFactors& factors) {
  float2 group{};
#pragma unroll
  for (int j = 0; j < kFoldSplits; ++j) {
    const int i = int(threadIdx.x) * kFoldSplits + j, split = from + i;
    if (i >= count) break;
    float2 factor = make_float2(-1.0f, 0.0f);
    if (row_of(split, begin, each) == split) {
      const float2 stats = p.results.stats[split * p.heads + head];
      factor = j == 0 ? make_float2(0.0f, 1.0f) : fold_factors(group.x, stats.x);
      group = j == 0 ? stats : fold_stats(factor, group, stats);
    }
    factors.splits[i] = factor;
  }
  if (int(threadIdx.x) * kFoldSplits < count)
    factors.groups[threadIdx.x] =
        make_float2(ptx::exp2_approx(__fsub_rn(group.x, largest)), group.y);
}

// Adds these splits to a thread's columns.
__device__ __forceinline__ void add_splits(const MlaProblem& p, int from, int count, int64_t head,
                                           const CombineFactors& factors, float& sum,
                                           float (&values)[kCombineColumns]) {
  const auto* rows =
      reinterpret_cast<const float4*>(p.results.values + (from * p.heads + head) * kLatent);
  const int64_t stride = p.heads * kLatent / kCombineColumns;
  float group[kCombineColumns] = {};
#pragma unroll 1
  for (int i = 0; i < count; i += kCombineAhead) {
    float4 v[kCombineAhead];
    float2 factor[kCombineAhead];
#pragma unroll
    for (int j = 0; j < kCombineAhead; ++j) {
      factor[j] = i + j < count ? factors.splits[i + j] : make_float2(-1.0f, 0.0f);
      if (!(factor[j].x < 0.0f)) v[j] = rows[(i + j) * stride + threadIdx.x];
    }
#pragma unroll
    for (int j = 0; j < kCombineAhead; ++j) {
      if (!(factor[j].x < 0.0f)) {
        group[0] = fold(factor[j], group[0], v[j].x);
        group[1] = fold(factor[j], group[1], v[j].y);
        group[2] = fold(factor[j], group[2], v[j].z);
        group[3] = fold(factor[j], group[3], v[j].w);
      }
      if (j % kFoldSplits != kFoldSplits - 1 || i + j - j % kFoldSplits >= count) continue;
      const float2 whole = factors.groups[(i + j) / kFoldSplits];
      sum = __fmaf_rn(whole.y, whole.x, sum);
#pragma unroll
      for (int k = 0; k < kCombineColumns; ++k) {
        values[k] = __fmaf_rn(group[k], whole.x, values[k]);
        group[k] = 0.0f;
      }
    }
  }
}

// The rows of results of one sequence and head: factors of up to kCombineSplits at a time in shared
// memory, and values of eight on their way at once, since there may be hundreds and few blocks.
__global__ void __launch_bounds__(kCombineThreads)
    mla_combine_kernel(MlaProblem p, int workers, bf16* out) {
  KN_SHARED(shared);
  const CombineFactors factors = {shared_at<float2>(shared, CombineLayout::kFactors),
                                  shared_at<float2>(shared, CombineLayout::kGroups)};
  const int64_t row = blockIdx.x;
  const int64_t b = row / p.heads, head = row % p.heads;
  const int begin = p.schedule.first[b], end = p.schedule.first[b + 1];
  device_require(end - begin == (int64_t(p.seq_lens[b]) + kSplitTokens - 1) / kSplitTokens,
                 "mla_decode: the schedule must be of these seq_lens");
  const int each = splits_each(p, workers);
  float largest = -INFINITY;
  for (int s = begin + int(threadIdx.x); s < end; s += kCombineThreads)
    if (row_of(s, begin, each) == s)
      largest = fmaxf(largest, p.results.stats[s * p.heads + head].x);
  largest =
      block_max<kCombineThreads / 32>(largest, shared_at<float>(shared, CombineLayout::kPartial));
  float sum = 0.0f, values[kCombineColumns] = {};
  for (int from = begin; from < end; from += kCombineSplits) {
    const int count = min(end - from, kCombineSplits);
    __syncthreads();
    make_factors(p, begin, from, count, each, head, largest, factors);
    __syncthreads();
    add_splits(p, from, count, head, factors, sum, values);
  }
  if (begin == end) sum = 1.0f;  // no token: zeros
  *reinterpret_cast<uint2*>(out + row * kLatent + threadIdx.x * kCombineColumns) =
      make_uint2(ptx::to_bf16x2(__fdiv_rn(values[0], sum), __fdiv_rn(values[1], sum)),
                 ptx::to_bf16x2(__fdiv_rn(values[2], sum), __fdiv_rn(values[3], sum)));
}

void check_supported(const MlaDecodeArgs& a) {
  check_op(a);
  KN_REQUIRE(a.q_dtype == DType::kBf16 && a.cache_dtype != DType::kFp32, kOp,
             ": q must be bf16 (0) and cache bf16 or fp8 (2) on a GPU (got ", int32_t(a.q_dtype),
             ", ", int32_t(a.cache_dtype), ")");
  KN_REQUIRE(a.kv_lora_rank == kLatent && a.qk_rope_head_dim == kRope, kOp,
             ": kv_lora_rank and qk_rope_head_dim must be 512 and 64 on a GPU (got ",
             a.kv_lora_rank, ", ", a.qk_rope_head_dim, ")");
  KN_REQUIRE(a.page_size % kMlaTileTokens == 0 && a.page_size < (1 << 30), kOp,
             ": page_size must be a multiple of 32, below 2^30, on a GPU (got ", a.page_size, ")");
  KN_REQUIRE(uintptr_t(a.splits) % 16 == 0, kOp, ": splits must be 16-byte aligned (got ", a.splits,
             ")");
}

MlaProblem problem(const MlaDecodeArgs& a) {
  const int64_t needed = mla_decode_workspace_bytes(a);
  KN_REQUIRE(needed == 0 ||
                 (a.workspace && uintptr_t(a.workspace) % 16 == 0 && a.workspace_bytes >= needed),
             kOp, ": workspace must have ", needed, " bytes, 16-byte aligned (got ",
             a.workspace_bytes, " at ", a.workspace, ")");
  KN_REQUIRE(a.seq_lens, kOp, ": seq_lens must not be null (got null)");
  MlaProblem p{};
  p.q = static_cast<const bf16*>(a.q);
  p.cache = a.cache;
  p.page_table = a.page_table;
  p.seq_lens = a.seq_lens;
  p.batch = a.batch;
  p.heads = a.heads;
  p.pages = a.pages;
  p.page_size = int(a.page_size);
  p.max_pages = a.max_pages;
  p.scale = a.softmax_scale * 1.4426950408889634f;
  auto* at = static_cast<uint8_t*>(a.workspace);
  p.schedule = schedule_at(a.splits ? const_cast<void*>(a.splits) : a.workspace, a.batch);
  at += own_schedule_bytes(a);
  p.results.values = reinterpret_cast<float*>(at);
  p.results.stats = reinterpret_cast<float2*>(at + capacity_of(a) * a.heads * kLatent * 4);
  return p;
}

// The results of all splits; returns how many workers share them.
template <int kGroups, bool kFp8>
int attend(const MlaDecodeArgs& a, const MlaProblem& p, void* stream) {
  const int64_t head_blocks = blocks_of(a.heads, kGroups * kMlaHeads);
  const int64_t wanted = blocks_of(2 * multiprocessors(kOp), head_blocks);
  const int64_t workers = std::max<int64_t>(std::min(wanted, capacity_of(a)), 1);
  launch({kOp, grid_of(kOp, workers * head_blocks), dim3(kGroups * kGroupWarps * 32),
          kMlaSharedBytes<kGroups>, stream},
         mla_decode_kernel<kGroups, kFp8>, p, int(head_blocks), int(workers));
  return int(workers);
}

}  // namespace

int64_t mla_decode_workspace_bytes(const MlaDecodeArgs& a) {
  check_supported(a);
  const int64_t split_bytes = a.heads * (kLatent * 4 + int64_t(sizeof(float2)));
  const int64_t results = checked_mul(kOp, capacity_of(a), split_bytes);
  return results + own_schedule_bytes(a);
}

void mla_decode(const MlaDecodeArgs& a, void* stream) {
  check_supported(a);
  if (a.batch == 0) return;
  const MlaProblem p = problem(a);
  KN_REQUIRE(a.q && a.out && is_aligned({a.q, a.cache, a.out}, {}), kOp,
             ": q, cache and out must be 16-byte aligned on a GPU (got q=", a.q,
             ", cache=", a.cache, ", out=", a.out, ")");
  KN_REQUIRE(a.max_pages == 0 || a.pages == 0 || (a.cache && a.page_table), kOp,
             ": cache and page_table must not be null (got cache=", a.cache,
             ", page_table=", a.page_table, ")");
  check_elements(kOp, {{a.page_table, 4}, {a.seq_lens, 4}});
  if (!a.splits) {
    MlaScheduleArgs own = schedule_of(a);
    own.workspace = a.workspace;
    own.workspace_bytes = own_schedule_bytes(a);
    mla_schedule(own, stream);
  }
  const bool fp8 = a.cache_dtype == DType::kFp8;
  int workers = 0;
  if (suits_mla_sm90(p) && is_hopper(kOp))
    workers = mla_decode_sm90(kOp, p, fp8, capacity_of(a), stream);
  else if (a.heads > kMlaHeads)
    workers = fp8 ? attend<2, true>(a, p, stream) : attend<2, false>(a, p, stream);
  else
    workers = fp8 ? attend<1, true>(a, p, stream) : attend<1, false>(a, p, stream);
  launch(
      {kOp, grid_of(kOp, a.batch * a.heads), dim3(kCombineThreads), CombineLayout::kBytes, stream},
      mla_combine_kernel, p, workers, static_cast<bf16*>(a.out));
}

}  // namespace kn::cuda
