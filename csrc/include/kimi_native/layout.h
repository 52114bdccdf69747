// Byte layouts of quantized weights, as index arithmetic. Everything here is `static constexpr`, so
// that translation units compiled for different instruction sets never share a weak symbol.
//
// INT4, the layout of the published checkpoints (compressed-tensors "pack-quantized"), read in
// place:
//
//   weight_packed  [out, in / 2] bytes  byte b of a row holds column 2b in its low nibble, 2b + 1
//   in its high one;
//                                       a nibble u stands for q = u - 8, q in [-8, 7]
//   weight_scale   [out, in / 32] bf16  w[o, i] = q[o, i] * weight_scale[o, i / 32]
//
// INT8 (ours, made while loading): the same with one signed byte per weight.
#pragma once
#include <cstdint>

namespace kn {

static constexpr int64_t kGroupSize = 32;  // weights that share one scale, along `in`
static constexpr int kInt4ZeroPoint = 8;   // nibble = q + 8

static constexpr int64_t int4_row_bytes(int64_t in) { return in / 2; }
static constexpr int64_t num_groups(int64_t in) { return in / kGroupSize; }

}  // namespace kn
