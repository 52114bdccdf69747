"""Grouped INT4 products in plain Triton, as engines fall back to: a program per block of rows of one expert and block
of output columns, weights decoded to bf16 before the dot product. The floor that every user has.

Imports Triton, which only a machine with a GPU (or TRITON_INTERPRET=1) runs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

GROUP_SIZE = 32


@triton.jit
def grouped_int4_kernel(
    x,
    x_index,
    packed,
    scale,
    y,
    block_expert,
    block_first,
    block_end,
    out_features,
    in_features,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    expert = tl.load(block_expert + tl.program_id(0)).to(tl.int64)
    if expert < 0:
        return
    rows = tl.load(block_first + tl.program_id(0)) + tl.arange(0, BLOCK_M)
    live = rows < tl.load(block_end + tl.program_id(0))
    tokens = tl.load(x_index + rows, mask=live, other=0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = columns < out_features
    first = expert * out_features + columns
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, in_features, BLOCK_K):
        ks = k + tl.arange(0, BLOCK_K)
        there = ks < in_features
        a = tl.load(
            x + tokens[:, None] * in_features + ks[None, :],
            mask=live[:, None] & there[None, :],
            other=0.0,
        )
        mask = there[:, None] & inside[None, :]
        at = packed + first[None, :] * (in_features // 2) + (ks // 2)[:, None]
        nibbles = (tl.load(at, mask=mask, other=0) >> ((ks % 2) * 4)[:, None]) & 15
        steps = scale + first[None, :] * (in_features // 32) + (ks // 32)[:, None]
        steps = tl.load(steps, mask=mask, other=0.0)
        b = ((nibbles.to(tl.float32) - 8.0) * steps.to(tl.float32)).to(tl.bfloat16)
        total = tl.dot(a, b, total)
    tl.store(
        y + rows[:, None].to(tl.int64) * out_features + columns[None, :],
        total.to(y.dtype.element_ty),
        mask=live[:, None] & inside[None, :],
    )


def plan(offsets: Tensor, rows: int, block_m: int) -> tuple[Tensor, Tensor, Tensor]:
    """Expert (-1: none), first row and end of each block of rows; as many blocks as there can be."""
    experts = offsets.shape[0] - 1
    most = min(experts, rows) + rows // block_m
    blocks = (offsets.diff() + block_m - 1) // block_m
    ends = blocks.cumsum(0)
    number = torch.arange(most, device=offsets.device)
    expert = torch.searchsorted(ends, number, right=True)
    known = expert.clamp(max=experts - 1)
    first = offsets[known] + (number - (ends - blocks)[known]) * block_m
    expert = torch.where(expert < experts, expert, -1)
    return expert.int(), first.int(), offsets[known + 1].int()


def grouped_int4(
    x: Tensor,
    x_index: Tensor,
    weights: tuple[Tensor, Tensor],
    planned: tuple[Tensor, Tensor, Tensor],
    blocks: tuple[int, int, int],
    *,
    out_dtype: torch.dtype,
    num_warps: int = 4,
    num_stages: int = 3,
) -> Tensor:
    """Row r is x[x_index[r]] times the matrix of its expert.

    weights  packed [experts, out, in / 8] int32 and scale [experts, out, in / 32] bf16
    planned  plan(offsets, rows, blocks[0])
    blocks   rows, columns and depth of a program's product
    """
    packed, scale = weights
    out_features, in_features = scale.shape[1], scale.shape[2] * GROUP_SIZE
    y = torch.empty(x_index.shape[0], out_features, dtype=out_dtype, device=x.device)
    grid = (planned[0].shape[0], triton.cdiv(out_features, blocks[1]))
    grouped_int4_kernel[grid](
        x,
        x_index,
        packed.view(torch.uint8),
        scale,
        y,
        *planned,
        out_features,
        in_features,
        BLOCK_M=blocks[0],
        BLOCK_N=blocks[1],
        BLOCK_K=blocks[2],
        num_warps=num_warps,
        num_stages=num_stages,
    )
    return y
