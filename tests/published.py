"""Small random checkpoints saved by the published implementation (transformers), and its logits: the model's oracle.

transformers does not know `kimi_k2`: a config with that model_type forced into its DeepseekV3 class loads with a mere
warning while every routed expert stays random. So the oracle is built as the family's own class, saved by its own
save_pretrained, and only the copy of config.json that we read is renamed afterwards. The other way round, read_oracle
builds it from a checkpoint folder as deepseek_v3 and refuses any missing or unexpected key.
"""

from __future__ import annotations

import copy
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


def make_oracle(family: str, overrides: dict, seed: int, *, decided: bool = False):
    """A published model in float32 whose weights are exactly representable in BF16.

    decided  the same experts for every token, see decide_routing
    """
    config_class, model_class = _classes(family)
    values = {**BASE, **overrides}
    if "mlp_layer_types" in values:
        del values["first_k_dense_replace"]
    config = config_class(**values)
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
                if decided:
                    decide_routing(b, config)
    return model


def _classes(family: str):
    import transformers

    name = {
        "deepseek_v3": "DeepseekV3",
        "deepseek_v2": "DeepseekV2",
        "glm4_moe_lite": "Glm4MoeLite",
    }[family]
    return getattr(transformers, f"{name}Config"), getattr(transformers, f"{name}ForCausalLM")


def decide_routing(bias: torch.Tensor, config) -> None:
    """Lift as many experts as a token chooses, spread over topk_group groups, above all sigmoid scores.

    Which experts answer then depends on no rounding, so that BF16 noise is rounding alone; their weights, which never
    see the bias, stay those of the token.
    """
    per_group = config.n_routed_experts // config.n_group
    groups = torch.randperm(config.n_group)[: config.topk_group]
    each = config.num_experts_per_tok // config.topk_group
    for group in groups.tolist():
        bias[group * per_group + torch.randperm(per_group)[:each]] += 4.0


def half_precision(model):
    """The oracle computing in BF16, the router's bias in float32 as published."""
    half = copy.deepcopy(model)
    for p in half.parameters():
        p.data = p.data.to(torch.bfloat16)
    half.config.dtype = torch.bfloat16
    return half


def save_published(
    model,
    path: Path,
    *,
    model_type: str | None = None,
    mtp_layer: bool = False,
    wrapped: bool = False,
) -> None:
    """Write the oracle as a BF16 checkpoint folder with the published names.

    model_type  what config.json shall say instead of the oracle's own
    mtp_layer   add a next-token-prediction layer, full of NaN: it must not be read
    wrapped     as kimi_k25: the config in text_config, the names after language_model., a vision tensor beside them
    """
    half_precision(model).save_pretrained(path)
    file = path / "model.safetensors"
    tensors = load_file(file)
    config = json.loads((path / "config.json").read_text())
    if model_type:
        config["model_type"] = model_type
    if mtp_layer:
        extra = config["num_hidden_layers"]
        config["num_nextn_predict_layers"] = 1
        tensors |= {
            name.replace("layers.1.", f"layers.{extra}."): torch.full_like(t, math.nan)
            for name, t in tensors.items()
            if ".layers.1." in name
        }
    if wrapped:
        config = {"model_type": "kimi_k25", "text_config": config | {"model_type": "kimi_k2"}}
        tensors = {f"language_model.{name}": t for name, t in tensors.items()}
        tensors["vision_tower.patch_embed.weight"] = torch.full((3, 3), math.nan)
    save_file(tensors, file, metadata={"format": "pt"})
    (path / "config.json").write_text(json.dumps(config))


def read_oracle(path: Path, *, as_model_type: str = "deepseek_v3"):
    """The published DeepseekV3 model of a BF16 checkpoint folder, in float32.

    as_model_type  config.json's model_type is replaced by it

    Raises ValueError unless every tensor of the folder went into a parameter and every parameter came from a tensor.
    """
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    config = DeepseekV3Config.from_dict(json.loads((path / "config.json").read_text()))
    config.model_type = as_model_type
    config._attn_implementation = "eager"
    model, report = DeepseekV3ForCausalLM.from_pretrained(
        path, config=config, dtype=torch.float32, output_loading_info=True
    )
    wrong = {kind: sorted(map(str, keys)) for kind, keys in report.items() if keys}
    if wrong:
        raise ValueError(f"{path}: the published class must take every tensor (got {wrong})")
    return model.eval()


@torch.no_grad()
def oracle_logits(model, ids: torch.Tensor) -> torch.Tensor:
    """[tokens, vocab] of one full forward pass, in the oracle's own dtype."""
    return model(ids[None], use_cache=False).logits[0]
