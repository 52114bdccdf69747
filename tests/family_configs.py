"""config.json of the family as published, as dicts, and how tests read one."""

from __future__ import annotations

from kimi_native.config import KimiConfig
from tiny_checkpoint import FP8, K2, MOONLIGHT

DEEPSEEK_V3 = K2 | {
    "model_type": "deepseek_v3",
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "n_routed_experts": 256,
    "n_group": 8,
    "topk_group": 4,
    "first_k_dense_replace": 3,
    "rope_theta": 10000,
    "rope_scaling": K2["rope_scaling"] | {"factor": 40, "beta_fast": 32},
    "quantization_config": FP8,
}
GLM_FLASH = MOONLIGHT | {
    "model_type": "glm4_moe_lite",
    "num_hidden_layers": 47,
    "intermediate_size": 10240,
    "moe_intermediate_size": 1536,
    "num_attention_heads": 20,
    "num_key_value_heads": 20,
    "q_lora_rank": 768,
    "qk_nope_head_dim": 192,
    "v_head_dim": 256,
    "num_experts_per_tok": 4,
    "n_shared_experts": 1,
    "vocab_size": 154880,
    "rope_theta": 1000000,
    "partial_rotary_factor": 1.0,
    "num_nextn_predict_layers": 1,
    "eos_token_id": [154820, 154827, 154829],
}
K2_0711 = K2 | {"rope_scaling": K2["rope_scaling"] | {"factor": 32.0}}
K2_6 = K2 | {"rope_scaling": K2["rope_scaling"] | {"beta_fast": 32.0}}
WRAPPED = {
    "model_type": "kimi_k25",
    "text_config": {k: v for k, v in K2.items() if k != "quantization_config"},
    "vision_config": {"anything": [1, {"at": "all"}]},
    "media_placeholder_token_id": 163605,
    "eos_token_id": 163586,
    "tie_word_embeddings": False,
}


def parse(d: dict, **changes) -> KimiConfig:
    return KimiConfig.from_dict(d | changes)


def without(d: dict, *keys: str) -> dict:
    return {k: v for k, v in d.items() if k not in keys}
