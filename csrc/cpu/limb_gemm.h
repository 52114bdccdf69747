// What the doors of int4_gemm, int8_gemm, int4_grouped_gemm and int4_grouped_swiglu share: size
// checks, preparing the tokens, cutting the work into tasks. The arithmetic is in limbs.h.
//
// Two ways to multiply: limbs.h, and int4_tiles.h where the tier has it and there are tokens
// enough. Workspace: prepared tokens, [threads] scratch (tiles), the list of segments (grouped
// ops).
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <span>

#include "core/cpu_features.h"
#include "core/error.h"
#include "core/threads.h"
#include "cpu/dispatch.h"
#include "cpu/int4_tiles.h"
#include "cpu/limbs.h"
#include "kimi_native/runtime.h"

namespace kn::cpu {

// Up to kSegmentTokens consecutive rows of one expert: as many prepared tokens as stay in L2 while
// the rows of the matrix pass (1 MB at in = 7168).
struct Segment {
  int64_t first_row;
  int32_t expert, rows;
};
constexpr int64_t kSegmentTokens = 64;
static_assert(kSegmentTokens <= kTileTokens);

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline void check_dtype(const char* op, const char* name, DType dtype) {
  KN_REQUIRE(dtype == DType::kBf16 || dtype == DType::kFp32, op, ": ", name,
             " must be bf16 (0) or fp32 (1) (got ", int32_t(dtype), ")");
}

inline void check_sizes(const char* op, int64_t x_rows, int64_t rows, int64_t out, int64_t in,
                        int32_t group_size) {
  KN_REQUIRE(group_size == kGroupSize, op, ": group_size must be ", kGroupSize, " (got ",
             group_size, ")");
  KN_REQUIRE(in > 0 && in % kGroupSize == 0, op, ": in must be a positive multiple of ", kGroupSize,
             " (got ", in, ")");
  checked_mul(op, x_rows, checked_mul(op, in, 8));  // prepared tokens take less than 8 in + 512
  checked_mul(op, rows, checked_mul(op, out, 8));
  checked_mul(op, out, checked_mul(op, in, 8));
}

inline int64_t prepared_tokens_bytes(const char* op, int64_t tokens, int64_t in) {
  return checked_mul(op, tokens, prepared_bytes(in));
}

inline void check_workspace(const char* op, const void* workspace, int64_t bytes, int64_t needed) {
  KN_REQUIRE(bytes >= needed, op, ": workspace must have ", needed, " bytes (got ", bytes, ")");
  KN_REQUIRE(workspace && uintptr_t(workspace) % 64 == 0, op,
             ": workspace must be 64-byte aligned (got ", workspace, ")");
}

// The tokens of an op and where they go, in portions that threads claim.
struct PreparedTokens {
  static constexpr int64_t kPortion = 4;  // about a microsecond: less is not worth a thread's claim
  const void* x;
  DType dtype;
  int64_t tokens, in;
  uint8_t* out;
  bool by_rows;
  void (*prepare_token)(const void* x, DType dtype, int64_t in, void* out, bool by_rows);

