"""torch's own products, which every user has: cuBLAS in bf16, the grouped product, the INT4 product, and attention in
two batched products over a contiguous cache."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from problems import (
    LATENT,
    SCALE,
    Bf16Gemm,
    Int4Gemm,
    MlaDecode,
    MoeExperts,
    dequantized,
)
from timing import Solve
from torch import Tensor

from kimi_native.weights import GROUP_SIZE


class Missing(Exception):
    """A peer cannot take part here, or not in this problem."""


def bf16_matmul(problem: Bf16Gemm) -> Solve:
    return lambda call: F.linear(problem.x, problem.weights[call % problem.num_calls])


def dequantized_matmul(problem: Int4Gemm) -> Solve:
    """The same matrix in bf16: four times the bytes, none of the decoding."""
    weight = dequantized(problem.words, problem.scale)
    copies = [weight.clone() for _ in range(min(problem.num_calls, 8))]
    return lambda call: F.linear(problem.x, copies[call % len(copies)])


def int4pack_mm(problem: Int4Gemm) -> Solve:
    """torch._weight_int4pack_mm (tinygemm): value = (nibble - 8) * scale + zero, with zero = 0."""
    if problem.x.device.type != "cuda":
        raise Missing("torch._weight_int4pack_mm in this layout needs a GPU")
    if problem.tokens > 256:
        raise Missing("torch._weight_int4pack_mm is not meant for more than a few tokens")
    shifts = range(0, 32, 4)
    nibbles = torch.stack([problem.words >> s & 15 for s in shifts], dim=-1).flatten(1)
    pairs = (nibbles[:, ::2] << 4 | nibbles[:, 1::2]).to(torch.uint8)
    packed = torch._convert_weight_to_int4pack(pairs, 8)
    scale = torch.stack([problem.scale, torch.zeros_like(problem.scale)], dim=-1)
    scale = scale.transpose(0, 1).contiguous()  # [in / group, out, 2]
    copies = [(packed.clone(), scale.clone()) for _ in range(problem.num_calls)]

    def solve(call: int) -> Tensor:
        weight, scales = copies[call % len(copies)]
        return torch._weight_int4pack_mm(problem.x, weight, GROUP_SIZE, scales)

    return solve


def grouped_mm(problem: MoeExperts) -> Solve:
    """torch._grouped_mm in bf16, on rows that are gathered beforehand."""
    if not hasattr(torch, "_grouped_mm"):
        raise Missing("torch._grouped_mm is not in this torch")
    weights = problem.weights
    if not hasattr(weights, "bf16"):  # 34 GB for a layer of K2, made expert by expert, once
        weights.bf16 = [
            torch.stack([dequantized(w, s) for w, s in zip(*part, strict=True)])
            for part in (weights.gate_up, weights.down)
        ]
    gate_up, down = (w.transpose(1, 2) for w in weights.bf16)
    rows = [problem.x[d.token_index.long()] for d in problem.dispatches]
    ends = [d.expert_offsets[1:].contiguous() for d in problem.dispatches]

    def solve(call: int) -> Tensor:
        at = call % problem.num_calls
        gate, up = torch._grouped_mm(rows[at], gate_up, offs=ends[at]).chunk(2, dim=-1)
        return torch._grouped_mm(F.silu(gate) * up, down, offs=ends[at])

    return solve


def absorbed_attention(problem: MlaDecode) -> Solve:
    if problem.fp8:
        raise Missing("torch has no attention over FP8 rows")
    batch, length = problem.tokens, problem.length
    flat = problem.page_table.flatten().long()
    caches = [c[flat].view(batch, length, -1) for c in problem.caches]

    def solve(call: int) -> Tensor:
        rows = caches[call % len(caches)]
        scores = torch.bmm(problem.q, rows.transpose(1, 2)).float() * SCALE
        return torch.bmm(scores.softmax(-1).to(rows.dtype), rows[..., :LATENT])

    return solve
