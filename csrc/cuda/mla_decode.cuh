// mla_decode, one split: up to 512 tokens of a sequence, for 16 heads (4 warps) or 32 (8 warps).
//
//   tile: 32 tokens x 576 columns, 36 KB, two in shared memory; one is multiplied, one on its way
//   scores  [16 heads x 32 tokens]   warp j of 4: tokens 8j .. 8j + 7, over all 576 columns
//   values  [16 heads x 512 columns] warp j: columns 128j .. 128j + 127, over all 32 tokens
//
// Heads are on the m16 side throughout. A warp keeps its sums of values (64 registers) and a third
// of its queries (48); the rest lies in shared memory, as products want it, and is read again for
// every tile. Weights go from scores to values through shared memory, as bf16; the sum that divides
// them is of the same bf16 numbers. 16-byte pieces of a row are swizzled: 8 rows of one piece
// (values) and 2 rows of four (scores) both fall into 8 different places of 128 bytes.
//
// fp8 rows (cache_layout.h) come into shared memory as they are, 21 KB a tile, and are widened
// there to one bf16 tile before it is multiplied; the next tile's copy starts then. A latent is
// exact in bf16 where its scale is a power of two, as rope_append writes it, else rounded once
// more.
//
// Bytes: 1152 (fp8: 656) a token for every 32 heads (for 64 heads once more from L2), and 2 KB a
// head and row of results. Order: tiles ascending with one running maximum, then that of splits. It
// depends on the sequence alone.
#pragma once
#include "cuda/bf16_fragments.cuh"
#include "cuda/mla_splits.cuh"

