// mla_decode on Hopper, one split after the other: up to 512 tokens of a sequence, for 64 heads.
//
//   warps 0 .. 3   scores [64 heads x 64 tokens] and softmax; values of columns 0 .. 255
//   warps 4 .. 7                                              values of columns 256 .. 511
//   warps 8 .. 11  one thread brings queries, and tiles of 64 tokens x 576 columns, 72 KB each
//
// A tile lies in boxes of 64 columns (128-byte swizzle), k-major for the scores, n-major for the
// values. Warp w of four has heads 16w .. 16w + 15. The weights' divisor is the sum of what bf16
// holds of them. bf16 rows: one tile is multiplied, one on its way. fp8 rows: they come as they
// lie, 41 KB, and the consumers widen them to the one bf16 tile.
//
// Bytes: 1152 (fp8: 656) a token for every 64 heads, 72 KB of queries a split, and 2 KB a head and
// row of results. FLOPs: 2 * 64 * 1088 a token. Order: tiles ascending with one running maximum,
// then that of splits.
#pragma once
#include "cuda/mla_decode_sm90.h"
#include "cuda/ptx_sm90.cuh"

namespace kn::cuda {

constexpr int kMlaWarpgroup = 128;
constexpr int kMlaConsumers = 2 * kMlaWarpgroup;
constexpr int kMlaSm90Threads = kMlaConsumers + kMlaWarpgroup;

constexpr int kBoxColumns = 64, kBoxRows = 64;
constexpr int kBoxRowBytes = kBoxColumns * 2;
constexpr int kBoxBytes = kBoxRows * kBoxRowBytes;
constexpr int kEightRowsBytes = 8 * kBoxRowBytes;
constexpr int kBoxes = kWidth / kBoxColumns, kLatentBoxes = kLatent / kBoxColumns;
constexpr int kMatrixBytes = kBoxes * kBoxBytes;  // 64 rows: the queries, or a tile
constexpr int kStepRows = 16;                     // of wgmma, along k
static_assert(kBoxRows == kSm90Heads && kBoxRows == kSm90Tokens);
static_assert(kFp8RowBytes % 16 == 0 && kLatentBoxes % 2 == 0);

template <bool kFp8>
struct MlaSm90Layout {
  static constexpr int kStages = kFp8 ? 1 : 2;  // what copies fill
  static constexpr int kRowsBytes = kFp8 ? kSm90Tokens * kFp8RowBytes : kMatrixBytes;
  static constexpr int kQueries = 0;  // first: a swizzle wants multiples of 1024
  static constexpr int kTiles = kQueries + kMatrixBytes;
  static constexpr int kWeights = kTiles + (kFp8 ? 1 : kStages) * kMatrixBytes;
  static constexpr int kRows = kFp8 ? kWeights + kBoxBytes : kTiles;
  static constexpr int kRescale = kFp8 ? kRows + kRowsBytes : kWeights + kBoxBytes;  // [64] float
  static constexpr int kFactors = kRescale + kSm90Heads * 4;                         // [64] float2
  static constexpr int kFull = kFactors + kSm90Heads * 8;
  static constexpr int kEmpty = kFull + kStages * 8;
  static constexpr int kQueriesFull = kEmpty + kStages * 8;
  static constexpr int kQueriesEmpty = kQueriesFull + 8;
  static constexpr int kBytes = kQueriesEmpty + 8;
};
static_assert(MlaSm90Layout<false>::kBytes <= 227 * 1024);

// Barriers of the consumers.
enum MlaBarrier {
  kWeightsRead = 1,  // by the second warpgroup
  kWeightsWritten,   // by the first
  kTileWritten,      // by both, where not by a copy alone
};

// Of a launch.
struct MlaSm90Problem {
  MlaProblem a;
  TensorMap queries, cache;  // rows of 576 bf16
  int head_blocks, workers;
};

// A block's place in the ring of copies.
template <bool kFp8, typename Bytes>
struct MlaRing {
  using Layout = MlaSm90Layout<kFp8>;
  Bytes shared;
  int stage = 0, parity = 0;

