"""Kernels of other packages, where they are installed: humming-kernels (INT4 products, compiled at first use) and
flashinfer-python (MLA decode, likewise)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from peer_torch import Missing
from problems import LATENT, PAGE, ROPE, SCALE, Int4Gemm, MlaDecode, MoeExperts
from timing import Solve
from torch import Tensor

# How the checkpoint says it, which humming reads.
INT4 = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "type": "int",
    "num_bits": 4,
    "strategy": "group",
    "group_size": 32,
    "symmetric": True,
}


def _humming_layer():
    try:
        from humming.layer import HummingLayer
    except (ImportError, OSError) as error:
        raise Missing(f"humming-kernels must be installed ({error})") from None
    return HummingLayer


def _humming(words: Tensor, scale: Tensor, experts: int | None = None):
    layer = _humming_layer()(
        shape_n=scale.shape[-2],
        shape_k=scale.shape[-1] * 32,
        weight_config=dict(INT4),
        num_experts=experts,
        torch_dtype=torch.bfloat16,
    ).to(words.device)
    layer.load_from_tensors({"weight_packed": words, "weight_scale": scale})
    layer.transform()
    return layer


def humming_gemm(problem: Int4Gemm) -> Solve:
    layers = [_humming(problem.words, problem.scale) for _ in range(problem.num_calls)]
    return lambda call: layers[call % len(layers)](problem.x)


def humming_moe(problem: MoeExperts) -> Solve:
    """Its grouped product over rows that are gathered beforehand; SwiGLU by torch in between."""
    weights = problem.weights
    if not hasattr(weights, "humming"):
        count = weights.shape.experts
        weights.humming = [_humming(*part, count) for part in (weights.gate_up, weights.down)]
    gate_up, down = weights.humming
    rows = [problem.x[d.token_index.long()] for d in problem.dispatches]
    offsets = [d.expert_offsets.long() for d in problem.dispatches]
    grouped = {"gemm_type": "grouped_contiguous"}

    def solve(call: int) -> Tensor:
        at = call % problem.num_calls
        options = {"compute_config": grouped, "expert_layout": offsets[at]}
        gate, up = gate_up(rows[at], **options).chunk(2, dim=-1)
        return down(F.silu(gate) * up, **options)

    return solve


def flashinfer_mla(problem: MlaDecode, backend: str) -> Solve:
    if problem.fp8:
        raise Missing("flashinfer has no MLA over FP8 rows on Hopper")
    try:
        from flashinfer.mla import BatchMLAPagedAttentionWrapper
    except (ImportError, OSError) as error:
        raise Missing(f"flashinfer-python must be installed ({error})") from None
    device, batch = problem.q.device, problem.tokens
    wrapper = BatchMLAPagedAttentionWrapper(
        torch.empty(128 << 20, dtype=torch.int8, device=device), backend=backend
    )
    steps = torch.arange(batch + 1, dtype=torch.int32, device=device)
    wrapper.plan(
        *(steps, steps * (problem.length // PAGE), problem.page_table.flatten(), problem.seq_lens),
        *(problem.heads, LATENT, ROPE, PAGE, False, SCALE, torch.bfloat16, torch.bfloat16),
    )
    q_latent, q_rope = (t.contiguous() for t in problem.q.split([LATENT, ROPE], dim=-1))

    def solve(call: int) -> Tensor:
        cache = problem.cache(call)
        return wrapper.run(q_latent, q_rope, cache[..., :LATENT], cache[..., LATENT:])

    return solve
