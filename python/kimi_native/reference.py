"""Every op in plain torch, naive on purpose: the specification.

Same names and meanings as ops.py. Each function computes in the widest of its inputs' dtype and float32 (float64 in,
float64 throughout), loops where a loop is clearest, and is differentiable in its floating-point inputs. Organised
differently from the kernels: dequantize then multiply, one full softmax, token by token. Imports torch, and the layout
of FP8 cache rows.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from kimi_native import fp8_rows


def _wide(*tensors: Tensor | None) -> torch.dtype:
    """float64 if any input is, else float32."""
    return (
        torch.float64
        if any(t is not None and t.dtype == torch.float64 for t in tensors)
        else torch.float32
    )


# ---- experts --------------------------------------------------------------------------------------------------------


def _top(values: Tensor, k: int) -> list[int]:
    """Indices of the k largest entries of a vector, best first, ties to the lowest index, NaN last."""
    ranked = sorted(range(len(values)), key=lambda i: (math.isnan(v := float(values[i])), -v, i))
    return ranked[:k]


def moe_route(
    logits: Tensor,
    correction_bias: Tensor | None,
    *,
    topk: int,
    scoring: str = "sigmoid",
    n_group: int = 1,
    topk_group: int = 1,
    group_score: str = "top2_sum",
    norm_topk_prob: bool = True,
    routed_scaling_factor: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Expert choice of each token; see ops.moe_route. Token by token, sorting in Python."""
    tokens = logits.shape[0]
    wide = logits.to(_wide(logits))
    scores = torch.sigmoid(wide) if scoring == "sigmoid" else torch.softmax(wide, dim=-1)
    ids = torch.empty(tokens, topk, dtype=torch.int64)
    for t in range(tokens):
        choice = scores[t].detach().clone()
        if correction_bias is not None:
            choice += correction_bias.to(choice.dtype)
        if n_group > 1:
            groups = choice.view(n_group, -1)
            best = [
                float(groups[g][_top(groups[g], 1 if group_score == "max" else 2)].sum())
                for g in range(n_group)
            ]
            kept = _top(torch.tensor(best, dtype=choice.dtype), topk_group)
            for g in range(n_group):
                if g not in kept:
                    groups[g] = -math.inf
        ids[t] = torch.tensor(_top(choice, topk))
    weights = scores.gather(1, ids)
    if norm_topk_prob and topk > 1:
        weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
    weights = weights * routed_scaling_factor
    spoiled = wide.detach().isnan().any(dim=-1, keepdim=True)
    return ids.to(torch.int32), weights.masked_fill(spoiled, math.nan)