  __device__ __forceinline__ void advance() {
    stage = stage == Layout::kStages - 1 ? 0 : stage + 1;
    if (stage == 0) parity ^= 1;
  }
  __device__ __forceinline__ SharedPtr<uint64_t> full() const {
    return shared_at<uint64_t>(shared, Layout::kFull + stage * 8);
  }
  __device__ __forceinline__ SharedPtr<uint64_t> empty() const {
    return shared_at<uint64_t>(shared, Layout::kEmpty + stage * 8);
  }
  __device__ __forceinline__ SharedPtr<uint8_t> rows() const {
    return shared_at<uint8_t>(shared, Layout::kRows + stage * Layout::kRowsBytes);
  }
  // What is multiplied.
  __device__ __forceinline__ SharedPtr<uint8_t> tile() const {
    return shared_at<uint8_t>(shared, Layout::kTiles + (kFp8 ? 0 : stage) * kMatrixBytes);
  }
};

// Where a block's results of a split go: what there is of 64 heads.
struct ResultRows {
  int64_t first;
  int count;
  bool join;
};

// Block i: heads i % head_blocks of the splits of worker i / head_blocks. The next split is looked
// up while f has this one.
template <typename F>
__device__ __forceinline__ void for_each_split(const MlaSm90Problem& p, F f) {
  const int64_t head = int64_t(blockIdx.x) % p.head_blocks * kSm90Heads;
  const int each = splits_each(p.a, p.workers);
  int split = int(blockIdx.x) / p.head_blocks * each;
  const int end = min(split + each, p.a.schedule.first[p.a.batch]);
  Split next{};
  if (split < end) next = find_split(p.a, split, each);
  while (split < end) {
    const Split s = next;
    const ResultRows rows = {s.row * p.a.heads + head,
                             int(min(p.a.heads - head, int64_t(kSm90Heads))), s.joins};
    ++split;
    if (split < end) next = find_split(p.a, split, each);
    f(s, head, rows);
  }
}

// ---- the producer -------------------------------------------------------------------------------

// The queries of a split, from row `row` on. They stay in L2 for the other splits of the sequence.
// Behind its last head are those of the next sequence, or zeros: rows of no result.
__device__ __forceinline__ void load_queries(const TensorMap* map, int row, SharedPtr<uint8_t> to,
                                             SharedPtr<uint64_t> full) {
  ptx::mbarrier_arrive_expect(full, kMatrixBytes);
  for (int box = 0; box < kBoxes; ++box)
    ptx::tma_load_2d(to + box * kBoxBytes, map, box * kBoxColumns, row, full);
}

// A tile, from row `row` of the cache on.
template <bool kFp8, typename Bytes>
__device__ __forceinline__ void load_tile(const MlaSm90Problem& p, const MlaRing<kFp8, Bytes>& ring,
                                          int64_t row) {
  ptx::mbarrier_arrive_expect(ring.full(), MlaSm90Layout<kFp8>::kRowsBytes);
  if constexpr (kFp8) {
    ptx::bulk_copy_once(ring.rows(), static_cast<const uint8_t*>(p.a.cache) + row * kFp8RowBytes,
                        MlaSm90Layout<kFp8>::kRowsBytes, ring.full());
  } else {
    for (int box = 0; box < kBoxes; ++box)
      ptx::tma_load_2d_once(ring.rows() + box * kBoxBytes, &p.cache, box * kBoxColumns, int(row),
                            ring.full());
  }
}

// By one thread. A split's first tile comes before its queries, whose place is free later.
template <bool kFp8, typename Bytes>
__device__ __forceinline__ void bring_splits(const MlaSm90Problem& p, Bytes shared) {
  using Layout = MlaSm90Layout<kFp8>;
  const auto queries_empty = shared_at<uint64_t>(shared, Layout::kQueriesEmpty);
  MlaRing<kFp8, Bytes> ring{shared};
  int parity = 0;  // of the queries
  for_each_split(p, [&](const Split& s, int64_t head, const ResultRows&) {
    for (int token = s.begin; token < s.end; token += kSm90Tokens) {
      const int64_t page = page_of(p.a, s.sequence, token, s.end);
      ptx::mbarrier_wait(ring.empty(), ring.parity ^ 1);
      load_tile<kFp8>(p, ring, page * p.a.page_size + token % p.a.page_size);
      ring.advance();
      if (token > s.begin) continue;
      ptx::mbarrier_wait(queries_empty, parity ^ 1);
      load_queries(&p.queries, int(s.sequence * p.a.heads + head),
                   shared_at<uint8_t>(shared, Layout::kQueries),
                   shared_at<uint64_t>(shared, Layout::kQueriesFull));
      parity ^= 1;
    }
  });
}

// ---- the consumers ------------------------------------------------------------------------------

using MlaScores = float[kSm90Tokens / 2];  // heads g, g + 8 of the warp's, as wgmma has them
using MlaValues = float[kLatent / 2 / 2];  // the same, of half of the columns
using MlaWeights = uint32_t[kSm90Tokens / kStepRows][4];  // operands of the steps along the tokens

// This warp reads no more what `empty` counts.
__device__ __forceinline__ void release(SharedPtr<uint64_t> empty) {
  __syncwarp();
  if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(empty);
}

// Rows of a tile from `present` on hold what the page holds there, perhaps NaN, and weight 0 does
// not hide that.
__device__ __forceinline__ void clear_rows(SharedPtr<uint8_t> tile, int present) {
  constexpr int kRowPieces = kBoxRowBytes / 16, kEach = kLatentBoxes * kRowPieces;
  const auto pieces = shared_cast<uint4>(tile);
#pragma unroll 1
  for (int i = int(threadIdx.x); i < (kSm90Tokens - present) * kEach; i += kMlaConsumers)
    pieces[i % kEach / kRowPieces * (kBoxBytes / 16) + (present + i / kEach) * kRowPieces +
           i % kRowPieces] = make_uint4(0, 0, 0, 0);
}

// Where 16 bytes of a row of a matrix lie, in 16 bytes.
__device__ __forceinline__ int sm90_place(int row, int piece) {
  return piece / 8 * (kBoxBytes / 16) + row * (kBoxRowBytes / 16) + (piece % 8 ^ row % 8);
}

// fp8 rows to a tile; zeros from row `present` on.
__device__ __forceinline__ void widen_rows(SharedPtr<uint8_t> rows, SharedPtr<uint8_t> tile,
                                           int present) {
  constexpr int kLatentPieces = kLatent / kRun, kRopePieces = kRope / kRun;
  const auto pieces = shared_cast<uint4>(tile);
#pragma unroll 2
  for (int i = int(threadIdx.x); i < kSm90Tokens * kLatentPieces; i += kMlaConsumers) {
    const int row = i / kLatentPieces, piece = i % kLatentPieces;
    const auto from = rows + row * kFp8RowBytes;
    const uint2 e = shared_cast<uint2>(from)[piece];
    const float scale =
        shared_cast<float>(from + int(fp8_scale_offset(kLatent)))[piece / (int(kFp8Group) / kRun)];
    const uint4 wide = widen_run(e, scale);
    pieces[sm90_place(row, piece)] = row < present ? wide : make_uint4(0, 0, 0, 0);
  }
#pragma unroll 1
  for (int i = int(threadIdx.x); i < kSm90Tokens * kRopePieces; i += kMlaConsumers) {
    const int row = i / kRopePieces, piece = i % kRopePieces;
    const auto key = shared_cast<uint4>(rows + row * kFp8RowBytes + int(fp8_rope_offset(kLatent)));
    const uint4 word = key[piece];
    pieces[sm90_place(row, kLatentPieces + piece)] = word;
  }
}

// Waits for the ring's tile; `present` of its tokens belong to the sequence.
template <bool kFp8, typename Bytes>
__device__ __forceinline__ void open_tile(const MlaRing<kFp8, Bytes>& ring, int present) {
  ptx::mbarrier_wait(ring.full(), ring.parity);
  if constexpr (kFp8) {
    ptx::barrier_sync(kTileWritten, kMlaConsumers);  // both have multiplied the one before
    widen_rows(ring.rows(), ring.tile(), present);
    release(ring.empty());
  } else {
    if (present >= kSm90Tokens) return;
    clear_rows(ring.tile(), present);
  }
  ptx::fence_proxy_async();
  ptx::barrier_sync(kTileWritten, kMlaConsumers);
}

__device__ __forceinline__ uint64_t rows_matrix(SharedPtr<uint8_t> boxes) {
  return ptx::matrix_descriptor(boxes, Swizzle::k128, 16, kEightRowsBytes);
}

// s = queries * keys. A descriptor counts in 16 bytes.
__device__ __forceinline__ void multiply_keys(SharedPtr<uint8_t> queries, SharedPtr<uint8_t> tile,
                                              MlaScores& s) {
  const uint64_t q = rows_matrix(queries), k = rows_matrix(tile);
  ptx::wgmma_fence();
#pragma unroll
  for (int c = 0; c < kWidth; c += kStepRows) {
    const int at = c / kBoxColumns * kBoxBytes + c % kBoxColumns * 2;
    ptx::wgmma_m64k16_bf16<kSm90Tokens>(s, q + uint64_t(at / 16), k + uint64_t(at / 16), c > 0);
  }
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>();
  ptx::wgmma_settle(s);
}

// Products to weights, in the registers where the values want them; `rescale` takes earlier sums to
// the new maximum.
__device__ __forceinline__ void weigh(float scale, int present, MlaScores& s,
                                      RunningSoftmax& softmax, MlaWeights& weights,
                                      float (&rescale)[2]) {
  const int t = int(threadIdx.x) % 4;
#pragma unroll
  for (int i = 0; i < kSm90Tokens / 2; ++i)
    s[i] = i / 4 * 8 + t * 2 + i % 2 < present ? __fmul_rn(s[i], scale) : -INFINITY;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float largest = -INFINITY, sum = 0.0f;
#pragma unroll
    for (int i = 2 * half; i < kSm90Tokens / 2; i += 4)
      largest = fmaxf(largest, fmaxf(s[i], s[i + 1]));
    largest = fmaxf(softmax.maximum[half], quad_max(largest));
    rescale[half] = ptx::exp2_approx(__fsub_rn(softmax.maximum[half], largest));
    softmax.maximum[half] = largest;
#pragma unroll
    for (int j = 0; j < kSm90Tokens / 8; ++j) {
      const int i = 4 * j + 2 * half;
      const uint32_t word = ptx::to_bf16x2(ptx::exp2_approx(__fsub_rn(s[i], largest)),
                                           ptx::exp2_approx(__fsub_rn(s[i + 1], largest)));
      weights[j / 2][j % 2 * 2 + half] = word;
      float low, high;
      unpack(word, low, high);
      sum = __fadd_rn(sum, __fadd_rn(low, high));
    }
    softmax.sum[half] = __fmaf_rn(softmax.sum[half], rescale[half], sum);
  }
}

