"""Shapes of the family for random checkpoints: config.json of each preset, and the tensors a config implies."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from kimi_native.errors import ConfigError

GROUP_SIZE = 32  # weights that share one INT4 scale; weights.GROUP_SIZE, without loading torch
RESERVED_SLOTS = 256  # control-token ids at the end of the vocabulary
EOS_OFFSET = 2  # <|im_end|>, counted from the first of them

_BASE: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "kimi_k2",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "aux_loss_alpha": 0.001,
    "ep_size": 1,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "moe_layer_freq": 1,
    "n_group": 1,
    "norm_topk_prob": True,
    "num_nextn_predict_layers": 0,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-5,
    "rope_scaling": None,
    "scoring_func": "sigmoid",
    "seq_aux": True,
    "tie_word_embeddings": False,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "use_cache": True,
}


def _yarn(factor: float, original: int, *, beta_fast: float = 1.0, **mscale: float) -> dict:
    return {
        "type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": original,
        "beta_fast": beta_fast,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        **mscale,
    }


# Kimi-K2-Thinking
_K2 = {
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 262144,
    "moe_intermediate_size": 2048,
    "n_routed_experts": 384,
    "n_shared_experts": 1,
    "num_attention_heads": 64,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 64,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rope_scaling": _yarn(64.0, 4096),
    "rope_theta": 50000.0,
    "routed_scaling_factor": 2.827,
    "v_head_dim": 128,
    "vocab_size": 163840,
}

# Moonlight-16B-A3B
_MOONLIGHT = {
    "model_type": "deepseek_v3",
    "hidden_size": 2048,
    "intermediate_size": 11264,
    "kv_lora_rank": 512,
    "max_position_embeddings": 8192,
    "moe_intermediate_size": 1408,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_attention_heads": 16,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 27,
    "num_key_value_heads": 16,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rope_theta": 50000.0,
    "routed_scaling_factor": 2.446,
    "v_head_dim": 128,
    "vocab_size": 163840,
}

# K2 in small. The original context is short, so that a test of a few hundred tokens is past it.
_TINY = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "kv_lora_rank": 64,
    "max_position_embeddings": 8192,
    "moe_intermediate_size": 128,
    "n_routed_experts": 16,
    "n_shared_experts": 1,
    "num_attention_heads": 4,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 96,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "rope_scaling": _yarn(64.0, 128),
    "rope_theta": 50000.0,
    "routed_scaling_factor": 2.5,
    "v_head_dim": 32,
    "vocab_size": 2048,
}

# kimi-nano, the bundled model: trained on two cores, decoded at hundreds of tokens per second on them.
_NANO = {
    "hidden_size": 192,
    "intermediate_size": 512,
    "kv_lora_rank": 64,
    "max_position_embeddings": 32768,
    "moe_intermediate_size": 96,
    "n_routed_experts": 32,
    "n_shared_experts": 1,
    "num_attention_heads": 6,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 5,
    "num_key_value_heads": 6,
    "q_lora_rank": 96,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "rope_theta": 50000.0,
    "routed_scaling_factor": 2.5,
    "v_head_dim": 32,
    "vocab_size": 1392,
}

PRESETS: dict[str, dict[str, Any]] = {
    "tiny": _TINY,
    "tiny-noqlora": {**_TINY, "q_lora_rank": None, "n_shared_experts": 2, "rope_scaling": None},
    # A ramp instead of a step, and mscale != mscale_all_dim: the one case where cos and sin are scaled.
    "tiny-yarn": {
        **_TINY,
        "max_position_embeddings": 5120,
        "rope_scaling": _yarn(40.0, 128, beta_fast=32.0, mscale_all_dim=0.8),
    },
    "tiny-groups": {**_TINY, "n_group": 4, "topk_group": 2},
    "tiny-v2": {
        **_TINY,
        "architectures": ["DeepseekV2ForCausalLM"],
        "model_type": "deepseek_v2",
        "max_position_embeddings": 5120,
        "q_lora_rank": None,
        "n_shared_experts": 2,
        "norm_topk_prob": False,
        "rms_norm_eps": 1e-6,
        "rope_scaling": _yarn(40.0, 128, beta_fast=32.0, mscale=0.707, mscale_all_dim=0.707),
        "rope_theta": 10000.0,
        "routed_scaling_factor": 1.0,
        "scoring_func": "softmax",
        "topk_method": "greedy",
    },
    # The multimodal wrapper of K2.5 and later, text part only: nested config, prefixed tensor names.
    "tiny-k25": {**_TINY, "rope_scaling": _yarn(64.0, 128, beta_fast=32.0)},
    "nano": _NANO,
    "moonlight-small": {**_MOONLIGHT, "num_hidden_layers": 9, "vocab_size": 32768},
    "moonlight-16b": _MOONLIGHT,
    "k2-slice": {**_K2, "num_hidden_layers": 2, "n_routed_experts": 64, "vocab_size": 32768},
    "k2-layer": {**_K2, "num_hidden_layers": 2},
    "k2": _K2,
}
_WRAPPED = {"tiny-k25"}

QUANTIZATION: dict[str, dict[str, Any] | None] = {
    "bf16": None,
    "int4": {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "kv_cache_scheme": None,
        "ignore": [
            "lm_head",
            "re:.*self_attn.*",
            "re:.*shared_experts.*",
            r"re:.*mlp\.(gate|up|gate_up|down)_proj.*",
        ],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "input_activations": None,
                "output_activations": None,
                "weights": {
                    "num_bits": 4,
                    "type": "int",
                    "symmetric": True,
                    "strategy": "group",
                    "group_size": GROUP_SIZE,
                    "dynamic": False,
                    "actorder": None,
                    "block_structure": None,
                    "observer": "minmax",
                    "observer_kwargs": {},
                },
            }
        },
    },
    "fp8": {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
    },
}


# ---- config.json -----------------------------------------------------------------------------------------------------


def text_config(preset: str, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The preset's text-model config with `overrides` applied and checked. Raises ConfigError."""
    if preset not in PRESETS:
        raise ConfigError(
            f"make_checkpoint: preset must be one of {', '.join(PRESETS)} (got {preset})"
        )
    config = copy.deepcopy({**_BASE, **PRESETS[preset]})
    unknown = sorted(set(overrides) - set(config))
    if unknown:
        raise ConfigError(
            f"make_checkpoint: overrides must be config keys of the preset (got {', '.join(unknown)})"
        )
    config.update(copy.deepcopy(dict(overrides)))
    _check_sizes(config)
    _check_routing(config)
    first_slot = config["vocab_size"] - RESERVED_SLOTS
    config["bos_token_id"] = first_slot
    config["eos_token_id"] = first_slot + EOS_OFFSET
    return dict(sorted(config.items()))


