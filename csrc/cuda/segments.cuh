// The rows of a grouped op as ranges of one expert, made on the device from expert_offsets: the
// host never learns how the tokens were routed. An expert's rows are cut into tiles of 128 for the
// kernel for many tokens; a rest of more than 32 is one more tile, a smaller one becomes segments
// of 16 for the kernel for few. The host launches as many blocks as there can be tiles, those past
// the last one end at once; blocks for segments, of which a long prompt has few, go from one to the
// next. On Hopper tiles go to its own kernel (int4_sm90.h).
#pragma once
#include <algorithm>

#include "core/op_checks.h"
#include "cuda/int4_sm90.h"

namespace kn::cuda {

constexpr int kSegmentThreads = 256;

__device__ __forceinline__ int32_t tiles_of(int32_t rows) {
  return rows / kManyTokens + (rows % kManyTokens > kFewTokens);
}

__device__ __forceinline__ int32_t segments_of(int32_t rows) {
  const int32_t rest = rows % kManyTokens;
  return rest > kFewTokens ? 0 : (rest + kSegmentTokens - 1) / kSegmentTokens;
}

// An expert with a segment has a row, and all but its last one are full.
inline int64_t max_segments(int64_t experts, int64_t rows) {
  const int64_t each = kFewTokens / kSegmentTokens;
  return std::min(each * experts, std::min(experts, rows) + rows / kSegmentTokens);
}

// An expert with a tile that is not full has more than 32 rows.
inline int64_t max_tiles(int64_t experts, int64_t rows) {
  return std::min(experts, rows / (kFewTokens + 1)) + rows / kManyTokens;
}

// The workspace: tokens for the kernel for few, the ranges of both, tokens for Hopper's kernel.
template <typename Args>
int64_t bytes_before_sm90(const Args& a) {
  const int64_t ranges = max_segments(a.experts, a.rows) + max_tiles(a.experts, a.rows);
  return blocks_of(prepared_bytes(a.x_rows, a.in) + ranges * int64_t(sizeof(RowRange)), 16) * 16;
}

template <typename Args>
bool needs_sm90(const char* op, const Args& a) {
  return max_tiles(a.experts, a.rows) > 0 && is_hopper(op);
}

template <typename Args>
int64_t grouped_workspace_bytes(const char* op, const Args& a) {
  check_op(a);
  return bytes_before_sm90(a) +
         (needs_sm90(op, a) ? int4_sm90_bytes(a.x_dtype, a.x_rows, a.in) : 0);
}

// `most` places for ranges: those of all experts in order, then empty ones.
struct Ranges {
  RowRange* places;
  int64_t most;
};

// The ranges of at most `each` rows from row `from` of expert e on; returns the next free place.
__device__ __forceinline__ int64_t cut_rows(const Ranges& r, int64_t next, int64_t e, int32_t from,
                                            int32_t end, int32_t each, int32_t count) {
  for (int32_t i = 0; i < count; ++i, from += each)
    r.places[next++] = {int32_t(e), from, min(each, end - from), 0};
  return next;
}

__device__ __forceinline__ void clear_from(const Ranges& r, SharedPtr<const int32_t> counts) {
  int64_t used = 0;
  for (int w = 0; w < kSegmentThreads / 32; ++w) used += counts[w];
  for (int64_t i = used + threadIdx.x; i < r.most; i += kSegmentThreads) r.places[i] = {0, 0, 0, 0};
}

// Calls f(range) for every gridDim.y-th segment of the block; empty ones come last. All threads.
template <typename F>
__device__ __forceinline__ void for_each_segment(const Ranges& segments, F f) {
  for (int64_t i = blockIdx.y; i < segments.most; i += gridDim.y) {
    const RowRange range = segments.places[i];
    if (range.count == 0) return;
    if (i >= gridDim.y) __syncthreads();  // shared memory is read to the end of f
    f(range);
  }
}

static __global__ void __launch_bounds__(kSegmentThreads)
    int4_segments_kernel(const int32_t* expert_offsets, int64_t experts, int64_t rows,
                         Ranges segments, Ranges tiles) {
  KN_SHARED(shared);
  const int64_t each = (experts + kSegmentThreads - 1) / kSegmentThreads;
  const int64_t begin = min(int64_t(threadIdx.x) * each, experts);
  const int64_t end = min(begin + each, experts);
  device_require(expert_offsets[0] == 0 && expert_offsets[experts] == rows,
                 "expert_offsets must go from 0 to rows");
  int32_t my_segments = 0, my_tiles = 0;
  for (int64_t e = begin; e < end; ++e) {
    const int32_t count = expert_offsets[e + 1] - expert_offsets[e];
    device_require(count >= 0 && count <= rows, "expert_offsets must ascend");
    my_segments += segments_of(count);
    my_tiles += tiles_of(count);
  }
  const auto segment_counts = shared_at<int32_t>(shared, 0);
  const auto tile_counts = shared_at<int32_t>(shared, kSegmentThreads / 32 * 4);
  int64_t segment = exclusive_scan(my_segments, segment_counts);
  int64_t tile = exclusive_scan(my_tiles, tile_counts);
  for (int64_t e = begin; e < end; ++e) {
    const int32_t first = expert_offsets[e], last = expert_offsets[e + 1], count = last - first;
    tile = cut_rows(tiles, tile, e, first, last, kManyTokens, tiles_of(count));
    segment = cut_rows(segments, segment, e, first + count / kManyTokens * kManyTokens, last,
                       kSegmentTokens, segments_of(count));
  }
  clear_from(segments, segment_counts);
  clear_from(tiles, tile_counts);
}

// Checks, prepares x and makes the ranges; `segments.places` is null if there is nothing to do.
struct Grouped {
  PreparedTokens x;
  Ranges segments, tiles;
};

template <typename Args>
Grouped open_grouped(const char* op, const Args& a, void* stream) {
  const int64_t needed = grouped_workspace_bytes(op, a);
  KN_REQUIRE(a.expert_offsets, op, ": expert_offsets must not be null");
  if (a.rows == 0 || a.out == 0) return {};
  KN_REQUIRE(a.x && a.y, op, ": x and y must not be null (got ", a.x, ", ", a.y, ")");
  KN_REQUIRE(a.experts >= 1 && a.x_rows >= 1, op,
             ": experts and x_rows must be at least 1 for rows=", a.rows, " (got ", a.experts,
             " and ", a.x_rows, ")");
  KN_REQUIRE(a.x_index || a.x_rows == a.rows, op, ": without x_index, x must have rows=", a.rows,
             " rows (got ", a.x_rows, ")");
  KN_REQUIRE(a.workspace && uintptr_t(a.workspace) % 16 == 0 && a.workspace_bytes >= needed, op,
             ": workspace must have ", needed, " bytes, 16-byte aligned (got ", a.workspace_bytes,
             " at ", a.workspace, ")");
  check_elements(op, {{a.x, dtype_bytes(a.x_dtype)},
                      {a.x_index, 4},
                      {a.expert_offsets, 4},
                      {a.y, dtype_bytes(a.y_dtype)}});
  Grouped g;
  g.x = prepare_tokens(op, a.x, a.x_dtype, a.x_rows, a.in, a.workspace, stream);
  auto* places = reinterpret_cast<RowRange*>(static_cast<uint8_t*>(a.workspace) +
                                             prepared_bytes(a.x_rows, a.in));
  g.segments = {places, max_segments(a.experts, a.rows)};
  g.tiles = {places + g.segments.most, max_tiles(a.experts, a.rows)};
  launch({op, dim3(1), dim3(kSegmentThreads), 2 * kSegmentThreads / 32 * 4, stream},
         int4_segments_kernel, a.expert_offsets, a.experts, a.rows, g.segments, g.tiles);
  return g;
}

template <typename Args>
void launch_sm90(const char* op, const Args& a, const Ranges& tiles,
                 std::initializer_list<Int4Experts> matrices, void* stream) {
  Int4Sm90Args s = {a.x,
                    a.x_dtype,
                    a.y_dtype,
                    a.x_index,
                    int(matrices.size()),
                    {},
                    tiles.places,
                    tiles.most,
                    a.y,
                    a.x_rows,
                    a.rows,
                    a.out,
                    a.in,
                    static_cast<uint8_t*>(a.workspace) + bytes_before_sm90(a)};
  std::copy(matrices.begin(), matrices.end(), s.matrices);
  int4_sm90(op, s, stream);
}

// Blocks of segments for each multiprocessor: a few times as many as run at once.
constexpr int64_t kSegmentBlocks = 128;

// Launches both kernels of a grouped op, each on its ranges.
template <int kMatrices, typename Args>
void launch_grouped(const char* op, const Args& a, const Grouped& g,
                    std::initializer_list<Int4Experts> matrices, void (*few)(Args, Grouped),
                    void (*many)(Args, Grouped), void* stream) {
  const int64_t at_once = blocks_of(kSegmentBlocks * multiprocessors(op), row_tiles(a.out));
  launch({op, grid_of(op, row_tiles(a.out), std::min(g.segments.most, at_once)), dim3(kRowThreads),
          kRowSharedBytes<kMatrices>, stream},
         few, a, g);
  if (g.tiles.most == 0) return;  // too few rows for any
  if (needs_sm90(op, a)) return launch_sm90(op, a, g.tiles, matrices, stream);
  launch({op, grid_of(op, many_row_blocks<kMatrices>(a.out), g.tiles.most), dim3(kManyThreads),
          kManySharedBytes, stream},
         many, a, g);
}

}  // namespace kn::cuda