  int64_t portions() const { return ceil_div(tokens, kPortion); }
  void prepare(int64_t portion) const {
    const int64_t end = std::min(tokens, (portion + 1) * kPortion);
    for (int64_t t = portion * kPortion; t < end; ++t)
      prepare_token((const char*)x + t * in * dtype_bytes(dtype), dtype, in,
                    out + t * prepared_bytes(in), by_rows);
  }
};

// The rows of an op's weights, once for each segment of tokens, cut into units of `unit_rows`.
struct RowUnits {
  int64_t segments, rows, unit_rows;
};

// The next run of units for a thread: long ones first, so that it streams through memory, then
// shorter and shorter ones, so that all threads end together; never across a segment's end.
struct UnitRun {
  int64_t segment, row, rows;  // rows = 0: none left
};
inline UnitRun claim_run(std::atomic<int64_t>& next, const RowUnits& work, int threads) {
  const int64_t per_segment = ceil_div(work.rows, work.unit_rows);
  const int64_t total = work.segments * per_segment;
  int64_t begin = next.load(std::memory_order_relaxed), take;
  do {
    if (begin >= total) return {0, 0, 0};
    take = std::max<int64_t>(1, 3 * (total - begin) / (4 * threads));
    take = std::min(take, per_segment - begin % per_segment);
  } while (!next.compare_exchange_weak(begin, begin + take, std::memory_order_relaxed));
  const int64_t row = begin % per_segment * work.unit_rows;
  return {begin / per_segment, row, std::min(take * work.unit_rows, work.rows - row)};
}

// Runs one op: prepares the tokens, then does all rows: run_tile(segment, row, rows, thread). The
// threads claim both from shared counters, so one that comes late holds nobody up.
template <typename Tokens, typename RunTile>
void run_units(const Tokens& x, const RowUnits& work, RunTile run_tile) {
  const int64_t portions = x.portions();
  const int threads = num_threads();
  std::atomic<int64_t> next_portion{0}, portions_done{0}, next_unit{0};
  parallel_for(threads, [&](int64_t, int thread) {
    for (int64_t i; (i = next_portion.fetch_add(1, std::memory_order_relaxed)) < portions;) {
      x.prepare(i);
      portions_done.fetch_add(1, std::memory_order_release);
    }
    while (portions_done.load(std::memory_order_acquire) < portions) relax();
    for (UnitRun run; (run = claim_run(next_unit, work, threads)).rows > 0;)
      run_tile(run.segment, run.row, run.rows, thread);
  });
}

// What prepares the tokens and does the tiles of an op, by rows up to fewer than blocks_from tokens
// a segment on average; the second pair is null on tiers without matrix tiles.
struct LimbKernels {
  int64_t blocks_from;
  void (*prepare)(const void* x, DType dtype, int64_t in, void* out, bool by_rows);
  void (*tile)(const LimbTile&);
  void (*prepare_block)(const Int4TilesPrepare&) = nullptr;
  void (*int4_tile)(const Int4Tile&) = nullptr;
};
inline LimbKernels int4_gemm_kernels(Compute compute) {
  const Kernels& k = kernels();
  if (compute == Compute::kInt8)
    return {Int4::kBlocksFrom, k.int4_prepare_one_limb, k.int4_gemm_tile_one_limb,
            k.int4_tiles.prepare_one_limb, k.int4_tiles.gemm};
  return {Int4::kBlocksFrom, k.int4_prepare, k.int4_gemm_tile, k.int4_tiles.prepare,
          k.int4_tiles.gemm};
}

// The parts of the workspace. Tiles are for kTilesFrom tokens a segment and more, on average.
constexpr int64_t kTilesFrom = 10;
struct LimbWorkspace {
  bool tiles;                        // if there are enough rows for each segment
  int64_t scratch_bytes;             // of a thread
  int64_t scratch, segments, bytes;  // where they start, and the end
};
// x_rows tokens, that `rows` rows of the op read.
inline LimbWorkspace limb_workspace(const char* op, int64_t x_rows, int64_t rows, int64_t in,
                                    int64_t limbs, int64_t segments, const LimbKernels& kernels) {
  LimbWorkspace w = {};
  w.tiles = kernels.int4_tile && rows >= kTilesFrom;
  w.scratch = prepared_tokens_bytes(op, x_rows, in);
  if (w.tiles) {
    w.scratch = std::max(w.scratch, checked_mul(op, rows, block_token_bytes(in, limbs)));
    w.scratch_bytes = int4_tiles_scratch_bytes(in);
  }
  w.segments = w.scratch + checked_mul(op, num_threads(), w.scratch_bytes);
  w.bytes = w.segments + checked_mul(op, segments, int64_t(sizeof(Segment)));
  return w;
}

inline void check_compute(const char* op, Compute compute) {
  KN_REQUIRE(compute == Compute::kExact || compute == Compute::kInt8, op,
             ": compute must be exact (0) or int8 (1) (got ", int32_t(compute), ")");
}

// One matrix in the layout of a format.
struct Matrix {
  const uint8_t* weight;
  const bf16* scale;
};

// A tile of rows of one matrix: the first half, to a multiple of 8 rows, is panel 0.
constexpr int64_t kGemmUnitRows = 16;

template <typename Format>
LimbTile gemm_tile(Format, const Matrix& m, int64_t row, int64_t rows, int64_t in) {
  LimbTile tile = {};
  const int64_t half = std::min(rows, ceil_div(rows, kGemmUnitRows) * (kGemmUnitRows / 2));
  for (int p = 0; p < 2; ++p) {
    tile.rows[p] = p == 0 ? half : rows - half;
    const int64_t at = tile.rows[p] > 0 ? row + p * half : row;
    tile.weight[p] = m.weight + at * row_bytes(Format{}, in);
    tile.scale[p] = m.scale + at * num_groups(in);
  }
  return tile;
}

// Blocks of a segment's tokens for matrix tiles; a portion is one block.
template <typename SegmentOf>
struct PreparedBlocks {
  static constexpr int64_t kBlocks = kSegmentTokens / kBlockTokens;
  const void* x;
  DType dtype;
  const int32_t* x_index;
  int64_t segments, in, token_bytes;
  uint8_t* out;
  SegmentOf segment_of;
  void (*prepare_block)(const Int4TilesPrepare&);