// What the first warpgroup tells the second.
struct PassedWeights {
  SharedPtr<uint8_t> weights;  // [64 heads][64 tokens] bf16, a box
  SharedPtr<float> rescale;    // [64 heads]
  SharedPtr<float2> factors;   // [64 heads], where a split joins others
};

template <bool kFp8, typename Bytes>
__device__ __forceinline__ PassedWeights passed_weights(Bytes shared) {
  using Layout = MlaSm90Layout<kFp8>;
  return {shared_at<uint8_t>(shared, Layout::kWeights), shared_at<float>(shared, Layout::kRescale),
          shared_at<float2>(shared, Layout::kFactors)};
}

// Head g of this thread's two.
__device__ __forceinline__ int first_head() {
  return int(threadIdx.x) % kMlaWarpgroup / 32 * 16 + int(threadIdx.x) % 32 / 4;
}

__device__ __forceinline__ void pass_weights(const PassedWeights& to, const MlaWeights& weights,
                                             const float (&rescale)[2]) {
  const int head = first_head(), t = int(threadIdx.x) % 4;
  const auto words = shared_cast<uint32_t>(to.weights);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int j = 0; j < kSm90Tokens / 8; ++j)
      words[sm90_place(head + half * 8, j) * 4 + t] = weights[j / 2][j % 2 * 2 + half];
    if (t == 0) to.rescale[head + half * 8] = rescale[half];
  }
  ptx::fence_proxy_async();
}