namespace kn::cuda {

constexpr int kWidthChunks = kWidth / kChunkColumns;
constexpr int kKeptChunks = 6;  // of a query, in registers; the others are in shared memory
constexpr int kMlaTileTokens = 32;
constexpr int kMlaHeads = 16;  // of a group of four warps
constexpr int kGroupWarps = 4;
constexpr int kCachePieces = kWidth / kPieceColumns;
constexpr int kMlaStageBytes = kMlaTileTokens * kWidth * 2;
constexpr int kMlaStages = 2;
constexpr int kFp8RowPieces = kFp8RowBytes / 16;
static_assert(kMlaTileTokens * kFp8RowBytes <= kMlaStageBytes);
constexpr int kWeightRow = kMlaTileTokens + 8;  // bf16 of a head's weights, and 16 bytes of padding
constexpr int kWeightBytes = kMlaHeads * kWeightRow * 2;
constexpr int kRowValueBytes = kGroupWarps * kMlaHeads * 4;  // one float for each warp and head
constexpr int kColumnTiles = kLatent / kGroupWarps / 8;      // of a warp

constexpr int kFragmentBytes = kMlaHeads * kChunkBytes;  // a chunk of 16 queries
constexpr int kGroupSharedBytes =
    (kWidthChunks - kKeptChunks) * kFragmentBytes + kWeightBytes + kRowValueBytes;

template <int kGroups>
constexpr int kMlaSharedBytes = kMlaStages * kMlaStageBytes + kGroups * kGroupSharedBytes;
static_assert(kMlaSharedBytes<2> <= kSharedBytesAnywhere);

// What a thread is: warp `part` of group `group`; rows g and g + 8 of 16 heads.
struct MlaThread {
  int group, part, g, t, lane;
};

__device__ __forceinline__ MlaThread mla_thread() {
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
  return {warp / kGroupWarps, warp % kGroupWarps, lane / 4, lane % 4, lane};
}

__device__ __forceinline__ int place_of(int row, int piece) {
  return row * kCachePieces + (piece ^ ((row & 1) << 2 | (row >> 1 & 3)));
}

// Starts the copy of the tile that begins with `token`; rows from `end` on are zeros.
template <int kGroups>
__device__ __forceinline__ void copy_tile(const MlaProblem& p, SharedPtr<uint8_t> stage,
                                          int64_t page, int token, int end) {
  const bf16* rows =
      static_cast<const bf16*>(p.cache) + (page * p.page_size + token % p.page_size) * kWidth;
  if (token < end) {
#pragma unroll 1  // the queries and sums leave few registers
    for (int i = int(threadIdx.x); i < kMlaTileTokens * kCachePieces;
         i += kGroups * kGroupWarps * 32) {
      const int row = i / kCachePieces, piece = i % kCachePieces;
      const bool inside = token + row < end;
      ptx::cp_async_16(stage + place_of(row, piece) * 16,
                       inside ? rows + int64_t(row) * kWidth + piece * kPieceColumns : rows,
                       inside);
    }
  }
  ptx::cp_async_commit();
}

// The same of fp8 rows, as they lie.
template <int kGroups>
__device__ __forceinline__ void copy_fp8_tile(const MlaProblem& p, SharedPtr<uint8_t> raw,
                                              int64_t page, int token, int end) {
  const uint8_t* rows = static_cast<const uint8_t*>(p.cache) +
                        (page * p.page_size + token % p.page_size) * kFp8RowBytes;
  if (token < end) {
    const int present = min(end - token, kMlaTileTokens) * kFp8RowPieces;
#pragma unroll 1
    for (int i = int(threadIdx.x); i < kMlaTileTokens * kFp8RowPieces;
         i += kGroups * kGroupWarps * 32)
      ptx::cp_async_16(raw + i * 16, i < present ? rows + i * 16 : rows, i < present);
  }
  ptx::cp_async_commit();
}

// A tile of fp8 rows to a bf16 tile, where the products expect it.
template <int kGroups>
__device__ __forceinline__ void widen_tile(SharedPtr<uint8_t> raw, SharedPtr<uint8_t> stage) {
  constexpr int kThreads = kGroups * kGroupWarps * 32;
  constexpr int kLatentPieces = kLatent / kPieceColumns, kRopePieces = kRope / kPieceColumns;
  const auto pieces = shared_cast<uint4>(stage);
#pragma unroll 1
  for (int i = int(threadIdx.x); i < kMlaTileTokens * kLatentPieces; i += kThreads) {
    const int row = i / kLatentPieces, piece = i % kLatentPieces;
    const uint2 e = shared_cast<uint2>(raw + row * kFp8RowBytes)[piece];
    const float scale = shared_cast<float>(
        raw + row * kFp8RowBytes + fp8_scale_offset(kLatent))[piece / (kFp8Group / kPieceColumns)];
    pieces[place_of(row, piece)] = widen_run(e, scale);
  }
#pragma unroll 1
  for (int i = int(threadIdx.x); i < kMlaTileTokens * kRopePieces; i += kThreads) {
    const int row = i / kRopePieces, piece = i % kRopePieces;
    const auto key = shared_cast<uint4>(raw + row * kFp8RowBytes + fp8_rope_offset(kLatent));
    pieces[place_of(row, kLatentPieces + piece)] = key[piece];
  }
}

// What shared memory holds for a group beside the tiles.
struct GroupShared {
  SharedPtr<uint4> queries;    // [chunk][product][lane]
  SharedPtr<uint8_t> weights;  // [16 heads][40] bf16
  SharedPtr<float> of_warps;   // [warp][16 heads]: maxima, and in the end sums
};

template <typename Bytes>
__device__ __forceinline__ GroupShared group_shared(Bytes bytes, int group) {
  const int queries = kMlaStages * kMlaStageBytes + group * kGroupSharedBytes;
  const int weights = queries + (kWidthChunks - kKeptChunks) * kFragmentBytes;
  return {shared_at<uint4>(bytes, queries), shared_at<uint8_t>(bytes, weights),
          shared_at<float>(bytes, weights + kWeightBytes)};
}

// A lane's operands of the two products of a chunk, in the order of their registers.
struct QueryFragment {
  uint4 first, second;
};

// Chunk c of 16 queries. Heads past the last one repeat it; their results are not written.
__device__ __forceinline__ QueryFragment query_chunk(const MlaProblem& p, const MlaThread& th,
                                                     int sequence, int64_t head, int c) {
  const bf16* rows = p.q + sequence * p.heads * kWidth + c * kChunkColumns + th.t * kPieceColumns;
  const int64_t last = p.heads - 1;
  const auto* low = reinterpret_cast<const uint4*>(rows + min(head + th.g, last) * kWidth);
  const auto* high = reinterpret_cast<const uint4*>(rows + min(head + th.g + 8, last) * kWidth);
  const uint4 l = __ldg(low), h = __ldg(high);
  return {make_uint4(l.x, h.x, l.y, h.y), make_uint4(l.z, h.z, l.w, h.w)};
}

// A chunk of queries in shared memory.
__device__ __forceinline__ QueryFragment load_fragment(SharedPtr<uint4> queries, int c, int lane) {
  return {queries[c * 64 + lane], queries[c * 64 + 32 + lane]};
}

// The queries, each chunk by one of the warps: the first ones by way of shared memory (`passing`)
// into registers, in the order the products want, the others into shared memory. One barrier
// inside; another must follow before the last chunks are used, or `passing` for something else.
__device__ __forceinline__ void load_queries(const MlaProblem& p, const MlaThread& th,
                                             const GroupShared& shared, SharedPtr<uint4> passing,
                                             int sequence, int64_t head,
                                             QueryFragment (&q)[kKeptChunks]) {
#pragma unroll 1
  for (int c = th.part; c < kWidthChunks; c += kGroupWarps) {
    const QueryFragment f = query_chunk(p, th, sequence, head, c);
    const auto to = c < kKeptChunks ? passing + c * 64 : shared.queries + (c - kKeptChunks) * 64;
    to[th.lane] = f.first;
    to[32 + th.lane] = f.second;
  }
  __syncthreads();
#pragma unroll
  for (int c = 0; c < kKeptChunks; ++c) q[c] = load_fragment(passing, c, th.lane);
}

__device__ __forceinline__ void multiply_fragment(const QueryFragment& q, const uint4& k,
                                                  float (&s)[4]) {
  const uint32_t a0[4] = {q.first.x, q.first.y, q.first.z, q.first.w}, b0[2] = {k.x, k.y};
  ptx::mma_m16n8k16_bf16(s, a0, b0);
  const uint32_t a1[4] = {q.second.x, q.second.y, q.second.z, q.second.w}, b1[2] = {k.z, k.w};
  ptx::mma_m16n8k16_bf16(s, a1, b1);
}

// s: heads g and g + 8 x tokens 2t and 2t + 1 of this warp's eight. Even and odd chunks are summed
// apart, so that two chains of products are under way.
__device__ __forceinline__ void multiply_scores(const MlaThread& th, const GroupShared& shared,
                                                SharedPtr<uint8_t> stage,
                                                const QueryFragment (&q)[kKeptChunks],
                                                float (&s)[4]) {
  const auto pieces = shared_cast<uint4>(stage);
  const int row = th.part * 8 + th.g;
  // The swizzle stays within 8 pieces, two chunks.
  const int even = place_of(row, th.t), odd = place_of(row, th.t + kChunkPieces);
  float sums[2][4] = {};
#pragma unroll
  for (int c = 0; c < kKeptChunks; c += 2) {
    multiply_fragment(q[c], pieces[even + c / 2 * 8], sums[0]);
    multiply_fragment(q[c + 1], pieces[odd + c / 2 * 8], sums[1]);
  }
#pragma unroll 1  // unrolled, all of it would be loaded ahead, into more registers than there are
  for (int c = kKeptChunks; c < kWidthChunks; c += 2) {
    multiply_fragment(load_fragment(shared.queries, c - kKeptChunks, th.lane),
                      pieces[even + c / 2 * 8], sums[0]);
    multiply_fragment(load_fragment(shared.queries, c - kKeptChunks + 1, th.lane),
                      pieces[odd + c / 2 * 8], sums[1]);
  }
#pragma unroll
  for (int r = 0; r < 4; ++r) s[r] = __fadd_rn(sums[0][r], sums[1][r]);
}

// Scores (base 2) to weights in shared memory; `rescale` takes earlier sums to the new maximum.
// One barrier inside, and one is needed before the weights are read.
__device__ __forceinline__ void softmax_tile(const MlaThread& th, const GroupShared& shared,
                                             const float (&s)[4], RunningSoftmax& softmax,
                                             float (&rescale)[2]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float largest = quad_max(fmaxf(s[2 * half], s[2 * half + 1]));
    if (th.t == 0) shared.of_warps[th.part * kMlaHeads + half * 8 + th.g] = largest;
  }
  __syncthreads();
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int head = half * 8 + th.g;
    float largest = softmax.maximum[half];
#pragma unroll
    for (int w = 0; w < kGroupWarps; ++w)
      largest = fmaxf(largest, shared.of_warps[w * kMlaHeads + head]);
    rescale[half] = ptx::exp2_approx(__fsub_rn(softmax.maximum[half], largest));
    softmax.maximum[half] = largest;
    const uint32_t word = ptx::to_bf16x2(ptx::exp2_approx(__fsub_rn(s[2 * half], largest)),
                                         ptx::exp2_approx(__fsub_rn(s[2 * half + 1], largest)));
    shared_cast<uint32_t>(shared.weights)[(head * kWeightRow + th.part * 8) / 2 + th.t] = word;
    float low, high;
    unpack(word, low, high);
    softmax.sum[half] = __fmaf_rn(softmax.sum[half], rescale[half], __fadd_rn(low, high));
  }
}