def moe_dispatch(topk_ids: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """(token_index, row_index, expert_offsets) of ops.MoeDispatch, by walking the experts one after another."""
    tokens, topk = topk_ids.shape
    row_index = torch.empty(tokens, topk, dtype=torch.int32)
    token_index: list[int] = []
    offsets = [0]
    for e in range(experts):
        for t in range(tokens):
            for slot in range(topk):
                if int(topk_ids[t, slot]) == e:
                    row_index[t, slot] = len(token_index)
                    token_index.append(t)
        offsets.append(len(token_index))
    if len(token_index) != tokens * topk:
        raise ValueError(f"moe_dispatch: topk_ids must be in [0, {experts}) (got others)")
    return (
        torch.tensor(token_index, dtype=torch.int32),
        row_index,
        torch.tensor(offsets, dtype=torch.int32),
    )


def moe_combine(
    rows: Tensor,
    row_index: Tensor,
    topk_weights: Tensor,
    shared: Tensor | None = None,
    *,
    out_dtype: torch.dtype,
) -> Tensor:
    """Sum over slots of weight times row, slot 0 first, plus the shared expert; see ops.moe_combine."""
    wide = _wide(rows, topk_weights, shared)
    total = torch.zeros(row_index.shape[0], rows.shape[1], dtype=wide)
    for slot in range(row_index.shape[1]):
        total = total + topk_weights[:, slot, None].to(wide) * rows[row_index[:, slot].long()].to(
            wide
        )
    if shared is not None:
        total = total + shared.to(wide)
    return total.to(out_dtype)


# ---- matrices -------------------------------------------------------------------------------------------------------


def dequantize_int4(weight_packed: Tensor, weight_scale: Tensor) -> Tensor:
    """[out, in / 8] int32 and [out, in / groups] scales to [out, in] values (float32, or float64 scales in float64)."""
    words = weight_packed.to(torch.int64)
    q = torch.stack([(words >> (4 * k) & 0xF) - 8 for k in range(8)], dim=-1).flatten(1)
    scale = weight_scale.to(_wide(weight_scale))
    return q.to(scale.dtype) * scale.repeat_interleave(q.shape[1] // scale.shape[1], dim=1)


def dequantize_int8(weight: Tensor, weight_scale: Tensor) -> Tensor:
    """[out, in] int8 and [out, in / groups] scales to [out, in] values."""
    scale = weight_scale.to(_wide(weight_scale))
    return weight.to(scale.dtype) * scale.repeat_interleave(
        weight.shape[1] // scale.shape[1], dim=1
    )


def _matmul(x: Tensor, w: Tensor) -> Tensor:
    wide = _wide(x, w)
    return x.to(wide) @ w.to(wide).transpose(-1, -2)


def activations(x: Tensor, compute: str) -> Tensor:
    """What INT4 matrices meet: x itself ("exact"), or x in 8 bits per 32 entries ("int8", not differentiable)."""
    if compute == "exact":
        return x
    if compute != "int8":
        raise ValueError(f"activations: compute must be exact or int8 (got {compute})")
    groups = x.to(_wide(x)).unflatten(-1, (-1, 32))
    largest = groups.abs().amax(dim=-1, keepdim=True).clamp_min(2.0**-100)
    return (torch.round(groups * (127 / largest)) * (largest / 127)).flatten(-2)


def int4_gemm(
    x: Tensor,
    weight_packed: Tensor,
    weight_scale: Tensor,
    *,
    out_dtype: torch.dtype,
    compute: str = "exact",
) -> Tensor:
    """x times a dequantized INT4 matrix transposed; see ops.int4_gemm."""
    w = dequantize_int4(weight_packed, weight_scale)
    return _matmul(activations(x, compute), w).to(out_dtype)


def int8_gemm(x: Tensor, weight: Tensor, weight_scale: Tensor, *, out_dtype: torch.dtype) -> Tensor:
    """x times a dequantized INT8 matrix transposed; see ops.int8_gemm."""
    return _matmul(x, dequantize_int8(weight, weight_scale)).to(out_dtype)


def int4_quantize(w: Tensor) -> tuple[Tensor, Tensor]:
    """(weight_packed, weight_scale) of a BF16 matrix; see ops.int4_quantize. The result is not differentiable."""
    groups = w.detach().to(_wide(w)).unflatten(1, (-1, 32))
    largest = groups.abs().amax(dim=2)
    bad = int((~largest.isfinite()).sum())
    if bad:
        raise ValueError(
            f"int4_quantize: w must be finite (got NaN or infinite values in {bad} groups of 32)"
        )
    scale = (largest / 7).clamp_min(2.0**-126).to(torch.bfloat16)
    q = torch.round(groups / scale.to(groups.dtype)[:, :, None]).to(torch.int64).flatten(1)
    words = sum((q[:, k::8] + 8) << 4 * k for k in range(8))
    return torch.where(words < 2**31, words, words - 2**32).to(torch.int32), scale


def bf16_gemm(x: Tensor, weight: Tensor, *, out_dtype: torch.dtype) -> Tensor:
    """x times a matrix transposed, or one matrix per head; see ops.bf16_gemm."""
    if x.dim() == 2:
        return _matmul(x, weight).to(out_dtype)
    return torch.stack([_matmul(x[:, h], weight[h]) for h in range(weight.shape[0])], dim=1).to(
        out_dtype
    )


def _per_expert(x: Tensor, expert_offsets: Tensor, expert_of_rows) -> Tensor:
    """Concatenates expert_of_rows(e, rows of expert e) over the experts that have rows."""
    offsets = expert_offsets.tolist()
    parts = [
        expert_of_rows(e, x[a:b]) for e, (a, b) in enumerate(itertools.pairwise(offsets)) if b > a
    ]
    return torch.cat(parts) if parts else expert_of_rows(0, x[:0])


def int4_grouped_swiglu(
    x: Tensor,
    token_index: Tensor,
    expert_offsets: Tensor,
    gate: list[tuple[Tensor, Tensor]],
    up: list[tuple[Tensor, Tensor]],
    *,
    out_dtype: torch.dtype,
    compute: str = "exact",
) -> Tensor:
    """silu(x Wgate^T) * (x Wup^T) by each row's expert; gate and up are (weight_packed, weight_scale) per expert."""

    def expert(e: int, rows: Tensor) -> Tensor:
        g = _matmul(rows, dequantize_int4(*gate[e]))
        return g * torch.sigmoid(g) * _matmul(rows, dequantize_int4(*up[e]))

    rows = activations(x, compute)[token_index.long()]
    return _per_expert(rows, expert_offsets, expert).to(out_dtype)


def int4_grouped_gemm(
    x: Tensor,
    expert_offsets: Tensor,
    weights: list[tuple[Tensor, Tensor]],
    *,
    out_dtype: torch.dtype,
    compute: str = "exact",
) -> Tensor:
    """x times the INT4 matrix of each row's expert; weights are (weight_packed, weight_scale) per expert."""
    return _per_expert(
        activations(x, compute),
        expert_offsets,
        lambda e, rows: _matmul(rows, dequantize_int4(*weights[e])),
    ).to(out_dtype)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, rounded once; see ops.swiglu."""
    wide = gate.to(_wide(gate, up))
    return (wide * torch.sigmoid(wide) * up.to(wide.dtype)).to(gate.dtype)


# ---- attention and norms --------------------------------------------------------------------------------------------


def rms_norm(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps), rounded to x's dtype, times weight; see ops.rms_norm."""
    wide = x.to(_wide(x))
    normed = wide * torch.rsqrt(wide.pow(2).mean(dim=-1, keepdim=True) + eps)
    return (normed.to(x.dtype).to(wide.dtype) * weight.to(wide.dtype)).to(x.dtype)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, *, eps: float
) -> tuple[Tensor, Tensor]:
    """rms_norm of x + residual (rounded to their dtype), and that sum; see ops.add_rms_norm."""
    total = x + residual
    return rms_norm(total, weight, eps=eps), total


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Pairs (2j, 2j + 1) of x [tokens, ..., rope] turned by cos, sin [tokens, rope / 2]; rounded once to x's dtype."""
    wide = x.to(_wide(x, cos))
    shape = (cos.shape[0], *[1] * (x.dim() - 2), cos.shape[1])
    cos, sin = cos.to(wide.dtype).view(shape), sin.to(wide.dtype).view(shape)
    even, odd = wide[..., 0::2], wide[..., 1::2]
    return (
        torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
        .flatten(-2)
        .to(x.dtype)
    )


def rope_append(
    q: Tensor,
    latent: Tensor,
    k_rope: Tensor,
    cos: Tensor,
    sin: Tensor,
    slots: Tensor,
    cache: Tensor,
    q_out: Tensor,
) -> Tensor:
    """q_out = rotated q; cache rows at `slots` = latent and rotated k_rope, both in place; see ops.rope_append."""
    key = rotate_pairs(k_rope, cos, sin)
    if cache.dtype == fp8_rows.DTYPE:
        rows = fp8_rows.quantize(latent, key)
    else:
        rows = torch.cat([latent, key], dim=-1).to(cache.dtype)
    cache.view(-1, cache.shape[-1])[slots] = rows
    return q_out.copy_(rotate_pairs(q, cos, sin))


def apply_rope(x: Tensor, positions: Tensor, inv_freq: Tensor, magnitude: float = 1.0) -> Tensor:
    """Rotary embedding in the published (interleaved) pairing: frequency j turns the pair (2j, 2j + 1).

    x          [tokens, ..., rope]  any float dtype; angles and rotation in at least float32
    positions  [tokens]             integers
    inv_freq   [rope / 2]           radians per position (config.rope_inv_freq)
    returns    x's shape and dtype

    Source: RoFormer, arXiv 2104.09864.
    """
    angle = positions.to(torch.float64)[:, None] * inv_freq.to(torch.float64)
    wide = _wide(x)
    return rotate_pairs(x, (angle.cos() * magnitude).to(wide), (angle.sin() * magnitude).to(wide))


def mla_decode(
    q: Tensor,
    cache: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    *,
    kv_lora_rank: int,
    softmax_scale: float,
) -> Tensor:
    """Absorbed attention over the paged latent cache, one sequence and one full softmax at a time."""
    wide = _wide(q, cache)
    page_size = cache.shape[1]
    out = torch.zeros(q.shape[0], q.shape[1], kv_lora_rank, dtype=wide)
    for b, length in enumerate(seq_lens.tolist()):
        if length == 0:
            continue
        pages = page_table[b, : -(-length // page_size)].long()
        keys = cache[pages].flatten(0, 1)[:length]
        if cache.dtype == fp8_rows.DTYPE:
            keys = fp8_rows.dequantize(keys, kv_lora_rank, q.shape[2] - kv_lora_rank)
        keys = keys.to(wide)
        scores = softmax_scale * (q[b].to(wide) @ keys.T)
        out[b] = torch.softmax(scores, dim=-1) @ keys[:, :kv_lora_rank]
    return out.to(q.dtype)


def mla_expanded(
    q: Tensor,
    latent: Tensor,
    k_rope: Tensor,
    kv_b: Tensor,
    *,
    qk_nope_head_dim: int,
    softmax_scale: float,
) -> Tensor:
    """Causal attention of one sequence in the expanded (prefill) form: keys and values rebuilt per head.

    q        [queries, heads, nope + rope]  rotated; query i stands at position tokens - queries + i
    latent   [tokens, kv_lora_rank]         after kv_a_layernorm
    k_rope   [tokens, rope]                 rotated, shared by all heads
    kv_b     [heads * (nope + v), kv_lora_rank]  per head: nope key rows, then value rows
    returns  [queries, heads, v]  of q's dtype

    Source: DeepSeek-V2, arXiv 2405.04434, section 2.1.
    """
    wide = _wide(q, latent, kv_b)
    queries, heads, _ = q.shape
    tokens = latent.shape[0]
    per_head = kv_b.to(wide).view(heads, -1, latent.shape[1])
    visible = torch.ones(queries, tokens, dtype=torch.bool).tril(tokens - queries)
    outs = []
    for h in range(heads):
        k_nope = latent.to(wide) @ per_head[h, :qk_nope_head_dim].T
        value = latent.to(wide) @ per_head[h, qk_nope_head_dim:].T
        key = torch.cat([k_nope, k_rope.to(wide)], dim=-1)
        scores = softmax_scale * (q[:, h].to(wide) @ key.T)
        outs.append(torch.softmax(scores.masked_fill(~visible, -math.inf), dim=-1) @ value)
    return torch.stack(outs, dim=1).to(q.dtype)
