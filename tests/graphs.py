"""Small graphs to train, and the same forward pass written naively from reference.py, one document at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from kimi_native import presets, reference
from kimi_native.config import LATENT_NORM_EPS, KimiConfig
from kimi_native.nano.graph import Documents, KimiGraph
from kimi_native.nano.published import published_tensors

SMALL = {
    "vocab_size": 600,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 3,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
}
# name: (preset, overrides of SMALL)
SHAPES = {
    "k2, yarn": ("tiny", {}),
    "no q_lora, 2 shared, no yarn": ("tiny-noqlora", {"q_lora_rank": None}),
    "groups": ("tiny-groups", {}),
    "v wider than q": ("tiny", {"v_head_dim": 40, "rope_scaling": None}),
    "softmax greedy": ("tiny-v2", {"q_lora_rank": None}),
    "tied head, no shared expert": ("tiny", {"tie_word_embeddings": True, "n_shared_experts": 0}),
}
LENGTHS = [5, 1, 9, 20, 2]


def small_values(preset: str = "tiny", **overrides) -> dict:
    """config.json of a small model."""
    return presets.text_config(preset, {**SMALL, **overrides})


def small_graph(
    preset: str = "tiny", *, seed: int = 0, dtype=torch.float32, **overrides
) -> KimiGraph:
    """A graph whose norms and correction biases are not ones and zeros."""
    graph = KimiGraph(
        KimiConfig.from_dict(small_values(preset, **overrides)), seed=seed, dtype=dtype
    )
    generator = torch.Generator().manual_seed(100 + seed)
    with torch.no_grad():
        for name, tensor in published_tensors(graph):
            if "norm" in name:
                tensor.add_(0.2 * torch.randn(tensor.shape, generator=generator))
            elif name.endswith("bias"):
                tensor.copy_(0.1 * torch.randn(tensor.shape, generator=generator))
    return graph


def some_documents(lengths: list[int] = LENGTHS, *, vocab: int = 600, seed: int = 0) -> Documents:
    """Random ids; positions that start anywhere and have gaps."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, vocab, (sum(lengths),), generator=generator)
    steps = torch.randint(1, 4, (sum(lengths),), generator=generator)
    positions = [part.cumsum(0) for part in steps.split(lengths)]
    return Documents(ids, torch.cat(positions), lengths)


def naive_logits(graph: KimiGraph, documents: Documents) -> tuple[Tensor, Tensor]:
    """Logits [tokens, vocab] and largest attention logits [layers, heads], float64, from published names alone."""
    weights = {name: t.double() for name, t in published_tensors(graph)}
    config, logits, largest = graph.config, [], []
    parts = zip(
        documents.ids.split(documents.lengths),
        documents.positions.split(documents.lengths),
        strict=True,
    )
    for ids, positions in parts:
        x = weights["model.embed_tokens.weight"][ids]
        per_layer = []
        for i in range(config.num_hidden_layers):
            layer = _Layer(weights, f"model.layers.{i}.", config)
            attended, logit = layer.attention(layer.norm("input_layernorm", x), positions)
            per_layer.append(logit)
            x = x + attended
            normed = layer.norm("post_attention_layernorm", x)
            moe = config.is_moe_layer(i)
            x = x + (layer.moe(normed) if moe else layer.mlp("mlp", normed))
        normed = reference.rms_norm(x, weights["model.norm.weight"], eps=config.rms_norm_eps)
        tied = config.tie_word_embeddings
        logits.append(normed @ weights["model.embed_tokens.weight" if tied else "lm_head.weight"].T)
        largest.append(torch.stack(per_layer))
    return torch.cat(logits), torch.stack(largest).amax(0)


class _Layer:
    def __init__(self, weights: dict[str, Tensor], prefix: str, config: KimiConfig) -> None:
        self.weights, self.prefix, self.config = weights, prefix, config

    def __getitem__(self, name: str) -> Tensor:
        return self.weights[f"{self.prefix}{name}.weight"]

    def norm(self, name: str, x: Tensor) -> Tensor:
        return reference.rms_norm(x, self[name], eps=self.config.rms_norm_eps)

    def mlp(self, name: str, x: Tensor) -> Tensor:
        gate, up = x @ self[f"{name}.gate_proj"].T, x @ self[f"{name}.up_proj"].T
        return reference.swiglu(gate, up) @ self[f"{name}.down_proj"].T

    def attention(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        c, p = self.config, "self_attn."
        if c.q_lora_rank is None:
            q = x @ self[p + "q_proj"].T
        else:
            a = reference.rms_norm(
                x @ self[p + "q_a_proj"].T, self[p + "q_a_layernorm"], eps=LATENT_NORM_EPS
            )
            q = a @ self[p + "q_b_proj"].T
        q = q.view(len(x), c.num_attention_heads, -1)
        compressed = x @ self[p + "kv_a_proj_with_mqa"].T
        latent = reference.rms_norm(
            compressed[:, : c.kv_lora_rank], self[p + "kv_a_layernorm"], eps=LATENT_NORM_EPS
        )
        inv_freq, magnitude = (
            torch.tensor(c.rope_inv_freq(), dtype=torch.float64),
            c.rope_magnitude(),
        )
        k_rope = compressed[:, c.kv_lora_rank :]
        k_rope = reference.apply_rope(k_rope, positions, inv_freq, magnitude)
        q_rope = reference.apply_rope(q[..., c.qk_nope_head_dim :], positions, inv_freq, magnitude)
        q = torch.cat([q[..., : c.qk_nope_head_dim], q_rope], dim=-1)
        out = reference.mla_expanded(
            q,
            latent,
            k_rope,
            self[p + "kv_b_proj"],
            qk_nope_head_dim=c.qk_nope_head_dim,
            softmax_scale=c.softmax_scale(),
        )
        largest = self._largest(q, latent, k_rope)
        return out.flatten(1) @ self[p + "o_proj"].T, largest

    def _largest(self, q: Tensor, latent: Tensor, k_rope: Tensor) -> Tensor:
        c = self.config
        per_head = self["self_attn.kv_b_proj"].view(c.num_attention_heads, -1, c.kv_lora_rank)
        found = torch.full((c.num_attention_heads,), -torch.inf, dtype=torch.float64)
        for h in range(c.num_attention_heads):
            key = torch.cat([latent @ per_head[h, : c.qk_nope_head_dim].T, k_rope], dim=1)
            for t in range(len(q)):
                found[h] = max(found[h], (key[: t + 1] @ q[t, h]).max() * c.softmax_scale())
        return found

    def moe(self, x: Tensor) -> Tensor:
        c = self.config
        noaux = c.topk_method == "noaux_tc"
        ids, weights = reference.moe_route(
            x @ self["mlp.gate"].T,
            self.weights[f"{self.prefix}mlp.gate.e_score_correction_bias"] if noaux else None,
            topk=c.num_experts_per_tok,
            scoring=c.scoring_func,
            n_group=c.n_group,
            topk_group=c.topk_group,
            group_score="top2_sum" if noaux else "max",
            norm_topk_prob=c.norm_topk_prob,
            routed_scaling_factor=c.routed_scaling_factor,
        )
        out = self.mlp("mlp.shared_experts", x) if c.n_shared_experts else torch.zeros_like(x)
        for t in range(len(x)):
            for e, w in zip(ids[t].tolist(), weights[t], strict=True):
                out[t] += w * self.mlp(f"mlp.experts.{e}", x[t : t + 1])[0]
        return out