__device__ __forceinline__ void rescale_values(const float (&rescale)[2], MlaValues& acc) {
  // Most tiles bring no new maximum.
  if (!__any_sync(kAllLanes, rescale[0] != 1.0f || rescale[1] != 1.0f)) return;
#pragma unroll
  for (int i = 0; i < kLatent / 4; ++i) acc[i] = __fmul_rn(acc[i], rescale[i / 2 % 2]);
}

// acc += weights * values, of the 256 columns from box `box` on; weight(i) is the operand of step
// i.
template <typename F>
__device__ __forceinline__ void add_values(SharedPtr<uint8_t> tile, int box, MlaValues& acc,
                                           F weight) {
  const uint64_t v =
      ptx::matrix_descriptor(tile + box * kBoxBytes, Swizzle::k128, kBoxBytes, kEightRowsBytes);
  ptx::wgmma_settle(acc);
  ptx::wgmma_fence();
#pragma unroll
  for (int i = 0; i < kSm90Tokens / kStepRows; ++i)
    ptx::wgmma_m64k16_bf16<kLatent / 2, ptx::Major::kN>(
        acc, weight(i), v + uint64_t(i * kStepRows * kBoxRowBytes / 16), true);
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>();
  ptx::wgmma_settle(acc);
}

// The split's sums of values of 256 columns from `column` on, and of one warpgroup; `factors` are
// read where it joins others.
__device__ __forceinline__ void write_values(const MlaProblem& p, const ResultRows& rows,
                                             int column, SharedPtr<float2> factors,
                                             const MlaValues& acc) {
  float* to =
      p.results.values + (rows.first + first_head()) * kLatent + column + threadIdx.x % 4 * 2;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int head = first_head() + half * 8;
    if (head >= rows.count) break;
    const float2 factor = rows.join ? factors[head] : make_float2(0.0f, 1.0f);
    write_run<kLatent / 2 / 8>(to + half * 8 * kLatent, rows.join, factor, [&](int i) {
      return make_float2(acc[4 * i + 2 * half], acc[4 * i + 2 * half + 1]);
    });
  }
}