def file_config(preset: str, format: str, text: Mapping[str, Any]) -> dict[str, Any]:
    """config.json as the family publishes it: quantization_config in the text part, some presets in a wrapper."""
    quantization = QUANTIZATION[format]
    inner = dict(text) if quantization is None else {**text, "quantization_config": quantization}
    if preset not in _WRAPPED:
        return inner
    return {
        "architectures": ["KimiK25ForConditionalGeneration"],
        "model_type": "kimi_k25",
        "bos_token_id": text["bos_token_id"],
        "eos_token_id": text["eos_token_id"],
        "dtype": "bfloat16",
        "text_config": inner,
        "tie_word_embeddings": text["tie_word_embeddings"],
    }


def tensor_prefix(preset: str) -> str:
    """What stands before every tensor name of the preset."""
    return "language_model." if preset in _WRAPPED else ""


def _need(condition: bool, rule: str, **got: Any) -> None:
    if not condition:
        values = ", ".join(f"{key}={value}" for key, value in got.items())
        raise ConfigError(f"make_checkpoint: {rule} (got {values})")


_SIZES = (
    "hidden_size",
    "intermediate_size",
    "kv_lora_rank",
    "max_position_embeddings",
    "moe_intermediate_size",
    "moe_layer_freq",
    "n_group",
    "n_routed_experts",
    "num_attention_heads",
    "num_experts_per_tok",
    "num_hidden_layers",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "topk_group",
    "v_head_dim",
    "vocab_size",
)
_SIZES_OR_ZERO = ("first_k_dense_replace", "n_shared_experts", "num_nextn_predict_layers")


def _check_sizes(config: Mapping[str, Any]) -> None:
    for keys, least in ((_SIZES, 1), (_SIZES_OR_ZERO, 0)):
        for key in keys:
            is_size = type(config[key]) is int and config[key] >= least
            _need(is_size, f"{key} must be an integer of at least {least}", **{key: config[key]})
    q_lora = config["q_lora_rank"]
    q_lora_ok = q_lora is None or (type(q_lora) is int and q_lora >= 1)
    _need(q_lora_ok, "q_lora_rank must be null or a positive integer", q_lora_rank=q_lora)
    for key in ("hidden_size", "moe_intermediate_size"):
        whole = config[key] % GROUP_SIZE == 0
        _need(whole, f"{key} must be a multiple of {GROUP_SIZE}", **{key: config[key]})
    rope = config["qk_rope_head_dim"]
    _need(rope % 2 == 0, "qk_rope_head_dim must be even", qk_rope_head_dim=rope)
    vocab = config["vocab_size"]
    _need(
        vocab >= 256 + RESERVED_SLOTS,
        f"vocab_size must hold 256 bytes and {RESERVED_SLOTS} reserved slots",
        vocab_size=vocab,
    )


def _check_routing(config: Mapping[str, Any]) -> None:
    experts, topk = config["n_routed_experts"], config["num_experts_per_tok"]
    groups, kept = config["n_group"], config["topk_group"]
    _need(
        experts % groups == 0 and kept <= groups,
        "n_group must divide n_routed_experts and topk_group must not exceed n_group",
        n_routed_experts=experts,
        n_group=groups,
        topk_group=kept,
    )
    _need(
        topk <= experts // groups * kept,
        "num_experts_per_tok must not exceed the experts of topk_group groups",
        num_experts_per_tok=topk,
        n_routed_experts=experts,
        n_group=groups,
        topk_group=kept,
    )


