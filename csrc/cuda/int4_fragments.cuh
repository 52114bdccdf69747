// INT4 tiles (layout.h) as operands of int8 products, and the arithmetic of one group that both
// kernels of the INT4 ops share, to the last bit.
//
// A nibble q + 8 moved to the upper half of its byte, with the upper bit flipped, is 16 q as a
// signed byte: two instructions for four weights, and no zero point is left to take away. A product
// m16n8k32 has the weights of 16 rows and one group on the m16 side, and on the n8 side two
// columns, high and low limb, of four tokens, a quad. Both limbs of a token meet in one lane:
//
//   256 high + low = 16 sum(q * v)                        < 2^27 and a multiple of 16: exact
//   acc = fma(unit * (256 high + low), 2^14 scale, acc)   unit = step / 2^18, a power of two
//
// The first factor is exact whatever way it is formed, and the sum is rounded once. The split of
// the 2^14 keeps products of unit finite for every step; a scale must be below 2^114.
#pragma once
#include "cuda/limbs.cuh"

namespace kn::cuda {

constexpr int kQuad = 4;  // tokens of one product
constexpr int kStageBytes = int(kTileBytes + kTileScaleBytes);
constexpr float kUnitOfStep = 1.0f / 262144.0f;
constexpr float kScaleFactor = 16384.0f;

struct Matrix {
  const uint8_t* tiles;
  const uint8_t* scales;
};

// A warp starts the copy of a tile, its scales behind it; zeros if not `ok`.
__device__ __forceinline__ void load_tile(const Matrix& m, SharedPtr<uint8_t> stage, int64_t tile,
                                          bool ok = true) {
  const int lane = int(threadIdx.x) % 32;
  const int64_t from = ok ? tile : 0;
  ptx::cp_async_16(stage + lane * 16, m.tiles + from * kTileBytes + lane * 16, ok);
  if (lane < int(kTileScaleBytes) / 16)
    ptx::cp_async_16(stage + int(kTileBytes) + lane * 16,
                     m.scales + from * kTileScaleBytes + lane * 16, ok);
}

// A lane's operand of 16 rows and one group, from its two words of the tile.
__device__ __forceinline__ void decode_group(uint32_t near, uint32_t far, uint32_t (&a)[4]) {
  constexpr uint32_t kUpper = 0xf0f0f0f0u, kFlip = 0x80808080u;
  a[0] = (near << 4 & kUpper) ^ kFlip;
  a[1] = (near & kUpper) ^ kFlip;
  a[2] = (far << 4 & kUpper) ^ kFlip;
  a[3] = (far & kUpper) ^ kFlip;
}

// 2^14 times the scales of rows g and g + 8.
__device__ __forceinline__ void decode_scales(uint32_t word, float (&scales)[2]) {
  unpack(word, scales[0], scales[1]);
  scales[0] = __fmul_rn(scales[0], kScaleFactor);
  scales[1] = __fmul_rn(scales[1], kScaleFactor);
}

}  // namespace kn::cuda