  int64_t portions() const { return segments * kBlocks; }
  void prepare(int64_t portion) const {
    const Segment s = segment_of(portion / kBlocks);
    const int64_t first = portion % kBlocks * kBlockTokens, row = s.first_row + first;
    if (first >= s.rows) return;
    prepare_block({.x = x_index ? x : (const char*)x + row * in * dtype_bytes(dtype),
                   .x_index = x_index ? x_index + row : nullptr,
                   .x_dtype = dtype,
                   .tokens = std::min<int64_t>(kBlockTokens, s.rows - first),
                   .in = in,
                   .out = out + row * token_bytes});
  }
};

// Runs an op over its segments, by tiles if there are tokens enough. make_tile(segment, row, rows)
// gives the weights of a tile.
template <typename Args, typename SegmentOf, typename MakeTile>
void run_segments(const Args& a, int64_t x_rows, const int32_t* x_index, int64_t rows,
                  const LimbWorkspace& w, int64_t limbs, const RowUnits& work, SegmentOf segment_of,
                  MakeTile make_tile, const LimbKernels& kernels) {
  uint8_t* x = (uint8_t*)a.workspace;
  const auto place = [&](int64_t segment, int64_t row, int64_t num_rows) {
    const Segment s = segment_of(segment);
    LimbTile tile = make_tile(s, row, num_rows);
    tile.far_prefetch = detect_cpu_features().far_prefetch;
    tile.y = (char*)a.y + (s.first_row * a.out + row) * dtype_bytes(a.y_dtype);
    tile.y_stride = a.out;
    tile.y_dtype = a.y_dtype;
    tile.tokens = s.rows;
    tile.in = a.in;
    return tile;
  };
  if (w.tiles && rows >= kTilesFrom * work.segments) {
    const int64_t token_bytes = block_token_bytes(a.in, limbs);
    const PreparedBlocks<SegmentOf> blocks{
        a.x,         a.x_dtype, x_index,    work.segments,        a.in,
        token_bytes, x,         segment_of, kernels.prepare_block};
    // Tiles take 16 rows of each panel.
    const RowUnits tile_work{work.segments, work.rows, 2 * work.unit_rows};
    run_units(blocks, tile_work, [&](int64_t segment, int64_t row, int64_t num_rows, int thread) {
      Int4Tile tile{place(segment, row, num_rows), limbs,
                    (char*)x + w.scratch + thread * w.scratch_bytes};
      tile.x = x + segment_of(segment).first_row * token_bytes;
      kernels.int4_tile(tile);
    });
    return;
  }
  const bool by_rows = rows < kernels.blocks_from * work.segments;
  const PreparedTokens tokens{a.x, a.x_dtype, x_rows, a.in, x, by_rows, kernels.prepare};
  // Blocks take 16 rows of each panel, too.
  const RowUnits units{work.segments, work.rows, (by_rows ? 1 : 2) * work.unit_rows};
  run_units(tokens, units, [&](int64_t segment, int64_t row, int64_t num_rows, int) {
    LimbTile tile = place(segment, row, num_rows);
    tile.by_rows = by_rows;
    const int64_t first = segment_of(segment).first_row;
    tile.x = x_index ? x : x + first * prepared_bytes(a.in);
    tile.x_index = x_index ? x_index + first : nullptr;
    kernels.tile(tile);
  });
}

inline LimbWorkspace dense_workspace(const char* op, int64_t tokens, int64_t in, int64_t limbs,
                                     const LimbKernels& kernels) {
  return limb_workspace(op, tokens, tokens, in, limbs, 0, kernels);
}

// The whole of int4_gemm and int8_gemm once the sizes are checked.
template <typename Format, typename Args>
void dense_limb_gemm(const char* op, Format format, const Args& a, const Matrix& m, int64_t limbs,
                     const LimbKernels& kernels) {
  if (a.tokens == 0 || a.out == 0) return;
  KN_REQUIRE(a.x && a.y && m.weight && m.scale, op,
             ": x, weight, weight_scale and y must not be "
             "null (got ",
             a.x, ", ", (const void*)m.weight, ", ", (const void*)m.scale, ", ", a.y, ")");
  const LimbWorkspace w = dense_workspace(op, a.tokens, a.in, limbs, kernels);
  check_workspace(op, a.workspace, a.workspace_bytes, w.bytes);
  const auto segment_of = [&](int64_t i) {
    const int64_t first = i * kSegmentTokens;
    return Segment{first, 0, int32_t(std::min(kSegmentTokens, a.tokens - first))};
  };
  const auto make_tile = [&](const Segment&, int64_t row, int64_t rows) {
    return gemm_tile(format, m, row, rows, a.in);
  };
  run_segments(a, a.tokens, nullptr, a.tokens, w, limbs,
               {ceil_div(a.tokens, kSegmentTokens), a.out, kGemmUnitRows}, segment_of, make_tile,
               kernels);
}

// ---- grouped ops ----

template <typename Args>
void check_grouped_sizes(const char* op, const Args& a) {
  check_dtype(op, "x", a.x_dtype);
  check_dtype(op, "y", a.y_dtype);
  check_sizes(op, a.x_rows, a.rows, a.out, a.in, a.group_size);
  check_compute(op, a.compute);
  checked_mul(op, a.experts, 64);
}

template <typename Args>
LimbWorkspace grouped_workspace(const char* op, const Args& a, const LimbKernels& kernels) {
  check_grouped_sizes(op, a);
  // Every segment but the last of an expert is full, and an expert with a segment has a row.
  const int64_t segments = std::min(a.experts, a.rows) + a.rows / kSegmentTokens;
  return limb_workspace(op, a.x_rows, a.rows, a.in, block_limbs(a.x_dtype, a.compute), segments,
                        kernels);
}

// Writes the segments behind the prepared tokens; returns how many.
template <typename Args>
int64_t make_segments(const char* op, const Args& a, Segment* segments) {
  KN_REQUIRE(a.expert_offsets[0] == 0 && a.expert_offsets[a.experts] == a.rows, op,
             ": expert_offsets must go from 0 to rows=", a.rows, " (got ", a.expert_offsets[0],
             " to ", a.expert_offsets[a.experts], ")");
  for (int64_t e = 0; e < a.experts; ++e)
    KN_REQUIRE(a.expert_offsets[e] <= a.expert_offsets[e + 1], op,
               ": expert_offsets must ascend (got ", a.expert_offsets[e], ", ",
               a.expert_offsets[e + 1], " for expert ", e, ")");
  int64_t n = 0;
  for (int64_t e = 0; e < a.experts; ++e)
    for (int64_t r = a.expert_offsets[e]; r < a.expert_offsets[e + 1]; r += kSegmentTokens)
      segments[n++] = {r, int32_t(e),
                       int32_t(std::min<int64_t>(kSegmentTokens, a.expert_offsets[e + 1] - r))};
  return n;
}

// Checks pointers, indices and workspace, and returns the number of segments (0: nothing to do).
// has_weights(e) says that no pointer of expert e is null; only experts with rows are asked.
template <typename Args, typename HasWeights>
int64_t open_grouped(const char* op, const Args& a, const LimbWorkspace& w,
                     HasWeights has_weights) {
  KN_REQUIRE(a.expert_offsets, op, ": expert_offsets must not be null");
  if (a.rows > 0 && a.out > 0) {
    KN_REQUIRE(a.x && a.y, op, ": x and y must not be null (got ", a.x, ", ", a.y, ")");
    check_workspace(op, a.workspace, a.workspace_bytes, w.bytes);
  }
  if (!a.x_index && a.rows > 0)
    KN_REQUIRE(a.x_rows == a.rows, op, ": without x_index, x must have rows=", a.rows,
               " rows (got ", a.x_rows, ")");
  for (int64_t r = 0; a.x_index && r < a.rows; ++r)
    KN_REQUIRE(a.x_index[r] >= 0 && a.x_index[r] < a.x_rows, op, ": x_index must be in [0, ",
               a.x_rows, ") (got ", a.x_index[r], " at row ", r, ")");
  if (a.rows == 0 || a.out == 0) return 0;
  Segment* segments = (Segment*)((char*)a.workspace + w.segments);
  const int64_t n = make_segments(op, a, segments);
  for (const Segment& s : std::span(segments, size_t(n)))
    KN_REQUIRE(has_weights(s.expert), op,
               ": weight pointers of an expert with rows must not be "
               "null (got null for expert ",
               s.expert, ")");
  return n;
}

// All of a grouped op: make_tile(expert, row, rows) gives the weights of some rows of an expert.
template <typename Args, typename HasWeights, typename MakeTile>
void run_grouped(const char* op, const Args& a, int64_t unit_rows, HasWeights has_weights,
                 MakeTile make_tile, const LimbKernels& kernels) {
  const LimbWorkspace w = grouped_workspace(op, a, kernels);
  const int64_t num_segments = open_grouped(op, a, w, has_weights);
  if (num_segments == 0) return;
  const Segment* segments = (const Segment*)((char*)a.workspace + w.segments);
  run_segments(
      a, a.x_rows, a.x_index, a.rows, w, block_limbs(a.x_dtype, a.compute),
      {num_segments, a.out, unit_rows}, [&](int64_t i) { return segments[i]; },
      [&](const Segment& s, int64_t row, int64_t rows) { return make_tile(s.expert, row, rows); },
      kernels);
}

}  // namespace kn::cpu
