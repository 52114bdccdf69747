// The rows of a grouped op as segments of at most 16 rows of one expert, made on the device from
// expert_offsets: the host never learns how the tokens were routed. The host launches as many
// blocks as there can be segments; those past the last one end at once.
#pragma once
#include <algorithm>

#include "core/op_checks.h"
#include "cuda/int4_rows.cuh"

namespace kn::cuda {

struct SegmentRange {
  int32_t expert, first, count, unused;
};

constexpr int kSegmentThreads = 256;

// Every segment but the last of an expert is full, and an expert with a segment has a row.
inline int64_t max_segments(int64_t experts, int64_t rows) {
  return std::min(experts, rows) + rows / kSegmentTokens;
}

template <typename Args>
int64_t grouped_workspace_bytes(const Args& a) {
  check_op(a);
  return prepared_bytes(a.x_rows, a.in) +
         max_segments(a.experts, a.rows) * int64_t(sizeof(SegmentRange));
}

// segments[0 .. max_segments): those of all experts in order, then empty ones.
static __global__ void __launch_bounds__(kSegmentThreads)
    int4_segments_kernel(const int32_t* expert_offsets, int64_t experts, int64_t rows,
                         SegmentRange* segments, int64_t most) {
  KN_SHARED(shared);
  const int64_t each = (experts + kSegmentThreads - 1) / kSegmentThreads;
  const int64_t begin = min(int64_t(threadIdx.x) * each, experts);
  const int64_t end = min(begin + each, experts);
  device_require(expert_offsets[0] == 0 && expert_offsets[experts] == rows,
                 "expert_offsets must go from 0 to rows");
  int32_t mine = 0;
  for (int64_t e = begin; e < end; ++e) {
    const int32_t count = expert_offsets[e + 1] - expert_offsets[e];
    device_require(count >= 0 && count <= rows, "expert_offsets must ascend");
    mine += (count + kSegmentTokens - 1) / kSegmentTokens;
  }
  const auto partial = shared_at<int32_t>(shared, 0);
  int64_t next = exclusive_scan(mine, partial);
  for (int64_t e = begin; e < end; ++e)
    for (int32_t r = expert_offsets[e]; r < expert_offsets[e + 1]; r += kSegmentTokens)
      segments[next++] = {int32_t(e), r, min(kSegmentTokens, expert_offsets[e + 1] - r), 0};
  int64_t used = 0;
  for (int w = 0; w < kSegmentThreads / 32; ++w) used += partial[w];
  for (int64_t i = used + threadIdx.x; i < most; i += kSegmentThreads) segments[i] = {0, 0, 0, 0};
}

// Checks, prepares x and makes the segments; `segments` is null if there is nothing to do.
struct Grouped {
  PreparedTokens x;
  const SegmentRange* segments;
  int64_t count;
};

template <typename Args>
Grouped open_grouped(const char* op, const Args& a, void* stream) {
  const int64_t needed = grouped_workspace_bytes(a);
  KN_REQUIRE(a.expert_offsets, op, ": expert_offsets must not be null");
  if (a.rows == 0 || a.out == 0) return {};
  KN_REQUIRE(a.x && a.y, op, ": x and y must not be null (got ", a.x, ", ", a.y, ")");
  KN_REQUIRE(a.x_index || a.x_rows == a.rows, op, ": without x_index, x must have rows=", a.rows,
             " rows (got ", a.x_rows, ")");
  KN_REQUIRE(a.workspace && uintptr_t(a.workspace) % 16 == 0 && a.workspace_bytes >= needed, op,
             ": workspace must have ", needed, " bytes, 16-byte aligned (got ", a.workspace_bytes,
             " at ", a.workspace, ")");
  Grouped g;
  g.x = prepare_tokens(op, a.x, a.x_dtype, a.x_rows, a.in, a.workspace, stream);
  auto* segments = reinterpret_cast<SegmentRange*>(static_cast<uint8_t*>(a.workspace) +
                                                   prepared_bytes(a.x_rows, a.in));
  g.segments = segments;
  g.count = max_segments(a.experts, a.rows);
  launch({op, dim3(1), dim3(kSegmentThreads), kSegmentThreads / 32 * 4, stream},
         int4_segments_kernel, a.expert_offsets, a.experts, a.rows, segments, g.count);
  return g;
}

}  // namespace kn::cuda
