"""Small random checkpoints saved by the published implementation (transformers), and its logits: the model's oracle.

transformers does not know `kimi_k2`: a config with that model_type forced into its DeepseekV3 class loads with a mere
warning while every routed expert stays random. So the oracle is built as deepseek_v3 (or v2), saved by its own
save_pretrained, and only the copy of config.json that we read is renamed afterwards.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

BASE = {
    "vocab_size": 320,
    "hidden_size": 128,
    "intermediate_size": 192,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_shared_experts": 1,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "routed_scaling_factor": 2.5,
    "kv_lora_rank": 64,
    "q_lora_rank": 48,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "qk_nope_head_dim": 32,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 4096,
    "num_nextn_predict_layers": 0,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


def yarn(factor: float, beta_fast: float, *, mscale: float = 1.0, original: int = 64) -> dict:
    return {
        "rope_type": "yarn",
        "rope_theta": 50000.0,
        "factor": factor,
        "beta_fast": beta_fast,
        "beta_slow": 1.0,
        "mscale": mscale,
        "mscale_all_dim": mscale,
        "original_max_position_embeddings": original,
    }


def make_oracle(family: str, overrides: dict, seed: int):
    """A published model in float32 whose weights are exactly representable in BF16."""
    from transformers import (
        DeepseekV2Config,
        DeepseekV2ForCausalLM,
        DeepseekV3Config,
        DeepseekV3ForCausalLM,
    )

    config_class, model_class = {
        "deepseek_v3": (DeepseekV3Config, DeepseekV3ForCausalLM),
        "deepseek_v2": (DeepseekV2Config, DeepseekV2ForCausalLM),
    }[family]
    config = config_class(**{**BASE, **overrides})
    config._attn_implementation = "eager"
    torch.manual_seed(seed)
    model = model_class(config).float().eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name:
                p.copy_(1 + 0.1 * torch.randn_like(p))
            elif "embed_tokens" in name:
                p.copy_(torch.randn_like(p))
            else:
                p.copy_(torch.randn_like(p) / math.sqrt(p.shape[-1]))
            p.copy_(p.bfloat16().float())
        for name, b in model.named_buffers():
            if "e_score_correction_bias" in name:
                b.copy_(0.1 * torch.randn_like(b))
    return model


def save_published(
    model, path: Path, *, model_type: str | None = None, mtp_layer: bool = False
) -> None:
    """Write the oracle as a BF16 checkpoint folder with the published names, optionally as kimi_k2."""
    import copy

    half = copy.deepcopy(model)
    for p in half.parameters():
        p.data = p.data.to(torch.bfloat16)  # exact; the router bias, a buffer, stays float32
    half.config.dtype = "bfloat16"
    half.save_pretrained(path)
    config_file = path / "config.json"
    config = json.loads(config_file.read_text())
    if model_type:
        config["model_type"] = model_type
    if mtp_layer:
        config["num_nextn_predict_layers"] = 1
        file = path / "model.safetensors"
        tensors = load_file(file)
        extra = config["num_hidden_layers"]
        tensors |= {
            name.replace("layers.1.", f"layers.{extra}."): torch.full_like(t, math.nan)
            for name, t in tensors.items()
            if ".layers.1." in name
        }
        save_file(tensors, file, metadata={"format": "pt"})
    config_file.write_text(json.dumps(config))


@torch.no_grad()
def oracle_logits(model, ids: torch.Tensor) -> torch.Tensor:
    """[tokens, vocab] of one full forward pass, in the oracle's own dtype."""
    return model(ids[None], use_cache=False).logits[0]
