"""MLA decode in plain Triton: 16 heads and a piece of a sequence a program, then the pieces combined. The floor that
every user has; bf16 rows.

Imports Triton, which only a machine with a GPU (or TRITON_INTERPRET=1) runs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

LATENT, ROPE = 512, 64
HEADS = 16  # of a program


@triton.jit
def mla_piece_kernel(
    q,
    cache,
    page_table,
    seq_lens,
    values,
    stats,
    heads,
    pieces,
    max_pages,
    scale,
    PAGE: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LATENT: tl.constexpr,
    ROPE: tl.constexpr,
):
    b, piece = tl.program_id(0), tl.program_id(2)
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    live = head < heads
    latent, rope = tl.arange(0, LATENT), LATENT + tl.arange(0, ROPE)
    q_row = q + (b * heads + head)[:, None] * (LATENT + ROPE)
    q_latent = tl.load(q_row + latent[None, :], mask=live[:, None], other=0.0)
    q_rope = tl.load(q_row + rope[None, :], mask=live[:, None], other=0.0)
    length = tl.load(seq_lens + b)
    share = tl.cdiv(tl.cdiv(length, pieces), BLOCK_N) * BLOCK_N
    begin = piece * share
    end = tl.minimum(begin + share, length)
    largest = tl.full((BLOCK_H,), -1e30, dtype=tl.float32)
    total = tl.zeros((BLOCK_H,), dtype=tl.float32)
    sums = tl.zeros((BLOCK_H, LATENT), dtype=tl.float32)
    for t in range(begin, end, BLOCK_N):
        token = t + tl.arange(0, BLOCK_N)
        there = token < end
        page = tl.load(page_table + b * max_pages + token // PAGE, mask=there, other=0)
        row = cache + (page.to(tl.int64) * PAGE + token % PAGE)[:, None] * (LATENT + ROPE)
        k_latent = tl.load(row + latent[None, :], mask=there[:, None], other=0.0)
        k_rope = tl.load(row + rope[None, :], mask=there[:, None], other=0.0)
        scores = tl.dot(q_latent, tl.trans(k_latent))
        scores = tl.dot(q_rope, tl.trans(k_rope), scores) * scale
        scores = tl.where(there[None, :], scores, -1e30)
        above = tl.maximum(largest, tl.max(scores, axis=1))
        weight = tl.exp(scores - above[:, None])
        shrink = tl.exp(largest - above)
        total = total * shrink + tl.sum(weight, axis=1)
        sums = tl.dot(weight.to(tl.bfloat16), k_latent, sums * shrink[:, None])
        largest = above
    at = (b * heads + head) * pieces + piece
    tl.store(values + at[:, None] * LATENT + latent[None, :], sums, mask=live[:, None])
    tl.store(stats + 2 * at, largest, mask=live)
    tl.store(stats + 2 * at + 1, total, mask=live)


@triton.jit
def mla_combine_kernel(values, stats, out, pieces, LATENT: tl.constexpr):
    row = tl.program_id(0)
    latent = tl.arange(0, LATENT)
    largest = -1e30
    for piece in range(pieces):
        largest = tl.maximum(largest, tl.load(stats + 2 * (row * pieces + piece)))
    total = 0.0
    sums = tl.zeros((LATENT,), dtype=tl.float32)
    for piece in range(pieces):
        at = row * pieces + piece
        weight = tl.exp(tl.load(stats + 2 * at) - largest)
        total += weight * tl.load(stats + 2 * at + 1)
        sums += weight * tl.load(values + at * LATENT + latent)
    tl.store(out + row * LATENT + latent, (sums / total).to(tl.bfloat16))


def mla_decode(
    q: Tensor,
    cache: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    *,
    softmax_scale: float,
    pieces: int,
    num_warps: int = 4,
    num_stages: int = 2,
) -> Tensor:
    """As ops.mla_decode of a bf16 cache; every sequence is cut into `pieces`."""
    batch, heads, _ = q.shape
    values = torch.empty(batch * heads * pieces, LATENT, device=q.device)
    stats = torch.empty(batch * heads * pieces, 2, device=q.device)
    out = torch.empty(batch, heads, LATENT, dtype=torch.bfloat16, device=q.device)
    mla_piece_kernel[(batch, triton.cdiv(heads, HEADS), pieces)](
        q,
        cache,
        page_table,
        seq_lens,
        values,
        stats,
        heads,
        pieces,
        page_table.shape[1],
        softmax_scale,
        PAGE=cache.shape[1],
        BLOCK_H=HEADS,
        BLOCK_N=32,
        LATENT=LATENT,
        ROPE=ROPE,
        num_warps=num_warps,
        num_stages=num_stages,
    )
    mla_combine_kernel[(batch * heads,)](values, stats, out, pieces, LATENT=LATENT, num_warps=4)
    return out
