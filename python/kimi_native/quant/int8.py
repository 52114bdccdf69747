"""INT8 weights with one BF16 scale per 32 weights of a row: an option for the dense matrices, made at load."""

from __future__ import annotations

import torch
from torch import Tensor

from kimi_native.checks import require
from kimi_native.quant.groups import (
    FLOAT_DTYPES,
    check_group_matrix,
    quantize_groups,
    row_chunks,
)
from kimi_native.single_threads import single_threads
from kimi_native.weights import GROUP_SIZE, Int8Weight


def quantize_int8(w: Tensor, *, out: Int8Weight | None = None) -> Int8Weight:
    """Round-to-nearest INT8, symmetric: scale = bf16(amax / 127), q in -127 .. 127, halves to even.

    w    [out, in]  bf16, fp16, fp32 or fp64 (rounded to fp32 first), finite, in a multiple of 32
    out  an Int8Weight of that shape, written and returned; default: a new one

    Error, with s the stored scale: |w| / s <= 127 (1 + 2^-8) = 127.4961 rounds to at most 127, so nothing is clamped
    and |w - q s| <= s / 2, plus 128 * 2^-24 s from the float32 quotient. A zero group has scale 2^-126 and q = 0.

    Raises ValueError on a shape or on NaN or infinity, TypeError on a dtype.
    """
    check_group_matrix("quantize_int8", w)
    if out is None:
        groups = w.shape[1] // GROUP_SIZE
        out = Int8Weight(
            torch.empty(w.shape, dtype=torch.int8, device=w.device),
            torch.empty(w.shape[0], groups, dtype=torch.bfloat16, device=w.device),
        )
    require(
        out.weight.shape == w.shape,
        f"quantize_int8: out must be {list(w.shape)} (got {list(out.weight.shape)})",
    )

    def quantize_rows(block: slice) -> None:
        weight, scales = out.weight[block], out.weight_scale[block]
        for rows, q, scale in quantize_groups("quantize_int8", w[block], 127.0, -127, 127):
            weight[rows] = q
            scales[rows] = scale

    pool = single_threads(torch.get_num_threads())
    for _ in pool.map(quantize_rows, row_chunks(*w.shape)):
        pass
    return out


def dequantize_int8(weight: Int8Weight, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """q * scale as [out, in] in `dtype` (floating-point): exact in float32 (7 + 8 significant bits), then rounded."""
    if dtype not in FLOAT_DTYPES:
        raise TypeError(f"dequantize_int8: dtype must be floating-point (got {dtype})")
    shape = (weight.out_features, weight.in_features)
    values = torch.empty(shape, dtype=dtype, device=weight.weight.device)
    for rows in row_chunks(*shape):
        q = weight.weight[rows].to(torch.float32).unflatten(1, (-1, GROUP_SIZE))
        values[rows] = (q * weight.weight_scale[rows].to(torch.float32).unsqueeze(2)).flatten(1)
    return values