// The split's maxima and sums; where it joins others also their factors, for both warpgroups.
__device__ __forceinline__ void write_stats(const MlaProblem& p, const ResultRows& rows,
                                            const RunningSoftmax& softmax,
                                            SharedPtr<float2> factors) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int head = first_head() + half * 8;
    float sum = softmax.sum[half];
    sum = __fadd_rn(sum, __shfl_xor_sync(kAllLanes, sum, 1));
    sum = __fadd_rn(sum, __shfl_xor_sync(kAllLanes, sum, 2));
    if (threadIdx.x % 4 != 0 || head >= rows.count) continue;
    float2& stats = p.results.stats[rows.first + head];
    const float2 mine = make_float2(softmax.maximum[half], sum);
    if (rows.join) {
      const float2 there = stats, factor = fold_factors(there.x, mine.x);
      factors[head] = factor;
      stats = fold_stats(factor, there, mine);
    } else {
      stats = mine;
    }
  }
}

// The warpgroup that makes scores, softmax and the values of the first half of the columns.
template <bool kFp8, typename Bytes>
__device__ __forceinline__ void attend_first(const MlaSm90Problem& p, Bytes shared) {
  using Layout = MlaSm90Layout<kFp8>;
  const auto queries = shared_at<uint8_t>(shared, Layout::kQueries);
  const auto queries_full = shared_at<uint64_t>(shared, Layout::kQueriesFull);
  const auto queries_empty = shared_at<uint64_t>(shared, Layout::kQueriesEmpty);
  const PassedWeights passed = passed_weights<kFp8>(shared);
  MlaRing<kFp8, Bytes> ring{shared};
  int parity = 0;  // of the queries
  for_each_split(p, [&](const Split& s, int64_t, const ResultRows& rows) {
    RunningSoftmax softmax;
    MlaValues acc = {};
    ptx::mbarrier_wait(queries_full, parity);
    parity ^= 1;
    for (int token = s.begin; token < s.end; token += kSm90Tokens) {
      const int present = s.end - token;
      open_tile<kFp8>(ring, present);
      MlaScores scores;
      multiply_keys(queries, ring.tile(), scores);
      if (present <= kSm90Tokens) release(queries_empty);
      MlaWeights weights;
      float rescale[2];
      weigh(p.a.scale, present, scores, softmax, weights, rescale);
      ptx::barrier_sync(kWeightsRead, kMlaConsumers);
      pass_weights(passed, weights, rescale);
      ptx::barrier_arrive(kWeightsWritten, kMlaConsumers);
      rescale_values(rescale, acc);
      for (const auto& step : weights) ptx::wgmma_settle(step);
      add_values(ring.tile(), 0, acc, [&](int i) -> const uint32_t (&)[4] { return weights[i]; });
      if constexpr (!kFp8) release(ring.empty());
      ring.advance();
    }
    if (rows.join) ptx::barrier_sync(kWeightsRead, kMlaConsumers);
    write_stats(p.a, rows, softmax, passed.factors);
    if (rows.join) ptx::barrier_sync(kWeightsWritten, kMlaConsumers);
    write_values(p.a, rows, 0, passed.factors, acc);
  });
}