// acc[i]: heads g and g + 8 x columns 2t and 2t + 1 of tile i of this warp's 128.
__device__ __forceinline__ void add_values(const MlaThread& th, SharedPtr<uint8_t> stage,
                                           SharedPtr<uint8_t> weights, const float (&rescale)[2],
                                           float (&acc)[kColumnTiles][4]) {
  uint32_t a[2][4];
#pragma unroll
  for (int step = 0; step < 2; ++step)
    ptx::ldmatrix_x4(a[step],
                     weights + (th.lane % 16 * kWeightRow + step * 16 + th.lane / 16 * 8) * 2);
#pragma unroll
  for (int i = 0; i < kColumnTiles; ++i) {
    uint32_t v[4];
    ptx::ldmatrix_x4_trans(v, stage + place_of(th.lane, th.part * kColumnTiles + i) * 16);
    const uint32_t b0[2] = {v[0], v[1]}, b1[2] = {v[2], v[3]};
#pragma unroll
    for (int r = 0; r < 4; ++r) acc[i][r] = __fmul_rn(acc[i][r], rescale[r / 2]);
    ptx::mma_m16n8k16_bf16(acc[i], a[0], b0);
    ptx::mma_m16n8k16_bf16(acc[i], a[1], b1);
  }
}

// The split's sums of values, and the maximum and sum of its weights. One barrier inside.
__device__ __forceinline__ void write_split(const MlaProblem& p, const MlaThread& th,
                                            const GroupShared& shared, const Split& split,
                                            int64_t head, const RunningSoftmax& softmax,
                                            const float (&acc)[kColumnTiles][4]) {
  const int64_t row = split.row * p.heads + head + th.g;
  float* to = p.results.values + row * kLatent + th.part * (kColumnTiles * 8) + th.t * 2;
  float2 there[2] = {}, factors[2] = {};
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float sum = softmax.sum[half];
    sum = __fadd_rn(sum, __shfl_xor_sync(kAllLanes, sum, 1));
    sum = __fadd_rn(sum, __shfl_xor_sync(kAllLanes, sum, 2));
    if (th.t == 0) shared.of_warps[th.part * kMlaHeads + half * 8 + th.g] = sum;
    if (head + half * 8 + th.g >= p.heads) continue;
    if (split.joins) {
      there[half] = p.results.stats[row + half * 8];
      factors[half] = fold_factors(there[half].x, softmax.maximum[half]);
    }
    write_run<kColumnTiles>(to + half * 8 * kLatent, split.joins, factors[half], [&](int i) {
      return make_float2(acc[i][2 * half], acc[i][2 * half + 1]);
    });
  }
  __syncthreads();  // all have read the stats that are there
  if (th.part != 0 || th.t != 0) return;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float sum = 0.0f;
    for (int w = 0; w < kGroupWarps; ++w)
      sum = __fadd_rn(sum, shared.of_warps[w * kMlaHeads + half * 8 + th.g]);
    const float2 stats = make_float2(softmax.maximum[half], sum);
    if (head + half * 8 + th.g < p.heads)
      p.results.stats[row + half * 8] =
          split.joins ? fold_stats(factors[half], there[half], stats) : stats;
  }
}