# ---- tensors ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Weight:
    """One weight of the model, before a format stores it.

    kind  "expert": a routed expert's matrix; "linear": any other matrix that the FP8 format quantizes;
          "plain": a matrix that no format quantizes; "embedding", "norm", "bias"
    """

    name: str
    kind: str
    shape: tuple[int, ...]


def weights(config: Mapping[str, Any], prefix: str = "") -> Iterator[Weight]:
    """Every weight of a text-model config, layer by layer, MTP layers after the others."""
    hidden, vocab, layers = (config[k] for k in ("hidden_size", "vocab_size", "num_hidden_layers"))
    yield Weight(f"{prefix}model.embed_tokens.weight", "embedding", (vocab, hidden))
    for layer in range(layers):
        yield from _layer(config, f"{prefix}model.layers.{layer}.", layer)
    for layer in range(layers, layers + config["num_nextn_predict_layers"]):
        yield from _mtp_layer(config, f"{prefix}model.layers.{layer}.")
    yield Weight(f"{prefix}model.norm.weight", "norm", (hidden,))
    if not config["tie_word_embeddings"]:
        yield Weight(f"{prefix}lm_head.weight", "plain", (vocab, hidden))


def _layer(config: Mapping[str, Any], name: str, layer: int | None) -> Iterator[Weight]:
    hidden = config["hidden_size"]
    yield Weight(f"{name}input_layernorm.weight", "norm", (hidden,))
    yield from _attention(config, f"{name}self_attn.")
    yield Weight(f"{name}post_attention_layernorm.weight", "norm", (hidden,))
    dense = layer is not None and (
        layer < config["first_k_dense_replace"] or layer % config["moe_layer_freq"] != 0
    )
    if dense:
        yield from _mlp(f"{name}mlp.", "linear", hidden, config["intermediate_size"])
    else:
        yield from _moe(config, f"{name}mlp.")


def _attention(config: Mapping[str, Any], name: str) -> Iterator[Weight]:
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    nope, rope, v = (config[k] for k in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
    q_lora, kv_lora = config["q_lora_rank"], config["kv_lora_rank"]
    if q_lora is None:
        yield Weight(f"{name}q_proj.weight", "linear", (heads * (nope + rope), hidden))
    else:
        yield Weight(f"{name}q_a_proj.weight", "linear", (q_lora, hidden))
        yield Weight(f"{name}q_a_layernorm.weight", "norm", (q_lora,))
        yield Weight(f"{name}q_b_proj.weight", "linear", (heads * (nope + rope), q_lora))
    yield Weight(f"{name}kv_a_proj_with_mqa.weight", "linear", (kv_lora + rope, hidden))
    yield Weight(f"{name}kv_a_layernorm.weight", "norm", (kv_lora,))
    yield Weight(f"{name}kv_b_proj.weight", "linear", (heads * (nope + v), kv_lora))
    yield Weight(f"{name}o_proj.weight", "linear", (hidden, heads * v))


def _mlp(name: str, kind: str, hidden: int, width: int) -> Iterator[Weight]:
    yield Weight(f"{name}gate_proj.weight", kind, (width, hidden))
    yield Weight(f"{name}up_proj.weight", kind, (width, hidden))
    yield Weight(f"{name}down_proj.weight", kind, (hidden, width))


def _moe(config: Mapping[str, Any], name: str) -> Iterator[Weight]:
    hidden, width = config["hidden_size"], config["moe_intermediate_size"]
    experts, shared = config["n_routed_experts"], config["n_shared_experts"]
    yield Weight(f"{name}gate.weight", "plain", (experts, hidden))
    if config["topk_method"] == "noaux_tc":
        yield Weight(f"{name}gate.e_score_correction_bias", "bias", (experts,))
    for expert in range(experts):
        yield from _mlp(f"{name}experts.{expert}.", "expert", hidden, width)
    if shared:
        yield from _mlp(f"{name}shared_experts.", "linear", hidden, width * shared)


def _mtp_layer(config: Mapping[str, Any], name: str) -> Iterator[Weight]:
    """A next-token-prediction layer as DeepSeek-V3 stores it; inference skips it."""
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    yield Weight(f"{name}embed_tokens.weight", "embedding", (vocab, hidden))
    yield Weight(f"{name}enorm.weight", "norm", (hidden,))
    yield Weight(f"{name}hnorm.weight", "norm", (hidden,))
    yield Weight(f"{name}eh_proj.weight", "plain", (hidden, 2 * hidden))
    yield from _layer(config, name, None)
    yield Weight(f"{name}shared_head.norm.weight", "norm", (hidden,))
    yield Weight(f"{name}shared_head.head.weight", "plain", (vocab, hidden))
