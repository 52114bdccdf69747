// The INT4 ops for many tokens on Hopper: a block has 128 rows of one matrix, or 64 of each of two,
// and up to 128 tokens, and goes from tile to tile (persistent).
//
//   warps 0 .. 3   slots 0 .. 3, 16 rows each    64 rows x 128 tokens a warpgroup, in two halves:
//   warps 4 .. 7   slots 4 .. 7                  one is multiplied while the other is added
//   warps 8 .. 11  fill a ring of four column tiles: 4.5 KB of weights, 16 KB a limb of tokens
//
// wgmma in bf16: q / 4 from registers times v * step / 2^7 from shared memory. A bf16 token rounded
// to its group's fixed point (limbs.cuh) is a bf16 number, an fp32 one is two. The sums of a group
// are integers below 2^23 times a power of two that fp32 holds for every step: exact, if a tensor
// core keeps 24 bits (tests/gpu/conformance: exact_operands).
//
//   acc = fma(sum, 2^9 scale, acc)          order, bytes of weights, FLOPs: int4_tile.cuh
#pragma once
#include "cuda/int4_sm90.h"
#include "cuda/ptx_sm90.cuh"

namespace kn::cuda {

constexpr int kConsumerThreads = 256;
constexpr int kProducerThreads = 128;
constexpr int kSm90Threads = kConsumerThreads + kProducerThreads;
constexpr int kSm90Stages = 4;
constexpr int kHalfTokens = kManyTokens / 2;
constexpr int kRowBytes = int(kTileColumns) * 2;  // of a token, limb and column tile: 128
constexpr int kHalfBytes = kHalfTokens * kRowBytes;
constexpr int kLimbBytes = 2 * kHalfBytes;
constexpr int kStepTokens = 8;  // rows between two units of a swizzle
constexpr int kSlotsBytes = kManySlots * kStageBytes;

template <int kLimbs>
struct Sm90Layout {
  static constexpr int kTokens = 0;  // first: a swizzle wants multiples of 1024
  static constexpr int kWeights = kSm90Stages * kLimbs * kLimbBytes;
  static constexpr int kTotals = kWeights + kSm90Stages * kSlotsBytes;  // [16][consumer] float4
  static constexpr int kFull = kTotals + kConsumerThreads * kHalfTokens * 4;
  static constexpr int kEmpty = kFull + kSm90Stages * 8;
  static constexpr int kBytes = kEmpty + kSm90Stages * 8;
};

// Of a launch.
struct Sm90Problem {
  Int4Sm90Args a;
  const uint8_t* tokens;  // [x_rows][limb][column tile] rows of kRowBytes
  TensorMap map;          // of `tokens`, without x_index
  int64_t row_blocks;
};

// A block's place in the ring.
template <int kLimbs, typename Bytes>
struct Ring {
  using Layout = Sm90Layout<kLimbs>;
  Bytes shared;
  int stage = 0, parity = 0;

  __device__ __forceinline__ void advance() {
    stage = stage == kSm90Stages - 1 ? 0 : stage + 1;
    if (stage == 0) parity ^= 1;
  }
  __device__ __forceinline__ SharedPtr<uint64_t> full() const {
    return shared_at<uint64_t>(shared, Layout::kFull + stage * 8);
  }
  __device__ __forceinline__ SharedPtr<uint64_t> empty() const {
    return shared_at<uint64_t>(shared, Layout::kEmpty + stage * 8);
  }
  __device__ __forceinline__ SharedPtr<uint8_t> tokens(int limb) const {
    return shared_at<uint8_t>(shared, Layout::kTokens + (stage * kLimbs + limb) * kLimbBytes);
  }
  __device__ __forceinline__ SharedPtr<uint8_t> weights(int slot) const {
    return shared_at<uint8_t>(shared, Layout::kWeights + stage * kSlotsBytes + slot * kStageBytes);
  }
};

// What a block works on: tokens of one expert, and a place along the rows of the matrices.
struct Tile {
  RowRange range;
  int64_t block;