// All tiles of a split, for 16 heads from `head` in each group.
template <int kGroups, bool kFp8, typename Bytes>
__device__ __forceinline__ void attend_split(const MlaProblem& p, const Split& split, int64_t head,
                                             Bytes bytes) {
  const MlaThread th = mla_thread();
  const int sequence = split.sequence, begin = split.begin, end = split.end;
  const GroupShared shared = group_shared(bytes, th.group);
  // bf16: two tiles in turn. fp8: the tile first, then the rows it is made of. The queries pass
  // through what no copy is on its way to.
  const auto raw = shared_at<uint8_t>(bytes, kMlaStageBytes);
  const int64_t first_page = page_of(p, sequence, begin, end);
  if constexpr (kFp8)
    copy_fp8_tile<kGroups>(p, raw, first_page, begin, end);
  else
    copy_tile<kGroups>(p, shared_at<uint8_t>(bytes, 0), first_page, begin, end);
  int64_t page = page_of(p, sequence, begin + kMlaTileTokens, end);  // of the tile to come
  QueryFragment q[kKeptChunks];
  const int passing = (kFp8 ? 0 : kMlaStageBytes) + th.group * kWidthChunks * kFragmentBytes;
  load_queries(p, th, shared, shared_at<uint4>(bytes, passing), sequence, head, q);
  RunningSoftmax softmax;
  float acc[kColumnTiles][4] = {};
  int stage = 0;
#pragma unroll 1
  for (int token = begin; token < end; token += kMlaTileTokens) {
    ptx::cp_async_wait<0>();
    __syncthreads();  // the tile is in for all, and all have read the stage that is free now
    const int next = token + kMlaTileTokens;
    const auto tile = shared_at<uint8_t>(bytes, kFp8 ? 0 : stage * kMlaStageBytes);
    if constexpr (kFp8) {
      widen_tile<kGroups>(raw, tile);
      __syncthreads();  // the tile is whole, and its rows have been read
      copy_fp8_tile<kGroups>(p, raw, page, next, end);
    } else {
      const auto free = shared_at<uint8_t>(bytes, (1 - stage) * kMlaStageBytes);
      copy_tile<kGroups>(p, free, page, next, end);
    }
    page = page_of(p, sequence, next + kMlaTileTokens, end);
    float s[4] = {};
    multiply_scores(th, shared, tile, q, s);
#pragma unroll
    for (int r = 0; r < 4; ++r)
      s[r] = token + th.part * 8 + th.t * 2 + r % 2 < end ? __fmul_rn(s[r], p.scale) : -INFINITY;
    float rescale[2];
    softmax_tile(th, shared, s, softmax, rescale);
    __syncthreads();
    add_values(th, tile, shared.weights, rescale, acc);
    stage = 1 - stage;
  }
  write_split(p, th, shared, split, head, softmax, acc);
}

}  // namespace kn::cuda