// The other one.
template <bool kFp8, typename Bytes>
__device__ __forceinline__ void attend_second(const MlaSm90Problem& p, Bytes shared) {
  const PassedWeights passed = passed_weights<kFp8>(shared);
  MlaRing<kFp8, Bytes> ring{shared};
  for_each_split(p, [&](const Split& s, int64_t, const ResultRows& rows) {
    MlaValues acc = {};
    const uint64_t weights = rows_matrix(passed.weights);
    for (int token = s.begin; token < s.end; token += kSm90Tokens) {
      ptx::barrier_arrive(kWeightsRead, kMlaConsumers);
      open_tile<kFp8>(ring, s.end - token);
      ptx::barrier_sync(kWeightsWritten, kMlaConsumers);
      const float rescale[2] = {passed.rescale[first_head()], passed.rescale[first_head() + 8]};
      rescale_values(rescale, acc);
      add_values(ring.tile(), kLatentBoxes / 2, acc,
                 [&](int i) { return weights + uint64_t(i * kStepRows * 2 / 16); });
      if constexpr (!kFp8) release(ring.empty());
      ring.advance();
    }
    if (rows.join) {
      ptx::barrier_arrive(kWeightsRead, kMlaConsumers);
      ptx::barrier_sync(kWeightsWritten, kMlaConsumers);
    }
    write_values(p.a, rows, kLatent / 2, passed.factors, acc);
  });
}

// 168 registers a thread at the launch, all that there are; most go to the consumers.
template <bool kFp8>
__global__ void __launch_bounds__(kMlaSm90Threads, 1)
    mla_decode_sm90_kernel(const __grid_constant__ MlaSm90Problem p) {
  using Layout = MlaSm90Layout<kFp8>;
  KN_SHARED(shared);
  if (threadIdx.x == 0) {
    for (int s = 0; s < Layout::kStages; ++s) {
      ptx::mbarrier_init(shared_at<uint64_t>(shared, Layout::kFull + s * 8), 1);
      ptx::mbarrier_init(shared_at<uint64_t>(shared, Layout::kEmpty + s * 8), kMlaConsumers / 32);
    }
    ptx::mbarrier_init(shared_at<uint64_t>(shared, Layout::kQueriesFull), 1);
    ptx::mbarrier_init(shared_at<uint64_t>(shared, Layout::kQueriesEmpty), kMlaWarpgroup / 32);
    ptx::mbarrier_init_fence();
  }
  __syncthreads();
  if (threadIdx.x >= kMlaConsumers) {
    ptx::give_registers<40>();
    if (threadIdx.x == kMlaConsumers) bring_splits<kFp8>(p, shared);
  } else {
    ptx::take_registers<232>();
    if (threadIdx.x < kMlaWarpgroup)
      attend_first<kFp8>(p, shared);
    else
      attend_second<kFp8>(p, shared);
  }
}

}  // namespace kn::cuda