  // Of 64 tokens: a range of no more is not multiplied as 128.
  __device__ __forceinline__ int halves() const { return range.count > kHalfTokens ? 2 : 1; }
};

// False behind the last one. Blocks of rows change first: those of one range run together and find
// its tokens in L2.
__device__ __forceinline__ bool find_tile(const Sm90Problem& p, int64_t i, Tile& tile) {
  const int64_t range = i / p.row_blocks;
  if (range >= p.a.num_ranges) return false;
  tile.block = i % p.row_blocks;
  if (p.a.ranges) {
    tile.range = p.a.ranges[range];
  } else {
    const int64_t first = range * kManyTokens;
    tile.range = {0, int32_t(first), int32_t(min(p.a.rows - first, int64_t(kManyTokens))), 0};
  }
  return tile.range.count > 0;
}

template <int kMatrices>
__device__ __forceinline__ int64_t sm90_row_tile(int64_t block, int slot) {
  return block * kManyRowTiles<kMatrices> + slot % kManyRowTiles<kMatrices>;
}

// ---- the producer -------------------------------------------------------------------------------

// What a lane copies of every column tile: tile or scales of a slot.
struct WeightCopy {
  const uint8_t* from;
  int bytes, to;  // `to` in the weights of a stage
};

template <int kMatrices>
__device__ __forceinline__ WeightCopy find_weights(const Sm90Problem& p, const Tile& tile,
                                                   int lane) {
  const int slot = lane % kManySlots;
  const Int4Experts& e = p.a.matrices[slot / kManyRowTiles<kMatrices>];
  Matrix m = e.alone;
  if (e.tiles)
    m = {e.tiles[tile.range.expert], reinterpret_cast<const uint8_t*>(e.scales[tile.range.expert])};
  device_require(m.tiles && m.scales, "weight pointers of an expert with rows must not be null");
  // Behind the matrix: its last row tile once more, whose sums are not stored.
  const int64_t row_tile = min(sm90_row_tile<kMatrices>(tile.block, slot), row_tiles(p.a.out) - 1);
  const int64_t first = row_tile * column_tiles(p.a.in);
  if (lane < kManySlots) return {m.tiles + first * kTileBytes, int(kTileBytes), slot * kStageBytes};
  return {m.scales + first * kTileScaleBytes, int(kTileScaleBytes),
          slot * kStageBytes + int(kTileBytes)};
}

// A producer's warp copies 16 bytes a lane, of four tokens at once, sixteen apart from the next
// four. A lane keeps the row of one of the 32 tokens, or -1: registers are few.
constexpr int kCopyTokens = 4;
constexpr int kCopyStride = kProducerThreads / 32 * kCopyTokens;

__device__ __forceinline__ int32_t find_gathered(const Sm90Problem& p, const RowRange& range,
                                                 int warp, int lane) {
  const TokenRows tokens = {
      {nullptr, nullptr, p.a.x_rows, 0}, p.a.x_index, range.first, range.count};
  const int token = lane / kCopyTokens * kCopyStride + warp * kCopyTokens + lane % kCopyTokens;
  return token < range.count ? int32_t(prepared_row(tokens, token)) : -1;
}

// As TMA would lay them out; zeros for a token that is not there.
template <int kLimbs>
__device__ __forceinline__ void copy_gathered(const Sm90Problem& p, int32_t row_of_lane, int warp,
                                              int lane, int halves, int tiles, int c,
                                              SharedPtr<uint8_t> to) {
  const int piece = lane % 8, token = warp * kCopyTokens + lane / 8;
  const auto place = to + token * kRowBytes + (piece ^ token % kStepTokens) * 16;
  static_assert(kCopyStride % kStepTokens == 0);
#pragma unroll 4
  for (int i = 0; i < halves * kHalfTokens / kCopyStride; ++i) {
    const int32_t row = __shfl_sync(kAllLanes, row_of_lane, i * kCopyTokens + lane / 8);
#pragma unroll
    for (int limb = 0; limb < kLimbs; ++limb) {
      const int64_t from = (max(int64_t(row), int64_t(0)) * kLimbs + limb) * tiles + c;
      ptx::cp_async_16(place + limb * kLimbBytes + i * kCopyStride * kRowBytes,
                       p.tokens + from * kRowBytes + piece * 16, row >= 0);
    }
  }
}

// Copies by cp.async are told to the consumers when they are in, two stages later.
template <typename R>
__device__ __forceinline__ void publish(R& behind) {
  ptx::fence_proxy_async();
  ptx::mbarrier_arrive(behind.full());
  behind.advance();
}

// Says what is going to come, and starts the copies of the tokens that lie one behind the other.
// Rows behind the range belong to others or are zero: their sums are not stored.
template <int kLimbs, typename R>
__device__ __forceinline__ void fill_stage(const Sm90Problem& p, const Tile& tile, const R& ring,
                                           int c, int tiles) {
  const int halves = p.a.x_index ? 0 : tile.halves();
  ptx::mbarrier_arrive_expect(ring.full(), kSlotsBytes + halves * kLimbs * kHalfBytes);
  for (int half = 0; half < halves; ++half)
    for (int limb = 0; limb < kLimbs; ++limb)
      ptx::tma_load_2d(ring.tokens(limb) + half * kHalfBytes, &p.map,
                       (limb * tiles + c) * int(kTileColumns),
                       tile.range.first + half * kHalfTokens, ring.full());
}

constexpr int kBehind = 2;

template <int kLimbs, int kMatrices, typename Bytes>
__device__ __forceinline__ void produce(const Sm90Problem& p, Bytes shared) {
  const int thread = int(threadIdx.x) - kConsumerThreads, lane = thread % 32;
  const int tiles = int(column_tiles(p.a.in));
  const bool gathered = p.a.x_index != nullptr;
  if (!gathered && thread >= 32) return;
  Ring<kLimbs, Bytes> ring{shared}, behind{shared};
  int ahead = 0;  // stages filled and not published
  Tile tile;
  for (int64_t i = blockIdx.x; find_tile(p, i, tile); i += gridDim.x) {
    const int32_t row = gathered ? find_gathered(p, tile.range, thread / 32, lane) : -1;
    const WeightCopy weights = find_weights<kMatrices>(p, tile, lane);
    for (int done = 0, c = 0; done < tiles; ++done, c = next_column_tile(c, tiles)) {
      ptx::mbarrier_wait(ring.empty(), ring.parity ^ 1);
      if (thread == 0) fill_stage<kLimbs>(p, tile, ring, c, tiles);
      __syncwarp();
      if (thread < 2 * kManySlots)
        ptx::bulk_copy(ring.weights(0) + weights.to, weights.from + int64_t(c) * weights.bytes,
                       weights.bytes, ring.full());
      if (gathered) {
        copy_gathered<kLimbs>(p, row, thread / 32, lane, tile.halves(), tiles, c, ring.tokens(0));
        ptx::cp_async_commit();
        if (ahead == kBehind) {
          ptx::cp_async_wait<kBehind>();
          publish(behind);
        } else {
          ++ahead;
        }
      }
      ring.advance();
    }
  }
  ptx::cp_async_wait<0>();
  for (; ahead > 0; --ahead) publish(behind);
}

// ---- the consumers ------------------------------------------------------------------------------

using HalfSums = float[kHalfTokens / 2];  // rows g, g + 8 of the warp's sixteen, as wgmma has them

// A warp's 16 rows of one group: both steps of 16 columns, and 2^9 times the scales of rows g and
// g + 8.
struct WeightGroup {
  uint32_t a[2][4];
  float scales[2];
};

// q / 4 from nibbles: as the last bits of 128 they are 128 + q + 8. A step's columns 4t, 4t + 2 and
// 4t + 1, 4t + 3 stand at k = 2t, 2t + 1 and 2t + 8, 2t + 9, as in the prepared tokens.
__device__ __forceinline__ void decode_step(uint32_t word, uint32_t (&a)[4]) {
  constexpr uint32_t kNibbles = 0x000f000fu, k128 = 0x43004300u;
  constexpr uint32_t kQuarter = 0x3e803e80u, kMinus34 = 0xc208c208u;
  constexpr int kAndOr = 0xea;  // (a & b) | c
#pragma unroll
  for (int i = 0; i < 4; ++i)
    a[i] = ptx::fma_bf16x2(ptx::lop3<kAndOr>(word >> 4 * i, kNibbles, k128), kQuarter, kMinus34);
}

__device__ __forceinline__ void decode_weights(uint32_t near, uint32_t far, uint32_t scale_word,
                                               WeightGroup& w) {
  decode_step(near, w.a[0]);
  decode_step(far, w.a[1]);
  unpack(scale_word, w.scales[0], w.scales[1]);
#pragma unroll
  for (int half = 0; half < 2; ++half) w.scales[half] = __fmul_rn(w.scales[half], 512.0f);
}

// Of a stage: this lane's words of the second group, which is decoded when it is wanted.
struct SecondGroup {
  uint32_t near, far, scales;
};

// Waits for the ring's stage; its first group into `w`.
template <typename R>
__device__ __forceinline__ SecondGroup open_stage(const R& ring, WeightGroup& w) {
  const int lane = int(threadIdx.x) % 32;
  ptx::mbarrier_wait(ring.full(), ring.parity);
  const auto slot = ring.weights(int(threadIdx.x) / 32);
  const uint4 words = shared_cast<uint4>(slot)[lane];
  const uint2 scales = shared_cast<uint2>(slot + int(kTileBytes))[lane / 4];
  decode_weights(words.x, words.y, scales.x, w);
  return {words.z, words.w, scales.y};
}

// This warp reads the stage no more.
template <typename R>
__device__ __forceinline__ void close_stage(const R& ring) {
  __syncwarp();
  if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(ring.empty());
}

template <typename R>
__device__ __forceinline__ uint64_t token_matrix(const R& ring) {
  return ptx::matrix_descriptor(ring.tokens(0), Swizzle::k128, 16, kStepTokens * kRowBytes);
}

// d = the products of one group and one half of the tokens. A descriptor counts in 16 bytes.
template <int kLimbs>
__device__ __forceinline__ void start_products(const WeightGroup& w, uint64_t tokens, int group,
                                               int half, HalfSums& d) {
  ptx::wgmma_settle(w.a[0]);
  ptx::wgmma_settle(w.a[1]);
  ptx::wgmma_fence();
#pragma unroll
  for (int limb = 0; limb < kLimbs; ++limb)
#pragma unroll
    for (int step = 0; step < 2; ++step) {
      const int at = limb * kLimbBytes + half * kHalfBytes + (2 * group + step) * 32;
      ptx::wgmma_m64k16_bf16<kHalfTokens>(d, w.a[step], tokens + uint64_t(at / 16),
                                          limb + step > 0);
    }
  ptx::wgmma_commit();
}

// Waits until at most kInFlight later products are under way.
template <int kInFlight>
__device__ __forceinline__ void add_products(const float (&scales)[2], HalfSums& d, HalfSums& acc) {
  ptx::wgmma_wait<kInFlight>();
  ptx::wgmma_settle(d);
#pragma unroll
  for (int i = 0; i < kHalfTokens / 2; ++i) acc[i] = __fmaf_rn(d[i], scales[i / 2 % 2], acc[i]);
}

// The sums of a run to the totals of this thread.
template <int kHalves>
__device__ __forceinline__ void close_run(HalfSums (&acc)[2], SharedPtr<float4> totals,
                                          bool first) {
#pragma unroll
  for (int half = 0; half < kHalves; ++half)
#pragma unroll
    for (int i = 0; i < kHalfTokens / 2; i += 4) {
      const auto place = totals + (half * kHalfTokens / 2 + i) / 4 * kConsumerThreads;
      float4 v = make_float4(acc[half][i], acc[half][i + 1], acc[half][i + 2], acc[half][i + 3]);
      if (!first) {
        const float4 t = *place;
        v = make_float4(__fadd_rn(t.x, v.x), __fadd_rn(t.y, v.y), __fadd_rn(t.z, v.z),
                        __fadd_rn(t.w, v.w));
      }
      *place = v;
      acc[half][i] = acc[half][i + 1] = acc[half][i + 2] = acc[half][i + 3] = 0.0f;
    }
}

// The products of one column tile. Two are under way at a time, one being made while the other
// one's sums are added: of both halves, or of both groups where there is one half. At the end there
// are none, and the other warpgroup has the tensor cores.
template <int kLimbs, int kHalves, typename R>
__device__ __forceinline__ void multiply_tile(R& ring, HalfSums (&acc)[2]) {
  WeightGroup first, second;
  HalfSums d[2];
  const SecondGroup words = open_stage(ring, first);
  const uint64_t tokens = token_matrix(ring);
  start_products<kLimbs>(first, tokens, 0, 0, d[0]);
  if constexpr (kHalves == 2) start_products<kLimbs>(first, tokens, 0, 1, d[1]);
  decode_weights(words.near, words.far, words.scales, second);
  if constexpr (kHalves == 2) {
    add_products<1>(first.scales, d[0], acc[0]);
    start_products<kLimbs>(second, tokens, 1, 0, d[0]);
    add_products<1>(first.scales, d[1], acc[1]);
    start_products<kLimbs>(second, tokens, 1, 1, d[1]);
    add_products<1>(second.scales, d[0], acc[0]);
    add_products<0>(second.scales, d[1], acc[1]);
  } else {
    start_products<kLimbs>(second, tokens, 1, 0, d[1]);
    add_products<1>(first.scales, d[0], acc[0]);
    add_products<0>(second.scales, d[1], acc[0]);
  }
  close_stage(ring);
  ring.advance();
}

// All column tiles; the sums are in `totals`.
template <int kLimbs, int kHalves, typename R>
__device__ __forceinline__ void multiply_tiles(R& ring, int tiles, SharedPtr<float4> totals) {
  HalfSums acc[2] = {};
  for (int done = 0, c = 0; done < tiles; ++done, c = next_column_tile(c, tiles)) {
    multiply_tile<kLimbs, kHalves>(ring, acc);
    if (c + kRowWarps >= tiles) close_run<kHalves>(acc, totals, c % kRowWarps == 0);
  }
}

// Four sums of a lane: rows g and g + 8 of tokens 2t and 2t + 1 of eight.
template <typename T>
__device__ __forceinline__ void store_sums(const Sm90Problem& p, const RowRange& range, int token,
                                           int64_t row, const float4& v) {
  const float sums[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int64_t at = row + i / 2 * 8;
    if (token + i % 2 < range.count && at < p.a.out)
      static_cast<T*>(p.a.y)[(range.first + token + i % 2) * p.a.out + at] = from_float<T>(sums[i]);
  }
}

// y of the tile. Of two matrices, each warpgroup has the sums of one: they meet in shared memory,
// and each warpgroup stores half of the tokens.
template <typename T, int kMatrices>
__device__ __forceinline__ void store_tile(const Sm90Problem& p, const Tile& tile,
                                           SharedPtr<float4> all) {
  const int each = tile.halves() * kHalfTokens / 8 / kMatrices;  // places of eight tokens
  const int thread = int(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int64_t row = sm90_row_tile<kMatrices>(tile.block, warp) * kTileRows + lane / 4;
  if constexpr (kMatrices == 2) ptx::barrier_sync(1, kConsumerThreads);
#pragma unroll 4
  for (int i = 0; i < each; ++i) {
    const int place = kMatrices == 1 ? i : thread / 128 * each + i;
    float4 v = all[place * kConsumerThreads + (kMatrices == 1 ? thread : thread % 128)];
    if constexpr (kMatrices == 2) {
      const float4 up = all[place * kConsumerThreads + 128 + thread % 128];
      v = make_float4(swiglu_of(v.x, up.x), swiglu_of(v.y, up.y), swiglu_of(v.z, up.z),
                      swiglu_of(v.w, up.w));
    }
    store_sums<T>(p, tile.range, place * 8 + lane % 4 * 2, row, v);
  }
  if constexpr (kMatrices == 2) ptx::barrier_sync(1, kConsumerThreads);
}

template <typename T, int kLimbs, int kMatrices, typename Bytes>
__device__ __forceinline__ void consume(const Sm90Problem& p, Bytes shared) {
  const int tiles = int(column_tiles(p.a.in));
  const auto totals = shared_at<float4>(shared, Sm90Layout<kLimbs>::kTotals);
  Ring<kLimbs, Bytes> ring{shared};
  Tile tile;
  for (int64_t i = blockIdx.x; find_tile(p, i, tile); i += gridDim.x) {
    const auto mine = totals + int(threadIdx.x);
    if (tile.halves() == 2)
      multiply_tiles<kLimbs, 2>(ring, tiles, mine);
    else
      multiply_tiles<kLimbs, 1>(ring, tiles, mine);
    store_tile<T, kMatrices>(p, tile, totals);
  }
}

// 168 registers a thread at the launch, all that there are; most go to the consumers.
template <typename T, int kLimbs, int kMatrices>
__global__ void __launch_bounds__(kSm90Threads, 1)
    int4_sm90_kernel(const __grid_constant__ Sm90Problem p) {
  KN_SHARED(shared);
  if (threadIdx.x == 0) {
    for (int s = 0; s < kSm90Stages; ++s) {
      const auto full = shared_at<uint64_t>(shared, Sm90Layout<kLimbs>::kFull + s * 8);
      ptx::mbarrier_init(full, 1 + (p.a.x_index ? kProducerThreads : 0));
      ptx::mbarrier_init(full + kSm90Stages, kConsumerThreads / 32);
    }
    ptx::mbarrier_init_fence();
  }
  __syncthreads();
  if (threadIdx.x >= kConsumerThreads) {
    ptx::give_registers<56>();
    produce<kLimbs, kMatrices>(p, shared);
  } else {
    ptx::take_registers<224>();
    consume<T, kLimbs, kMatrices>(p, shared);
  }
}

}  // namespace kn::cuda
