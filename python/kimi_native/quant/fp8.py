"""The FP8 format of the published checkpoints: e4m3 weights, one float32 multiplier per block of 128 x 128.

The stored name is weight_scale_inv, but it is the multiplier:
w[i, j] = float(w8[i, j]) * scale_inv[i // 128, j // 128]. Blocks at the right and lower edges are truncated. Source: DeepSeek-V3, README_WEIGHTS.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kimi_native.checks import check_dtype, require
from kimi_native.quant.groups import check_float_matrix, finite_float32, row_chunks

BLOCK_SIZE = 128
FP8_MAX = torch.finfo(torch.float8_e4m3fn).max  # 448
# A floor for the multiplier: a block of zeros stays finite, and no multiplier is subnormal.
_SMALLEST_SCALE = torch.finfo(torch.float32).tiny


def _blocks(size: int) -> int:
    return -(-size // BLOCK_SIZE)


def _per_element(scale_inv: Tensor, rows: int, columns: int) -> Tensor:
    """[row blocks, column blocks] -> [rows, columns], the blocks at the edges truncated."""
    wide = scale_inv.repeat_interleave(BLOCK_SIZE, dim=1)[:, :columns]
    return wide.repeat_interleave(BLOCK_SIZE, dim=0)[:rows]


def _block_amax(values: Tensor) -> Tensor:
    rows, columns = values.shape
    padded = values.new_zeros(_blocks(rows) * BLOCK_SIZE, _blocks(columns) * BLOCK_SIZE)
    padded[:rows, :columns] = values.abs()
    return padded.unflatten(1, (-1, BLOCK_SIZE)).unflatten(0, (-1, BLOCK_SIZE)).amax(dim=(1, 3))


def quantize_block(w: Tensor) -> tuple[Tensor, Tensor]:
    """Round-to-nearest e4m3 with scale_inv = amax / 448 of each block.

    w        [out, in]  bf16, fp16, fp32 or fp64 (rounded to fp32 first), finite
    returns  weight [out, in] float8_e4m3fn, weight_scale_inv [ceil(out / 128), ceil(in / 128)] float32

    Error: e4m3 has 4 significant bits and smallest step 2^-9, so |w - w8 s| <= s max(2^-4 |w8|, 2^-10), plus float32
    rounding of the quotient (2^-24 relative). A block of zeros gets a finite multiplier and zero weights.

    Raises ValueError on a shape or on NaN or infinity, TypeError on a dtype.
    """
    check_float_matrix("quantize_block", w)
    out_features, in_features = w.shape
    weight = torch.empty(out_features, in_features, dtype=torch.float8_e4m3fn, device=w.device)
    scale_inv = torch.empty(
        _blocks(out_features), _blocks(in_features), dtype=torch.float32, device=w.device
    )
    for rows in row_chunks(out_features, in_features, multiple=BLOCK_SIZE):
        values = finite_float32("quantize_block", w[rows])
        scale = (_block_amax(values) / FP8_MAX).clamp_min(_SMALLEST_SCALE)
        quotient = values / _per_element(scale, *values.shape)
        weight[rows] = quotient.clamp_(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
        scale_inv[rows.start // BLOCK_SIZE : _blocks(rows.stop)] = scale
    return weight, scale_inv


def dequantize_block(weight: Tensor, scale_inv: Tensor) -> Tensor:
    """w8 * scale_inv in float32, rounded to BF16.

    weight     [out, in]                            float8_e4m3fn
    scale_inv  [ceil(out / 128), ceil(in / 128)]    float32
    returns    [out, in]                            bf16

    Raises ValueError on a shape, TypeError on a dtype.
    """
    check_dtype("dequantize_block", "weight", weight, torch.float8_e4m3fn)
    check_dtype("dequantize_block", "scale_inv", scale_inv, torch.float32)
    require(
        weight.dim() == 2,
        f"dequantize_block: weight must be [out, in] (got {list(weight.shape)})",
    )
    out_features, in_features = weight.shape
    expected = [_blocks(out_features), _blocks(in_features)]
    require(
        list(scale_inv.shape) == expected,
        f"dequantize_block: scale_inv must be {expected} (got {list(scale_inv.shape)})",
    )
    values = torch.empty(out_features, in_features, dtype=torch.bfloat16, device=weight.device)
    for rows in row_chunks(out_features, in_features, multiple=BLOCK_SIZE):
        scale = scale_inv[rows.start // BLOCK_SIZE : _blocks(rows.stop)]
        w8 = weight[rows].to(torch.float32)
        values[rows] = w8 * _per_element(scale, *w8.shape)
    return values
