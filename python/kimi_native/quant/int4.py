"""The INT4 format of the published checkpoints: pack, unpack, quantize, dequantize.

Symmetric integers in [-8, 7], one BF16 scale per 32 weights of a row, eight to a 32-bit word: element k of a word sits
in bits 4k .. 4k + 3 as q + 8. As bytes of a little-endian machine: two weights each, the even column in the low nibble.
Source: compressed-tensors, format "pack-quantized".
"""

from __future__ import annotations

import torch
from torch import Tensor

from kimi_native.checks import check_contiguous, check_dtype, require
from kimi_native.quant.groups import (
    FLOAT_DTYPES,
    check_group_matrix,
    quantize_groups,
    row_chunks,
)
from kimi_native.weights import GROUP_SIZE, Int4Weight

_INTEGER_DTYPES = (torch.int8, torch.int16, torch.int32, torch.int64)

# levels -> (divisor of amax, smallest q). 15: -7 .. 7, as the published INT4 weights appear to use; 16: the rule of
# compressed-tensors, where amax / 7.5 puts half a step beyond 7 and the positive extreme is clamped.
LEVELS = {15: (7.0, -7), 16: (7.5, -8)}


def pack(q: Tensor) -> Tensor:
    """Integers to the checkpoint's words.

    q        [out, in]      int8, int16, int32 or int64, values in [-8, 7], in a multiple of 8
    returns  [out, in / 8]  int32

    Raises ValueError on a shape or a value out of range, TypeError on a dtype.
    """
    check_dtype("pack", "q", q, *_INTEGER_DTYPES)
    require(
        q.dim() == 2 and q.shape[1] % 8 == 0,
        f"pack: q must be [out, in] with in a multiple of 8 (got {list(q.shape)})",
    )
    if q.numel() > 0:
        low, high = (int(x) for x in q.aminmax())
        require(low >= -8 and high <= 7, f"pack: q must lie in [-8, 7] (got {low} .. {high})")
    out_features, in_features = q.shape
    packed = torch.empty(out_features, in_features // 8, dtype=torch.int32, device=q.device)
    for rows in row_chunks(out_features, in_features):
        _pack_rows(q[rows], packed[rows])
    return packed


def _pack_rows(q: Tensor, packed: Tensor) -> None:
    if q.numel() == 0:  # has no strides to view it with
        return
    # Two nibbles, each in a byte, as one 16-bit number 0x0o0e; o in bits 8 .. 11 goes to bits 4 .. 7 beside e.
    pairs = (q + 8).to(torch.int8).contiguous().view(torch.int16)
    packed.view(torch.uint8).copy_((pairs >> 4) | (pairs & 0x0F))


def unpack(packed: Tensor) -> Tensor:
    """The checkpoint's words to integers: [out, in / 8] int32 contiguous -> [out, in] int8 in [-8, 7].

    Raises ValueError on a shape or layout, TypeError on a dtype.
    """
    check_dtype("unpack", "packed", packed, torch.int32)
    require(packed.dim() == 2, f"unpack: packed must be [out, in / 8] (got {list(packed.shape)})")
    check_contiguous("unpack", "packed", packed)
    out_features, words = packed.shape
    q = torch.empty(out_features, words * 8, dtype=torch.int8, device=packed.device)
    for rows in row_chunks(out_features, words * 8):
        octets = packed[rows].view(torch.uint8)
        q[rows, 0::2] = (octets & 0x0F).to(torch.int8) - 8
        q[rows, 1::2] = (octets >> 4).to(torch.int8) - 8
    return q


def dequantize(weight: Int4Weight, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """q * scale as [out, in] in `dtype` (a floating-point type), rounded at most once.

    q has up to 4 significant bits and a BF16 scale 8, so the float32 product is exact (below 2^-126 in magnitude it is
    so as long as float32 subnormals are on, torch's default). TypeError on a dtype that is not floating-point.
    """
    if dtype not in FLOAT_DTYPES:
        raise TypeError(f"dequantize: dtype must be floating-point (got {dtype})")
    shape = (weight.out_features, weight.in_features)
    values = torch.empty(shape, dtype=dtype, device=weight.weight_packed.device)
    for rows in row_chunks(*shape):
        q = unpack(weight.weight_packed[rows]).to(torch.float32).unflatten(1, (-1, GROUP_SIZE))
        values[rows] = (q * weight.weight_scale[rows].to(torch.float32).unsqueeze(2)).flatten(1)
    return values


def quantize(w: Tensor, *, levels: int = 15) -> Int4Weight:
    """Round-to-nearest INT4, symmetric, one BF16 scale per 32 weights of a row.

    w       [out, in]  bf16, fp16, fp32 or fp64 (rounded to fp32 first), finite, in a multiple of 32
    levels  15: scale = bf16(amax / 7), q in -7 .. 7.  16: scale = bf16(amax / 7.5), q in -8 .. 7
    scale is never below 2^-126, so a group of zeros has a finite scale and q = 0. Halves round to even.

    Error, with s the stored scale (q is computed against s, not against the unrounded quotient):
    BF16 rounds within 2^-8 of s, hence |w| / s <= divisor * (1 + 2^-8).
    - levels=15: |w| / s <= 7 + 0.0274, which rounds into -7 .. 7 without clamping: |w - q s| <= s / 2.
    - levels=16: |w| / s <= 7.5 + 0.0293; where that rounds to 8, a positive weight is clamped to 7 (a negative one is
      -8): |w - q s| <= s (1/2 + 7.5 * 2^-8).
    The float32 quotient adds at most 8 * 2^-24 s to either; a BF16 result of dequantize() adds 2^-8 |q s|.

    Raises ValueError on a shape, on NaN or infinity or on another `levels`, TypeError on a dtype.
    """
    check_group_matrix("quantize", w)
    if levels not in LEVELS:
        raise ValueError(f"quantize: levels must be 15 or 16 (got {levels})")
    divisor, q_min = LEVELS[levels]
    out_features, in_features = w.shape
    packed = torch.empty(out_features, in_features // 8, dtype=torch.int32, device=w.device)
    scale = torch.empty(
        out_features, in_features // GROUP_SIZE, dtype=torch.bfloat16, device=w.device
    )
    for rows, q, chunk_scale in quantize_groups("quantize", w, divisor, q_min, 7):
        _pack_rows(q, packed[rows])
        scale[rows] = chunk_scale
    return Int4Weight(packed, scale)
